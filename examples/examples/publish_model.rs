//! Publishes a directory as a model from a light node, and stays to provide it.
//!
//! ```sh
//! cargo run -p sundara-examples --example publish_model -- DIR DATA_DIR NETWORK_NAME BOOTSTRAP_ADDRESS...
//! ```

use sundara_node::{Network, Node};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let [dir, data_dir, network, bootstrap @ ..] = given.as_slice() else {
        anyhow::bail!("usage: publish_model DIR DATA_DIR NETWORK_NAME BOOTSTRAP_ADDRESS...");
    };
    // The data directory keeps the publisher's hotkey: names live under it, and versions only go up.
    let node = Node::builder().network(Network::named(network, 0)).data_dir(data_dir).bootstrap(bootstrap);
    let node = node.loopback().start().await?;
    let published = node.models().publish(std::path::Path::new(dir)).await?;
    println!("{published:?}");
    println!("providing it; Ctrl-C ends");
    tokio::signal::ctrl_c().await?;
    node.shutdown().await;
    Ok(())
}
