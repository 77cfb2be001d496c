//! Random modules on both code generators: never two different digests.
//!
//! A module is generated from bytes of a seeded stream, with the preview 1 functions as the imports it may use. Every
//! exported function is called; results, traps, memories, globals, output, virtual time and fuel go into one hash. The
//! seed is printed on failure; `SUNDARA_SMITH_SEED` and `SUNDARA_SMITH_MODULES` choose others.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use arbitrary::Unstructured;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use wasmtime::{Engine, Extern, Instance, Linker, Module, Store, Val, ValType};

use super::config::{WasmConfig, WasmTarget, engine, features};
use super::host::{Host, p1};
use super::limits::TABLE_ELEMENTS_MAX;
use super::run::{arm, classify};
use crate::control::RunControl;
use crate::{ExecutionRequest, OutputSink, Setup};

/// Fuel of a module: enough to get anywhere, little enough that loops end.
const FUEL: u64 = 200_000;
const MEMORY_BYTES: u64 = 8 << 20;
/// Modules in the default run: what fits into a minute of an unoptimised build on two processors.
const MODULES_DEFAULT: u64 = 1_000;
/// Modules in the full run.
const MODULES_FULL: u64 = 10_000;

struct Machine {
    engine: Engine,
    linker: Linker<Host>,
}

impl Machine {
    fn new(target: WasmTarget) -> Self {
        let settings = WasmConfig { target, workers: 1, keep_resident_bytes: 0, ..WasmConfig::default() };
        let engine = engine(&settings).unwrap();
        let mut linker = Linker::new(&engine);
        p1::link(&mut linker).unwrap();
        Self { engine, linker }
    }

    /// A digest, or none where the outcome is the machine's.
    fn digest(&self, wasm: &[u8], seed: u64) -> Option<blake3::Hash> {
        let module = Module::new(&self.engine, wasm).ok()?;
        let request = ExecutionRequest::new(Arc::new(Setup::builtin("none")), vec![7; 300]);
        let control = Arc::new(RunControl::default());
        let mut host = Host::for_job(&request, OutputSink::discard(), Arc::clone(&control));
        host.limiter = super::host::Limiter::new(MEMORY_BYTES);
        let mut store = Store::new(&self.engine, host);
        store.limiter(|host| &mut host.limiter);
        arm(&mut store, &control);
        store.set_fuel(FUEL).unwrap();
        let mut hasher = blake3::Hasher::new();
        match self.linker.instantiate(&mut store, &module) {
            Ok(instance) => self.call_all(&mut store, &module, &instance, seed, &mut hasher)?,
            Err(error) => {
                outcome(&mut store, error, &mut hasher)?;
            }
        }
        hasher.update(&store.get_fuel().unwrap().to_le_bytes());
        let host = store.data_mut();
        hasher.update(&host.clock.peek().to_le_bytes());
        hasher.update(&host.limiter.peak_bytes().to_le_bytes());
        hasher.update(&host.stdout.digest());
        hasher.update(&host.stderr.take());
        Some(hasher.finalize())
    }

    fn call_all(
        &self,
        store: &mut Store<Host>,
        module: &Module,
        instance: &Instance,
        seed: u64,
        hasher: &mut blake3::Hasher,
    ) -> Option<()> {
        let mut arguments = ChaCha8Rng::seed_from_u64(seed);
        for export in module.exports() {
            match instance.get_export(&mut *store, export.name()) {
                Some(Extern::Func(function)) => {
                    let ty = function.ty(&*store);
                    let given: Vec<Val> = ty.params().map(|ty| argument(&ty, &mut arguments)).collect();
                    let mut results = vec![Val::I32(0); ty.results().len()];
                    match function.call(&mut *store, &given, &mut results) {
                        Ok(()) => results.iter().for_each(|value| hash_value(value, hasher)),
                        Err(error) => outcome(store, error, hasher)?,
                    }
                }
                Some(Extern::Global(global)) => hash_value(&global.get(&mut *store), hasher),
                _ => {}
            }
        }
        for export in module.exports() {
            if let Some(memory) = instance.get_memory(&mut *store, export.name()) {
                hasher.update(memory.data(&*store));
            }
        }
        Some(())
    }
}

/// Hashes how a call ended; none where that is the machine's.
fn outcome(store: &mut Store<Host>, error: wasmtime::Error, hasher: &mut blake3::Hasher) -> Option<()> {
    let text = format!("{error:?}");
    let outcome = classify(store.data_mut(), error, false).unwrap_or_else(|fault| panic!("{fault}: {text}"));
    let (class, detail) = outcome.code()?;
    hasher.update(&[class]).update(&detail.to_le_bytes());
    Some(())
}

fn argument(ty: &ValType, random: &mut ChaCha8Rng) -> Val {
    match ty {
        ValType::I32 => Val::I32(random.next_u32() as i32),
        ValType::I64 => Val::I64(random.next_u64() as i64),
        ValType::F32 => Val::F32(random.next_u32()),
        ValType::F64 => Val::F64(random.next_u64()),
        ValType::V128 => Val::V128((u128::from(random.next_u64()) << 64 | u128::from(random.next_u64())).into()),
        ValType::Ref(_) => Val::FuncRef(None),
    }
}

