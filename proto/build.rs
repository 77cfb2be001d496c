//! Compiles the schema with protox, so that no protoc need be on the machine.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=schema");
    let files: Vec<PathBuf> = ["common", "job", "attestation", "model", "advert", "batch", "round", "rpc", "blob"]
        .iter()
        .map(|name| PathBuf::from(format!("schema/{name}.proto")))
        .collect();
    let descriptors = protox::compile(&files, ["schema"])?;
    prost_build::Config::new().bytes(["."]).compile_fds(descriptors)?;
    Ok(())
}
