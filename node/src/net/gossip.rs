//! Gossip: what is on the topics, and the worker that checks it before it is passed on.
//!
//! Owns parsing and verification of every message, and delivery to subscribers. Does not own the mesh (gossipsub) nor
//! what a message leads to (services).
//!
//! ```text
//! gossipsub --Message--> event loop --try_send--> worker: sizes, form, signatures (proto)
//!     ^                                              |  accepted: subscribers (try_send)
//!     '--- report: accept / reject / ignore <--------'
//! ```
//!
//! Invariants: nothing is forwarded before it is verified. Rejected, which costs the sender its score, is only what
//! anyone can check for himself; what depends on our clock or on our load is ignored without blame. Signature checks run
//! in the worker, one at a time, so that a flood of them cannot stall the loop; when its queue is full, messages are
//! ignored and counted.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use prost::Message as _;
use sundara_proto::advert::Advert;
use sundara_proto::batch::{AuditEpoch, Batch, FraudProof};
use sundara_proto::crypto::{Network, Payload, Signed, SignedError};
use sundara_proto::id::NodeId;
use sundara_proto::job::JobSpec;
pub use sundara_proto::names::Topic;
use sundara_proto::pb;
use sundara_proto::units::UnixMillis;
use sundara_proto::wire::{self, WireError, limit};
use tokio::sync::mpsc;

use super::metrics::NetMetrics;

/// Messages waiting for one subscriber.
const SUBSCRIBER_QUEUE: usize = 1024;
/// Subscribers of one topic.
const SUBSCRIBERS_MAX: usize = 64;

/// A verified message.
#[derive(Clone, Debug)]
pub struct GossipMessage {
    /// The neighbour that passed it on; this node itself for its own messages.
    pub from: NodeId,
    /// What it says, signatures checked.
    pub payload: GossipPayload,
}

/// Everything that rides on the topics, parsed and with its signatures checked.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum GossipPayload {
    /// A request that no validator took directly.
    Job {
        /// The job.
        spec: Signed<JobSpec>,
        /// Its whole input, where it is small.
        inline_input: Option<Bytes>,
        /// The requester leaves before the result.
        announce: bool,
    },
    /// What a node offers.
    Advert(Signed<Advert>),
    /// A signed root of a page.
    Batch(Signed<Batch>),
    /// A validator's audit commitment.
    AuditEpoch(Signed<AuditEpoch>),
    /// A result that its signers cannot defend. Its inner signatures are checked too.
    FraudProof(Signed<FraudProof>),
}

/// Why a message was not published.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum GossipError {
    /// It would be refused by every peer.
    #[error("message is not valid on this topic: {0}")]
    Invalid(#[from] Fault),
    /// Nobody to send it to; this node's own subscribers got it.
    #[error("no connected peer listens to this topic")]
    NoPeers,
    /// The same bytes were published a short while ago.
    #[error("the same message was published already")]
    Duplicate,
    /// gossipsub would not take it.
    #[error("cannot publish: {0}")]
    Publish(String),
    /// The node is shutting down.
    #[error("network is shut down")]
    Closed,
}

/// What is wrong with a message. Anyone can check each of these.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// Too large, or not decodable.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A signature or a signed payload.
    #[error(transparent)]
    Signed(#[from] SignedError),
    /// On the wrong topic.
    #[error("this kind of message does not belong on this topic")]
    WrongTopic,
    /// For another mesh.
    #[error("message is for another mesh")]
    WrongNetwork,
    /// The input is not the one that the spec names.
    #[error("inline input is not the one that the job names")]
    WrongInput,
    /// A proof that proves nothing.
    #[error("fraud proof does not hold")]
    NoProof,
}

