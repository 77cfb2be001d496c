//! Worker threads for work that takes the processor: running guests, compiling modules.
//!
//! Owns a fixed number of threads with a stack of known size (a guest's recursion ends at wasmtime's own limit, well
//! above the end of this stack) and a bounded queue in front of them. Threads start with the first work and end when
//! the pool is dropped. The caller's async executor never runs any of it.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::error::RuntimeError;

/// Stack of a worker: wasmtime's guest limit (1 MiB here) plus generous room for host calls and for the compiler.
const STACK_BYTES: usize = 8 << 20;

type Work = Box<dyn FnOnce() + Send>;

/// A bounded pool of named threads.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    name: &'static str,
    threads: usize,
    started: Once,
    permits: Arc<Semaphore>,
    waiting: AtomicUsize,
    queue_max: usize,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    ready: Condvar,
}

#[derive(Default)]
struct Queue {
    work: VecDeque<Work>,
    closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        loop {
            let mut queue = self.lock();
            let work = loop {
                if let Some(work) = queue.work.pop_front() {
                    break work;
                }
                if queue.closed {
                    return;
                }
                queue = self.ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
            };
            drop(queue);
            work();
        }
    }
}

/// A free worker, to be used at once.
pub(crate) struct Slot {
    shared: Arc<Shared>,
    permit: OwnedSemaphorePermit,
}

/// Counts a waiter for as long as it waits.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Pool {
    /// A pool of `threads` workers with at most `queue_max` callers waiting for one.
    pub(crate) fn new(name: &'static str, threads: usize, queue_max: usize) -> Self {
        Self {
            shared: Arc::default(),
            name,
            threads: threads.max(1),
            started: Once::new(),
            permits: Arc::new(Semaphore::new(threads.max(1))),
            waiting: AtomicUsize::new(0),
            queue_max,
        }
    }

    /// Waits for a free worker. Cancel safe.
    pub(crate) async fn slot(&self) -> Result<Slot, RuntimeError> {
        self.start();
        let permit = match Arc::clone(&self.permits).try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                let queued = self.waiting.fetch_add(1, Ordering::AcqRel);
                let _waiting = Waiting(&self.waiting);
                if queued >= self.queue_max {
                    return Err(RuntimeError::Busy { queued });
                }
                Arc::clone(&self.permits).acquire_owned().await.map_err(|_| RuntimeError::Closed)?
            }
        };
        Ok(Slot { shared: Arc::clone(&self.shared), permit })
    }

    fn start(&self) {
        self.started.call_once(|| {
            for index in 0..self.threads {
                let shared = Arc::clone(&self.shared);
                let spawned = std::thread::Builder::new()
                    .name(format!("{}-{index}", self.name))
                    .stack_size(STACK_BYTES)
                    .spawn(move || shared.serve());
                if let Err(error) = spawned {
                    tracing::error!(pool = self.name, index, %error, "cannot start a worker thread");
                }
            }
        });
    }
}

impl Slot {
    /// Starts `work` on the worker and does not wait; it must not panic.
    pub(crate) fn spawn(self, work: impl FnOnce() + Send + 'static) {
        let Self { shared, permit } = self;
        shared.lock().work.push_back(Box::new(move || {
            work();
            drop(permit);
        }));
        shared.ready.notify_one();
    }

    /// Runs `work` on the worker. Its result is handed over first; what is left over is dropped after that, and then
    /// the slot is given back, also when the future has been dropped.
    pub(crate) async fn run<T: Send + 'static, L: Send>(
        self,
        work: impl FnOnce() -> (T, L) + Send + 'static,
    ) -> Result<T, RuntimeError> {
        let (done, result) = oneshot::channel();
        self.spawn(move || match catch_unwind(AssertUnwindSafe(work)) {
            Ok((output, left_over)) => {
                let _ = done.send(Ok(output));
                drop(left_over);
            }
            Err(panic) => {
                let _ = done.send(Err(panic));
            }
        });
        match result.await {
            Ok(Ok(output)) => Ok(output),
            Ok(Err(panic)) => Err(RuntimeError::Engine(format!("worker panicked: {}", panic_text(&*panic)))),
            Err(_) => Err(RuntimeError::Closed),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.ready.notify_all();
    }
}

/// The message of a panic.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_full_queue_refuses_and_a_panic_is_an_error() {
        let pool = Pool::new("test", 1, 0);
        let (release, held) = mpsc::sync_channel::<()>(1);
        let slot = pool.slot().await.unwrap();
        let first = tokio::spawn(slot.run(move || (held.recv().is_ok(), ())));
        assert!(matches!(pool.slot().await, Err(RuntimeError::Busy { queued: 0 })));
        release.send(()).unwrap();
        assert!(first.await.unwrap().unwrap());
        // A slot is free a moment after the result is there, so these may have to wait for it.
        let pool = Pool::new("test", 1, 1);
        let failed = pool.slot().await.unwrap().run(|| -> ((), ()) { panic!("boom") }).await;
        assert!(matches!(failed, Err(RuntimeError::Engine(text)) if text.contains("boom")));
        assert_eq!(pool.slot().await.unwrap().run(|| (7, ())).await.unwrap(), 7);
    }
}
