//! Caps on memories and tables, counted over the whole instance.
//!
//! A growth above the cap is refused the way wasm says (-1), so that a guest may recover; that it was refused is kept,
//! and a guest that then traps or exits with an error ends as `MemoryLimit`.

use wasmtime::{Error, ResourceLimiter, Result};

use crate::wasm::limits::TABLE_ELEMENTS_MAX;

/// Most tables of one store; the pool's limits are the tighter ones.
const TABLES_MAX: usize = 64;
/// Most memories of one store.
const MEMORIES_MAX: usize = 16;
/// Most core instances of one store: a component is made of several.
const INSTANCES_MAX: usize = 64;

/// Counts linear memory.
#[derive(Debug)]
pub(crate) struct Limiter {
    cap_bytes: u64,
    used_bytes: u64,
    peak_bytes: u64,
    /// A growth was refused because of the cap.
    refused: bool,
    /// The operating system refused a growth that the cap allowed.
    host_failed: bool,
}

impl Limiter {
    pub(crate) fn new(cap_bytes: u64) -> Self {
        Self { cap_bytes, used_bytes: 0, peak_bytes: 0, refused: false, host_failed: false }
    }

    /// Goes on counting under a new cap, from what is in use; a guest that was initialised in this store keeps its
    /// memory.
    pub(crate) fn restart(&mut self, cap_bytes: u64) {
        *self = Self { used_bytes: self.used_bytes, peak_bytes: self.used_bytes, ..Self::new(cap_bytes) };
    }

    pub(crate) fn peak_bytes(&self) -> u64 {
        self.peak_bytes
    }

    pub(crate) fn refused(&self) -> bool {
        self.refused
    }

    pub(crate) fn host_failed(&self) -> bool {
        self.host_failed
    }
}

impl ResourceLimiter for Limiter {
    fn memory_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> Result<bool> {
        // Beyond the module's own maximum wasm refuses by itself; that is no matter of the cap.
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(false);
        }
        let used = self.used_bytes.saturating_add((desired as u64).saturating_sub(current as u64));
        if used > self.cap_bytes {
            self.refused = true;
            return Ok(false);
        }
        self.used_bytes = used;
        self.peak_bytes = self.peak_bytes.max(used);
        Ok(true)
    }

    fn memory_grow_failed(&mut self, error: Error) -> Result<()> {
        self.host_failed = true;
        Err(error.context("the operating system refused memory within the limit"))
    }

    fn table_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> Result<bool> {
        Ok(desired <= TABLE_ELEMENTS_MAX)
    }

    fn instances(&self) -> usize {
        INSTANCES_MAX
    }

    fn tables(&self) -> usize {
        TABLES_MAX
    }

    fn memories(&self) -> usize {
        MEMORIES_MAX
    }
}