/// What a node does with a message.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)]
pub(super) enum Judgement {
    Accept(GossipPayload),
    /// Wrong for everyone.
    Reject(Fault),
    /// Not for us to pass on now; nobody is to blame.
    Ignore(&'static str),
}

/// Largest message on a topic.
pub(super) fn size_limit(topic: Topic) -> usize {
    match topic {
        Topic::Jobs => limit::GOSSIP_JOB,
        Topic::Adverts | Topic::Batches | Topic::Audits | Topic::Proofs => limit::GOSSIP,
    }
}

/// Checks a message completely. `now` decides only what is ignored, never what is rejected.
pub(super) fn judge(network: &Network, topic: Topic, data: Bytes, now: UnixMillis) -> Judgement {
    match parse(network, topic, data, |network, raw| Verifier { network }.signed_kind(raw)) {
        Err(fault) => Judgement::Reject(fault),
        Ok(payload) => match stale(&payload, now) {
            Some(why) => Judgement::Ignore(why),
            None => Judgement::Accept(payload),
        },
    }
}

/// A message of our own: its form is checked, its signatures are ours.
pub(super) fn check_own(network: &Network, topic: Topic, data: Bytes) -> Result<GossipPayload, Fault> {
    parse(network, topic, data, |_, raw| Trusting.signed_kind(raw))
}

/// The signed part of a message, by kind.
enum SignedKind {
    Job(pb::JobRequest),
    Advert(pb::Signed),
    Batch(pb::Signed),
    AuditEpoch(pb::Signed),
    FraudProof(pb::Signed),
}

/// How signatures are dealt with: checked for peers, trusted for ourselves.
trait Check {
    fn open<T: Payload>(&self, raw: pb::Signed) -> Result<Signed<T>, SignedError>;
    fn holds(&self, proof: &Signed<FraudProof>) -> bool;

    fn signed_kind(&self, kind: SignedKind) -> Result<GossipPayload, Fault> {
        Ok(match kind {
            SignedKind::Job(raw) => {
                let spec = self.open::<JobSpec>(wire::required(raw.spec, "spec")?)?;
                GossipPayload::Job { spec, inline_input: raw.inline_input, announce: raw.announce }
            }
            SignedKind::Advert(raw) => GossipPayload::Advert(self.open(raw)?),
            SignedKind::Batch(raw) => GossipPayload::Batch(self.open(raw)?),
            SignedKind::AuditEpoch(raw) => GossipPayload::AuditEpoch(self.open(raw)?),
            SignedKind::FraudProof(raw) => {
                let proof = self.open::<FraudProof>(raw)?;
                if !self.holds(&proof) {
                    return Err(Fault::NoProof);
                }
                GossipPayload::FraudProof(proof)
            }
        })
    }
}

struct Verifier<'a> {
    network: &'a Network,
}

impl Check for Verifier<'_> {
    fn open<T: Payload>(&self, raw: pb::Signed) -> Result<Signed<T>, SignedError> {
        Signed::verify(self.network, raw)
    }
    fn holds(&self, proof: &Signed<FraudProof>) -> bool {
        proof.check().is_some()
    }
}

struct Trusting;

impl Check for Trusting {
    fn open<T: Payload>(&self, raw: pb::Signed) -> Result<Signed<T>, SignedError> {
        Ok(Signed::trusted(raw)?)
    }
    fn holds(&self, _: &Signed<FraudProof>) -> bool {
        true
    }
}

fn parse(
    network: &Network,
    topic: Topic,
    data: Bytes,
    open: impl FnOnce(&Network, SignedKind) -> Result<GossipPayload, Fault>,
) -> Result<GossipPayload, Fault> {
    use pb::gossip::Kind;
    let raw: pb::Gossip = wire::decode_raw(data, size_limit(topic))?;
    let kind = match (topic, wire::required(raw.kind, "kind")?) {
        (Topic::Jobs, Kind::Job(raw)) => SignedKind::Job(raw),
        (Topic::Adverts, Kind::Advert(raw)) => SignedKind::Advert(raw),
        (Topic::Batches, Kind::Batch(raw)) => SignedKind::Batch(raw),
        (Topic::Audits, Kind::AuditEpoch(raw)) => SignedKind::AuditEpoch(raw),
        (Topic::Proofs, Kind::FraudProof(raw)) => SignedKind::FraudProof(raw),
        _ => return Err(Fault::WrongTopic),
    };
    let payload = open(network, kind)?;
    let named = match &payload {
        GossipPayload::Job { spec, inline_input, .. } => {
            let right = |input: &Bytes| {
                input.len() as u64 == spec.input_len.0 && sundara_proto::id::BlobId::of(input) == spec.input
            };
            if !inline_input.as_ref().is_none_or(right) {
                return Err(Fault::WrongInput);
            }
            spec.network
        }
        GossipPayload::Advert(advert) => advert.network,
        GossipPayload::Batch(batch) => batch.network,
        GossipPayload::AuditEpoch(audit) => audit.network,
        GossipPayload::FraudProof(proof) => proof.network,
    };
    if named == *network { Ok(payload) } else { Err(Fault::WrongNetwork) }
}

