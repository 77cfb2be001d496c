//! Configuration: one value, resolved once, that says of each of its parts where it came from.
//!
//! Owns the list of sections and the order of layers: default < file < environment < network file < flag. A section
//! stands beside the module that it configures. It holds no secret: keys are named by their files.
//!
//! A file is TOML with a table a section; the environment spells `section.key` as `SUNDARA_SECTION__KEY`, lists with
//! commas. Names that no section knows are refused.

mod http;
pub mod layers;
mod network_file;
mod sections;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

#[cfg(feature = "executor")]
pub use crate::services::{
    batches::BatchesConfig, executor::ExecutorConfig, intake::IntakeConfig, miner::MinerConfig, scores::ScoresConfig,
    work::pool::PoolConfig,
};
pub use crate::services::{
    casebook::EvidenceConfig, jobs::JobsConfig, reduce::RoundsConfig, registry::RegistryConfig,
    transfer::TransferConfig,
};
pub use http::HttpConfig;
pub use layers::{ConfigError, Layers, Origin, Resolved, Shown};
pub use network_file::NetworkFile;
pub use sections::{AttachConfig, KeysConfig, LogConfig, LogFormat, NetworkConfig, NodeConfig};

/// Everything that an operator may choose.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Config {
    /// Roles and the data directory.
    pub node: NodeConfig,
    /// Key files.
    pub keys: KeysConfig,
    /// Which mesh.
    pub network: NetworkConfig,
    /// Addresses of this node and of those to begin with.
    pub net: crate::net::NetConfig,
    /// Whom an executor works for.
    pub attach: AttachConfig,
    /// Jobs that this node submits.
    pub jobs: JobsConfig,
    /// The store on disk.
    pub store: crate::store::StoreConfig,
    /// Models, inputs and outputs on disk.
    pub blobs: crate::blobs::BlobsConfig,
    /// Blobs on the wire.
    pub transfer: TransferConfig,
    /// Models that this node publishes and knows of.
    pub registry: RegistryConfig,
    /// Map-reduce rounds that this node takes part in or serves.
    pub rounds: RoundsConfig,
    /// Evidence of offences.
    pub evidence: EvidenceConfig,
    /// Jobs that this node runs.
    #[cfg(feature = "executor")]
    pub executor: ExecutorConfig,
    /// Executors of this miner or validator.
    #[cfg(feature = "executor")]
    pub pool: PoolConfig,
    /// Offers that this miner takes.
    #[cfg(feature = "executor")]
    pub miner: MinerConfig,
    /// Jobs that this validator takes in.
    #[cfg(feature = "executor")]
    pub intake: IntakeConfig,
    /// How this validator schedules and verifies.
    #[cfg(feature = "executor")]
    pub dispatch: crate::domain::job::JobConfig,
    /// Signed pages of evidence.
    #[cfg(feature = "executor")]
    pub batches: BatchesConfig,
    /// Scores of miners, and the evidence of other validators that they rest on.
    #[cfg(feature = "executor")]
    pub scores: ScoresConfig,
    /// The local HTTP API.
    pub http: HttpConfig,
    /// Log lines of the binary.
    pub log: LogConfig,
}

/// Where a process takes its configuration from.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// A TOML file; without one, `config.toml` in the data directory if it is there.
    pub file: Option<PathBuf>,
    /// Environment variables, as `std::env::vars` gives them.
    pub environment: Vec<(String, String)>,
    /// A network's file.
    pub network: Option<PathBuf>,
    /// Settings given as flags: name of the setting, its value, the flag.
    pub flags: Vec<(&'static str, Value, &'static str)>,
}

impl Config {
    /// Reads all sources and resolves them.
    ///
    /// # Errors
    /// The first thing that is wrong, with the layer and setting named.
    pub fn resolve(sources: &Sources) -> Result<Resolved<Self>, ConfigError> {
        let file = match &sources.file {
            Some(file) => Some(file.clone()),
            // The data directory that the other layers name; a file in it cannot move it.
            None => Some(sources.layers(None)?.resolve::<Self>()?.value.node.data_dir.join("config.toml"))
                .filter(|file| file.exists()),
        };
        let resolved = sources.layers(file.as_deref())?.resolve::<Self>()?;
        resolved.value.check()?;
        Ok(resolved)
    }

    /// What no single setting shows to be wrong.
    fn check(&self) -> Result<(), ConfigError> {
        if self.node.data_dir.as_os_str().is_empty() {
            return Err(ConfigError::Invalid("node.data_dir is empty; name a directory".into()));
        }
        if self.network.genesis.is_none() && self.network.name.is_empty() {
            return Err(ConfigError::Invalid("network.name is empty and there is no network.genesis; set one".into()));
        }
        if let Some(reason) = crate::presets::conflict(&self.node.roles) {
            return Err(ConfigError::Invalid(format!("node.roles: {reason}")));
        }
        Ok(())
    }
}

impl Sources {
    fn layers(&self, file: Option<&Path>) -> Result<Layers, ConfigError> {
        let mut layers = Layers::new();
        if let Some(file) = file {
            layers.file(file)?;
        }
        layers.environment(self.environment.iter().cloned());
        if let Some(path) = &self.network {
            NetworkFile::read(path)?.layer(path, &mut layers);
        }
        for (key, value, flag) in &self.flags {
            layers.set(key, value.clone(), Origin::Flag((*flag).to_owned()));
        }
        Ok(layers)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
