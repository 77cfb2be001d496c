//! Gossip and the worker that checks it, and DHT records with it.

use std::sync::Arc;

use bytes::Bytes;
use libp2p::PeerId;
use libp2p::gossipsub::{self, MessageAcceptance, MessageId};
use libp2p::kad;
use sundara_proto::names::Topic;
use tokio::sync::mpsc;

use super::{NetDriver, Shared, TaskEnd};
use crate::net::behaviour;
use crate::net::dht::{self, Checked};
use crate::net::gossip::{GossipError, GossipMessage, Judgement, judge};
use crate::net::id::node_id;

/// Messages waiting to be checked: at 40 us each the last waits 40 ms. Beyond, they are ignored.
pub(super) const QUEUE: usize = 1024;

/// Something with a signature to check.
#[derive(Debug)]
pub(super) enum Work {
    Gossip { topic: Topic, id: MessageId, from: PeerId, data: Bytes },
    Record { from: PeerId, record: kad::Record },
}

/// What came of it.
#[derive(Debug)]
pub(super) enum Judged {
    Gossip { id: MessageId, from: PeerId, acceptance: MessageAcceptance },
    Record { from: PeerId, record: kad::Record, checked: Result<Box<Checked>, &'static str> },
}

/// Checks one thing after the other, and lets other tasks run in between.
pub(super) async fn worker(shared: Arc<Shared>, mut queue: mpsc::Receiver<Work>, results: mpsc::Sender<TaskEnd>) {
    while let Some(work) = queue.recv().await {
        let judged = match work {
            Work::Gossip { topic, id, from, data } => {
                Judged::Gossip { acceptance: deliver(&shared, topic, from, data), id, from }
            }
            Work::Record { from, record } => {
                let checked = dht::check(&shared.network, record.key.as_ref(), &record.value, dht::wall_clock());
                Judged::Record { from, record, checked: checked.map(Box::new) }
            }
        };
        if results.send(TaskEnd::Judged(judged)).await.is_err() {
            return;
        }
        // A signature takes 40 us of this thread; several in a row would hold up the loop where they share one.
        tokio::task::yield_now().await;
    }
}

fn deliver(shared: &Shared, topic: Topic, from: PeerId, data: Bytes) -> MessageAcceptance {
    let metrics = &shared.metrics;
    match judge(&shared.network, topic, data, dht::wall_clock()) {
        Judgement::Accept(payload) => {
            metrics.gossip_delivered.inc();
            if let Some(from) = node_id(&from) {
                shared.subscribers.deliver(topic, &GossipMessage { from, payload }, metrics);
            }
            MessageAcceptance::Accept
        }
        Judgement::Reject(fault) => {
            metrics.gossip_rejected.inc();
            tracing::debug!(peer = %from, ?topic, %fault, "gossip rejected");
            MessageAcceptance::Reject
        }
        Judgement::Ignore(why) => {
            metrics.gossip_ignored.inc();
            tracing::trace!(peer = %from, ?topic, why, "gossip ignored");
            MessageAcceptance::Ignore
        }
    }
}

impl NetDriver {
    pub(super) fn on_gossip(&mut self, event: gossipsub::Event) {
        let gossipsub::Event::Message { propagation_source: from, message_id: id, message } = event else { return };
        let network = self.shared.network;
        let topic = Topic::ALL.into_iter().find(|t| behaviour::topic(&network, *t).hash() == message.topic);
        let work = topic.map(|topic| Work::Gossip { topic, id: id.clone(), from, data: message.data.into() });
        if work.is_none_or(|work| self.judge.try_send(work).is_err()) {
            self.shared.metrics.gossip_ignored.inc();
            self.report(&id, &from, MessageAcceptance::Ignore);
        }
    }

    fn report(&mut self, id: &MessageId, from: &PeerId, acceptance: MessageAcceptance) {
        self.swarm.behaviour_mut().gossip.inner.report_message_validation_result(id, from, acceptance);
    }

    pub(super) fn on_judged(&mut self, judged: Judged) {
        match judged {
            Judged::Gossip { id, from, acceptance } => self.report(&id, &from, acceptance),
            Judged::Record { from, record, checked } => self.on_record_checked(from, record, checked),
        }
    }

    pub(super) fn subscribe(&mut self, topic: Topic) {
        let topic = behaviour::topic(&self.shared.network, topic);
        if let Err(error) = self.swarm.behaviour_mut().gossip.inner.subscribe(&topic) {
            tracing::warn!(%topic, %error, "cannot subscribe");
        }
    }

    /// Leaves the topics to which nobody listens any more.
    pub(super) fn unsubscribe_idle(&mut self) {
        for topic in Topic::ALL {
            if !self.shared.subscribers.wanted(topic) {
                let topic = behaviour::topic(&self.shared.network, topic);
                self.swarm.behaviour_mut().gossip.inner.unsubscribe(&topic);
            }
        }
    }

    pub(super) fn publish(&mut self, topic: Topic, data: Bytes) -> Result<(), GossipError> {
        use gossipsub::PublishError as E;
        let topic = behaviour::topic(&self.shared.network, topic);
        match self.swarm.behaviour_mut().gossip.inner.publish(topic, data) {
            Ok(_) => Ok(()),
            Err(E::NoPeersSubscribedToTopic) => Err(GossipError::NoPeers),
            Err(E::Duplicate) => Err(GossipError::Duplicate),
            Err(error) => Err(GossipError::Publish(error.to_string())),
        }
    }
}