/// Whether a message is out of date by our clock. Another's may differ, so nobody is blamed.
fn stale(payload: &GossipPayload, now: UnixMillis) -> Option<&'static str> {
    let ahead = now.plus(UnixMillis::SKEW_MAX);
    match payload {
        GossipPayload::Job { spec, .. } if spec.not_after < now => Some("job is past its time"),
        GossipPayload::Job { spec, .. } if spec.not_after > ahead.plus(JobSpec::NOT_AFTER_MAX) => {
            Some("job is dated too far ahead")
        }
        GossipPayload::Advert(advert) if advert.expires_at < now => Some("advert has expired"),
        GossipPayload::Advert(advert) if advert.issued_at > ahead => Some("advert is dated ahead"),
        GossipPayload::Batch(batch) if batch.issued_at > ahead => Some("batch is dated ahead"),
        _ => None,
    }
}

/// Who listens to what. Shared by the worker, and by the handle for messages of our own.
#[derive(Debug, Default)]
pub(super) struct Subscribers {
    topics: Mutex<HashMap<Topic, Vec<mpsc::Sender<GossipMessage>>>>,
    /// Topics whose messages this node passes on although it does nothing with them.
    carried: Mutex<HashSet<Topic>>,
}

impl Subscribers {
    pub(super) fn add(&self, topic: Topic) -> mpsc::Receiver<GossipMessage> {
        let (sender, receiver) = mpsc::channel(SUBSCRIBER_QUEUE);
        let mut topics = self.topics.lock().unwrap_or_else(PoisonError::into_inner);
        let senders = topics.entry(topic).or_default();
        senders.retain(|s| !s.is_closed());
        debug_assert!(senders.len() < SUBSCRIBERS_MAX, "services subscribe once");
        senders.push(sender);
        receiver
    }

    /// Hands a message on without waiting: a slow subscriber loses it.
    pub(super) fn deliver(&self, topic: Topic, message: &GossipMessage, metrics: &NetMetrics) {
        let mut topics = self.topics.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(senders) = topics.get_mut(&topic) else { return };
        senders.retain(|sender| match sender.try_send(message.clone()) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                metrics.gossip_lagged.inc();
                true
            }
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        });
    }

    pub(super) fn carry(&self, topic: Topic) {
        self.carried.lock().unwrap_or_else(PoisonError::into_inner).insert(topic);
    }

    /// Whether anyone listens to a topic, or it is carried for others.
    pub(super) fn wanted(&self, topic: Topic) -> bool {
        if self.carried.lock().unwrap_or_else(PoisonError::into_inner).contains(&topic) {
            return true;
        }
        let topics = self.topics.lock().unwrap_or_else(PoisonError::into_inner);
        topics.get(&topic).is_some_and(|senders| senders.iter().any(|s| !s.is_closed()))
    }
}

/// Encodes a message of our own and checks that peers would take it.
pub(super) fn encode_own(
    network: &Network,
    topic: Topic,
    gossip: &pb::Gossip,
) -> Result<(Bytes, GossipPayload), GossipError> {
    let data = Bytes::from(gossip.encode_to_vec());
    let payload = check_own(network, topic, data.clone())?;
    Ok((data, payload))
}

/// Shared pointer to the subscribers.
pub(super) type SharedSubscribers = Arc<Subscribers>;
