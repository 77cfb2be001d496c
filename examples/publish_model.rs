//! Publishes a model from a node of one's own, and serves it until the process is interrupted.
//!
//! `cargo run --example publish_model -- MESH BOOTSTRAP VALIDATOR DATA_DIR MODEL_DIR`: the first three as
//! `cargo run --release -- testnet` prints them; a directory for the node's keys and blobs, since the model's name lives
//! under its hotkey; and the directory of the model, with its model.toml (examples/guests/README.md).

use sundara_node::{Network, Node};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [mesh, bootstrap, validator, data_dir, model_dir] = arguments.as_slice() else {
        anyhow::bail!("usage: publish_model MESH BOOTSTRAP VALIDATOR DATA_DIR MODEL_DIR");
    };

    let mesh = Node::builder().network(Network::named(mesh, 0)).bootstrap([bootstrap]);
    let node = mesh.trust([validator.parse()?]).data_dir(data_dir).start().await?;
    node.wait_for_validators(1).await; // Somebody has to be there to hear of it.
    let published = node.models().publish(model_dir).await?;
    println!("{}/{}@{}", published.publisher, published.name, published.version);
    if let Some(reason) = published.unannounced {
        eprintln!("not announced yet, it is tried again: {reason}");
    }
    tokio::signal::ctrl_c().await?;
    node.shutdown().await;
    Ok(())
}
