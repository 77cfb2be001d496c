//! The pool: every executor that this node owns, and who runs the next order.
//!
//! Owns the table of executors with their load, the choice among them, and the way of an order through them: one that
//! faults or vanishes is left, and the order goes to another. Does not own how executors come and go (the `executors`
//! service adds and removes them) nor what a result is worth.
//!
//! Invariants: an executor never holds more orders than its slots and its queue; a reservation gives its place back when
//! it is dropped; an order visits no executor twice; output that was passed on is not passed on again after a change of
//! executor, since replicas of an exact job write the same bytes.

mod remote;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sundara_proto::advert::ExecutorClass;
use sundara_proto::crypto::Network;
use sundara_proto::id::{EngineId, Hotkey, NodeId};
use sundara_proto::wire::limit;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{ExecutorEvent, ExecutorFault, ExecutorHandle, Order, Run, RunSide, Unwanted};
use crate::blobs::{Blobs, TransferHandle};
use crate::net::NetHandle;
use crate::service::{Tasks, Workers};

/// Executors of one node, the one inside it included. An advert lists their engines.
pub(crate) const MEMBERS_MAX: usize = 64;
/// An executor that faulted is the last choice for this long; doubles with each fault in a row.
const REST: Duration = Duration::from_secs(1);
/// Longest rest.
const REST_MAX: Duration = Duration::from_secs(60);

/// How many orders executors may hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct PoolConfig {
    /// Orders that wait behind each slot. They cover the way from a validator and back, so that a slot is never idle
    /// while there is work; more only makes them late.
    pub queue_per_slot: u32,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self { queue_per_slot: 3 }
    }
}

/// What the pool works with.
pub(crate) struct PoolParts {
    pub(crate) config: PoolConfig,
    pub(crate) network: Network,
    /// Hotkey that vouches for the executors.
    pub(crate) owner: Hotkey,
    pub(crate) net: NetHandle,
    pub(crate) blobs: Blobs,
    pub(crate) transfer: TransferHandle,
    /// Checks signatures.
    pub(crate) workers: Workers,
    pub(crate) tasks: Tasks,
}

/// The pool. Clones share it.
#[derive(Clone)]
pub(crate) struct Pool {
    inner: Arc<Inner>,
}

struct Inner {
    parts: PoolParts,
    members: Mutex<HashMap<NodeId, Member>>,
    next: AtomicU64,
    offering: watch::Sender<Vec<ExecutorClass>>,
    engines: watch::Sender<Vec<EngineId>>,
    /// Wakes those who wait for a place.
    freed: Notify,
}

/// Which executors will do.
#[derive(Clone, Copy, Debug)]
enum Want<'a> {
    /// Of this class; empty for any.
    Class(&'a str),
    /// With this engine.
    Engine(EngineId),
}

impl Want<'_> {
    fn fits(self, member: &Member) -> bool {
        match self {
            Self::Class(class) => class.is_empty() || member.class.hardware_class == class,
            Self::Engine(engine) => member.class.engines.contains(&engine),
        }
    }
}

#[derive(Clone)]
enum Link {
    InProcess(ExecutorHandle),
    Attached,
}

struct Member {
    /// Tells an executor that left and came back from the one before.
    id: u64,
    link: Link,
    class: ExecutorClass,
    running: u32,
    capacity: u32,
    done: u64,
    faults: u32,
    rests_until: Option<Instant>,
    /// Cancelled when it is gone: its orders move on.
    gone: CancellationToken,
}

impl Member {
    fn resting(&self, now: Instant) -> bool {
        self.rests_until.is_some_and(|until| until > now)
    }

    /// Smaller is the better choice: awake before resting, a free slot before a queue, a process of its own before the one
    /// that speaks for all of them, then the smaller part of its slots in use.
    fn load(&self, now: Instant) -> (bool, bool, bool, u64) {
        let inside = matches!(self.link, Link::InProcess(_));
        let load = u64::from(self.running) * 1_000 / u64::from(self.class.slots.max(1));
        (self.resting(now), self.running >= self.class.slots, inside, load)
    }
}

/// Why no executor takes an order now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoRoom {
    /// There is none.
    NoExecutor,
    /// None is of that class.
    WrongClass,
    /// All are full.
    Busy,
}

