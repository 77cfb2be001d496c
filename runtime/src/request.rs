//! What is to be run: a program with its environment ([`Setup`], shared by many jobs) and one job's own part.
//!
//! Owns the request types and their validation. Does not fetch or verify artifacts: the caller hands over paths whose
//! bytes it has verified against the digests (only the program's own digest is checked again, once, before compiling).
//!
//! The guest sees:
//!
//! ```text
//! stdin         input
//! stdout        the result
//! /model/NAME   artifacts, read-only
//! /job/seed     the seed, decimal ASCII without a newline ("42")
//! /job/params   the parameters, as given
//! ```

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use crate::env::Environment;
use crate::error::RuntimeError;
use crate::limits::Limits;

/// Most artifacts of one setup: bounds the directory tree that each run builds.
pub const ARTIFACTS_MAX: usize = 4_096;
/// Longest artifact name in bytes: the usual bound of a file name.
pub const ARTIFACT_NAME_BYTES_MAX: usize = 255;
/// Longest export name asked for.
pub(crate) const EXPORT_NAME_BYTES_MAX: usize = 256;
/// The entry called when the request names none: what a WASI command exports.
pub const ENTRY_DEFAULT: &str = "_start";

/// The kind of a job, which picks the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum JobKind {
    /// A WebAssembly module (WASI preview 1) or component (preview 2), bit-for-bit deterministic.
    Wasm,
    /// A reference job compiled into this crate.
    Builtin,
}

/// Where a module's bytes are.
#[derive(Clone, Debug)]
pub enum ModuleBytes {
    /// In memory.
    Inline(Bytes),
    /// In a file that is read once, when the module is compiled.
    Path(PathBuf),
}

/// A wasm module or component, named by digest.
#[derive(Clone, Debug)]
pub struct ModuleSource {
    /// BLAKE3 of the bytes; checked before the module is compiled.
    pub digest: [u8; 32],
    /// The bytes.
    pub bytes: ModuleBytes,
}

impl ModuleSource {
    /// A module in memory; the digest is computed here.
    pub fn inline(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self { digest: *blake3::hash(&bytes).as_bytes(), bytes: ModuleBytes::Inline(bytes) }
    }

    /// A module in a file, with the digest that its bytes must have.
    pub fn path(digest: [u8; 32], path: impl Into<PathBuf>) -> Self {
        Self { digest, bytes: ModuleBytes::Path(path.into()) }
    }
}

/// What runs.
#[derive(Clone, Debug)]
pub enum Program {
    /// A wasm module or component.
    Wasm(ModuleSource),
    /// A reference job, see [`crate::builtin`].
    Builtin {
        /// Its name, for example `echo`.
        name: String,
    },
}

impl Program {
    /// The kind, which picks the backend.
    pub fn kind(&self) -> JobKind {
        match self {
            Self::Wasm(_) => JobKind::Wasm,
            Self::Builtin { .. } => JobKind::Builtin,
        }
    }

    /// The digest that stands for the program in the environment identity.
    pub fn digest(&self) -> [u8; 32] {
        match self {
            Self::Wasm(source) => source.digest,
            Self::Builtin { name } => Environment::of_builtin(name).program,
        }
    }
}

/// One file under `/model`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artifact {
    /// Path below `/model`, `/` between directories, for example `weights/layer-0.bin`.
    pub name: String,
    /// BLAKE3 of the bytes, already verified by the caller.
    pub digest: [u8; 32],
    /// Where the bytes are; must not change while a run may read it.
    pub path: PathBuf,
}

/// A program and its environment: all that does not differ from job to job of one model.
///
/// Keep it in an [`Arc`] and hand the same one to every request.
#[derive(Clone, Debug)]
pub struct Setup {
    /// What runs.
    pub program: Program,
    /// Export that makes the warm image: run once, before any job, then the memory is kept. Signature `() -> ()`.
    pub init: Option<String>,
    /// Files under `/model`.
    pub artifacts: Vec<Artifact>,
    /// Digest that stands for the model in the environment identity; zero for a program without one.
    pub model_root: [u8; 32],
    /// Quantisation label in the environment identity; empty where it does not apply.
    pub quantisation: String,
}

impl Setup {
    /// A program alone: no init, no artifacts, no model.
    pub fn new(program: Program) -> Self {
        Self { program, init: None, artifacts: Vec::new(), model_root: [0; 32], quantisation: String::new() }
    }

    /// A builtin job by name.
    pub fn builtin(name: impl Into<String>) -> Self {
        Self::new(Program::Builtin { name: name.into() })
    }

    /// The environment that the identity is computed over.
    pub fn environment(&self) -> Environment {
        Environment {
            program: self.program.digest(),
            model_root: self.model_root,
            quantisation: self.quantisation.clone(),
        }
    }

    /// Checks names and counts.
    ///
    /// # Errors
    /// [`RuntimeError::InvalidRequest`] says what is wrong: an artifact name that is empty, absolute, too long, has an
    /// empty, `.` or `..` part or a NUL, stands twice, or is both a file and a directory.
    pub fn validate(&self) -> Result<(), RuntimeError> {
        let refuse = |what: String| Err(RuntimeError::InvalidRequest(what));
        if self.artifacts.len() > ARTIFACTS_MAX {
            return refuse(format!("{} artifacts, at most {ARTIFACTS_MAX}", self.artifacts.len()));
        }
        if self.init.as_ref().is_some_and(|name| name.len() > EXPORT_NAME_BYTES_MAX) {
            return refuse(format!("init export name above {EXPORT_NAME_BYTES_MAX} bytes"));
        }
        let mut files = HashSet::new();
        let mut directories = HashSet::new();
        for Artifact { name, .. } in &self.artifacts {
            if name.len() > ARTIFACT_NAME_BYTES_MAX || name.contains('\0') {
                return refuse(format!("artifact name {name:?} is too long or holds a NUL"));
            }
            if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
                return refuse(format!("artifact name {name:?} is not a plain relative path"));
            }
            if !files.insert(name.as_str()) {
                return refuse(format!("artifact name {name:?} stands twice"));
            }
            directories.extend(name.match_indices('/').map(|(at, _)| &name[..at]));
        }
        match files.intersection(&directories).next() {
            Some(name) => refuse(format!("artifact name {name:?} is a file and a directory")),
            None => Ok(()),
        }
    }
}

/// One job.
#[derive(Clone, Debug)]
pub struct ExecutionRequest {
    /// Program and environment.
    pub setup: Arc<Setup>,
    /// Export that is called, `() -> ()` or `() -> i32` (an exit code); for a component `_start` means `wasi:cli/run`.
    pub entry: String,
    /// Standard input.
    pub input: Bytes,
    /// `/job/params`.
    pub params: Bytes,
    /// `/job/seed`, decimal ASCII; also a part of the randomness key.
    pub seed: u64,
    /// Keys the job's randomness; the same for every replica of the job (its JobId).
    pub job_key: [u8; 32],
    /// What the run may use.
    pub limits: Limits,
}

impl ExecutionRequest {
    /// A request with the default entry and limits, empty parameters, seed 0 and a zero key.
    pub fn new(setup: Arc<Setup>, input: impl Into<Bytes>) -> Self {
        Self {
            setup,
            entry: ENTRY_DEFAULT.to_owned(),
            input: input.into(),
            params: Bytes::new(),
            seed: 0,
            job_key: [0; 32],
            limits: Limits::default(),
        }
    }
}
