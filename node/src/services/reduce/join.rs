//! How groups come about: a creator admits members until all are there or the time is up, signs the roster, and takes
//! latecomers for later rounds.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sundara_proto::crypto::Signed;
use sundara_proto::id::{GroupId, Hotkey, NodeId};
use sundara_proto::pb;
use sundara_proto::round::{GroupMember, GroupRoster, Invitation, JoinGroup, Rank, RoundSettings, StateDigest};
use sundara_proto::wire::{WireMessage as _, limit};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::group::{Group, GroupTimes, Reducers};
use super::{Ctx, lock};
use crate::net::{FailureCode, PeerIdentity, Reply, RpcError};
use crate::service::wall_now;

/// Requests to join that wait for a group's creator.
const JOINS_QUEUED_MAX: usize = 512;
/// Rosters on their way to one member.
const ROSTERS_QUEUED_MAX: usize = 16;
/// Between two tries to reach a creator.
const RETRY: Duration = Duration::from_millis(250);

/// Whom a creator lets in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Admission {
    /// These hotkeys, and whoever has an invitation that the creator signed.
    #[default]
    Invited,
    /// These hotkeys too.
    Hotkeys(Vec<Hotkey>),
    /// Anyone on the mesh. For tests and benches.
    Anyone,
}

/// A group as its creator wants it.
#[derive(Clone, Debug)]
pub struct GroupSpec {
    /// Its name among the creator's groups: letters, digits, `.`, `_`, `-`.
    pub name: String,
    /// Members, the creator included.
    pub members: usize,
    /// Rounds go on with so many.
    pub min_members: usize,
    /// How rounds run.
    pub settings: RoundSettings,
    /// Who sums.
    pub reducers: Reducers,
    /// Whom to let in.
    pub admission: Admission,
    /// How long to wait for what.
    pub times: GroupTimes,
    /// The group begins with those who came within this time, if they are enough.
    pub form_within: Duration,
    /// The rank that a joining member wants; any where `None`. The creator has rank 0.
    pub rank: Option<Rank>,
}

impl GroupSpec {
    /// A group of so many members, with every default: verified sums through up to four miners, by invitation, formed
    /// within two minutes.
    pub fn new(name: impl Into<String>, members: usize) -> Self {
        Self {
            name: name.into(),
            members,
            min_members: 1,
            settings: RoundSettings::default(),
            reducers: Reducers::default(),
            admission: Admission::default(),
            times: GroupTimes::default(),
            form_within: Duration::from_secs(120),
            rank: None,
        }
    }
}

/// Why there is no group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// The wish itself makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Too few came.
    #[error("{came} of {wanted} members joined group `{name}` within {} s: start the others, or lower min_members", within.as_secs())]
    TooFew {
        /// The group.
        name: String,
        /// Members that joined, the creator included.
        came: usize,
        /// Members that were to join.
        wanted: usize,
        /// The time they had.
        within: Duration,
    },
    /// The creator said no, or cannot be reached.
    #[error("group `{name}` cannot be joined: {reason}")]
    Refused {
        /// The group.
        name: String,
        /// In words.
        reason: String,
    },
    /// The node is shutting down.
    #[error("the node is shutting down")]
    Closed,
}

struct Join {
    peer: PeerIdentity,
    join: JoinGroup,
    reply: Reply,
}

/// Groups that this node made, by id: where requests to join go.
#[derive(Default)]
pub(super) struct Creating {
    groups: Mutex<HashMap<GroupId, mpsc::Sender<Join>>>,
}

/// A peer wants to join a group of this node.
pub(super) fn requested(ctx: &Ctx, peer: PeerIdentity, join: pb::JoinGroup, reply: Reply) {
    let Ok(join) = JoinGroup::from_raw(join) else {
        return reply.fail(FailureCode::Malformed, "a malformed request to join");
    };
    let sender = lock(&ctx.creating.groups).get(&join.group).cloned();
    let Some(sender) = sender else {
        return reply.fail(FailureCode::NotServed, "this node has made no such group, or not yet");
    };
    if let Err(mpsc::error::TrySendError::Full(join) | mpsc::error::TrySendError::Closed(join)) =
        sender.try_send(Join { peer, join, reply })
    {
        join.reply.fail(FailureCode::Busy, "too many want to join at once");
    }
}

