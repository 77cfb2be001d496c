//! Layers of settings, resolved once into a typed value with the origin of every part.
//!
//! Owns the order default < file < environment < network file < flag, and says for every setting which layer it came
//! from. It knows no section: the tree of settings is what the type's `Default` serialises to. Invariants: a setting that
//! no section knows is an error that names the nearest known one; a value of the wrong form is an error that names the
//! setting and the layer that holds it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// What environment variables of settings begin with; `__` stands between the parts of the name.
pub const ENV_PREFIX: &str = "SUNDARA_";
/// Largest configuration file read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Which layer a value came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "from", content = "at", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Origin {
    /// Built in.
    Default,
    /// A configuration file.
    File(PathBuf),
    /// An environment variable.
    Environment(String),
    /// The file of a network, named by `--network`.
    Network(PathBuf),
    /// A flag.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::Network(path) => write!(f, "network file {}", path.display()),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// What is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A file that cannot be read.
    #[error("cannot read {path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A name that no section knows.
    #[error("unknown setting `{key}` ({origin}){}", nearest.as_ref().map(|n| format!("; did you mean `{n}`?")).unwrap_or_default())]
    Unknown {
        /// As written, parts joined by dots.
        key: String,
        /// Where.
        origin: Origin,
        /// The known name that resembles it most.
        nearest: Option<String>,
    },
    /// A value of the wrong form.
    #[error("setting `{key}` ({origin}): {reason}")]
    Value {
        /// Which setting.
        key: String,
        /// Where its value came from.
        origin: Origin,
        /// What is wrong.
        reason: String,
    },
    /// Values that contradict each other, or one that is out of range.
    #[error("{0}")]
    Invalid(String),
}

/// A value as a layer gives it.
#[derive(Clone, Debug)]
enum Given {
    /// Already typed (a file, a flag).
    Typed(Value),
    /// Text (an environment variable): read as the setting's type wants it.
    Text(String),
}

#[derive(Clone, Debug)]
struct Setting {
    key: Vec<String>,
    given: Given,
    origin: Origin,
}

/// Settings of one or more layers; later ones win.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    settings: Vec<Setting>,
}

impl Layers {
    /// No layer: every value is the default.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a TOML file.
    ///
    /// # Errors
    /// When it cannot be read or is no TOML.
    pub fn file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let table = read_toml(path)?;
        self.table(Vec::new(), table, &Origin::File(path.to_path_buf()));
        Ok(())
    }

    /// Adds those environment variables that name a setting: `SUNDARA_SECTION__KEY`.
    pub fn environment(&mut self, variables: impl Iterator<Item = (String, String)>) {
        for (name, text) in variables {
            let Some(rest) = name.strip_prefix(ENV_PREFIX).filter(|rest| rest.contains("__")) else { continue };
            let key = rest.split("__").map(str::to_lowercase).collect();
            self.settings.push(Setting { key, given: Given::Text(text), origin: Origin::Environment(name) });
        }
    }

    /// Adds one value; `key` is its parts joined by dots.
    pub fn set(&mut self, key: &str, value: Value, origin: Origin) {
        let key = key.split('.').map(str::to_owned).collect();
        self.settings.push(Setting { key, given: Given::Typed(value), origin });
    }

    fn table(&mut self, prefix: Vec<String>, table: toml::Table, origin: &Origin) {
        for (name, value) in table {
            let mut key = prefix.clone();
            key.push(name);
            match value {
                toml::Value::Table(inner) if !inner.is_empty() => self.table(key, inner, origin),
                other => {
                    let given = Given::Typed(json_of(other));
                    self.settings.push(Setting { key, given, origin: origin.clone() });
                }
            }
        }
    }

    /// Resolves all layers over `T`'s default.
    ///
    /// # Errors
    /// The first unknown name or unfit value.
    pub fn resolve<T: Default + Serialize + DeserializeOwned>(&self) -> Result<Resolved<T>, ConfigError> {
        let defaults = serde_json::to_value(T::default())
            .map_err(|e| ConfigError::Invalid(format!("the defaults cannot be shown: {e}")))?;
        let mut tree = defaults.clone();
        let mut origins = BTreeMap::new();
        for setting in &self.settings {
            let value = fit::<T>(&defaults, setting)?;
            let is_section = lookup(&defaults, &setting.key).is_some_and(Value::is_object);
            if is_section && value.as_object().is_some_and(Map::is_empty) {
                // An empty table sets nothing.
                continue;
            }
            put(&mut tree, &setting.key, value);
            origins.insert(setting.key.join("."), setting.origin.clone());
        }
        // Each value fits by itself; together they fit too, unless a type checks several at once.
        let value = serde_json::from_value(tree).map_err(|e| ConfigError::Invalid(e.to_string()))?;
        Ok(Resolved { value, origins })
    }
}

/// A configuration and where it came from.
#[derive(Clone, Debug)]
pub struct Resolved<T> {
    /// The configuration.
    pub value: T,
    origins: BTreeMap<String, Origin>,
}

