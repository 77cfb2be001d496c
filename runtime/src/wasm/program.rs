//! From bytes to something that can be started: check, compile, link, and make the warm image.
//!
//! Owns the verdict on a program that no machine can run ([`Loaded::Refused`]), kept apart from what only this machine
//! cannot do. Runs on the compile pool; nothing here is asynchronous.
//!
//! ```text
//! digest -> (disk) -> bytes -> validate -> compile -> link -> Ready
//!                                             `-> init, snapshot -> compile -> link -> Ready (image)
//! ```

use std::io::Read;
use std::sync::Arc;

use wasmparser::Validator;
use wasmtime::component::{Component, ComponentExportIndex};
use wasmtime::{Engine, ExternType, InstancePre, Module};

use super::brief::History;
use super::config::features;
use super::disk::DiskCache;
use super::host::{Host, p1, p2};
use super::image::{self, Image};
use super::limits::MODULE_BYTES_MAX;
use crate::control::RunControl;
use crate::outcome::{InvalidModule, Outcome};
use crate::request::{ENTRY_DEFAULT, ModuleBytes, ModuleSource, Setup};
use crate::{IndeterminateReason, RuntimeError};

/// What loading a program came to.
pub(crate) enum Loaded {
    /// It can be started.
    Ready(Ready),
    /// Every run of it ends this way; the text is for people.
    Refused(Outcome, String),
}

/// A linked program.
pub(crate) struct Ready {
    pub(crate) code: Code,
    /// The init export still has to be called in each run: the program cannot be made into an image.
    pub(crate) cold_init: Option<String>,
    pub(crate) history: History,
}

impl Ready {
    fn new(code: Code, cold_init: Option<String>) -> Self {
        Self { code, cold_init, history: History::default() }
    }
}

/// Either kind of wasm, linked against its host.
pub(crate) enum Code {
    Core(InstancePre<Host>),
    Component(Box<ComponentCode>),
}

/// A component and where its `run` is.
pub(crate) struct ComponentCode {
    pub(crate) pre: wasmtime::component::InstancePre<Host>,
    run: Option<ComponentExportIndex>,
}

impl ComponentCode {
    /// The function behind an entry name: `_start` means `wasi:cli/run`, others are exports of the root.
    pub(crate) fn entry(&self, name: &str) -> Option<ComponentExportIndex> {
        match (name, &self.run) {
            (ENTRY_DEFAULT, Some(run)) => Some(*run),
            (name, _) => self.pre.component().get_export_index(None, name),
        }
    }
}

/// What loading stops with.
pub(super) enum Stop {
    Refused(Outcome, String),
    Fault(RuntimeError),
}

impl Stop {
    pub(super) fn invalid(what: InvalidModule, why: impl Into<String>) -> Self {
        Self::Refused(Outcome::InvalidModule(what), why.into())
    }
}

/// What loading needs from the runtime.
pub(crate) struct Loader {
    pub(crate) engine: Engine,
    pub(crate) core: wasmtime::Linker<Host>,
    pub(crate) component: wasmtime::component::Linker<Host>,
    pub(crate) disk: Option<DiskCache>,
    /// Stops init exports when the runtime is dropped.
    pub(crate) closing: Arc<RunControl>,
}

/// Which program, and what its image is made of.
pub(crate) struct Wanted {
    /// Names it in the caches: the module digest, or for an image all that goes into it.
    pub(crate) name: [u8; 32],
    pub(crate) setup: Arc<Setup>,
    pub(crate) source: ModuleSource,
    pub(crate) env_id: [u8; 32],
    pub(crate) memory_bytes: u64,
}

impl Loader {
    /// Links both worlds.
    pub(crate) fn new(engine: Engine, disk: Option<DiskCache>) -> wasmtime::Result<Self> {
        let mut core = wasmtime::Linker::new(&engine);
        p1::link(&mut core)?;
        let mut component = wasmtime::component::Linker::new(&engine);
        p2::link(&mut component)?;
        Ok(Self { engine, core, component, disk, closing: Arc::default() })
    }

    /// Loads a program. Faults of this machine are errors and are not remembered.
    pub(crate) fn load(&self, wanted: &Wanted) -> Result<Loaded, RuntimeError> {
        match self.try_load(wanted) {
            Ok(ready) => Ok(Loaded::Ready(ready)),
            Err(Stop::Refused(outcome, why)) => Ok(Loaded::Refused(outcome, why)),
            Err(Stop::Fault(fault)) => Err(fault),
        }
    }

    fn try_load(&self, wanted: &Wanted) -> Result<Ready, Stop> {
        if let Some(module) = self.disk.as_ref().and_then(|disk| disk.module(&self.engine, &wanted.name)) {
            return Ok(Ready::new(self.link_core(&module)?, None));
        }
        if let Some(component) = self.component_on_disk(wanted) {
            return Ok(Ready::new(self.link_component(&component)?, None));
        }
        let bytes = read_program(&wanted.source)?;
        validate(&bytes)?;
        let Some(init) = &wanted.setup.init else {
            return Ok(Ready::new(self.compile(&wanted.name, &bytes)?, None));
        };
        match image::make(self, wanted, init, &bytes)? {
            Image::Snapshot(image) => Ok(Ready::new(self.compile(&wanted.name, &image)?, None)),
            // Compiled under the digest of the module itself, which is what runs.
            Image::Impossible(code) => Ok(Ready::new(code, Some(init.clone()))),
        }
    }

