//! Joining: every configured address is tried for ever, and what failed is said.
//!
//! Each address stands alone: one that works does not stop the others, since joining through one only can split a mesh in
//! two. Sans-IO: the loop dials and reports.

use std::time::Duration;

use libp2p::multiaddr::Protocol;
use libp2p::swarm::ConnectionId;
use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use super::status::BootstrapStatus;

/// Longest wait between two attempts.
const RETRY_MAX: Duration = Duration::from_secs(60);
/// Repeats of one error are logged at the 1st, 2nd, 4th, 8th ... attempt.
const fn is_logged(attempt: u64) -> bool {
    attempt.is_power_of_two()
}

#[derive(Debug)]
struct Entry {
    address: Multiaddr,
    /// Named in the address, or learnt by connecting.
    peer: Option<PeerId>,
    dialling: Option<ConnectionId>,
    connected: bool,
    attempts: u64,
    delay: Duration,
    next: Instant,
    last_error: Option<String>,
}

/// All addresses to join through.
#[derive(Debug)]
pub(super) struct Bootstrap {
    entries: Vec<Entry>,
    first: Duration,
}

impl Bootstrap {
    pub(super) fn new(addresses: &[Multiaddr], first: Duration, now: Instant) -> Self {
        let entry = |address: &Multiaddr| Entry {
            address: address.clone(),
            peer: peer_of(address),
            dialling: None,
            connected: false,
            attempts: 0,
            delay: first,
            next: now,
            last_error: None,
        };
        Self { entries: addresses.iter().map(entry).collect(), first }
    }

    /// Addresses whose turn it is. Each must be followed by [`Bootstrap::on_dialling`] or [`Bootstrap::on_failed`].
    pub(super) fn due(&self, now: Instant) -> Vec<(usize, Multiaddr)> {
        let due = |e: &Entry| !e.connected && e.dialling.is_none() && e.next <= now;
        self.entries.iter().enumerate().filter(|(_, e)| due(e)).map(|(i, e)| (i, e.address.clone())).collect()
    }

    pub(super) fn on_dialling(&mut self, index: usize, connection: ConnectionId) {
        if let Some(entry) = self.entries.get_mut(index) {
            entry.dialling = Some(connection);
            entry.attempts += 1;
        }
    }

    /// The dial at once came to nothing, for instance because the address cannot be dialled at all.
    pub(super) fn on_not_dialled(&mut self, index: usize, reason: String, now: Instant) {
        if let Some(entry) = self.entries.get_mut(index) {
            entry.attempts += 1;
            entry.fail(reason, now);
        }
    }

    /// A connection could not be made, or ended before both sides were certified.
    pub(super) fn on_failed(&mut self, connection: ConnectionId, reason: &str, now: Instant) {
        if let Some(entry) = self.entries.iter_mut().find(|e| e.dialling == Some(connection)) {
            entry.fail(reason.to_owned(), now);
        }
    }

    /// The address answered as this peer.
    pub(super) fn on_established(&mut self, connection: ConnectionId, peer: PeerId) {
        if let Some(entry) = self.entries.iter_mut().find(|e| e.dialling == Some(connection)) {
            entry.peer = Some(peer);
        }
    }

    /// Both sides are certified, whoever dialled.
    pub(super) fn on_certified(&mut self, peer: PeerId) {
        for entry in self.entries.iter_mut().filter(|e| e.peer == Some(peer)) {
            if !entry.connected {
                tracing::info!(address = %entry.address, attempts = entry.attempts, "bootstrap connected");
            }
            entry.connected = true;
            entry.dialling = None;
            entry.attempts = 0;
            entry.delay = self.first;
            entry.last_error = None;
        }
    }

    /// The last connection to the peer ended.
    pub(super) fn on_gone(&mut self, peer: PeerId, reason: &str, now: Instant) {
        for entry in self.entries.iter_mut().filter(|e| e.peer == Some(peer)) {
            if entry.connected || entry.dialling.is_some() {
                entry.connected = false;
                entry.fail(reason.to_owned(), now);
            }
        }
    }

    pub(super) fn status(&self) -> Vec<BootstrapStatus> {
        let status = |e: &Entry| BootstrapStatus {
            address: e.address.to_string(),
            connected: e.connected,
            attempts: e.attempts,
            last_error: e.last_error.clone(),
        };
        self.entries.iter().map(status).collect()
    }
}

impl Entry {
    fn fail(&mut self, reason: String, now: Instant) {
        self.dialling = None;
        // A quarter of jitter keeps a mesh that lost its bootstrap from coming back all at once.
        let jitter = self.delay.mul_f64(rand::random_range(0.0..0.25));
        self.next = now + self.delay + jitter;
        let news = self.last_error.as_ref() != Some(&reason);
        if news || is_logged(self.attempts) {
            let retry_in = self.delay;
            tracing::warn!(address = %self.address, %reason, attempts = self.attempts, ?retry_in, "bootstrap failed");
        }
        self.delay = (self.delay * 2).min(RETRY_MAX);
        self.last_error = Some(reason);
    }
}

/// The peer that an address names.
pub(super) fn peer_of(address: &Multiaddr) -> Option<PeerId> {
    match address.iter().last()? {
        Protocol::P2p(peer) => Some(peer),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_address_is_tried_for_ever_and_says_why_it_failed() {
        let addresses = ["/ip4/192.0.2.1/tcp/1", "/ip4/192.0.2.2/tcp/1"].map(|a| a.parse().unwrap());
        let mut now = Instant::now();
        let mut bootstrap = Bootstrap::new(&addresses, Duration::from_secs(1), now);
        assert_eq!(bootstrap.due(now).len(), 2);
        for attempt in 1..=200_u64 {
            let connection = ConnectionId::new_unchecked(attempt as usize);
            bootstrap.on_dialling(0, connection);
            assert!(bootstrap.due(now).iter().all(|(i, _)| *i == 1), "not dialled twice at once");
            bootstrap.on_failed(connection, "connection refused", now);
            assert_eq!(bootstrap.status()[0].attempts, attempt);
            assert_eq!(bootstrap.status()[0].last_error.as_deref(), Some("connection refused"));
            now += RETRY_MAX * 2;
            assert_eq!(bootstrap.due(now)[0].0, 0, "attempt {attempt} is followed by another");
        }
        assert_eq!(
            bootstrap.status()[1],
            BootstrapStatus { address: "/ip4/192.0.2.2/tcp/1".into(), connected: false, attempts: 0, last_error: None }
        );
    }

    #[test]
    fn a_lost_bootstrap_is_tried_again() {
        let (peer, now) = (PeerId::random(), Instant::now());
        let address: Multiaddr = format!("/ip4/192.0.2.1/tcp/1/p2p/{peer}").parse().unwrap();
        let mut bootstrap = Bootstrap::new(&[address], Duration::from_secs(1), now);
        bootstrap.on_dialling(0, ConnectionId::new_unchecked(1));
        bootstrap.on_certified(peer);
        assert!(bootstrap.status()[0].connected);
        bootstrap.on_gone(peer, "connection lost", now);
        assert!(bootstrap.due(now).is_empty());
        assert_eq!(bootstrap.due(now + Duration::from_secs(2)).len(), 1);
    }
}
