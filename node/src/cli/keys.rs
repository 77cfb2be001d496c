//! `key new` and `key show`.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde::Serialize;
use sundara_chain::keys::{self, KeyError};
use sundara_proto::id::{Hotkey, NodeId};

use super::args::{KeyCommand, LogArgs, NodeArgs};
use super::exit::{CliError, CliResult, Exit};
use super::out::Out;

/// Longest phrase read: 24 words of 8 letters are 216 bytes.
const PHRASE_BYTES_MAX: u64 = 4096;

/// What is shown of a key file.
#[derive(Debug, Default, Serialize)]
struct Shown {
    file: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    hotkey: Option<Hotkey>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<NodeId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer_id: Option<String>,
    /// Whether the file holds a phrase from which the key can be restored.
    #[serde(skip_serializing_if = "Option::is_none")]
    has_phrase: Option<bool>,
}

pub(super) fn run(command: KeyCommand, log: &LogArgs) -> CliResult {
    match command {
        KeyCommand::New { file, node, phrase_file, data_dir, json } => {
            let out = Out { json };
            let shown = make(file, node, phrase_file, data_dir, log)?;
            out.show(&shown, |shown| {
                let what =
                    if node { "" } else { "\nIts phrase is in that file and nowhere else: keep a copy of the file." };
                format!("{}{what}", text(shown))
            })?;
        }
        KeyCommand::Show { file: Some(file), json, .. } => Out { json }.show(&show(&file)?, text)?,
        KeyCommand::Show { file: None, data_dir, json } => {
            let config = NodeArgs { data_dir, ..NodeArgs::default() }.resolve(log)?.value;
            let files = [config.keys.hotkey_file(&config.node.data_dir), config.keys.node_file(&config.node.data_dir)];
            let shown = files.iter().map(|file| show(file)).collect::<Result<Vec<_>, _>>()?;
            Out { json }.show(&shown, |all| all.iter().map(text).collect::<Vec<_>>().join("\n"))?;
        }
    }
    Ok(Exit::Ok)
}

fn make(
    file: Option<PathBuf>,
    node: bool,
    phrase_file: Option<PathBuf>,
    data_dir: Option<PathBuf>,
    log: &LogArgs,
) -> Result<Shown, CliError> {
    let file = match file {
        Some(file) => file,
        None => {
            let config = NodeArgs { data_dir, ..NodeArgs::default() }.resolve(log)?.value;
            let dir = &config.node.data_dir;
            if node { config.keys.node_file(dir) } else { config.keys.hotkey_file(dir) }
        }
    };
    if node {
        let made = keys::create_node_key(&file)?.node_id();
        return Ok(node_shown(file, made));
    }
    let pair = match phrase_file {
        None => keys::create_hotkey(&file)?,
        Some(source) => keys::import_hotkey(&file, &read_phrase(&source)?)?,
    };
    Ok(Shown { file, hotkey: Some(pair.hotkey()), has_phrase: Some(true), ..Shown::default() })
}

/// A hotkey file, or else a node key file.
fn show(file: &Path) -> Result<Shown, KeyError> {
    match keys::load_node_key(file) {
        Ok(pair) => Ok(node_shown(file.to_path_buf(), pair.node_id())),
        Err(KeyError::Malformed { .. }) => {
            let key = keys::show_hotkey(file)?;
            let (hotkey, has_phrase) = (Some(key.hotkey), Some(key.has_phrase));
            Ok(Shown { file: file.to_path_buf(), hotkey, has_phrase, ..Shown::default() })
        }
        Err(other) => Err(other),
    }
}

fn node_shown(file: PathBuf, node: NodeId) -> Shown {
    Shown { file, node: Some(node), peer_id: peer_id(node), ..Shown::default() }
}

/// libp2p's name of a node key.
fn peer_id(node: NodeId) -> Option<String> {
    let key = libp2p::identity::ed25519::PublicKey::try_from_bytes(node.as_bytes()).ok()?;
    Some(libp2p::identity::PublicKey::from(key).to_peer_id().to_string())
}

fn text(shown: &Shown) -> String {
    let mut lines = Vec::new();
    lines.extend(shown.hotkey.map(|hotkey| format!("hotkey   {hotkey}")));
    lines.extend(shown.node.map(|node| format!("node     {node}")));
    lines.extend(shown.peer_id.as_ref().map(|peer| format!("peer id  {peer}")));
    lines.push(format!("file     {}", shown.file.display()));
    lines.join("\n")
}

fn read_phrase(source: &Path) -> Result<zeroize::Zeroizing<String>, CliError> {
    let mut phrase = zeroize::Zeroizing::new(String::with_capacity(PHRASE_BYTES_MAX as usize));
    if source == Path::new("-") {
        std::io::stdin().lock().take(PHRASE_BYTES_MAX).read_to_string(&mut phrase)?;
        return Ok(phrase);
    }
    let content = keys::read_secret_file(source)?;
    phrase.push_str(std::str::from_utf8(&content).map_err(|_| KeyError::Phrase)?);
    Ok(phrase)
}
