//! Certificates by which an owner vouches for its executors.
//!
//! Owns signing and renewing. A certificate lives for a day and is renewed when half of it has passed, so that an owner
//! that is away for some hours takes none of its executors out of work.

use std::time::Duration;

use sundara_proto::attestation::ExecutorCert;
use sundara_proto::crypto::{HotkeyPair, Network, Signed};
use sundara_proto::id::NodeId;
use sundara_proto::units::UnixMillis;
use tokio::sync::watch;

use crate::service::{Tasks, wall_now};

/// Life of a certificate (protocol.md).
pub(crate) const CERT_LIFE: Duration = Duration::from_secs(24 * 3600);
/// Age at which it is renewed.
pub(crate) const CERT_RENEW_AFTER: Duration = Duration::from_secs(12 * 3600);
/// Certificates are dated back by this, so that a verifier whose clock is behind by the allowed skew takes them at once.
const CERT_BACKDATE: Duration = UnixMillis::SKEW_MAX;

/// Where an executor finds its present certificate; `None` until it has one.
pub(crate) type CertSlot = watch::Receiver<Option<Signed<ExecutorCert>>>;

/// Signs a certificate of one day.
pub(crate) fn issue(
    network: &Network,
    owner: &HotkeyPair,
    executor: NodeId,
    hardware_class: &str,
    now: UnixMillis,
) -> Signed<ExecutorCert> {
    let issued_at = UnixMillis(now.0.saturating_sub(u64::try_from(CERT_BACKDATE.as_millis()).unwrap_or(0)));
    let cert = ExecutorCert {
        network: *network,
        executor,
        hardware_class: hardware_class.to_owned(),
        issued_at,
        expires_at: issued_at.plus(CERT_LIFE),
    };
    Signed::sign(network, owner, cert)
}

/// Vouches for the executor inside this node, and renews that until the tasks end.
pub(crate) fn keep_own(
    network: Network,
    owner: HotkeyPair,
    executor: NodeId,
    hardware_class: &str,
    tasks: &Tasks,
) -> CertSlot {
    let class = hardware_class.to_owned();
    let (tx, rx) = watch::channel(Some(issue(&network, &owner, executor, &class, wall_now())));
    let token = tasks.token();
    tasks.spawn("executor-cert", async move {
        loop {
            tokio::select! {
                () = token.cancelled() => return,
                () = tokio::time::sleep(CERT_RENEW_AFTER) => {}
            }
            tx.send_replace(Some(issue(&network, &owner, executor, &class, wall_now())));
        }
    });
    rx
}
