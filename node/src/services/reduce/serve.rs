//! What peers ask of this node: to join a group, to lead a round, to sum.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use sundara_proto::crypto::Signed;
use sundara_proto::id::NodeId;
use sundara_proto::pb;
use sundara_proto::pb::round_frame::Kind as Frame;
use sundara_proto::round::{RoundOpen, TranscriptRequest};
use sundara_proto::wire::WireMessage as _;
use tokio::sync::mpsc;

use super::lane::{self, Carries, EVENTS_QUEUED_MAX, Event, Lane, RoundKey, Stray};
use super::leader;
use super::reducer::Reducer;
use super::terms::Round;
use super::{Ctx, RoundsConfig};
use crate::domain::round::plan;
use crate::net::{BulkStream, FailureCode, Inbound, PeerIdentity};

/// Messages of rounds that are not known yet.
const STRAYS_QUEUED_MAX: usize = 1_024;
/// Lanes of which not all streams are here.
const HALF_LANES_MAX: usize = 256;
/// Time for a stream to say what it is.
const INTRODUCED_WITHIN: Duration = Duration::from_secs(10);
/// Members that join a round at once.
const JOINING_MAX: usize = 512;

/// Answers requests.
pub(super) async fn requests(ctx: Arc<Ctx>, mut requests: mpsc::Receiver<Inbound>) {
    let token = ctx.tasks.token();
    loop {
        let inbound = tokio::select! {
            () = token.cancelled() => return,
            inbound = requests.recv() => inbound,
        };
        let Some(inbound) = inbound else { return };
        let (peer, request, reply) = inbound.into_parts();
        match request {
            pb::request::Kind::JoinGroup(join) => super::join::requested(&ctx, peer, join, reply),
            pb::request::Kind::RoundReady(ready) => {
                let id = <[u8; 32]>::try_from(ready.group.as_ref()).map(sundara_proto::id::GroupId::from).ok();
                let group = id.and_then(|id| ctx.group(&id));
                let rank = group.as_ref().and_then(|g| g.roster().rank_of(&peer.hotkey));
                let (Some(group), Some(rank)) = (group, rank) else {
                    reply.fail(FailureCode::Forbidden, "no group of that name has you as a member here");
                    continue;
                };
                if let Some(close) = ctx.closed(group.id, ready.seq) {
                    let event = pb::RoundEvent { kind: Some(pb::round_event::Kind::Close(close)) };
                    ctx.spawn("closed", async move {
                        // Whoever is gone does not need it.
                        let _ = reply.finish(pb::response::Kind::Round(event)).await;
                    });
                    continue;
                }
                let Some(sender) = ctx.leading.sender(group.id, ready.seq) else {
                    reply.fail(FailureCode::Busy, "too many rounds wait for their leader");
                    continue;
                };
                let input = leader::Input::Ready { rank, ready, reply };
                if let Err(
                    mpsc::error::TrySendError::Full(leader::Input::Ready { reply, .. })
                    | mpsc::error::TrySendError::Closed(leader::Input::Ready { reply, .. }),
                ) = sender.try_send(input)
                {
                    reply.fail(FailureCode::Forbidden, "this round is over");
                }
            }
            pb::request::Kind::RoundReport(report) => {
                let id = <[u8; 32]>::try_from(report.round.as_ref()).map(sundara_proto::id::RoundId::from).ok();
                let leader = id.and_then(|id| ctx.leading.of(&id, &peer.hotkey));
                let (Some(kind), Some((sender, rank))) = (report.kind, leader) else {
                    reply.fail(FailureCode::Forbidden, "this node leads no such round");
                    continue;
                };
                ctx.spawn("report", async move {
                    // A leader that has just ended does not need it.
                    drop(sender.send(leader::Input::Report { rank, kind }).await);
                    let _ = reply.finish(pb::response::Kind::Done(pb::Done {})).await;
                });
            }
            pb::request::Kind::Transcript(request) => {
                let page = TranscriptRequest::from_raw(request).ok().and_then(|r| ctx.transcripts.page(&r));
                match page {
                    Some(page) => {
                        ctx.spawn("transcript", async move {
                            let _ = reply.finish(pb::response::Kind::Transcript(page.to_raw())).await;
                        });
                    }
                    None => reply.fail(FailureCode::Forbidden, "no such round is remembered here"),
                }
            }
            _ => reply.fail(FailureCode::Forbidden, "not a request for this service"),
        }
    }
}

/// Streams of a lane that wait for the others.
type HalfLane = Vec<(Carries, BulkStream)>;
/// A stream of a lane: whose, which lane, what it carries.
type Introduced = (PeerIdentity, [u8; 16], Carries, BulkStream);

