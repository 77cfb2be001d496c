//! A cap on bytes a second, shared by all streams of one direction.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// How far sending may run ahead of the rate: long enough to bridge a scheduler's pause, short enough not to show.
const BURST: Duration = Duration::from_millis(100);

/// Smallest and largest quantum: a slow cap shared by many streams must still move each often enough that none counts as
/// stalled; a fast one must not cost a timer a frame.
const QUANTUM_MIN: usize = 16 << 10;
const QUANTUM_MAX: usize = 256 << 10;

/// Lets bytes through at a rate, in the order in which they ask.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Bytes a second; `None` for no cap.
    rate: Option<u64>,
    /// When everything let through so far would be sent at the rate.
    paid_until: Mutex<Option<Instant>>,
}

impl Pace {
    /// `bytes_per_s` of 0 means no cap.
    pub(crate) fn new(bytes_per_s: u64) -> Self {
        Self { rate: (bytes_per_s > 0).then_some(bytes_per_s), paid_until: Mutex::new(None) }
    }

    /// Bytes to ask for at once.
    pub(crate) fn quantum(&self) -> usize {
        self.rate.map_or(QUANTUM_MAX, |rate| {
            usize::try_from(rate / 20).unwrap_or(QUANTUM_MAX).clamp(QUANTUM_MIN, QUANTUM_MAX)
        })
    }

    /// Waits until `bytes` may pass. Dropping the future forfeits them.
    pub(crate) async fn pass(&self, bytes: usize) {
        let Some(rate) = self.rate else { return };
        let wait_until = {
            let mut paid = self.paid_until.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let from = paid.map_or(now, |at| at.max(now));
            *paid = Some(from + Duration::from_secs_f64(bytes as f64 / rate as f64));
            from.checked_sub(BURST)
        };
        if let Some(at) = wait_until {
            sleep_until(at).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn many_streams_share_one_rate() {
        let pace = Arc::new(Pace::new(1_000_000));
        let start = Instant::now();
        let streams: Vec<_> = (0..4)
            .map(|_| {
                let pace = pace.clone();
                tokio::spawn(async move {
                    for _ in 0..25 {
                        pace.pass(50_000).await;
                    }
                })
            })
            .collect();
        for stream in streams {
            assert!(stream.await.is_ok());
        }
        let took = start.elapsed().as_secs_f64();
        assert!((4.8..5.1).contains(&took), "5 MB at 1 MB/s took {took} s");
    }

    #[tokio::test(start_paused = true)]
    async fn idle_time_is_not_saved_up() {
        let pace = Pace::new(1_000_000);
        tokio::time::sleep(Duration::from_secs(60)).await;
        let start = Instant::now();
        for _ in 0..10 {
            pace.pass(100_000).await;
        }
        assert!(start.elapsed() >= Duration::from_millis(790));
    }

    #[tokio::test(start_paused = true)]
    async fn no_cap_waits_for_nothing() {
        let pace = Pace::new(0);
        let start = Instant::now();
        pace.pass(usize::MAX).await;
        assert_eq!(start.elapsed(), Duration::ZERO);
    }
}
