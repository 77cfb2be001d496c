//! Units as types, so that two numbers of one kind cannot be mixed up.

use std::fmt;
use std::num::NonZeroU64;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteCount(pub u64);

impl ByteCount {
    /// `n` x 1,024 bytes.
    pub const fn kib(n: u64) -> Self {
        Self(n * 1024)
    }
    /// `n` x 1,048,576 bytes.
    pub const fn mib(n: u64) -> Self {
        Self(n * 1024 * 1024)
    }
    /// `n` x 2^30 bytes.
    pub const fn gib(n: u64) -> Self {
        Self(n * 1024 * 1024 * 1024)
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
        for (unit, size) in UNITS {
            if self.0 >= size {
                let tenths = self.0 / (size / 10).max(1);
                return if self.0.is_multiple_of(size) {
                    write!(f, "{} {unit}", self.0 / size)
                } else {
                    write!(f, "{}.{} {unit}", tenths / 10, tenths % 10)
                };
            }
        }
        write!(f, "{} B", self.0)
    }
}

/// Milliseconds since the Unix epoch, from some node's wall clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixMillis(pub u64);

impl UnixMillis {
    /// How far two wall clocks may differ before it is named as an error.
    pub const SKEW_MAX: Duration = Duration::from_secs(2);

    /// This time plus `d`, saturating.
    pub fn plus(self, d: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(d.as_millis()).unwrap_or(u64::MAX)))
    }
    /// From this time to `later`; zero when `later` is earlier.
    pub fn until(self, later: Self) -> Duration {
        Duration::from_millis(later.0.saturating_sub(self.0))
    }
}

/// How long an epoch lasts where no chain counts blocks, in milliseconds. One of the whole mesh: nodes that differ in it
/// count different epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EpochLength(NonZeroU64);

impl EpochLength {
    /// So many milliseconds; `None` for zero.
    pub fn from_ms(ms: u64) -> Option<Self> {
        NonZeroU64::new(ms).map(Self)
    }
    /// The epoch of a moment: floor(unix_ms / length).
    pub fn epoch(self, at: UnixMillis) -> u64 {
        at.0 / self.0
    }
    /// When an epoch begins; saturating.
    pub fn begin(self, epoch: u64) -> UnixMillis {
        UnixMillis(epoch.saturating_mul(self.0.get()))
    }
    /// How long it lasts.
    pub fn duration(self) -> Duration {
        Duration::from_millis(self.0.get())
    }
}

impl Default for EpochLength {
    /// Ten minutes, as protocol.md has it.
    fn default() -> Self {
        const TEN_MINUTES: NonZeroU64 = match NonZeroU64::new(600_000) {
            Some(ms) => ms,
            None => NonZeroU64::MIN,
        };
        Self(TEN_MINUTES)
    }
}

/// Height of a block of the chain; 0 where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockNumber(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_are_counted_from_1970() {
        let epochs = EpochLength::default();
        assert_eq!(epochs.duration(), Duration::from_secs(600));
        assert_eq!(epochs.epoch(UnixMillis(1_750_000_000_000)), 2_916_666);
        assert_eq!(epochs.begin(2_916_666), UnixMillis(1_749_999_600_000));
        assert_eq!(EpochLength::from_ms(0), None);
    }

    #[test]
    fn byte_counts_read_well() {
        for (bytes, text) in
            [(5, "5 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (1 << 30, "1 GiB"), (256 << 20, "256 MiB")]
        {
            assert_eq!(ByteCount(bytes).to_string(), text);
        }
    }
}