/// Makes a group, and waits until it has formed.
pub(super) async fn create(ctx: &Arc<Ctx>, spec: GroupSpec) -> Result<Arc<Group>, JoinError> {
    let local = ctx.net.local();
    let name = spec.name.clone();
    let wrong = |what: &str| JoinError::Invalid(format!("group `{name}`: {what}"));
    if spec.members == 0 || spec.members > limit::MEMBERS {
        return Err(wrong(&format!("{} members; 1 to {} are possible", spec.members, limit::MEMBERS)));
    }
    if spec.min_members > spec.members {
        return Err(wrong("min_members is above members"));
    }
    let id = GroupId::of(&ctx.network, &local.hotkey, &spec.name);
    let roster = GroupRoster {
        name: spec.name.clone(),
        version: 1,
        members: vec![GroupMember { hotkey: local.hotkey, node: local.node }],
        settings: spec.settings,
        min_members: u32::try_from(spec.min_members.max(1)).unwrap_or(u32::MAX),
    };
    if GroupRoster::from_raw(roster.to_raw()).is_err() {
        return Err(wrong("names hold letters, digits, `.`, `_`, `-`"));
    }
    let (tx, rx) = mpsc::channel(JOINS_QUEUED_MAX);
    {
        let mut groups = lock(&ctx.creating.groups);
        if groups.get(&id).is_some_and(|tx| !tx.is_closed()) {
            return Err(wrong("it exists already"));
        }
        groups.insert(id, tx);
    }
    let mut creator = Creator {
        ctx: ctx.clone(),
        id,
        roster,
        admission: spec.admission.clone(),
        followers: BTreeMap::new(),
        group: None,
        joins: rx,
        wishes: Vec::new(),
        formed: false,
    };
    if let Err(e) = creator.form(&spec).await {
        lock(&ctx.creating.groups).remove(&id);
        return Err(e);
    }
    let signed = Signed::sign(&ctx.network, &ctx.key, creator.roster.clone());
    let (roster_tx, roster_rx) = watch::channel(Arc::new(signed));
    let group = Arc::new(Group::new(id, 0, spec.times, spec.reducers, roster_rx, 0));
    lock(&ctx.groups).insert(id, group.clone());
    creator.group = Some(group.clone());
    creator.tell_all();
    ctx.spawn("group", creator.run(roster_tx));
    Ok(group)
}

struct Creator {
    ctx: Arc<Ctx>,
    id: GroupId,
    roster: GroupRoster,
    admission: Admission,
    followers: BTreeMap<Rank, mpsc::Sender<pb::Joined>>,
    group: Option<Arc<Group>>,
    joins: mpsc::Receiver<Join>,
    /// Who came before the group formed.
    wishes: Vec<Seat>,
    formed: bool,
}

/// A member that waits for its rank.
struct Seat {
    member: GroupMember,
    wish: Option<Rank>,
    tx: mpsc::Sender<pb::Joined>,
}

impl Creator {
    /// Gives members the ranks that they want, others what is left, without gaps.
    fn seat(&mut self) {
        let mut left: Vec<Seat> = std::mem::take(&mut self.wishes);
        left.sort_by_key(|seat| (seat.wish.is_none(), seat.wish));
        let mut seats: Vec<Option<Seat>> = Vec::new();
        seats.resize_with(left.len(), || None);
        let mut rest = Vec::new();
        for seat in left {
            let free = seat.wish.and_then(|rank| usize::from(rank).checked_sub(1)).and_then(|i| seats.get_mut(i));
            match free {
                Some(place) if place.is_none() => *place = Some(seat),
                _ => rest.push(seat),
            }
        }
        let mut rest = rest.into_iter();
        for (seat, rank) in seats.into_iter().map(|seat| seat.or_else(|| rest.next())).zip(1..) {
            let Some(seat) = seat else { continue };
            self.roster.members.push(seat.member);
            self.followers.insert(rank, seat.tx);
        }
    }

