//! The file of a network: what a node has to know to join one mesh, in one file that its operators hand out.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sundara_proto::id::{Digest, Hotkey};
use sundara_proto::units::EpochLength;

use super::layers::{ConfigError, Layers, Origin, read_toml};

/// What `--network FILE` holds, as TOML. Nothing in it is secret.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct NetworkFile {
    /// Name of a mesh without a chain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Genesis of its chain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub genesis: Option<Digest>,
    /// Subnet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub netuid: Option<u16>,
    /// Addresses of nodes to begin with, `/p2p/` and the PeerId at the end.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bootstrap: Vec<String>,
    /// Websocket address of the chain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chain: Option<String>,
    /// BLAKE3 of the incentive file in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub incentive: Option<Digest>,
    /// Length of its epochs in milliseconds, where no chain counts blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch_ms: Option<EpochLength>,
    /// Validators whose verdicts are believed without a chain.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trusted_validators: Vec<Hotkey>,
}

impl NetworkFile {
    /// Reads one.
    ///
    /// # Errors
    /// When it cannot be read, holds an unknown name, or names no mesh.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let failed = |reason: String| ConfigError::File { path: path.to_path_buf(), reason };
        let file: Self = read_toml(path)?.try_into().map_err(|e: toml::de::Error| failed(e.message().to_owned()))?;
        match (&file.name, &file.genesis) {
            (None, None) => Err(failed("it names no mesh; set name, or genesis where there is a chain".into())),
            (Some(_), Some(_)) => Err(failed("it sets both name and genesis; a mesh has one of them".into())),
            _ => Ok(file),
        }
    }

    /// Puts its settings over those that are there.
    pub fn layer(&self, path: &Path, layers: &mut Layers) {
        let mut set = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                layers.set(key, value, Origin::Network(path.to_path_buf()));
            }
        };
        set("network.name", self.name.as_ref().map(|name| json!(name)));
        // A mesh that has a name has no genesis of its own: one that another layer sets is not to win over the name.
        set("network.genesis", Some(json!(self.genesis)));
        set("network.netuid", self.netuid.map(|netuid| json!(netuid)));
        set("network.chain", self.chain.as_ref().map(|chain| json!(chain)));
        set("network.incentive", self.incentive.map(|digest| json!(digest)));
        set("network.epoch_ms", self.epoch_ms.map(|length| json!(length)));
        set("net.bootstrap", (!self.bootstrap.is_empty()).then(|| json!(self.bootstrap)));
        let trusted = &self.trusted_validators;
        set("jobs.trusted_validators", (!trusted.is_empty()).then(|| json!(trusted)));
    }
}
