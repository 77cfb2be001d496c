//! Deadlines of jobs and miners, in ticks.

use std::collections::BTreeMap;
use std::time::Duration;

use sundara_proto::id::{Hotkey, JobId};

/// Deadlines are rounded up to this, so that thousands of jobs share one wake-up and a node wakes at most 20 times a
/// second for them.
const TICK: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timer {
    /// Some deadline of a live job may have passed.
    Job(JobId),
    /// The id of a finished job need not be remembered.
    Forget(JobId),
    /// A miner's time off may be over.
    Wake(Hotkey),
    /// A miner's advert may have lapsed.
    Expire(Hotkey),
}

/// A calendar of timers. Timers are never taken back: one that fires for nothing is looked at and dropped.
#[derive(Debug, Default)]
pub(super) struct Wheel {
    ticks: BTreeMap<u64, Vec<Timer>>,
    announced: Option<u64>,
}

impl Wheel {
    pub(super) fn set(&mut self, at: Duration, timer: Timer) {
        let tick = u64::try_from(at.as_nanos().div_ceil(TICK.as_nanos())).unwrap_or(u64::MAX);
        self.ticks.entry(tick).or_default().push(timer);
    }

    /// Everything that is due.
    pub(super) fn due(&mut self, now: Duration) -> Vec<Timer> {
        let tick = u64::try_from(now.as_nanos() / TICK.as_nanos()).unwrap_or(u64::MAX);
        let mut due = Vec::new();
        while let Some(entry) = self.ticks.first_entry() {
            if *entry.key() > tick {
                break;
            }
            due.append(&mut entry.remove());
        }
        self.announced = None;
        due
    }

    /// When to wake, if that is news since the last call.
    pub(super) fn announce(&mut self) -> Option<Duration> {
        let first = *self.ticks.first_key_value()?.0;
        if self.announced.is_some_and(|announced| announced <= first) {
            return None;
        }
        self.announced = Some(first);
        let millis = u64::try_from(TICK.as_millis()).unwrap_or(u64::MAX).saturating_mul(first);
        Some(Duration::from_millis(millis))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_fire_once_and_only_an_earlier_one_is_announced() {
        let mut wheel = Wheel::default();
        let ms = Duration::from_millis;
        let timer = |i| Timer::Job(JobId([i; 32]));
        assert_eq!(wheel.announce(), None);
        wheel.set(ms(1_010), timer(1));
        assert_eq!(wheel.announce(), Some(ms(1_050)));
        wheel.set(ms(1_040), timer(2));
        wheel.set(ms(9_000), timer(3));
        assert_eq!(wheel.announce(), None);
        wheel.set(ms(100), timer(4));
        assert_eq!(wheel.announce(), Some(ms(100)));
        assert_eq!(wheel.due(ms(99)), []);
        assert_eq!(wheel.announce(), Some(ms(100)), "a wake-up that came too early is asked for again");
        assert_eq!(wheel.due(ms(1_050)), [timer(4), timer(1), timer(2)]);
        assert_eq!(wheel.announce(), Some(ms(9_000)));
    }
}