    /// Until all members are there, or the time is up.
    async fn form(&mut self, spec: &GroupSpec) -> Result<(), JoinError> {
        let deadline = Instant::now() + spec.form_within;
        while 1 + self.wishes.len() < spec.members {
            tokio::select! {
                join = self.joins.recv() => match join {
                    Some(join) => {
                        self.admit(join);
                    }
                    None => return Err(JoinError::Closed),
                },
                () = tokio::time::sleep_until(deadline) => {
                    let came = 1 + self.wishes.len();
                    if came >= spec.min_members.max(2) {
                        break;
                    }
                    return Err(JoinError::TooFew {
                        name: spec.name.clone(),
                        came,
                        wanted: spec.members,
                        within: spec.form_within,
                    });
                }
            }
        }
        self.seat();
        self.formed = true;
        Ok(())
    }

    /// Latecomers, as long as the group is used.
    async fn run(mut self, roster: watch::Sender<Arc<Signed<GroupRoster>>>) {
        let token = self.ctx.tasks.token();
        loop {
            let join = tokio::select! {
                () = token.cancelled() => return,
                () = roster.closed() => return,
                join = self.joins.recv() => join,
            };
            let Some(join) = join else { return };
            if self.admit(join) {
                self.roster.version += 1;
                let signed = Signed::sign(&self.ctx.network, &self.ctx.key, self.roster.clone());
                roster.send_replace(Arc::new(signed));
                self.tell_all();
            }
        }
    }

    /// Takes a member in, or says why not.
    fn admit(&mut self, Join { peer, join, reply }: Join) -> bool {
        let listed = match &self.admission {
            Admission::Anyone => true,
            Admission::Hotkeys(hotkeys) => hotkeys.contains(&peer.hotkey),
            Admission::Invited => false,
        };
        let creator = self.ctx.net.local().hotkey;
        let invited = || {
            let invitation = Signed::<Invitation>::verify(&self.ctx.network, join.invitation.clone()?).ok()?;
            let own = invitation.signer() == creator.0;
            Some(own && invitation.admits(&self.id, &peer.hotkey, &join.token, wall_now()))
        };
        let known = self.roster.members.iter().position(|m| m.hotkey == peer.hotkey);
        let waits = self.wishes.iter().position(|seat| seat.member.hotkey == peer.hotkey);
        if known.is_none() && waits.is_none() && !listed && !invited().unwrap_or(false) {
            reply.fail(FailureCode::Forbidden, "not on the group's list, and without a valid invitation");
            return false;
        }
        let member = GroupMember { hotkey: peer.hotkey, node: peer.node };
        if !self.formed {
            if known.is_some() {
                reply.fail(FailureCode::Forbidden, "this hotkey is the group's creator");
                return false;
            }
            if let Some(place) = waits {
                // It comes again: its first request is given up.
                self.wishes.remove(place);
            }
            let (tx, rx) = mpsc::channel(ROSTERS_QUEUED_MAX);
            self.wishes.push(Seat { member, wish: join.rank, tx });
            self.ctx.spawn("roster", forward(reply, rx));
            return true;
        }
        let place = match known {
            Some(place) => {
                self.roster.members[place] = member;
                place
            }
            None if self.roster.members.len() >= limit::MEMBERS => {
                reply.fail(FailureCode::Busy, "the group is full");
                return false;
            }
            None => {
                self.roster.members.push(member);
                self.roster.members.len() - 1
            }
        };
        let Ok(rank) = Rank::try_from(place) else { return false };
        let (tx, rx) = mpsc::channel(ROSTERS_QUEUED_MAX);
        self.followers.insert(rank, tx);
        self.ctx.spawn("roster", forward(reply, rx));
        true
    }

    fn tell_all(&mut self) {
        let roster = Signed::sign(&self.ctx.network, &self.ctx.key, self.roster.clone()).to_wire();
        let (next, states) = self.group.as_ref().map_or((0, Vec::new()), |g| (g.upcoming(), g.states()));
        let joined = pb::Joined { roster: Some(roster), next, states };
        self.followers.retain(|_, tx| tx.try_send(joined.clone()).is_ok());
    }
}

