//! Tasks of a node: every one has a name, an owner and a shutdown.
//!
//! Owns spawning and nothing else: what a task does is its service's business. Services get a [`Tasks`] from the builder,
//! make a [`Tasks::child`] of their own and spawn under it.
//!
//! Invariants: nothing outlives [`Tasks::shutdown`], which takes at most its grace time; a task that panics is named in
//! the log and in [`Tasks::failure`], and takes nothing else down by itself; work that takes the processor goes through
//! [`Workers`], whose size is fixed.
//!
//! Shutting down has two steps: the tokens are cancelled and tasks finish what they hold; after the grace time the rest
//! is aborted, and their names are returned. Draining jobs comes before both and is the miner's and validator's own.

use std::any::Any;
use std::collections::BTreeMap;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures::FutureExt as _;
use sundara_proto::units::UnixMillis;
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

/// Time that tasks have to finish after their tokens are cancelled. Long enough for a flush of the store; jobs are
/// drained before.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(10);
/// Time that aborted tasks have to reach their next await. One that needs longer blocks a thread and is left behind.
const ABORT_GRACE: Duration = Duration::from_secs(1);

/// A task that panicked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskFailure {
    /// Owner and name, as in `miner/offers`.
    pub task: String,
    /// What the panic said.
    pub detail: String,
}

struct Running {
    name: String,
    /// `None` only while it is being spawned.
    abort: Option<AbortHandle>,
}

struct Shared {
    tracker: TaskTracker,
    running: Mutex<BTreeMap<u64, Running>>,
    next: AtomicU64,
    /// A shutdown has finished: nothing new runs.
    stopped: AtomicBool,
    /// The first failure; later ones are in the log.
    failure: watch::Sender<Option<TaskFailure>>,
}

impl Shared {
    fn running(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes a task from the list when it ends, however it ends.
struct Registered {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.shared.running().remove(&self.id);
    }
}

/// Spawns named tasks under a shutdown token. Clones share their tasks.
#[derive(Clone)]
pub struct Tasks {
    shared: Arc<Shared>,
    owner: Arc<str>,
    token: CancellationToken,
}

impl Tasks {
    /// The root of a node's tasks. Tasks run on the tokio runtime that [`Tasks::spawn`] is called in.
    pub fn new() -> Self {
        let shared = Shared {
            tracker: TaskTracker::new(),
            running: Mutex::default(),
            next: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            failure: watch::Sender::new(None),
        };
        Self { shared: Arc::new(shared), owner: "".into(), token: CancellationToken::new() }
    }

    /// Tasks of one owner. Its token is cancelled with this one's, and can be cancelled alone.
    #[must_use]
    pub fn child(&self, owner: &str) -> Self {
        Self { shared: Arc::clone(&self.shared), owner: self.path(owner).into(), token: self.token.child_token() }
    }

    /// Cancelled when these tasks have to end. Long-lived tasks select on it.
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    /// Runs `future` as a task of this owner. After a finished [`Tasks::shutdown`] nothing runs any more and the future
    /// is dropped at its first await.
    pub fn spawn<F>(&self, name: &str, future: F) -> AbortHandle
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let name = self.path(name);
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let registered = Registered { shared: Arc::clone(&self.shared), id };
        let span = tracing::info_span!("task", name = %name);
        let task = {
            let name = name.clone();
            async move {
                let ended = AssertUnwindSafe(future).catch_unwind().await;
                if let Err(panic) = ended {
                    registered.shared.report(name, panic.as_ref());
                }
                drop(registered);
            }
        };
        // Listed before it runs, so that a task that ends at once finds itself; the lock is free while spawning, because a
        // runtime that is going down drops the future right there.
        self.shared.running().insert(id, Running { name, abort: None });
        let abort = self.shared.tracker.spawn(task.instrument(span)).abort_handle();
        if let Some(running) = self.shared.running().get_mut(&id) {
            running.abort = Some(abort.clone());
        }
        if self.shared.stopped.load(Ordering::Acquire) {
            abort.abort();
        }
        abort
    }

    /// Names of the tasks that run now, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.shared.running().values().map(|r| r.name.clone()).collect();
        names.sort_unstable();
        names
    }

    /// Waits for the first task that panics. Cancel safe; never resolves in a healthy node.
    pub async fn failure(&self) -> TaskFailure {
        let mut failure = self.shared.failure.subscribe();
        // The sender lives in `self`, so waiting cannot fail before there is a value.
        match failure.wait_for(Option::is_some).await {
            Ok(found) => found.clone().unwrap_or_else(|| unreachable!("waited for a failure")),
            Err(_) => std::future::pending().await,
        }
    }

    /// Cancels all tasks of the node, gives them [`SHUTDOWN_GRACE`] and aborts the rest, whose names are returned.
    pub async fn shutdown(&self) -> Vec<String> {
        self.shutdown_within(SHUTDOWN_GRACE).await
    }

    /// As [`Tasks::shutdown`] with another grace time; zero aborts at once.
    pub async fn shutdown_within(&self, grace: Duration) -> Vec<String> {
        self.token.cancel();
        self.shared.tracker.close();
        let finished = tokio::time::timeout(grace, self.shared.tracker.wait()).await.is_ok();
        self.shared.stopped.store(true, Ordering::Release);
        if finished {
            return Vec::new();
        }
        let late = self.names();
        // Collected first: aborting may drop a future at once, and that one takes the lock to sign off.
        let aborts: Vec<_> = self.shared.running().values().filter_map(|r| r.abort.clone()).collect();
        for abort in aborts {
            abort.abort();
        }
        for name in &late {
            tracing::warn!(task = %name, grace_s = grace.as_secs_f64(), "task did not finish in time and was aborted");
        }
        let _ = tokio::time::timeout(ABORT_GRACE, self.shared.tracker.wait()).await;
        late
    }

    fn path(&self, name: &str) -> String {
        if self.owner.is_empty() { name.to_owned() } else { format!("{}/{name}", self.owner) }
    }
}

