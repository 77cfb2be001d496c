//! How the wasm engine is set up: what an operator may choose, and what nobody may.
//!
//! Owns [`WasmConfig`] and the engine made from it. Everything that a guest could notice is a constant and stands in
//! [`engine_flags`], which is a part of the environment identity; the configuration holds only what cannot change a
//! result: threads, queues, caches, the code generator.

use std::path::PathBuf;

use wasmtime::{Config, Enabled, Engine, InstanceAllocationStrategy, PoolingAllocationConfig, Strategy, WasmFeatures};

use super::brief;
use super::host::{BYTE_FUEL, CALL_FUEL, HOST_VERSION, PATH_FUEL};
use super::limits::{
    COMPONENT_INSTANCE_BYTES_MAX, CORE_INSTANCE_BYTES_MAX, INIT_FUEL, INSTANCES_PER_COMPONENT_MAX,
    MEMORIES_PER_COMPONENT_MAX, MEMORY_BYTES_MAX, MODULE_BYTES_MAX, TABLE_ELEMENTS_MAX, TABLES_PER_MODULE_MAX,
};
use crate::RuntimeError;

/// Version of wasmtime, pinned exactly in the workspace; a test compares it with the lock file.
pub(crate) const WASMTIME_VERSION: &str = "48.0.8";

/// Native stack that a guest may use; where it ends is the machine's, hence `Indeterminate`.
pub(crate) const GUEST_STACK_BYTES: usize = 1 << 20;
/// Callers that may wait for a worker.
const QUEUE_DEFAULT: usize = 4_096;
/// Compiled programs kept in memory.
const PROGRAMS_DEFAULT: usize = 64;
/// Bytes of compiled code and images on disk.
const CACHE_BYTES_DEFAULT: u64 = 8 << 30;
/// Memory of all runs at once.
const MEMORY_BUDGET_DEFAULT: u64 = 4 << 30;
/// Memory that a slot keeps between runs, so that the next run of the same program takes no page faults for it.
const KEEP_RESIDENT_DEFAULT: usize = 1 << 20;
/// Compilers beside the workers: instances that init exports need.
pub(crate) const COMPILERS: usize = 1;

/// The code generator. Both give the same bits; the interpreter is the second architecture that tests compare with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WasmTarget {
    /// Machine code for this processor, by Cranelift.
    #[default]
    Native,
    /// Bytecode for the Pulley interpreter.
    Pulley,
}

/// What an operator may choose; none of it changes a result.
#[derive(Clone, Debug)]
pub struct WasmConfig {
    /// The code generator.
    pub target: WasmTarget,
    /// Guests that run at once.
    pub workers: usize,
    /// Callers that may wait for a worker; more are refused as busy.
    pub queue: usize,
    /// Memory of all runs at once, in bytes: a run waits until its whole limit fits.
    pub memory_budget_bytes: u64,
    /// Where compiled code and warm images are kept; in memory only when absent.
    pub cache_dir: Option<PathBuf>,
    /// Bytes kept there; the files unused longest go first.
    pub cache_bytes_max: u64,
    /// Compiled programs kept in memory.
    pub programs_max: usize,
    /// Bytes of linear memory that an idle slot keeps resident.
    pub keep_resident_bytes: usize,
}

impl Default for WasmConfig {
    fn default() -> Self {
        Self {
            target: WasmTarget::Native,
            workers: std::thread::available_parallelism().map_or(1, usize::from),
            queue: QUEUE_DEFAULT,
            memory_budget_bytes: MEMORY_BUDGET_DEFAULT,
            cache_dir: None,
            cache_bytes_max: CACHE_BYTES_DEFAULT,
            programs_max: PROGRAMS_DEFAULT,
            keep_resident_bytes: KEEP_RESIDENT_DEFAULT,
        }
    }
}

/// The language: WebAssembly 2.0 with SIMD and extended constants. No threads, no relaxed SIMD, no garbage collection,
/// no exceptions, no 64-bit or multiple memories, no asynchronous components.
pub(crate) fn features() -> WasmFeatures {
    WasmFeatures::FLOATS
        | WasmFeatures::MUTABLE_GLOBAL
        | WasmFeatures::SATURATING_FLOAT_TO_INT
        | WasmFeatures::SIGN_EXTENSION
        | WasmFeatures::REFERENCE_TYPES
        | WasmFeatures::MULTI_VALUE
        | WasmFeatures::BULK_MEMORY
        | WasmFeatures::SIMD
        | WasmFeatures::EXTENDED_CONST
        | WasmFeatures::COMPONENT_MODEL
}