async fn forward(mut reply: Reply, mut rosters: mpsc::Receiver<pb::Joined>) {
    loop {
        let joined = tokio::select! {
            joined = rosters.recv() => joined,
            () = reply.closed() => return,
        };
        let Some(joined) = joined else { return };
        if reply.send(pb::response::Kind::Joined(joined)).await.is_err() {
            return;
        }
    }
}

/// What a member shows to be let in.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ticket {
    pub(crate) invitation: Option<pb::Signed>,
    pub(crate) token: Vec<u8>,
}

/// Joins a group that `creator` makes or has made. Waits until it has formed.
pub(super) async fn join(
    ctx: &Arc<Ctx>,
    creator: (NodeId, Hotkey),
    name: &str,
    ticket: &Ticket,
    wish: &GroupSpec,
) -> Result<(Arc<Group>, Vec<Signed<StateDigest>>), JoinError> {
    let id = GroupId::of(&ctx.network, &creator.1, name);
    let refused = |reason: String| JoinError::Refused { name: name.to_owned(), reason };
    let request = JoinGroup {
        group: id,
        rank: wish.rank,
        invitation: ticket.invitation.clone(),
        token: ticket.token.clone().into(),
    };
    let deadline = Instant::now() + wish.form_within;
    loop {
        let asked = ctx.net.request(creator.0, pb::request::Kind::JoinGroup(request.to_raw())).await;
        let reason = match asked {
            Ok(mut rosters) => {
                let first = tokio::time::timeout_at(deadline, rosters.next()).await;
                match first {
                    Ok(Some(Ok(pb::response::Kind::Joined(joined)))) => {
                        let me = ctx.net.local();
                        let roster = checked(ctx, joined.roster, creator.1, name)
                            .ok_or_else(|| refused("its creator sent a roster that it did not sign".to_owned()))?;
                        let rank = roster
                            .rank_of(&me.hotkey)
                            .ok_or_else(|| refused("the roster is without this node".into()))?;
                        let (tx, rx) = watch::channel(Arc::new(roster));
                        let group = Group::new(id, rank, wish.times, wish.reducers.clone(), rx, joined.next);
                        let group = Arc::new(group);
                        lock(&ctx.groups).insert(id, group.clone());
                        let states =
                            joined.states.into_iter().filter_map(|s| Signed::verify(&ctx.network, s).ok()).collect();
                        let (ctx, name) = (ctx.clone(), name.to_owned());
                        ctx.clone().spawn("rosters", async move {
                            while let Some(Ok(pb::response::Kind::Joined(joined))) = rosters.next().await {
                                if let Some(roster) = checked(&ctx, joined.roster, creator.1, &name) {
                                    tx.send_replace(Arc::new(roster));
                                }
                                if tx.is_closed() {
                                    return;
                                }
                            }
                            // Without its creator a group goes on as it is.
                            tx.closed().await;
                        });
                        return Ok((group, states));
                    }
                    Ok(Some(Ok(_))) => return Err(refused("its creator answers something else".to_owned())),
                    Ok(Some(Err(RpcError::Refused { code: FailureCode::Forbidden, detail }))) => {
                        return Err(refused(detail));
                    }
                    Ok(Some(Err(e))) => e.to_string(),
                    Ok(None) => "its creator ended the request".to_owned(),
                    Err(_) => return Err(refused(format!("it did not form within {} s", wish.form_within.as_secs()))),
                }
            }
            Err(RpcError::Closed) => return Err(JoinError::Closed),
            Err(e) => e.to_string(),
        };
        // Not made yet, or not reachable yet: whoever starts first waits for the others.
        if Instant::now() + RETRY >= deadline {
            return Err(refused(reason));
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn checked(ctx: &Ctx, raw: Option<pb::Signed>, creator: Hotkey, name: &str) -> Option<Signed<GroupRoster>> {
    let roster = Signed::<GroupRoster>::verify(&ctx.network, raw?).ok()?;
    (roster.creator() == creator && roster.name == name).then_some(roster)
}
