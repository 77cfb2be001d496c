//! Warm images: run a program's init export once, keep its memory.
//!
//! Owns the snapshot (through wasmtime-wizer, whose version is wasmtime's). The init export sees no input, no `/job`,
//! randomness of the environment, and `/model`; its output is thrown away. A start from the image equals running init
//! and then the start in one instance, bit for bit and in fuel, since only the start is counted and the host begins
//! anew for it.
//!
//! A core module that wizer cannot snapshot (it changes tables) runs its init export in every run instead. Components
//! have no such way round: handles that init leaves in the instance would survive there and not in an image, so one
//! that cannot be snapshot is refused everywhere.

use std::panic::{AssertUnwindSafe, catch_unwind};

use wasmparser::ValType;
use wasmtime::component::{ComponentExportIndex, WasmList};
use wasmtime::{Instance, Module, Store, Val};
use wasmtime_wizer::{ComponentInstanceState, InstanceState, SnapshotVal, Wizer};

use super::host::Host;
use super::limits::INIT_FUEL;
use super::program::{Code, ComponentCode, Loader, Stop, Wanted, exports_init, is_component};
use super::run::{self, INITIALIZE, arm};
use crate::RuntimeError;
use crate::control::block_on;
use crate::outcome::{InitFault, InvalidModule, Outcome};
use crate::pool::panic_text;

/// What became of the attempt.
pub(super) enum Image {
    /// A module with the memory as init left it.
    Snapshot(Vec<u8>),
    /// Init has to run in every run, with this code.
    Impossible(Code),
}

/// Runs init and takes the snapshot.
pub(super) fn make(loader: &Loader, wanted: &Wanted, init: &str, bytes: &[u8]) -> Result<Image, Stop> {
    let mut wizer = Wizer::new();
    // The export stays, as it does where init and start share an instance.
    wizer.init_func(init).keep_init_func(true);
    if is_component(bytes) { component(loader, wanted, &wizer, bytes) } else { core(loader, wanted, &wizer, bytes) }
}

fn core(loader: &Loader, wanted: &Wanted, wizer: &Wizer, bytes: &[u8]) -> Result<Image, Stop> {
    let init = wizer.get_init_func();
    let (context, instrumented) = match guarded(|| wizer.instrument(bytes)) {
        Ok(instrumented) => instrumented,
        Err(reason) => {
            tracing::debug!(reason, "no warm image; init runs in every job");
            let code = loader.compile(&wanted.source.digest, bytes)?;
            let Code::Core(pre) = &code else { return Err(internal("a module became a component")) };
            check_init(pre.module(), init)?;
            return Ok(Image::Impossible(code));
        }
    };
    let module = Module::new(&loader.engine, &instrumented).map_err(|error| internal(format!("{error:#}")))?;
    check_init(&module, init)?;
    let Code::Core(pre) = loader.link_core(&module)? else { return Err(internal("a module became a component")) };
    let mut store = store(loader, wanted)?;
    let instance = match pre.instantiate(&mut store) {
        Ok(instance) => instance,
        Err(error) => return Err(failed(&mut store, error, false)),
    };
    initialize(&mut store, &instance, init).map_err(|error| failed(&mut store, error, false))?;
    let mut state = CoreState { store: &mut store, instance };
    guarded(|| block_on(wizer.snapshot(&context, &mut state))).map(Image::Snapshot).map_err(internal)
}

/// What a start from an image leaves out: `_initialize`, then init.
pub(super) fn initialize(store: &mut Store<Host>, instance: &Instance, init: &str) -> wasmtime::Result<()> {
    // Asked for as the init export itself, it still runs once.
    let before = if init == INITIALIZE { None } else { instance.get_func(&mut *store, INITIALIZE) };
    let init = instance.get_func(&mut *store, init);
    for function in before.into_iter().chain(init) {
        function.typed::<(), ()>(&*store)?.call(&mut *store, ())?;
    }
    Ok(())
}

fn check_init(module: &Module, init: &str) -> Result<(), Stop> {
    if exports_init(module, init) {
        return Ok(());
    }
    Err(Stop::invalid(InvalidModule::NoEntry, format!("no init export `{init}` of type () -> ()")))
}

fn component(loader: &Loader, wanted: &Wanted, wizer: &Wizer, bytes: &[u8]) -> Result<Image, Stop> {
    let refused = |reason: String| Stop::invalid(InvalidModule::NoSnapshot, reason);
    let (context, instrumented) = guarded(|| wizer.instrument_component(bytes)).map_err(refused)?;
    // Never on disk: this code runs once.
    let component = wasmtime::component::Component::new(&loader.engine, &instrumented)
        .map_err(|error| internal(format!("{error:#}")))?;
    let Code::Component(code) = loader.link_component(&component)? else {
        return Err(internal("a component became a module"));
    };
    let init = wizer.get_init_func();
    let missing = || Stop::invalid(InvalidModule::NoEntry, format!("no init export `{init}` of type func()"));
    let index = code.entry(init).ok_or_else(missing)?;
    let mut store = store(loader, wanted)?;
    let instance = match code.pre.instantiate(&mut store) {
        Ok(instance) => instance,
        Err(error) => return Err(failed(&mut store, error, true)),
    };
    let function = instance.get_typed_func::<(), ()>(&mut store, index).map_err(|_| missing())?;
    function.call(&mut store, ()).map_err(|error| failed(&mut store, error, true))?;
    let mut state = ComponentState { store: &mut store, instance, code: &code };
    guarded(|| block_on(wizer.snapshot_component(&context, &mut state))).map(Image::Snapshot).map_err(refused)
}