/// An executor as its owner's `status` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExecutorStatus {
    /// Its node key.
    pub node: NodeId,
    /// Whether it runs inside this node.
    pub in_process: bool,
    /// Its class.
    pub hardware_class: String,
    /// Jobs that it runs at once.
    pub slots: u32,
    /// Orders that it holds.
    pub running: u32,
    /// Orders that it ended with a result since it came.
    pub done: u64,
    /// Faults in a row.
    pub faults: u32,
}

/// A place at an executor; given back when dropped.
pub(crate) struct Reservation {
    pool: Pool,
    node: NodeId,
    member: u64,
    link: Link,
    gone: CancellationToken,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(member) = self.pool.members().get_mut(&self.node).filter(|m| m.id == self.member) {
            member.running = member.running.saturating_sub(1);
        }
        self.pool.inner.freed.notify_one();
    }
}

impl Pool {
    /// An empty pool.
    pub(crate) fn new(parts: PoolParts) -> Self {
        let inner = Inner {
            parts,
            members: Mutex::default(),
            next: AtomicU64::new(0),
            offering: watch::Sender::new(Vec::new()),
            engines: watch::Sender::new(Vec::new()),
            freed: Notify::new(),
        };
        Self { inner: Arc::new(inner) }
    }

    fn members(&self) -> MutexGuard<'_, HashMap<NodeId, Member>> {
        self.inner.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the executor inside this node, under the node's own key.
    pub(crate) fn add_in_process(&self, node: NodeId, handle: ExecutorHandle) {
        let class = ExecutorClass {
            hardware_class: handle.hardware_class.to_string(),
            slots: handle.slots,
            engines: handle.engines.to_vec(),
            price: 0,
        };
        self.add(node, Link::InProcess(handle), class);
    }

    /// Adds an attached executor, or replaces what was known of it. Fails when there are too many.
    pub(crate) fn add_attached(&self, node: NodeId, class: ExecutorClass) -> bool {
        self.add(node, Link::Attached, class)
    }

    fn add(&self, node: NodeId, link: Link, class: ExecutorClass) -> bool {
        let capacity = class.slots.saturating_mul(1 + self.inner.parts.config.queue_per_slot).max(1);
        {
            let mut members = self.members();
            if let Some(known) = members.get_mut(&node) {
                // A renewal: what it runs goes on.
                (known.class, known.capacity, known.link) = (class, capacity, link);
            } else if members.len() < MEMBERS_MAX {
                let gone = CancellationToken::new();
                let id = self.inner.next.fetch_add(1, Ordering::Relaxed);
                let member =
                    Member { id, link, class, running: 0, capacity, done: 0, faults: 0, rests_until: None, gone };
                members.insert(node, member);
            } else {
                return false;
            }
        }
        self.announce();
        true
    }

    /// Forgets an executor; its orders move on to others.
    pub(crate) fn remove(&self, node: &NodeId) {
        let Some(member) = self.members().remove(node) else { return };
        member.gone.cancel();
        self.announce();
    }

    /// As [`Pool::remove`], for an executor that is not inside this node.
    pub(crate) fn remove_attached(&self, node: &NodeId) {
        let attached = self.members().get(node).is_some_and(|m| matches!(m.link, Link::Attached));
        if attached {
            self.remove(node);
        }
    }

    /// What the executors can run together, by class; changes as they come and go.
    pub(crate) fn offering(&self) -> watch::Receiver<Vec<ExecutorClass>> {
        self.inner.offering.subscribe()
    }

    /// Every engine that some executor has, sorted.
    pub(crate) fn engines(&self) -> watch::Receiver<Vec<EngineId>> {
        self.inner.engines.subscribe()
    }

    /// Every executor.
    pub(crate) fn list(&self) -> Vec<ExecutorStatus> {
        let members = self.members();
        let mut list: Vec<_> = members
            .iter()
            .map(|(node, m)| ExecutorStatus {
                node: *node,
                in_process: matches!(m.link, Link::InProcess(_)),
                hardware_class: m.class.hardware_class.clone(),
                slots: m.class.slots,
                running: m.running,
                done: m.done,
                faults: m.faults,
            })
            .collect();
        list.sort_by_key(|status| status.node);
        list
    }

