//! A light node in ten lines: joins a mesh, submits a job, shows what happens to it, and checks the verified result.
//!
//! `cargo run --example light_node -- MESH BOOTSTRAP VALIDATOR`: the mesh's name, the multiaddress of a node to join
//! through, and the hotkey of a validator to believe. `cargo run --release -- testnet` prints all three.

use std::io::Write as _;

use futures::StreamExt as _;
use sundara_node::{JobEvent, JobOrder, Network, Node};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [mesh, bootstrap, validator] = arguments.as_slice() else {
        anyhow::bail!("usage: light_node MESH BOOTSTRAP VALIDATOR, as `sundara-node testnet` prints them");
    };

    let mesh = Node::builder().network(Network::named(mesh, 0)).bootstrap([bootstrap]);
    let node = mesh.trust([validator.parse()?]).start().await?;
    let job = node.jobs().submit(JobOrder::builtin("echo").input("hello, mesh\n").replicas(2).stream(true)).await?;
    let mut events = job.events();
    while let Some(event) = events.next().await {
        if let JobEvent::Output { data, .. } = event {
            std::io::stdout().write_all(&data)?; // Provisional: the verdict names the digest of the whole output.
        }
    }
    let result = job.result().await?;
    println!("{:?}, {} attestations hold", result.kind(), result.verify()?.attestations.len());
    node.shutdown().await;
    Ok(())
}