/// All that a guest could notice, in one line.
pub(crate) fn engine_flags() -> String {
    format!(
        "sundara-wasm host={HOST_VERSION} wasm2 simd128 extended-const components nan=canonical \
         fuel=wasmtime-default call={CALL_FUEL} byte={BYTE_FUEL} path={PATH_FUEL} init={INIT_FUEL} \
         module<={MODULE_BYTES_MAX} memory<={MEMORY_BYTES_MAX} tables<={TABLES_PER_MODULE_MAX}x{TABLE_ELEMENTS_MAX} \
         instance<={CORE_INSTANCE_BYTES_MAX} component<={COMPONENT_INSTANCE_BYTES_MAX} \
         instances<={INSTANCES_PER_COMPONENT_MAX} memories<={MEMORIES_PER_COMPONENT_MAX}"
    )
}

/// Makes the engine.
pub(crate) fn engine(settings: &WasmConfig) -> Result<Engine, RuntimeError> {
    let mut config = Config::new();
    config.strategy(Strategy::Cranelift);
    if settings.target == WasmTarget::Pulley {
        config.target(pulley_target()).map_err(failed)?;
    }
    config
        .wasm_features(WasmFeatures::all(), false)
        .wasm_features(features(), true)
        .consume_fuel(true)
        .epoch_interruption(true)
        .cranelift_nan_canonicalization(true)
        .max_wasm_stack(GUEST_STACK_BYTES)
        // Nobody reads traces of a foreign guest; the maps would be a third of each image.
        .wasm_backtrace_max_frames(None)
        .generate_address_map(false)
        .native_unwind_info(cfg!(windows))
        // Guests address 4 GiB without a bounds check.
        .memory_reservation(MEMORY_BYTES_MAX)
        .memory_init_cow(true)
        // A warm image is mapped whatever its density: its size is bounded by the memory limit it was made under.
        .memory_guaranteed_dense_image_size(MEMORY_BYTES_MAX)
        .allocation_strategy(InstanceAllocationStrategy::Pooling(pool(settings)));
    Engine::new(&config).map_err(failed)
}

/// Slots for every worker, compiler and caller's thread at once, each as large as any program may be.
fn pool(settings: &WasmConfig) -> PoolingAllocationConfig {
    let stores = u32::try_from(settings.workers.max(1) + COMPILERS + brief::AT_ONCE).unwrap_or(u32::MAX);
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(stores)
        .total_core_instances(stores.saturating_mul(INSTANCES_PER_COMPONENT_MAX))
        .total_memories(stores.saturating_mul(MEMORIES_PER_COMPONENT_MAX))
        .total_tables(stores.saturating_mul(TABLES_PER_MODULE_MAX))
        .max_component_instance_size(COMPONENT_INSTANCE_BYTES_MAX)
        .max_core_instances_per_component(INSTANCES_PER_COMPONENT_MAX)
        .max_memories_per_component(MEMORIES_PER_COMPONENT_MAX)
        .max_tables_per_component(TABLES_PER_MODULE_MAX)
        .max_core_instance_size(CORE_INSTANCE_BYTES_MAX)
        .max_memories_per_module(1)
        .max_tables_per_module(TABLES_PER_MODULE_MAX)
        .table_elements(TABLE_ELEMENTS_MAX)
        .max_memory_size(usize::try_from(MEMORY_BYTES_MAX).unwrap_or(usize::MAX))
        .linear_memory_keep_resident(settings.keep_resident_bytes)
        .table_keep_resident(settings.keep_resident_bytes.min(64 << 10))
        .pagemap_scan(Enabled::Auto);
    pool
}

fn pulley_target() -> &'static str {
    if cfg!(target_endian = "little") { "pulley64" } else { "pulley64be" }
}

fn failed(error: wasmtime::Error) -> RuntimeError {
    RuntimeError::Engine(format!("{error:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_one_that_is_locked() {
        let lock = include_str!("../../../Cargo.lock");
        let locked = |name: &str| format!("name = \"{name}\"\nversion = \"{WASMTIME_VERSION}\"");
        assert!(lock.contains(&locked("wasmtime")));
        assert!(lock.contains(&locked("wasmtime-wizer")));
    }
}
