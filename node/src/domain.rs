//! Policy: what an operator may choose differently without breaking agreement.
//!
//! **Owns** the machines that decide: [`job`] (a validator's whole view of its jobs), [`schedule`] (which miners),
//! [`verify`] (which results agree), [`audit`] (how often to check, and the epochs' secrets), [`admission`] (whose jobs),
//! [`score`] (what an epoch's verdicts come to).
//!
//! **Does not own** anything that acts. Every machine has one shape, `handle(&mut self, input, now) -> outputs`: events
//! go in, data comes out, and a service performs it. Nothing here reads a clock, draws randomness of its own, touches a
//! socket or waits; time, seeds and secrets are arguments. So the simulator drives the very code that a node runs.

pub mod admission;
pub mod audit;
pub mod catalog;
pub mod job;
pub mod round;
pub mod schedule;
pub mod score;
pub mod verify;

use std::fmt;
use std::time::Duration;

use sundara_proto::id::Hotkey;
use sundara_proto::units::UnixMillis;

/// The two clocks of a node, read once by the service for each input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Monotonic time since some fixed point of this process. Deadlines inside the node use it.
    pub mono: Duration,
    /// Wall clock, for what is written down or compared with another node's word.
    pub wall: UnixMillis,
}

/// Who stands behind a miner: its coldkey where the chain tells it, else its hotkey. Replicas have distinct owners.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner(pub [u8; 32]);

impl From<Hotkey> for Owner {
    fn from(hotkey: Hotkey) -> Self {
        Self(hotkey.0)
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Owner({})", Hotkey(self.0))
    }
}
