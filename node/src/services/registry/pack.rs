//! Reading a model's directory: `model.toml` says what is in it.
//!
//! ```toml
//! name = "digits"                 # [a-z0-9A-Z._-], under the publisher's hotkey
//! version = 3                     # only goes up
//! engine = "wasm"                 # the default
//! program = "digits.wasm"
//! artifacts = ["weights.bin"]     # default: every other file of the directory
//! tier = 0                        # 0: exact
//! hardware_class = ""             # empty: any
//! init = ""                       # export that makes the warm image
//! entry = ""                      # export called by default; empty: _start
//! description = "..."
//! license = "MIT"
//!
//! [limits]                        # each may be left out
//! fuel = 10000000000
//! memory = 536870912              # bytes
//! output = 16777216               # bytes
//! wall_ms = 60000
//!
//! [determinism]                   # default: exact
//! class = "tolerance"
//! atol = 1e-6
//! rtol = 1e-5
//! dtype = "f32"
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sundara_proto::job::Limits;
use sundara_proto::model::Determinism;
use sundara_proto::units::ByteCount;
use sundara_proto::wire::{self, limit};

/// Name of the file.
pub(crate) const MODEL_FILE: &str = "model.toml";

/// Largest `model.toml` that is read: the manifest that comes of it is no larger.
const MODEL_FILE_MAX: u64 = limit::MANIFEST as u64;

/// What is wrong with a model's directory, by file and field.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not TOML, or a field that is not known or of another type.
    #[error("{}: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The parser's words, with the line.
        reason: String,
    },
    /// A field holds what it may not.
    #[error("{}: field `{field}`: {reason}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// What is wrong, and what would be right.
        reason: String,
    },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelToml {
    name: String,
    version: u64,
    #[serde(default = "wasm")]
    engine: String,
    program: String,
    artifacts: Option<Vec<String>>,
    #[serde(default)]
    tier: u32,
    #[serde(default)]
    hardware_class: String,
    #[serde(default)]
    init: String,
    #[serde(default)]
    entry: String,
    #[serde(default)]
    description: String,
    #[serde(default)]
    license: String,
    #[serde(default)]
    limits: LimitsToml,
    determinism: Option<Determinism>,
}

fn wasm() -> String {
    "wasm".to_owned()
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitsToml {
    fuel: Option<u64>,
    memory: Option<ByteCount>,
    output: Option<ByteCount>,
    wall_ms: Option<u64>,
}

/// A model's directory, read and checked.
#[derive(Debug)]
pub(crate) struct Pack {
    pub(crate) name: String,
    pub(crate) version: u64,
    pub(crate) engine: String,
    /// Name and place of each file, the program first.
    pub(crate) files: Vec<(String, PathBuf)>,
    pub(crate) limits: Limits,
    pub(crate) determinism: Determinism,
    pub(crate) tier: u32,
    pub(crate) hardware_class: String,
    pub(crate) init: String,
    pub(crate) entry: String,
    pub(crate) description: String,
    pub(crate) license: String,
}

/// Reads `dir`.
pub(crate) fn read(dir: &Path) -> Result<Pack, PackError> {
    let path = dir.join(MODEL_FILE);
    let size = fs::metadata(&path).map_err(|source| PackError::Read { path: path.clone(), source })?.len();
    if size > MODEL_FILE_MAX {
        let reason = format!("{size} bytes are more than the {MODEL_FILE_MAX} that a manifest may have");
        return Err(PackError::Parse { path, reason });
    }
    let text = fs::read_to_string(&path).map_err(|source| PackError::Read { path: path.clone(), source })?;
    let raw: ModelToml =
        toml::from_str(&text).map_err(|e| PackError::Parse { path: path.clone(), reason: e.to_string() })?;
    Checker { dir, path }.check(raw)
}

struct Checker<'a> {
    dir: &'a Path,
    path: PathBuf,
}