/// Takes lanes in, and the rounds that they bring.
pub(super) async fn lanes(
    ctx: Arc<Ctx>,
    config: RoundsConfig,
    lends: bool,
    mut streams: mpsc::Receiver<(PeerIdentity, BulkStream)>,
) {
    let token = ctx.tasks.token();
    let (introduced, mut introductions) = mpsc::channel::<Introduced>(HALF_LANES_MAX);
    let (strays_tx, mut strays) = mpsc::channel::<Stray>(STRAYS_QUEUED_MAX);
    let mut half: HashMap<(NodeId, [u8; 16]), HalfLane> = HashMap::new();
    let mut rounds = Rounds { ctx: ctx.clone(), config, lends, serving: HashMap::new() };
    loop {
        tokio::select! {
            () = token.cancelled() => return,
            stream = streams.recv() => {
                let Some((peer, mut stream)) = stream else { return };
                let introduced = introduced.clone();
                ctx.spawn("introduction", async move {
                    let named = tokio::time::timeout(INTRODUCED_WITHIN, lane::accept(&mut stream)).await;
                    if let Ok(Ok((name, carries))) = named {
                        drop(introduced.send((peer, name, carries, stream)).await);
                    }
                });
            }
            introduction = introductions.recv() => {
                let Some((peer, name, carries, stream)) = introduction else { return };
                if half.len() >= HALF_LANES_MAX {
                    half.clear();
                }
                let streams = half.entry((peer.node, name)).or_default();
                streams.push((carries, stream));
                if streams.len() == Carries::ALL.len()
                    && let Some(streams) = half.remove(&(peer.node, name))
                    && let Some([messages, up, down]) = lane::sorted(streams)
                {
                    Lane::start(peer, [messages, up, down], Some(strays_tx.clone()), &ctx.tasks);
                }
            }
            stray = strays.recv() => {
                let Some(stray) = stray else { return };
                rounds.stray(stray).await;
            }
        }
    }
}

/// Rounds that this node sums in.
struct Rounds {
    ctx: Arc<Ctx>,
    config: RoundsConfig,
    lends: bool,
    serving: HashMap<RoundKey, Serving>,
}

struct Serving {
    /// What its chunks may take.
    memory: u64,
    joining: mpsc::Sender<(Lane, pb::RoundHello)>,
    events: mpsc::Sender<Event>,
}

impl Rounds {
    async fn stray(&mut self, Stray { lane, round, frame }: Stray) {
        self.serving.retain(|_, serving| !serving.joining.is_closed());
        match frame {
            Frame::Hello(hello) => {
                if !self.serving.contains_key(&round)
                    && let Err(reason) = self.admit(&lane, round, &hello)
                {
                    tracing::debug!(peer = %lane.peer().node, reason, "a round is not served");
                    let abort = pb::RoundAbort { attempt: 0, chunk: None, reason: reason.to_owned() };
                    lane.send(round, Frame::Abort(abort));
                    return;
                }
                if let Some(serving) = self.serving.get(&round) {
                    // A round that has just ended does not need it.
                    drop(serving.joining.send((lane, hello)).await);
                }
            }
            frame => {
                if let Some(serving) = self.serving.get(&round) {
                    drop(serving.events.send(Event::Frame { peer: lane.peer(), frame }).await);
                }
            }
        }
    }

    /// Memory for rounds of others, of which `lent` is taken.
    fn memory_max(&self, lent: u64) -> u64 {
        if self.config.memory_max.0 > 0 {
            return self.config.memory_max.0;
        }
        // Where that cannot be told, a small machine's worth.
        let free = sysinfo::System::new().map_or(2 << 30, |mut system| {
            system.refresh_memory();
            system.available_memory()
        });
        lent + plan::capacity(free)
    }

    /// Begins to serve a round.
    fn admit(&mut self, lane: &Lane, key: RoundKey, hello: &pb::RoundHello) -> Result<(), &'static str> {
        let raw = hello.open.clone().ok_or("a round without its opening")?;
        let open =
            Signed::<RoundOpen>::verify(&self.ctx.network, raw).map_err(|_| "a round that is not signed well")?;
        let me = self.ctx.net.local().node;
        let round = Round::new(open).map_err(|_| "a round that is not well formed")?;
        if round.key != key || !round.open.is_by_its_leader() {
            return Err("a round that its leader did not sign");
        }
        let named = |node: NodeId| round.open.members.iter().any(|m| m.node == node);
        if !named(lane.peer().node) {
            return Err("a round of others");
        }
        // In a butterfly a member serves its fellows; to others a node lends itself if it wants to.
        if !named(me) {
            if !self.lends {
                return Err("this node does not lend itself as a reducer: set rounds.serve");
            }
            let leader = round.open.member(round.open.leader).map(|m| m.hotkey);
            let allowed = &self.config.leaders;
            if !allowed.is_empty() && leader.is_none_or(|leader| !allowed.contains(&leader)) {
                return Err("this node serves only the groups that its operator named: rounds.leaders");
            }
        }
        if self.serving.len() >= self.config.served_max {
            return Err("this node serves as many rounds as it may: rounds.served_max");
        }
        let members = round.open.members.len() as u64;
        let memory = plan::REDUCER_BYTES + members * plan::REDUCER_BYTES_A_MEMBER;
        let lent: u64 = self.serving.values().map(|serving| serving.memory).sum();
        if !named(me) && lent + memory > self.memory_max(lent) {
            return Err("this node lends no more memory: rounds.memory_max");
        }
        let (joining, joining_rx) = mpsc::channel(JOINING_MAX);
        let (events, events_rx) = mpsc::channel(EVENTS_QUEUED_MAX);
        let reducer = Reducer::new(self.ctx.clone(), Arc::new(round), (events.clone(), events_rx));
        self.ctx.spawn("reducer", reducer.run(joining_rx));
        self.serving.insert(key, Serving { joining, events, memory });
        Ok(())
    }
}
