//! Buffers of chunks, used again: a fresh one costs a page fault for every 4 KiB of it.

use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that wait to be used again, at most: about what one round of a small group has under way.
const KEPT_MAX: usize = 64 << 20;

/// A store of buffers. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Buffers {
    free: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Buffers {
    /// A buffer of this length, whatever is in it.
    pub(super) fn take(&self, len: usize) -> Vec<u8> {
        let found = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            let fits = free.iter().position(|b| b.capacity() >= len && b.capacity() <= len * 2 + 4_096);
            fits.map(|i| free.swap_remove(i))
        };
        // A fresh one comes zeroed from the system, page by page as it is written.
        let Some(mut buffer) = found else { return vec![0; len] };
        buffer.resize(len, 0);
        buffer
    }

    /// Gives a buffer back.
    pub(super) fn give(&self, buffer: Vec<u8>) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let kept: usize = free.iter().map(Vec::capacity).sum();
        if kept + buffer.capacity() <= KEPT_MAX && buffer.capacity() > 0 {
            free.push(buffer);
        }
    }

    /// Gives a shared buffer back, if nobody else has it.
    pub(super) fn give_shared(&self, buffer: Arc<Vec<u8>>) {
        if let Ok(buffer) = Arc::try_unwrap(buffer) {
            self.give(buffer);
        }
    }
}