/// A store for an init export.
fn store(loader: &Loader, wanted: &Wanted) -> Result<Store<Host>, Stop> {
    let host = Host::for_init(&wanted.setup, &wanted.env_id, wanted.memory_bytes, loader.closing.clone());
    let mut store = Store::new(&loader.engine, host);
    store.limiter(|host| &mut host.limiter);
    store.set_fuel(INIT_FUEL).map_err(|error| internal(format!("{error:#}")))?;
    arm(&mut store, &loader.closing);
    Ok(store)
}

/// What a failed init means for every run.
fn failed(store: &mut Store<Host>, error: wasmtime::Error, component: bool) -> Stop {
    let text = format!("init: {error:#}\n{}", String::from_utf8_lossy(&store.data_mut().stderr.take()));
    match run::classify(store.data_mut(), error, component) {
        Err(fault) => Stop::Fault(fault),
        Ok(outcome) => match init_outcome(outcome) {
            // The runtime is closing.
            Outcome::Aborted(_) => Stop::Fault(RuntimeError::Closed),
            outcome => Stop::Refused(outcome, text),
        },
    }
}

/// The outcome of a run whose init ended this way.
pub(super) fn init_outcome(outcome: Outcome) -> Outcome {
    match outcome {
        Outcome::Completed | Outcome::ExitCode(_) => Outcome::InitFailed(InitFault::Exit),
        Outcome::OutOfFuel => Outcome::InitFailed(InitFault::OutOfFuel),
        Outcome::MemoryLimit => Outcome::InitFailed(InitFault::MemoryLimit),
        Outcome::Aborted(_) | Outcome::Indeterminate(_) => outcome,
        _ => Outcome::InitFailed(InitFault::Trap),
    }
}

fn internal(text: impl Into<String>) -> Stop {
    Stop::Fault(RuntimeError::Engine(text.into()))
}

/// Errors and panics of the snapshotter as text: it was written for trusted modules.
fn guarded<T>(work: impl FnOnce() -> wasmtime::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(format!("{error:#}")),
        Err(panic) => Err(panic_text(&*panic).to_owned()),
    }
}

/// Reads the state of a core instance. The names are of exports that `instrument` made.
struct CoreState<'a> {
    store: &'a mut Store<Host>,
    instance: Instance,
}

impl InstanceState for CoreState<'_> {
    async fn global_get(&mut self, name: &str, _: ValType) -> SnapshotVal {
        let global = self.instance.get_global(&mut *self.store, name);
        match global.map(|global| global.get(&mut *self.store)) {
            Some(Val::I32(value)) => SnapshotVal::I32(value),
            Some(Val::I64(value)) => SnapshotVal::I64(value),
            Some(Val::F32(bits)) => SnapshotVal::F32(bits),
            Some(Val::F64(bits)) => SnapshotVal::F64(bits),
            Some(Val::V128(value)) => SnapshotVal::V128(value.as_u128()),
            // Caught by `guarded`; the trait has no other way to fail.
            _ => panic!("global {name} cannot be snapshot"),
        }
    }

    async fn memory_contents(&mut self, name: &str, contents: impl FnOnce(&[u8]) + Send) {
        match self.instance.get_memory(&mut *self.store, name) {
            Some(memory) => contents(memory.data(&*self.store)),
            None => panic!("memory {name} cannot be snapshot"),
        }
    }
}

/// Reads the state of a component through the accessors that `instrument_component` made.
struct ComponentState<'a> {
    store: &'a mut Store<Host>,
    instance: wasmtime::component::Instance,
    code: &'a ComponentCode,
}

impl ComponentState<'_> {
    fn accessor(&self, instance: &str, function: &str) -> wasmtime::Result<ComponentExportIndex> {
        let component = self.code.pre.component();
        component
            .get_export_index(None, instance)
            .and_then(|instance| component.get_export_index(Some(&instance), function))
            .ok_or_else(|| wasmtime::Error::msg("accessor is missing"))
    }

    fn call<R: wasmtime::component::Lift + 'static>(&mut self, instance: &str, function: &str) -> R {
        let value = self.accessor(instance, function).and_then(|index| {
            let function = self.instance.get_typed_func::<(), (R,)>(&mut *self.store, index)?;
            Ok(function.call(&mut *self.store, ())?.0)
        });
        match value {
            Ok(value) => value,
            // Caught by `guarded`; the trait has no other way to fail.
            Err(error) => panic!("{instance}#{function}: {error:#}"),
        }
    }
}

impl ComponentInstanceState for ComponentState<'_> {
    async fn call_func_ret_list_u8(&mut self, instance: &str, func: &str, contents: impl FnOnce(&[u8]) + Send) {
        let list: WasmList<u8> = self.call(instance, func);
        contents(list.as_le_slice(&*self.store));
    }

    async fn call_func_ret_s32(&mut self, instance: &str, func: &str) -> i32 {
        self.call(instance, func)
    }

    async fn call_func_ret_s64(&mut self, instance: &str, func: &str) -> i64 {
        self.call(instance, func)
    }

    async fn call_func_ret_f32(&mut self, instance: &str, func: &str) -> u32 {
        self.call::<f32>(instance, func).to_bits()
    }

    async fn call_func_ret_f64(&mut self, instance: &str, func: &str) -> u64 {
        self.call::<f64>(instance, func).to_bits()
    }
}