    /// Components are kept under a name of their own, since the file does not say which kind it is.
    fn component_on_disk(&self, wanted: &Wanted) -> Option<Component> {
        self.disk.as_ref()?.component(&self.engine, &component_name(&wanted.name))
    }

    /// Compiles valid bytes, keeps the code on disk, and links it.
    pub(super) fn compile(&self, name: &[u8; 32], bytes: &[u8]) -> Result<Code, Stop> {
        if is_component(bytes) {
            let component = match &self.disk {
                Some(disk) => {
                    let name = component_name(name);
                    disk.store(&name, &self.engine.precompile_component(bytes).map_err(uncompilable)?);
                    disk.component(&self.engine, &name)
                }
                None => None,
            };
            let component = component.map_or_else(|| Component::new(&self.engine, bytes), Ok);
            return self.link_component(&component.map_err(uncompilable)?);
        }
        let module = match &self.disk {
            Some(disk) => {
                disk.store(name, &self.engine.precompile_module(bytes).map_err(uncompilable)?);
                disk.module(&self.engine, name)
            }
            None => None,
        };
        let module = module.map_or_else(|| Module::new(&self.engine, bytes), Ok);
        self.link_core(&module.map_err(uncompilable)?)
    }

    pub(super) fn link_core(&self, module: &Module) -> Result<Code, Stop> {
        let pre = self.core.instantiate_pre(module);
        pre.map(Code::Core).map_err(|error| Stop::invalid(InvalidModule::UnknownImport, format!("{error:#}")))
    }

    pub(super) fn link_component(&self, component: &Component) -> Result<Code, Stop> {
        let unknown = |error: wasmtime::Error| Stop::invalid(InvalidModule::UnknownImport, format!("{error:#}"));
        let mut linker = self.component.clone();
        linker.define_unknown_imports_as_traps(component).map_err(unknown)?;
        let pre = linker.instantiate_pre(component).map_err(unknown)?;
        let run = run_export(component);
        Ok(Code::Component(Box::new(ComponentCode { pre, run })))
    }
}

/// `wasi:cli/run` of any 0.2 version.
fn run_export(component: &Component) -> Option<ComponentExportIndex> {
    let ty = component.component_type();
    let mut names = ty.exports(component.engine()).map(|(name, _)| name);
    let name = names.find(|name| name.starts_with("wasi:cli/run@0.2."))?;
    let instance = component.get_export_index(None, name)?;
    component.get_export_index(Some(&instance), "run")
}

/// Whether a core module exports a function `() -> ()` under a name.
pub(super) fn exports_init(module: &Module, name: &str) -> bool {
    match module.get_export(name) {
        Some(ExternType::Func(ty)) => ty.params().len() == 0 && ty.results().len() == 0,
        _ => false,
    }
}

/// The fourth and fifth bytes of the header say which kind it is.
pub(super) fn is_component(bytes: &[u8]) -> bool {
    bytes.get(4..8) == Some(&[0x0d, 0, 1, 0])
}

fn component_name(name: &[u8; 32]) -> [u8; 32] {
    blake3::derive_key("sundara-node compiled component v1", name)
}

fn read_program(source: &ModuleSource) -> Result<bytes::Bytes, Stop> {
    let fault = |source| Stop::Fault(RuntimeError::Read { what: "the program".into(), source });
    let bytes = match &source.bytes {
        ModuleBytes::Inline(bytes) => bytes.clone(),
        ModuleBytes::Path(path) => {
            let mut bytes = Vec::new();
            // One byte more than allowed tells a file that is too large.
            let file = std::fs::File::open(path).map_err(fault)?;
            file.take(MODULE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(fault)?;
            bytes.into()
        }
    };
    if bytes.len() as u64 > MODULE_BYTES_MAX {
        return Err(Stop::invalid(InvalidModule::TooLarge, format!("above {MODULE_BYTES_MAX} bytes")));
    }
    if blake3::hash(&bytes) != blake3::Hash::from_bytes(source.digest) {
        return Err(Stop::Fault(RuntimeError::DigestMismatch { expected: source.digest }));
    }
    Ok(bytes)
}

/// Validity is decided here and nowhere else, by the language alone, so that every machine decides alike.
fn validate(bytes: &[u8]) -> Result<(), Stop> {
    match Validator::new_with_features(features()).validate_all(bytes) {
        Ok(_) => Ok(()),
        Err(error) => Err(Stop::invalid(InvalidModule::Malformed, error.to_string())),
    }
}

/// Valid wasm that does not compile: beyond the constant bounds of the pool, or beyond this machine's compiler.
fn uncompilable(error: wasmtime::Error) -> Stop {
    let text = format!("{error:#}");
    if text.contains("does not fit in pooling allocator requirements") || text.contains("exceeds the limit of") {
        Stop::invalid(InvalidModule::TooLarge, text)
    } else {
        Stop::Refused(Outcome::Indeterminate(IndeterminateReason::Compile), text)
    }
}