impl Checker<'_> {
    fn wrong<T>(&self, field: &'static str, reason: impl Into<String>) -> Result<T, PackError> {
        Err(PackError::Field { path: self.path.clone(), field, reason: reason.into() })
    }

    fn name(&self, field: &'static str, value: String, required: bool) -> Result<String, PackError> {
        if required && value.is_empty() {
            return self.wrong(field, "must not be empty");
        }
        wire::name(value.clone(), field).or_else(|_| {
            let form =
                "may have at most 128 letters, digits, dots, underscores and hyphens, and must not begin with a dot";
            self.wrong(field, format!("`{value}` {form}"))
        })
    }

    fn text(&self, field: &'static str, value: String, max: usize) -> Result<String, PackError> {
        wire::text(value, max, field)
            .or_else(|_| self.wrong(field, format!("may have at most {max} bytes and no control characters")))
    }

    fn check(&self, raw: ModelToml) -> Result<Pack, PackError> {
        if raw.engine != "wasm" {
            return self.wrong("engine", format!("`{}` is not known; use \"wasm\"", raw.engine));
        }
        let determinism = raw.determinism.clone().unwrap_or(Determinism::Exact);
        if let Determinism::Tolerance { atol, rtol, dtype } = &determinism {
            let sane = |x: f64| x.is_finite() && x >= 0.0;
            if !sane(*atol) || !sane(*rtol) || !matches!(dtype.as_str(), "f32" | "f64") {
                return self.wrong("determinism", "needs atol and rtol of at least 0, and dtype \"f32\" or \"f64\"");
            }
        }
        let files = self.files(&raw)?;
        Ok(Pack {
            limits: self.limits(&raw.limits)?,
            name: self.name("name", raw.name, true)?,
            version: raw.version,
            engine: raw.engine,
            files,
            determinism,
            tier: raw.tier,
            hardware_class: self.name("hardware_class", raw.hardware_class, false)?,
            init: self.name("init", raw.init, false)?,
            entry: self.name("entry", raw.entry, false)?,
            description: self.text("description", raw.description, limit::TEXT)?,
            license: self.text("license", raw.license, limit::NAME)?,
        })
    }

    fn limits(&self, raw: &LimitsToml) -> Result<Limits, PackError> {
        let base = Limits::default();
        let limits = Limits {
            fuel: raw.fuel.unwrap_or(base.fuel),
            memory: raw.memory.unwrap_or(base.memory),
            output: raw.output.unwrap_or(base.output),
            wall_ms: raw.wall_ms.unwrap_or(base.wall_ms),
        };
        let max = Limits::MAX;
        if limits.within(&max) {
            return Ok(limits);
        }
        self.wrong(
            "limits",
            format!("at most fuel {}, memory {}, output {}, wall_ms {}", max.fuel, max.memory, max.output, max.wall_ms),
        )
    }

    /// The program, then the artifacts by name.
    fn files(&self, raw: &ModelToml) -> Result<Vec<(String, PathBuf)>, PackError> {
        let program = self.file("program", &raw.program)?;
        let mut names = match &raw.artifacts {
            Some(names) => names.clone(),
            None => self.others(&raw.program)?,
        };
        names.sort_unstable();
        if names.len() > limit::ARTIFACTS {
            return self.wrong("artifacts", format!("{} files are more than {}", names.len(), limit::ARTIFACTS));
        }
        if let Some(twice) = names.windows(2).find(|w| w[0] == w[1]) {
            return self.wrong("artifacts", format!("`{}` is named twice", twice[0]));
        }
        let mut files = vec![program];
        for name in &names {
            files.push(self.file("artifacts", name)?);
        }
        Ok(files)
    }

    fn file(&self, field: &'static str, name: &str) -> Result<(String, PathBuf), PackError> {
        let name = self.name(field, name.to_owned(), true)?;
        let path = self.dir.join(&name);
        if path.is_file() {
            Ok((name, path))
        } else {
            self.wrong(field, format!("there is no file {}", path.display()))
        }
    }

    /// Every file but the program, `model.toml` and hidden ones.
    fn others(&self, program: &str) -> Result<Vec<String>, PackError> {
        let read = |source| PackError::Read { path: self.dir.to_owned(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(self.dir).map_err(read)? {
            let entry = entry.map_err(read)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let skipped = name.starts_with('.') || name == program || name == MODEL_FILE;
            if entry.path().is_file() && !skipped {
                names.push(name);
            }
        }
        Ok(names)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn packed(toml: &str, files: &[&str]) -> Result<Pack, PackError> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(MODEL_FILE), toml).unwrap();
        files.iter().for_each(|name| fs::write(dir.path().join(name), name).unwrap());
        read(dir.path())
    }

    const GOOD: &str = "name = \"digits\"\nversion = 3\nprogram = \"d.wasm\"\n";

    #[test]
    fn a_short_file_is_enough() {
        let pack = packed(GOOD, &["d.wasm", "weights.bin", "b.txt", ".hidden"]).unwrap();
        let names: Vec<&str> = pack.files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["d.wasm", "b.txt", "weights.bin"]);
        assert_eq!((pack.version, pack.limits, pack.determinism), (3, Limits::default(), Determinism::Exact));
    }

    #[test]
    fn all_fields_are_read() {
        let text = format!(
            "{GOOD}engine = \"wasm\"\nartifacts = [\"w\"]\ntier = 1\nhardware_class = \"cpu\"\ninit = \"warm\"\n\
             entry = \"step\"\ndescription = \"d\"\nlicense = \"MIT\"\n[limits]\nfuel = 5\nwall_ms = 7\n[determinism]\n\
             class = \"tolerance\"\natol = 0.5\nrtol = 0.25\ndtype = \"f64\"\n"
        );
        let pack = packed(&text, &["d.wasm", "w", "other"]).unwrap();
        assert_eq!(pack.files.len(), 2);
        assert_eq!((pack.limits.fuel, pack.limits.wall_ms, pack.tier), (5, 7, 1));
        assert_eq!((pack.init.as_str(), pack.entry.as_str()), ("warm", "step"));
        assert!(matches!(pack.determinism, Determinism::Tolerance { atol: 0.5, .. }));
    }

    #[test]
    fn errors_name_the_file_and_the_field() {
        let cases = [
            ("name = \"\"\nversion = 1\nprogram = \"d.wasm\"", "name"),
            ("name = \"a b\"\nversion = 1\nprogram = \"d.wasm\"", "name"),
            ("name = \"a\"\nversion = -1\nprogram = \"d.wasm\"", "version"),
            ("name = \"a\"\nprogram = \"d.wasm\"", "version"),
            ("name = \"a\"\nversion = 1\nprogram = \"none.wasm\"", "program"),
            ("name = \"a\"\nversion = 1\nprogram = \"../d.wasm\"", "program"),
            ("name = \"a\"\nversion = 1\nprogram = \"d.wasm\"\nartifacts = [\"gone\"]", "artifacts"),
            ("name = \"a\"\nversion = 1\nprogram = \"d.wasm\"\nartifacts = [\"w\", \"w\"]", "artifacts"),
            ("name = \"a\"\nversion = 1\nprogram = \"d.wasm\"\nengine = \"gpu\"", "engine"),
            ("name = \"a\"\nversion = 1\nprogram = \"d.wasm\"\nspeed = 1", "speed"),
            ("name = \"a\"\nversion = 1\nprogram = \"d.wasm\"\n[limits]\nmemory = 99999999999", "limits"),
            ("name = \"a\"\nversion = 1\nprogram = \"d.wasm\"\n[determinism]\nclass = \"maybe\"", "class"),
        ];
        for (toml, field) in cases {
            let error = packed(toml, &["d.wasm", "w"]).unwrap_err().to_string();
            assert!(error.contains(MODEL_FILE) && error.contains(field), "{toml}: {error}");
        }
        let missing = read(Path::new("/nonexistent/model")).unwrap_err().to_string();
        assert!(missing.contains("/nonexistent/model/model.toml"), "{missing}");
    }
}
