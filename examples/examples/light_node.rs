//! A light node in ten lines: start, submit, stream, await the verified result.
//!
//! Against the local testnet: `cargo run --release -- testnet` prints a bootstrap address and its validator's hotkey.
//!
//! ```sh
//! cargo run -p sundara-examples --example light_node -- BOOTSTRAP_ADDRESS VALIDATOR_HOTKEY NETWORK_NAME
//! ```

use futures::StreamExt as _;
use sundara_node::{JobEvent, JobOrder, Network, Node};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let [bootstrap, validator, network] = arguments()?;
    let node = Node::builder().network(Network::named(&network, 0)).bootstrap([bootstrap]).trust([validator.parse()?]);
    let node = node.loopback().start().await?;
    let job = node.jobs().submit(JobOrder::builtin("echo").input("hello, mesh\n").replicas(2).stream(true)).await?;
    let mut events = job.events();
    while let Some(event) = events.next().await {
        if let JobEvent::Output { data, .. } = event {
            print!("{}", String::from_utf8_lossy(&data));
        }
    }
    let result = job.result().await?;
    println!("{:?}, {} attestations", result.kind(), result.verify()?.attestations.len());
    node.shutdown().await;
    Ok(())
}

fn arguments() -> anyhow::Result<[String; 3]> {
    let given: Vec<String> = std::env::args().skip(1).collect();
    given.try_into().map_err(|_| anyhow::anyhow!("usage: light_node BOOTSTRAP_ADDRESS VALIDATOR_HOTKEY NETWORK_NAME"))
}