/// One setting with its origin.
#[derive(Clone, Debug, Serialize)]
pub struct Shown {
    /// Parts joined by dots.
    pub key: String,
    /// As in force.
    pub value: Value,
    /// Which layer it came from.
    pub origin: Origin,
}

impl<T: Serialize> Resolved<T> {
    /// Every setting in force, in the order of their names.
    ///
    /// # Errors
    /// When a section does not serialise, a mistake in our own code.
    pub fn shown(&self) -> Result<Vec<Shown>, ConfigError> {
        let tree = serde_json::to_value(&self.value).map_err(|e| ConfigError::Invalid(e.to_string()))?;
        let mut leaves = Vec::new();
        collect(&tree, String::new(), &mut leaves);
        let shown = |(key, value): (String, Value)| Shown { origin: self.origin(&key), key, value };
        Ok(leaves.into_iter().map(shown).collect())
    }

    /// Where the value of `key` came from.
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }
}

/// Reads a small TOML file.
pub(super) fn read_toml(path: &Path) -> Result<toml::Table, ConfigError> {
    let failed = |reason: String| ConfigError::File { path: path.to_path_buf(), reason };
    let meta = std::fs::metadata(path).map_err(|e| failed(e.to_string()))?;
    if meta.len() > FILE_BYTES_MAX {
        return Err(failed(format!("it has {} bytes, above {FILE_BYTES_MAX}", meta.len())));
    }
    let text = std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
    text.parse().map_err(|e: toml::de::Error| failed(e.to_string().trim_end().replace('\n', " ")))
}

/// The value of a setting, once it is known to fit.
fn fit<T: DeserializeOwned>(defaults: &Value, setting: &Setting) -> Result<Value, ConfigError> {
    let key = setting.key.join(".");
    let default = lookup(defaults, &setting.key);
    let fits = |value: &Value| {
        let mut tree = defaults.clone();
        put(&mut tree, &setting.key, value.clone());
        serde_json::from_value::<T>(tree)
    };
    let mut complaint = None;
    for candidate in candidates(&setting.given, default) {
        match fits(&candidate) {
            Ok(_) => return Ok(candidate),
            Err(e) => complaint = complaint.or(Some(e.to_string())),
        }
    }
    // A table with free names (a map) has taken the value above; whatever else is not there has no name here.
    if default.is_none() {
        return Err(ConfigError::Unknown { nearest: nearest(defaults, &key), key, origin: setting.origin.clone() });
    }
    Err(ConfigError::Value { key, origin: setting.origin.clone(), reason: complaint.unwrap_or_default() })
}

/// Readings of a value, the likeliest first.
fn candidates(given: &Given, default: Option<&Value>) -> Vec<Value> {
    let text = match given {
        Given::Typed(value) => return vec![value.clone()],
        Given::Text(text) => text,
    };
    let raw = Value::String(text.clone());
    let typed = format!("x = {text}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("x")).map(json_of);
    let list = || text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(Value::from).collect();
    match default {
        Some(Value::String(_)) => vec![raw],
        Some(Value::Array(_)) => typed.into_iter().chain([list()]).collect(),
        _ => typed.into_iter().chain([raw]).collect(),
    }
}

fn json_of(value: toml::Value) -> Value {
    match value {
        toml::Value::String(text) => Value::String(text),
        toml::Value::Integer(n) => n.into(),
        toml::Value::Float(x) => x.into(),
        toml::Value::Boolean(b) => b.into(),
        toml::Value::Datetime(at) => Value::String(at.to_string()),
        toml::Value::Array(items) => items.into_iter().map(json_of).collect(),
        toml::Value::Table(table) => Value::Object(table.into_iter().map(|(k, v)| (k, json_of(v))).collect()),
    }
}

fn lookup<'a>(tree: &'a Value, key: &[String]) -> Option<&'a Value> {
    key.iter().try_fold(tree, |node, part| node.as_object()?.get(part))
}

fn put(tree: &mut Value, key: &[String], value: Value) {
    let Some((first, rest)) = key.split_first() else {
        *tree = value;
        return;
    };
    if !tree.is_object() {
        *tree = Value::Object(Map::new());
    }
    if let Some(object) = tree.as_object_mut() {
        put(object.entry(first.clone()).or_insert(Value::Null), rest, value);
    }
}

fn collect(tree: &Value, prefix: String, leaves: &mut Vec<(String, Value)>) {
    match tree {
        Value::Object(object) if !object.is_empty() => {
            for (name, value) in object {
                let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                collect(value, key, leaves);
            }
        }
        leaf => leaves.push((prefix, leaf.clone())),
    }
}

/// The known name nearest to `key`, if one resembles it.
fn nearest(defaults: &Value, key: &str) -> Option<String> {
    let mut leaves = Vec::new();
    collect(defaults, String::new(), &mut leaves);
    let score = |name: &str| strsim::jaro_winkler(name, key);
    let best = leaves.into_iter().map(|(name, _)| name).max_by(|a, b| score(a).total_cmp(&score(b)))?;
    (score(&best) > 0.8).then_some(best)
}
