//! A member follows its leader through a round; when the leader is gone, the next rank.

use std::sync::Arc;
use std::time::Duration;

use sundara_proto::crypto::Signed;
use sundara_proto::id::NodeId;
use sundara_proto::pb;
use sundara_proto::round::{Rank, Ranks, RoundAmend, RoundClose, RoundOp, RoundOpen};
use sundara_proto::rules::round::dtype::Dtype;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::group::Group;
use super::leader::{self, Known, Spec};
use super::member::{Member, Order, Report};
use super::tensor::{Space, Tensor};
use super::terms::Round;
use super::{Ctx, Outcome, RoundFailure};
use crate::net::Responses;

/// Reports that wait for the leader.
const REPORTS_QUEUED_MAX: usize = 256;
/// What the leader says and the round has not taken yet.
const ORDERS_QUEUED_MAX: usize = 64;
/// Beyond the group's own patience, for the leader's word to come.
const MARGIN: Duration = Duration::from_secs(15);

/// One round of this member, from its tensors to the result.
pub(super) async fn round(
    ctx: Arc<Ctx>,
    group: Arc<Group>,
    seq: u64,
    op: RoundOp,
    tensors: Vec<Tensor>,
) -> Result<Outcome, RoundFailure> {
    let dtype = tensors.first().map_or(Dtype::F32, Tensor::dtype);
    if let Some(other) = tensors.iter().find(|t| t.dtype() != dtype) {
        return Err(RoundFailure::new(format!(
            "the tensors of one round have one type: {dtype:?} and {:?} came together",
            other.dtype()
        )));
    }
    // Empty tensors have no place in the element space; they come back as they are.
    let empty: Vec<bool> = tensors.iter().map(Tensor::is_empty).collect();
    let full: Vec<Tensor> = tensors.into_iter().filter(|t| !t.is_empty()).collect();
    let lens: Vec<u64> = full.iter().map(|t| t.len() as u64).collect();
    let settings = group.settings_for(op, dtype);
    let spec = Spec { op, dtype, lens, settings };
    let mut follower = Follower { ctx, group, seq, spec, known: Known::default(), gone: Ranks::empty(), over: false };
    let mut outcome = follower.follow(full).await?;
    let mut results = std::mem::take(&mut outcome.tensors).into_iter();
    let place = |empty: bool| if empty { Some(Tensor::zeros(dtype, 0)) } else { results.next() };
    outcome.tensors = empty.into_iter().filter_map(place).collect();
    Ok(outcome)
}

struct Follower {
    ctx: Arc<Ctx>,
    group: Arc<Group>,
    seq: u64,
    spec: Spec,
    known: Known,
    /// Leaders that are gone.
    gone: Ranks,
    /// The leader has said how it ended.
    over: bool,
}

/// A round that is open here.
struct Running {
    round: Arc<Round>,
    orders: mpsc::Sender<Order>,
    amends: usize,
}

impl Follower {
    async fn follow(&mut self, tensors: Vec<Tensor>) -> Result<Outcome, RoundFailure> {
        let deadline = Instant::now() + self.group.terms.gather + MARGIN;
        let (leader_tx, leader_rx) = watch::channel(None::<NodeId>);
        let (reports, reports_rx) = mpsc::channel::<Report>(REPORTS_QUEUED_MAX);
        let mut tensors = Some(tensors);
        let mut reports_rx = Some(reports_rx);
        let mut running: Option<Running> = None;
        let mut work: std::pin::Pin<Box<dyn Future<Output = Result<Outcome, RoundFailure>> + Send>> =
            Box::pin(std::future::pending());
        let mut events: Option<Responses> = None;
        loop {
            if self.over {
                return work.await;
            }
            if events.is_none() {
                let (node, responses) = self.attach(running.is_some()).await?;
                leader_tx.send_replace(Some(node));
                events = Some(responses);
            }
            let Some(responses) = events.as_mut() else { continue };
            tokio::select! {
                result = &mut work => return result,
                event = responses.next() => match event {
                    Some(Ok(pb::response::Kind::Round(event))) => {
                        let opened = self.on_event(event, running.as_mut()).await?;
                        if let Some(round) = opened {
                            let (orders, orders_rx) = mpsc::channel(ORDERS_QUEUED_MAX);
                            let round = Arc::new(round);
                            let tensors = tensors.take().unwrap_or_default();
                            if let Some(reports) = reports_rx.take() {
                                self.ctx.spawn("reports", report(self.ctx.clone(), round.clone(), leader_rx.clone(), reports));
                            }
                            work = self.work(round.clone(), tensors, reports.clone(), orders_rx);
                            running = Some(Running { round, orders, amends: 0 });
                        }
                    }
                    Some(Ok(_)) => events = None,
                    Some(Err(crate::net::RpcError::Refused { detail, .. })) if running.is_none() => {
                        return Err(RoundFailure::new(format!("the leader refuses: {detail}")));
                    }
                    Some(Err(_)) | None => {
                        self.leader_gone();
                        events = None;
                    }
                },
                () = tokio::time::sleep_until(deadline), if running.is_none() => {
                    return Err(RoundFailure::new(format!(
                        "round {} of the group was not opened within {} s",
                        self.seq, (self.group.terms.gather + MARGIN).as_secs()
                    )));
                }
            }
        }
    }

