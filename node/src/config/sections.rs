//! Sections that belong to the node as a whole. Those of a port or a service stand beside its module.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sundara_proto::crypto::Network;
use sundara_proto::id::Digest;
use sundara_proto::units::EpochLength;

use crate::presets::Role;

/// Where a node keeps what it must not lose, and what it does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct NodeConfig {
    /// What the node does: light, executor, miner, validator. They combine.
    pub roles: Vec<Role>,
    /// Store, blobs and keys. Two nodes never share one.
    pub data_dir: PathBuf,
    /// Ends the process as a signal would when its standard input ends: a node that another program runs does not outlive
    /// it then, however it ended. Default: false.
    pub stop_with_stdin: bool,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self { roles: Vec::new(), data_dir: default_data_dir(), stop_with_stdin: false }
    }
}

/// `.sundara` in the home directory; below the current directory where there is no home.
fn default_data_dir() -> PathBuf {
    std::env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from).unwrap_or_default().join(".sundara")
}

/// Key files. Secrets are in files only, never in settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct KeysConfig {
    /// The hotkey's file, in btwallet's layout; `hotkey` in the data directory unless set. Made at the first start when it
    /// is in the data directory, required to exist when it is elsewhere.
    pub hotkey: Option<PathBuf>,
    /// The node key's file; `node.key` in the data directory unless set.
    pub node: Option<PathBuf>,
}

impl KeysConfig {
    /// File of the hotkey.
    pub fn hotkey_file(&self, data_dir: &Path) -> PathBuf {
        self.hotkey.clone().unwrap_or_else(|| data_dir.join("hotkey"))
    }
    /// File of the node key.
    pub fn node_file(&self, data_dir: &Path) -> PathBuf {
        self.node.clone().unwrap_or_else(|| data_dir.join("node.key"))
    }
}

/// Which mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct NetworkConfig {
    /// Name of a mesh without a chain; its genesis is derived from it. Not used when `genesis` is set.
    pub name: String,
    /// Genesis of the chain, 64 hexadecimal digits.
    pub genesis: Option<Digest>,
    /// Subnet.
    pub netuid: u16,
    /// Websocket address of the chain; none for a mesh without one.
    pub chain: Option<String>,
    /// BLAKE3 of the incentive file in force; none for the built-in one.
    pub incentive: Option<Digest>,
    /// Length of an epoch in milliseconds where no chain counts blocks; the same at every node of the mesh.
    pub epoch_ms: EpochLength,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            name: "sundara-local".into(),
            genesis: None,
            netuid: 1,
            chain: None,
            incentive: None,
            epoch_ms: EpochLength::default(),
        }
    }
}

impl NetworkConfig {
    /// The mesh that these settings name.
    pub fn network(&self) -> Network {
        match self.genesis {
            Some(genesis) => Network { genesis: genesis.0, netuid: self.netuid },
            None => Network::named(&self.name, self.netuid),
        }
    }
}

/// How the process logs. Used by the binary only; a program that embeds a node logs as it likes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct LogConfig {
    /// tracing's filter syntax: `info`, `warn,sundara_node=debug`.
    pub level: String,
    /// Form of a line.
    pub format: LogFormat,
    /// A file that gets every line too, in the same form without colours. It grows until something rotates it.
    pub file: Option<PathBuf>,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text, file: None }
    }
}

/// Form of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

/// Whom this executor works for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct AttachConfig {
    /// Multiaddress of the miner whose executor this is; where the invite names another, this one is used.
    pub miner: Option<String>,
    /// Multiaddress of the validator whose trusted executor this is.
    pub validator: Option<String>,
    /// File that the owner wrote with `executor invite`. Needed once; the certificate is renewed without it.
    pub invite: Option<PathBuf>,
}