    fn announce(&self) {
        let mut classes: Vec<ExecutorClass> = Vec::new();
        for member in self.members().values() {
            match classes.iter_mut().find(|c| c.hardware_class == member.class.hardware_class) {
                None => classes.push(member.class.clone()),
                Some(class) => {
                    class.slots = class.slots.saturating_add(member.class.slots);
                    class.price = class.price.max(member.class.price);
                    class.engines.extend(&member.class.engines);
                    class.engines.sort_unstable();
                    class.engines.dedup();
                    class.engines.truncate(limit::ADVERT_ITEMS);
                }
            }
        }
        classes.sort_by(|a, b| a.hardware_class.cmp(&b.hardware_class));
        let mut engines: Vec<EngineId> = classes.iter().flat_map(|c| c.engines.iter().copied()).collect();
        engines.sort_unstable();
        engines.dedup();
        update(&self.inner.engines, engines);
        update(&self.inner.offering, classes);
        self.inner.freed.notify_waiters();
    }

    /// Takes a place at the best executor of a class, see [`Member::load`]; an empty class is any.
    pub(crate) fn reserve(&self, hardware_class: &str) -> Result<Reservation, NoRoom> {
        self.place(Want::Class(hardware_class), &[])
    }

    fn place(&self, want: Want<'_>, tried: &[NodeId]) -> Result<Reservation, NoRoom> {
        let now = Instant::now();
        let mut members = self.members();
        if members.is_empty() {
            return Err(NoRoom::NoExecutor);
        }
        if !members.values().any(|m| want.fits(m)) {
            return Err(NoRoom::WrongClass);
        }
        let best = members
            .iter_mut()
            .filter(|(node, m)| want.fits(m) && m.running < m.capacity && !tried.contains(node))
            .min_by_key(|(node, m)| (m.load(now), **node));
        let (node, member) = best.ok_or(NoRoom::Busy)?;
        member.running += 1;
        let (link, gone) = (member.link.clone(), member.gone.clone());
        Ok(Reservation { pool: self.clone(), node: *node, member: member.id, link, gone })
    }

    /// Runs an order at the reserved place, and at others of its class when that one fails.
    pub(crate) fn run_at(&self, place: Reservation, order: Order) -> Run {
        let (run, side) = Run::pair();
        let pool = self.clone();
        self.inner.parts.tasks.spawn("order", async move {
            let class = order.spec.hardware_class.clone();
            pool.drive(place, Want::Class(&class), order, side).await;
        });
        run
    }

    /// Runs an order on an executor with this engine, and waits for a place if need be.
    ///
    /// # Errors
    /// When no executor has the engine.
    pub(crate) fn run(&self, engine: EngineId, order: Order) -> Result<Run, ExecutorFault> {
        if !self.inner.engines.borrow().contains(&engine) {
            return Err(ExecutorFault::passing(format!("no executor of this node has engine {engine}")));
        }
        let (run, side) = Run::pair();
        let pool = self.clone();
        self.inner.parts.tasks.spawn("order", async move {
            let want = Want::Engine(engine);
            let deadline = order.deadline;
            let place = tokio::select! {
                biased;
                () = side.cancel.cancelled() => return,
                place = pool.wait_for_place(want) => Ok(place),
                () = tokio::time::sleep_until(deadline) => Err("no executor had room in time"),
            };
            match place {
                Ok(place) => pool.drive(place, want, order, side).await,
                Err(reason) => drop(side.send(ExecutorEvent::Fault(ExecutorFault::passing(reason))).await),
            }
        });
        Ok(run)
    }

    async fn wait_for_place(&self, want: Want<'_>) -> Reservation {
        loop {
            let freed = self.inner.freed.notified();
            match self.place(want, &[]) {
                Ok(place) => {
                    // One release may have room for more than one.
                    self.inner.freed.notify_one();
                    return place;
                }
                Err(_) => freed.await,
            }
        }
    }

