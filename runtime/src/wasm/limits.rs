//! Bounds that decide whether a program can run at all. Constants, since every machine must decide alike; each is a
//! part of the environment identity.

/// Largest wasm file: Python and its library are 30 MB.
pub(crate) const MODULE_BYTES_MAX: u64 = 64 << 20;
/// Largest linear memory, which is also what 32 bits address.
pub(crate) const MEMORY_BYTES_MAX: u64 = 4 << 30;
/// Most elements of one table: C# and Python builds have above 10,000 functions.
pub(crate) const TABLE_ELEMENTS_MAX: usize = 65_536;
/// Most tables of a module or component.
pub(crate) const TABLES_PER_MODULE_MAX: u32 = 16;
/// Most linear memories of a component.
pub(crate) const MEMORIES_PER_COMPONENT_MAX: u32 = 4;
/// Most core instances of a component: a module, its adapter, and shims.
pub(crate) const INSTANCES_PER_COMPONENT_MAX: u32 = 32;
/// Engine state of a core instance: globals, imports, function references.
pub(crate) const CORE_INSTANCE_BYTES_MAX: usize = 4 << 20;
/// Engine state of a component instance.
pub(crate) const COMPONENT_INSTANCE_BYTES_MAX: usize = 4 << 20;
/// Fuel of an init export: loading a model of some GB, about a minute. It also bounds how long one can take, for
/// nothing that an init export can call waits.
pub(crate) const INIT_FUEL: u64 = 200_000_000_000;