fn hash_value(value: &Val, hasher: &mut blake3::Hasher) {
    match value {
        Val::I32(value) => hasher.update(&value.to_le_bytes()),
        Val::I64(value) => hasher.update(&value.to_le_bytes()),
        Val::F32(bits) => hasher.update(&bits.to_le_bytes()),
        Val::F64(bits) => hasher.update(&bits.to_le_bytes()),
        Val::V128(value) => hasher.update(&value.as_u128().to_le_bytes()),
        Val::FuncRef(reference) => hasher.update(&[u8::from(reference.is_some())]),
        _ => hasher.update(b"other"),
    };
}

/// The language of the engine, and what it may import.
fn shape(available: &[u8]) -> wasm_smith::Config {
    wasm_smith::Config {
        available_imports: Some(available.to_vec()),
        export_everything: true,
        max_imports: 8,
        max_memories: 1,
        max_tables: 4,
        max_table_elements: TABLE_ELEMENTS_MAX as u64,
        max_memory32_bytes: MEMORY_BYTES * 2,
        max_instructions: 200,
        allow_start_export: true,
        bulk_memory_enabled: true,
        canonicalize_nans: false,
        custom_page_sizes_enabled: false,
        disallow_traps: false,
        exceptions_enabled: false,
        extended_const_enabled: true,
        gc_enabled: false,
        memory64_enabled: false,
        multi_value_enabled: true,
        reference_types_enabled: false,
        relaxed_simd_enabled: false,
        saturating_float_to_int_enabled: true,
        sign_extension_ops_enabled: true,
        simd_enabled: true,
        tail_call_enabled: false,
        threads_enabled: false,
        wide_arithmetic_enabled: false,
        ..wasm_smith::Config::default()
    }
}

/// Preview 1 functions that answer differently on a host that is not deterministic.
fn imports() -> Vec<u8> {
    wat::parse_str(
        r#"(module
        (import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "fd_read" (func (param i32 i32 i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "random_get" (func (param i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "clock_time_get" (func (param i32 i64 i32) (result i32)))
        (import "wasi_snapshot_preview1" "poll_oneoff" (func (param i32 i32 i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "fd_readdir" (func (param i32 i32 i32 i64 i32) (result i32)))
        (import "wasi_snapshot_preview1" "fd_filestat_get" (func (param i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "fd_close" (func (param i32) (result i32)))
        (import "wasi_snapshot_preview1" "proc_exit" (func (param i32))))"#,
    )
    .unwrap()
}

#[derive(Debug, Default)]
struct Tally {
    equal: u64,
    indeterminate: u64,
    invalid: u64,
}

fn compare(modules: u64) -> Tally {
    let chosen = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = chosen("SUNDARA_SMITH_SEED").unwrap_or(1);
    let modules = chosen("SUNDARA_SMITH_MODULES").unwrap_or(modules);
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let available = imports();
    let tallies: Vec<Tally> = std::thread::scope(|scope| {
        let spawned: Vec<_> = (0..threads)
            .map(|thread| {
                let available = &available;
                let work = move || compare_some(seed, (thread..modules).step_by(threads as usize), available);
                std::thread::Builder::new().stack_size(16 << 20).spawn_scoped(scope, work).unwrap()
            })
            .collect();
        spawned.into_iter().map(|handle| handle.join().unwrap()).collect()
    });
    tallies.iter().fold(Tally::default(), |sum, one| Tally {
        equal: sum.equal + one.equal,
        indeterminate: sum.indeterminate + one.indeterminate,
        invalid: sum.invalid + one.invalid,
    })
}

fn compare_some(seed: u64, indices: impl Iterator<Item = u64>, available: &[u8]) -> Tally {
    let (native, pulley) = (Machine::new(WasmTarget::Native), Machine::new(WasmTarget::Pulley));
    let mut tally = Tally::default();
    for index in indices {
        let module_seed = seed << 32 | index;
        let mut dna = vec![0; 8 << 10];
        ChaCha8Rng::seed_from_u64(module_seed).fill_bytes(&mut dna);
        let Ok(module) = wasm_smith::Module::new(shape(available), &mut Unstructured::new(&dna)) else {
            tally.invalid += 1;
            continue;
        };
        let wasm = module.to_bytes();
        if wasmparser::Validator::new_with_features(features()).validate_all(&wasm).is_err() {
            tally.invalid += 1;
            continue;
        }
        match (native.digest(&wasm, module_seed), pulley.digest(&wasm, module_seed)) {
            (Some(one), Some(other)) => {
                assert_eq!(one, other, "module {module_seed} differs between the generators");
                tally.equal += 1;
            }
            _ => tally.indeterminate += 1,
        }
    }
    tally
}

#[test]
fn random_modules_agree_between_the_generators() {
    let tally = compare(MODULES_DEFAULT);
    eprintln!("{tally:?}");
    assert!(tally.equal > 9 * (tally.indeterminate + tally.invalid), "{tally:?} says too little");
}

/// The whole of verification.md's row: `cargo test -p sundara-runtime --lib ten_thousand -- --ignored`.
#[test]
#[ignore = "ten times the default run"]
fn ten_thousand_random_modules_agree_between_the_generators() {
    let tally = compare(MODULES_FULL);
    eprintln!("{tally:?}");
    assert!(tally.equal + tally.indeterminate >= MODULES_FULL * 9 / 10, "{tally:?}");
}