    async fn drive(self, first: Reservation, want: Want<'_>, order: Order, side: RunSide) {
        let mut progress = Progress::default();
        let (mut tried, mut faults) = (Vec::new(), Vec::new());
        let mut place = first;
        loop {
            let run = match &place.link {
                Link::InProcess(handle) => handle.run(order.clone()),
                Link::Attached => remote::run(&self.inner.parts, place.node, order.clone()),
            };
            let fault = match forward(run, &place.gone, &side, &mut progress).await {
                Ok(Ended::Well) => {
                    self.settle(&place.node, None);
                    return;
                }
                Ok(Ended::Faulted(fault)) => fault,
                Err(Unwanted) => return,
            };
            tracing::warn!(executor = %place.node, job = %order.job, %fault, "executor fault");
            self.settle(&place.node, Some(&fault));
            tried.push(place.node);
            faults.push(fault);
            match self.place(want, &tried) {
                Ok(next) => place = next,
                Err(_) => {
                    drop(place);
                    let _ = side.send(ExecutorEvent::Fault(gathered(&faults))).await;
                    return;
                }
            }
        }
    }

    /// Notes how an executor did.
    fn settle(&self, node: &NodeId, fault: Option<&ExecutorFault>) {
        let mut members = self.members();
        let Some(member) = members.get_mut(node) else { return };
        match fault {
            None => {
                member.done += 1;
                (member.faults, member.rests_until) = (0, None);
            }
            Some(_) => {
                let rest = REST.saturating_mul(1 << member.faults.min(6)).min(REST_MAX);
                member.faults = member.faults.saturating_add(1);
                member.rests_until = Some(Instant::now() + rest);
            }
        }
    }
}

/// What the reader has been told already, across executors.
#[derive(Default)]
struct Progress {
    started: bool,
    output: u64,
}

enum Ended {
    Well,
    Faulted(ExecutorFault),
}

/// Time for what an executor said before it went to arrive.
const LAST_WORDS: Duration = Duration::from_secs(1);

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Passes the events of one executor on until its last.
async fn forward(
    mut run: Run,
    gone: &CancellationToken,
    side: &RunSide,
    progress: &mut Progress,
) -> Result<Ended, Unwanted> {
    let mut last_words = None;
    loop {
        let event = tokio::select! {
            biased;
            () = side.cancel.cancelled() => return Err(Unwanted),
            event = run.next() => event,
            () = gone.cancelled(), if last_words.is_none() => {
                // One that drained has said its last just before it went: that may be on its way here still.
                last_words = Some(Instant::now() + LAST_WORDS);
                continue;
            }
            () = sleep_until(last_words) => {
                return Ok(Ended::Faulted(ExecutorFault::passing("the executor is gone")));
            }
        };
        match event {
            None => return Ok(Ended::Faulted(ExecutorFault::passing("the executor stopped without an answer"))),
            Some(ExecutorEvent::Fault(fault)) => return Ok(Ended::Faulted(fault)),
            Some(ExecutorEvent::Started) => {
                if !std::mem::replace(&mut progress.started, true) {
                    side.send(ExecutorEvent::Started).await?;
                }
            }
            Some(ExecutorEvent::Output { offset, data }) => {
                // What an earlier executor wrote already is not said again.
                let known = usize::try_from(progress.output.saturating_sub(offset)).unwrap_or(usize::MAX);
                if known < data.len() {
                    let fresh = data.slice(known..);
                    let at = progress.output;
                    progress.output += fresh.len() as u64;
                    side.send(ExecutorEvent::Output { offset: at, data: fresh }).await?;
                }
            }
            Some(last @ ExecutorEvent::Finished(_)) => return side.send(last).await.map(|()| Ended::Well),
        }
    }
}

fn update<T: PartialEq>(sender: &watch::Sender<T>, value: T) {
    sender.send_if_modified(|old| {
        let changed = *old != value;
        *old = value;
        changed
    });
}

/// One fault that tells of all.
fn gathered(faults: &[ExecutorFault]) -> ExecutorFault {
    let mut reason = faults.iter().map(|f| f.reason.as_str()).collect::<Vec<_>>().join("; ");
    if reason.len() > limit::TEXT {
        let end = (0..=limit::TEXT).rev().find(|i| reason.is_char_boundary(*i)).unwrap_or(0);
        reason.truncate(end);
    }
    ExecutorFault { reason, retryable: faults.iter().any(|f| f.retryable) }
}
