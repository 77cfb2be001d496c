//! Wall limits: stops runs whose time is over, from one thread that sleeps otherwise.
//!
//! Owns real deadlines. They are the machine's and never decide a result, only that there is none. The thread is not
//! woken for a deadline later than the one it sleeps towards, so that a stream of jobs with one limit wakes it once in
//! that limit, and an idle node never. The caller's timers are not used: they may be paused, or stuck behind work.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use crate::control::RunControl;
use crate::outcome::AbortReason;

/// The thread and its deadlines.
pub(crate) struct Watchdog {
    shared: Arc<Shared>,
    started: Once,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Pokes the engine after a run's signal is set.
    interrupt: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct State {
    deadlines: BTreeMap<(Instant, u64), Arc<RunControl>>,
    /// What the thread sleeps towards; nothing while it sleeps for good.
    wake: Option<Instant>,
    next: u64,
    closed: bool,
}

/// Holds a deadline for as long as it lives.
pub(crate) struct Deadline {
    shared: Arc<Shared>,
    key: Option<(Instant, u64)>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self) {
        let mut state = self.lock();
        while !state.closed {
            let now = Instant::now();
            while let Some(due) = state.deadlines.first_entry().filter(|entry| entry.key().0 <= now) {
                due.remove().stop(AbortReason::WallClock);
                (self.interrupt)();
            }
            state.wake = state.deadlines.first_key_value().map(|((moment, _), _)| *moment);
            state = match state.wake {
                Some(moment) => {
                    let waited = self.changed.wait_timeout(state, moment.saturating_duration_since(now));
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl Watchdog {
    /// A watchdog whose thread starts with the first deadline.
    pub(crate) fn new(interrupt: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        let shared = Shared { state: Mutex::default(), changed: Condvar::new(), interrupt: Box::new(interrupt) };
        Arc::new(Self { shared: Arc::new(shared), started: Once::new() })
    }

    /// Stops a run when `wall` is over, unless the guard is dropped before. A limit beyond all clocks is none.
    pub(crate) fn guard(&self, wall: Duration, control: &Arc<RunControl>) -> Deadline {
        self.started.call_once(|| {
            let shared = Arc::clone(&self.shared);
            let spawned = std::thread::Builder::new().name("wall-limits".into()).spawn(move || shared.watch());
            if let Err(error) = spawned {
                tracing::error!(%error, "cannot start the thread that keeps wall limits");
            }
        });
        let key = Instant::now().checked_add(wall).map(|moment| {
            let mut state = self.shared.lock();
            let key = (moment, state.next);
            state.next += 1;
            state.deadlines.insert(key, Arc::clone(control));
            if state.wake.is_none_or(|wake| moment < wake) {
                self.shared.changed.notify_one();
            }
            key
        });
        Deadline { shared: Arc::clone(&self.shared), key }
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.shared.lock().deadlines.remove(&key);
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn the_earlier_deadline_fires_alone() {
        let pokes = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&pokes);
        let watchdog = Watchdog::new(move || {
            counted.fetch_add(1, Ordering::SeqCst);
        });
        let (late, soon, never) = (Arc::default(), Arc::default(), Arc::default());
        let _late = watchdog.guard(Duration::from_secs(3_600), &late);
        let _never = watchdog.guard(Duration::MAX, &never);
        let _soon = watchdog.guard(Duration::from_millis(1), &soon);
        assert_eq!(soon.wait(std::future::pending::<()>()), Err(AbortReason::WallClock));
        assert_eq!((late.stopped(), never.stopped()), (None, None));
    }

    #[test]
    fn a_guard_that_is_gone_stops_nothing() {
        let watchdog = Watchdog::new(|| ());
        let (gone, kept) = (Arc::default(), Arc::default());
        drop(watchdog.guard(Duration::from_millis(1), &gone));
        let _kept = watchdog.guard(Duration::from_millis(5), &kept);
        // The later one has fired, so the earlier one would have.
        assert!(kept.wait(std::future::pending::<()>()).is_err());
        assert_eq!(gone.stopped(), None);
    }
}