    fn work(
        &self,
        round: Arc<Round>,
        tensors: Vec<Tensor>,
        reports: mpsc::Sender<Report>,
        mut orders: mpsc::Receiver<Order>,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Outcome, RoundFailure>> + Send>> {
        let out = match self.spec.op {
            // Whoever gets no output keeps what it brought.
            RoundOp::Reduce { root } if root != self.group.rank() => Vec::new(),
            _ => tensors.iter().map(|t| Tensor::zeros(t.dtype(), t.len())).collect(),
        };
        let member = Member::new(
            self.ctx.clone(),
            self.group.clone(),
            round,
            Arc::new(Space::new(tensors)),
            Space::new(out),
            reports,
        );
        Box::pin(async move { member.run(&mut orders).await })
    }

    fn leader(&self) -> Option<(Rank, NodeId)> {
        let roster = self.group.roster();
        let dropped = self.known.amends.last().map(|a| a.dropped).unwrap_or_default();
        let takes_part = |rank: Rank| {
            self.known.open.as_ref().is_none_or(|open| open.member(rank).is_some()) && !dropped.contains(rank)
        };
        let all = (0..=Rank::MAX).take(roster.members.len());
        let rank = all.into_iter().find(|rank| !self.gone.contains(*rank) && takes_part(*rank))?;
        roster.member(rank).map(|m| (rank, m.node))
    }

    fn leader_gone(&mut self) {
        if let Some((rank, _)) = self.leader()
            && rank != self.group.rank()
        {
            tracing::info!(rank, seq = self.seq, "the leader of a round is gone; the next rank leads");
            self.gone.insert(rank);
        }
    }

    /// Asks the lowest live rank, which may be this node itself.
    async fn attach(&mut self, running: bool) -> Result<(NodeId, Responses), RoundFailure> {
        loop {
            let (rank, node) = self.leader().ok_or_else(|| RoundFailure::new("no member is left to lead the round"))?;
            if rank == self.group.rank()
                && let Some((tx, rx)) = self.ctx.leading.take(self.group.id, self.seq)
            {
                let (ctx, group, spec) = (self.ctx.clone(), self.group.clone(), self.spec.clone());
                let known = Known { open: self.known.open.clone(), amends: self.known.amends.clone() };
                self.ctx.spawn("leader", leader::lead(ctx, group, self.seq, spec, known, rx, tx));
            }
            let mut ready = self.spec.to_ready(&self.group, self.seq, &self.known);
            ready.state = self.group.own_state(&self.ctx.net.local().hotkey);
            match self.ctx.net.request(node, pb::request::Kind::RoundReady(ready)).await {
                Ok(responses) => return Ok((node, responses)),
                Err(e) if rank == self.group.rank() => {
                    return Err(RoundFailure::new(format!("this node cannot lead the round: {e}")));
                }
                Err(e) => {
                    tracing::info!(rank, error = %e, running, "a leader cannot be reached");
                    self.leader_gone();
                }
            }
        }
    }

    /// What the leader says. A round that has just opened, if it does.
    async fn on_event(
        &mut self,
        event: pb::RoundEvent,
        running: Option<&mut Running>,
    ) -> Result<Option<Round>, RoundFailure> {
        use pb::round_event::Kind;
        let network = self.ctx.network;
        match (event.kind, running) {
            (Some(Kind::Open(raw)), None) => {
                let open = Signed::<RoundOpen>::verify(&network, raw)
                    .map_err(|e| RoundFailure::new(format!("the leader's word is not signed well: {e}")))?;
                let round = self.checked(open)?;
                self.known.open = Some(round.open.clone());
                Ok(Some(round))
            }
            (Some(Kind::Amend(raw)), Some(running)) => {
                let Ok(amend) = Signed::<RoundAmend>::verify(&network, raw) else { return Ok(None) };
                let by = running.round.open.member(amend.leader).is_some_and(|m| m.hotkey.0 == amend.signer());
                let next = amend.number as usize == running.amends + 1;
                if by && next && amend.round == running.round.id && amend.fits(&running.round.open) {
                    running.amends += 1;
                    self.known.amends.push(amend.clone());
                    drop(running.orders.send(Order::Amend(amend)).await);
                }
                Ok(None)
            }
            (Some(Kind::Probe(_)), Some(running)) => {
                drop(running.orders.send(Order::Probe).await);
                Ok(None)
            }
            (Some(Kind::Close(raw)), Some(running)) => {
                let close = Signed::<RoundClose>::verify(&network, raw)
                    .map_err(|e| RoundFailure::new(format!("the leader's close is not signed well: {e}")))?;
                let leads = running.round.open.members.iter().any(|m| m.hotkey.0 == close.signer());
                if leads && close.round == running.round.id {
                    self.over = true;
                    self.ctx.note_closed(self.group.id, self.seq, close.to_wire());
                    let order = Order::Close { sums: close.sums, dropped: close.dropped };
                    drop(running.orders.send(order).await);
                }
                Ok(None)
            }
            (Some(Kind::Failed(failed)), running) => {
                let ranks = Ranks::from_bytes(&failed.ranks, "ranks").unwrap_or_default();
                let failure = RoundFailure::members(failed.reason, ranks.iter().collect());
                match running {
                    Some(running) => {
                        self.over = true;
                        drop(running.orders.send(Order::Failed(failure)).await);
                        Ok(None)
                    }
                    None => Err(failure),
                }
            }
            _ => Ok(None),
        }
    }

    /// Whether the round that was opened is the one that this member wants.
    fn checked(&self, open: Signed<RoundOpen>) -> Result<Round, RoundFailure> {
        let by_leader = open.is_by_its_leader();
        let me = open.member(self.group.rank()).is_some_and(|m| m.node == self.ctx.net.local().node);
        let same = open.group == self.group.id
            && open.seq == self.seq
            && open.op == self.spec.op
            && open.dtype == self.spec.dtype
            && open.lens == self.spec.lens
            && open.settings == self.spec.settings;
        if !(by_leader && me && same) {
            return Err(RoundFailure::new("the leader opened another round than this member asked for"));
        }
        Round::new(open).map_err(|e| RoundFailure::new(format!("the leader opened a malformed round: {e}")))
    }
}

/// Brings reports to whoever leads, in order.
async fn report(
    ctx: Arc<Ctx>,
    round: Arc<Round>,
    mut leader: watch::Receiver<Option<NodeId>>,
    mut reports: mpsc::Receiver<Report>,
) {
    while let Some(kind) = reports.recv().await {
        let report = pb::RoundReport { round: round.id.into(), kind: Some(kind) };
        for _ in 0..3 {
            let Some(node) = *leader.borrow_and_update() else { break };
            let sent = ctx.net.request_one(node, pb::request::Kind::RoundReport(report.clone())).await;
            let Err(e) = sent else { break };
            tracing::debug!(error = %e, "a report did not reach the leader");
            // Again once another leads; if none does soon, the next stall reports anew.
            drop(tokio::time::timeout(Duration::from_secs(1), leader.changed()).await);
        }
    }
}
