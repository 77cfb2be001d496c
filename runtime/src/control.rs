//! Stopping a run from outside, and waiting on a worker thread for something asynchronous.
//!
//! Owns the stop signal of one run. Does not own wall limits ([`crate::watchdog`]) nor the way
//! a backend notices (wasm: an engine epoch; host calls and builtin jobs: they ask).

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use tokio_util::sync::CancellationToken;

use crate::outcome::AbortReason;

const RUNNING: u8 = 0;
const WALL_CLOCK: u8 = 1;
const CANCELLED: u8 = 2;

/// The stop signal of one run. The first reason given stands.
#[derive(Debug, Default)]
pub(crate) struct RunControl {
    reason: AtomicU8,
    wake: CancellationToken,
}

impl RunControl {
    /// Asks the run to stop.
    pub(crate) fn stop(&self, reason: AbortReason) {
        let code = match reason {
            AbortReason::WallClock => WALL_CLOCK,
            AbortReason::Cancelled => CANCELLED,
        };
        let _ = self.reason.compare_exchange(RUNNING, code, Ordering::AcqRel, Ordering::Acquire);
        self.wake.cancel();
    }

    /// Why the run has to stop, if it has to.
    pub(crate) fn stopped(&self) -> Option<AbortReason> {
        match self.reason.load(Ordering::Acquire) {
            RUNNING => None,
            WALL_CLOCK => Some(AbortReason::WallClock),
            _ => Some(AbortReason::Cancelled),
        }
    }

    /// Blocks this thread until `future` is done, or the run is stopped.
    pub(crate) fn wait<F: Future>(&self, future: F) -> Result<F::Output, AbortReason> {
        let done = block_on(async {
            tokio::select! {
                biased;
                () = self.wake.cancelled() => None,
                output = future => Some(output),
            }
        });
        done.ok_or_else(|| self.stopped().unwrap_or(AbortReason::Cancelled))
    }
}

/// Stops the run when dropped: a caller that drops the future of a run leaves no work behind.
struct StopOnDrop<'a, I: Fn()> {
    control: &'a RunControl,
    interrupt: I,
    armed: bool,
}

impl<I: Fn()> StopOnDrop<'_, I> {
    fn stop(&self, reason: AbortReason) {
        self.control.stop(reason);
        (self.interrupt)();
    }
}

impl<I: Fn()> Drop for StopOnDrop<'_, I> {
    fn drop(&mut self) {
        if self.armed {
            self.stop(AbortReason::Cancelled);
        }
    }
}

/// Awaits `work`, which runs elsewhere, and stops it on cancellation; it then still waits for it to notice.
/// `interrupt` pokes the engine after the signal is set.
pub(crate) async fn drive<T>(
    control: &Arc<RunControl>,
    cancel: &CancellationToken,
    interrupt: impl Fn(),
    work: impl Future<Output = T>,
) -> T {
    let mut work = pin!(work);
    let mut guard = StopOnDrop { control, interrupt, armed: true };
    let done = tokio::select! {
        biased;
        done = &mut work => done,
        () = cancel.cancelled() => {
            guard.stop(AbortReason::Cancelled);
            work.await
        }
    };
    guard.armed = false;
    done
}

/// Wakes a parked thread.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Polls a future to its end on this thread. The future must not need an I/O or timer driver.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let waker: Waker = Arc::new(Unpark(std::thread::current())).into();
    let mut context = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_stands() {
        let control = RunControl::default();
        assert_eq!(control.stopped(), None);
        control.stop(AbortReason::WallClock);
        control.stop(AbortReason::Cancelled);
        assert_eq!(control.stopped(), Some(AbortReason::WallClock));
        assert_eq!(control.wait(std::future::pending::<()>()), Err(AbortReason::WallClock));
    }

    #[tokio::test]
    async fn a_dropped_drive_stops_the_run() {
        let control = Arc::new(RunControl::default());
        let cancel = CancellationToken::new();
        let mut driven = Box::pin(drive(&control, &cancel, || (), std::future::pending::<()>()));
        assert!(futures_poll_once(driven.as_mut()).is_pending());
        drop(driven);
        assert_eq!(control.stopped(), Some(AbortReason::Cancelled));
    }

    fn futures_poll_once<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }
}