impl Default for Tasks {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Tasks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tasks").field("owner", &self.owner).field("running", &self.names()).finish()
    }
}

impl Shared {
    fn report(&self, task: String, panic: &(dyn Any + Send)) {
        let detail = panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "a panic without a message".to_owned());
        tracing::error!(%task, %detail, "task panicked");
        self.failure.send_if_modified(|failure| {
            let first = failure.is_none();
            if first {
                *failure = Some(TaskFailure { task, detail });
            }
            first
        });
    }
}

/// This node's wall clock. Services read it here and nowhere else; machines below get it as an argument.
pub fn wall_now() -> UnixMillis {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    UnixMillis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Why work handed to [`Workers`] has no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WorkError {
    /// The work panicked.
    #[error("work on pool `{pool}` panicked")]
    Panicked {
        /// The pool.
        pool: &'static str,
    },
    /// The pool was closed, or the runtime is going down.
    #[error("pool `{pool}` is closed")]
    Closed {
        /// The pool.
        pool: &'static str,
    },
}

/// A bounded pool for work that takes the processor or blocks: signing, hashing, the store. Clones share it.
#[derive(Clone, Debug)]
pub struct Workers {
    name: &'static str,
    permits: Arc<Semaphore>,
}

impl Workers {
    /// A pool that runs `threads` pieces of work at once, at least one; more wait in order.
    pub fn new(name: &'static str, threads: usize) -> Self {
        Self { name, permits: Arc::new(Semaphore::new(threads.max(1))) }
    }

    /// Runs `work` on a blocking thread. Dropping the future does not stop work that has begun.
    ///
    /// # Errors
    /// When the work panicked or the runtime is going down.
    pub async fn run<T, F>(&self, work: F) -> Result<T, WorkError>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let closed = WorkError::Closed { pool: self.name };
        let permit = Arc::clone(&self.permits).acquire_owned().await.map_err(|_| closed.clone())?;
        let done = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(permit);
            result
        });
        done.await.map_err(|e| if e.is_panic() { WorkError::Panicked { pool: self.name } } else { closed })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn shutdown_waits_for_tasks_that_finish() {
        let tasks = Tasks::new();
        let (done, finished) = oneshot::channel();
        let token = tasks.child("store").token();
        tasks.child("store").spawn("flush", async move {
            token.cancelled().await;
            tokio::task::yield_now().await;
            done.send(()).unwrap();
        });
        assert_eq!(tasks.names(), ["store/flush"]);
        assert!(tasks.shutdown().await.is_empty());
        finished.await.unwrap();
        assert!(tasks.names().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn shutdown_is_bounded_and_names_what_was_late() {
        let tasks = Tasks::new();
        tasks.child("miner").spawn("stubborn", std::future::pending());
        tasks.spawn("quick", async {});
        assert_eq!(tasks.shutdown().await, ["miner/stubborn"]);
        assert!(tasks.names().is_empty(), "aborted tasks are gone");
    }

    #[tokio::test]
    async fn a_panic_is_reported_by_name_and_spares_the_others() {
        let tasks = Tasks::new();
        let (alive, still) = oneshot::channel();
        let (go, wait) = oneshot::channel::<()>();
        tasks.spawn("other", async move {
            wait.await.unwrap();
            alive.send(()).unwrap();
        });
        tasks.child("net").spawn("loop", async { panic!("peer {} did it", 7) });
        let failure = tasks.failure().await;
        assert_eq!(failure, TaskFailure { task: "net/loop".to_owned(), detail: "peer 7 did it".to_owned() });
        go.send(()).unwrap();
        still.await.unwrap();
        assert!(tasks.shutdown().await.is_empty());
    }

    #[tokio::test]
    async fn a_child_can_end_alone_and_ends_with_its_parent() {
        let tasks = Tasks::new();
        let (one, two) = (tasks.child("one"), tasks.child("two"));
        one.token().cancel();
        assert!(!two.token().is_cancelled());
        tasks.token().cancel();
        assert!(two.token().is_cancelled());
    }

    #[tokio::test]
    async fn nothing_runs_after_shutdown() {
        let tasks = Tasks::new();
        assert!(tasks.shutdown().await.is_empty());
        let (sent, got) = oneshot::channel::<()>();
        tasks.spawn("late", async move {
            std::future::pending::<()>().await;
            sent.send(()).unwrap();
        });
        assert!(got.await.is_err(), "the future was dropped");
    }

    #[tokio::test]
    async fn a_pool_runs_no_more_than_its_size_and_survives_a_panic() {
        let pool = Workers::new("sign", 1);
        assert_eq!(pool.run(|| 6 * 7).await, Ok(42));
        assert_eq!(pool.run(|| panic!("boom")).await, Err::<(), _>(WorkError::Panicked { pool: "sign" }));
        let (release, held) = std::sync::mpsc::sync_channel::<()>(1);
        let mut first = Box::pin(pool.run(move || held.recv()));
        assert!(futures::poll!(first.as_mut()).is_pending());
        let mut second = Box::pin(pool.run(|| 1));
        assert!(futures::poll!(second.as_mut()).is_pending());
        assert_eq!(pool.permits.available_permits(), 0);
        release.send(()).unwrap();
        first.await.unwrap().unwrap();
        assert_eq!(second.await, Ok(1));
    }
}
