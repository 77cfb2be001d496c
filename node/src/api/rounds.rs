//! Map-reduce from a program: make or join a group, call its operations, leave by dropping it.
//!
//! ```no_run
//! # async fn f(node: sundara_node::Node) -> Result<(), Box<dyn std::error::Error>> {
//! use sundara_node::rounds::{Admission, GroupSpec, Op};
//! let mut spec = GroupSpec::new("training", 4);
//! spec.admission = Admission::Anyone;
//! let group = node.rounds().create(spec).await?;
//! let gradient = vec![0.5_f32; 1_000_000];
//! let mean = group.all_reduce(gradient, Op::Mean).await?.into_f32()?;
//! # Ok(()) }
//! ```

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use sundara_proto::crypto::{HotkeyPair, Signed};
use sundara_proto::id::{GroupId, Hotkey, NodeId};
use sundara_proto::pb;
use sundara_proto::round::{Invitation, Invitee, RoundOp, StateDigest};
use sundara_proto::units::{ByteCount, UnixMillis};

use crate::blobs::{Access, Sources};
use crate::service::wall_now;
use crate::services::reduce::{self, RoundsHandle};

pub use crate::services::reduce::{
    Admission, Blamed, GroupSpec, GroupTimes, JoinError, Lie, Outcome, Reducers, RoundFailure, Tensor, TensorError,
};
pub use sundara_proto::round::{Mode, Rank, RoundSettings, Topology};
pub use sundara_proto::rules::round::dtype::{Compress, Dtype};

/// How members' tensors become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// The sum.
    Sum,
    /// The sum over the number of members that took part.
    Mean,
    /// The least of each element.
    Min,
    /// The greatest of each element.
    Max,
    /// The median of each element: bears bad members, for groups of fewer than eight.
    Median,
    /// The mean of each element without its extremes.
    TrimmedMean,
    /// One step from zero, clipped to 1.5 times the median norm. Bring differences to the last aggregate.
    CentredClip,
}

impl From<Op> for RoundOp {
    fn from(op: Op) -> Self {
        match op {
            Op::Sum => Self::Sum,
            Op::Mean => Self::Mean,
            Op::Min => Self::Min,
            Op::Max => Self::Max,
            Op::Median => Self::Median,
            Op::TrimmedMean => Self::TrimmedMean,
            Op::CentredClip => Self::CentredClip,
        }
    }
}

/// Groups of this node. Cheap to clone.
#[derive(Clone)]
pub struct Rounds {
    pub(crate) handle: RoundsHandle,
    pub(crate) key: HotkeyPair,
}

/// Leave to join a group, for a file or another process.
#[derive(Clone, Debug)]
pub struct Pass {
    invitation: pb::Signed,
    token: Vec<u8>,
}

impl Pass {
    /// As text without secrets of keys; whoever has it may join until it expires.
    pub fn to_text(&self) -> String {
        use prost::Message as _;
        format!("{}:{}", hex::encode(self.invitation.encode_to_vec()), hex::encode(&self.token))
    }

    /// From its text.
    pub fn from_text(text: &str) -> Option<Self> {
        use prost::Message as _;
        let (invitation, token) = text.trim().split_once(':')?;
        let invitation = pb::Signed::decode(Bytes::from(hex::decode(invitation).ok()?)).ok()?;
        Some(Self { invitation, token: hex::decode(token).ok()? })
    }
}

impl Rounds {
    /// Makes a group, with this node as rank 0, and waits until it has formed.
    ///
    /// # Errors
    /// [`JoinError::TooFew`] when too few joined within `form_within`; [`JoinError::Invalid`] for a spec that makes no
    /// sense.
    pub async fn create(&self, spec: GroupSpec) -> Result<Group, JoinError> {
        let group = self.handle.create(spec).await?;
        Ok(Group { handle: self.handle.clone(), group, key: self.key.clone(), states: Vec::new() })
    }

    /// Joins a group by its creator and name, and waits until it has formed. Its creator must be reachable; it may make
    /// the group later. Only `times`, `reducers` and `form_within` of `wish` are this member's own.
    ///
    /// # Errors
    /// [`JoinError::Refused`].
    pub async fn join(
        &self,
        creator: (NodeId, Hotkey),
        name: &str,
        pass: Option<&Pass>,
        wish: &GroupSpec,
    ) -> Result<Group, JoinError> {
        let (invitation, token) = pass.map(|p| (p.invitation.clone(), p.token.clone())).unzip();
        let (group, states) = self.handle.join(creator, name, invitation, token.unwrap_or_default(), wish).await?;
        Ok(Group { handle: self.handle.clone(), group, key: self.key.clone(), states })
    }

    /// Leave for whoever holds it to join the group `name` of this node, valid for `life`.
    pub fn invite(&self, name: &str, life: Duration) -> Pass {
        let (network, creator) = self.handle.creator();
        let group = GroupId::of(&network, &creator, name);
        let token: [u8; 32] = rand::random();
        let invitee = Invitee::Bearer(sundara_proto::round::token_digest(&group, &token));
        let life = u64::try_from(life.as_millis()).unwrap_or(u64::MAX);
        let expires_at = UnixMillis(wall_now().0.saturating_add(life));
        let invitation = Signed::sign(&network, &self.key, Invitation { group, invitee, expires_at });
        Pass { invitation: invitation.to_wire(), token: token.to_vec() }
    }

    /// Proven lies, found by this node from now on.
    pub fn blamed(&self) -> tokio::sync::broadcast::Receiver<Blamed> {
        self.handle.blamed()
    }
}

/// A group of which this node is a member. Clones share it; calls of different clones are rounds in the order of the
/// calls, and every member has to make the same ones in the same order.
///
/// Dropping the future of a call gives the result up, and harms neither the round nor the next.
#[derive(Clone)]
pub struct Group {
    handle: RoundsHandle,
    group: reduce::GroupRef,
    key: HotkeyPair,
    states: Vec<Signed<StateDigest>>,
}

impl Group {
    /// This member's rank, from 0.
    pub fn rank(&self) -> Rank {
        self.group.rank()
    }

    /// Members, as of now.
    pub fn size(&self) -> usize {
        self.group.size()
    }

    /// The group's id.
    pub fn id(&self) -> GroupId {
        self.group.id()
    }

    /// Combines a tensor of each member; everyone gets the result.
    ///
    /// # Errors
    /// [`RoundFailure`], with the ranks because of which it failed.
    pub async fn all_reduce(&self, tensor: impl Into<Tensor>, op: Op) -> Result<Tensor, RoundFailure> {
        let outcome = self.all_reduce_many(vec![tensor.into()], op).await?;
        one(outcome)
    }

    /// As [`Group::all_reduce`], of several tensors in one round, with what is known of the round.
    ///
    /// # Errors
    /// [`RoundFailure`].
    pub async fn all_reduce_many(&self, tensors: Vec<Tensor>, op: Op) -> Result<Outcome, RoundFailure> {
        self.round(op.into(), tensors).await
    }

    /// Sums a tensor of each member; `root` alone gets the result, the others `None`.
    ///
    /// # Errors
    /// [`RoundFailure`].
    pub async fn reduce(&self, tensor: impl Into<Tensor>, root: Rank) -> Result<Option<Tensor>, RoundFailure> {
        let outcome = self.round(RoundOp::Reduce { root }, vec![tensor.into()]).await?;
        if root == self.rank() { one(outcome).map(Some) } else { Ok(None) }
    }

    /// Everyone gets the tensor of `root`. The others bring one of its type and length, whose elements do not matter.
    ///
    /// # Errors
    /// [`RoundFailure`].
    pub async fn broadcast(&self, tensor: impl Into<Tensor>, root: Rank) -> Result<Tensor, RoundFailure> {
        one(self.round(RoundOp::Broadcast { root }, vec![tensor.into()]).await?)
    }

    /// Everyone gets the tensors of all, in the order of ranks. All have one type and length.
    ///
    /// # Errors
    /// [`RoundFailure`].
    pub async fn all_gather(&self, tensor: impl Into<Tensor>) -> Result<Vec<Tensor>, RoundFailure> {
        let tensor = tensor.into();
        let members = self.size();
        // One broadcast a member, all at once.
        let first = self.group.turn(members as u64);
        let rounds = (0..members).map(|root| {
            let mine = usize::from(self.rank()) == root;
            let tensor = if mine { tensor.clone() } else { Tensor::zeros(tensor.dtype(), tensor.len()) };
            let root = Rank::try_from(root).unwrap_or(Rank::MAX);
            let op = RoundOp::Broadcast { root };
            async move { one(self.handle.round(&self.group, first + u64::from(root), op, vec![tensor]).await?) }
        });
        futures::future::try_join_all(rounds).await
    }

    /// Returns when every member has called it.
    ///
    /// # Errors
    /// [`RoundFailure`].
    pub async fn barrier(&self) -> Result<(), RoundFailure> {
        self.round(RoundOp::Barrier, Vec::new()).await.map(drop)
    }

    /// Sends a file of `root` to all: `path` is read there, and written elsewhere.
    ///
    /// # Errors
    /// [`RoundFailure`], also when the file cannot be read or written.
    pub async fn broadcast_file(&self, path: &Path, root: Rank) -> Result<ByteCount, RoundFailure> {
        let io = |e: std::io::Error| RoundFailure::new(format!("{}: {e}", path.display()));
        let mine = root == self.rank();
        let bytes = if mine { tokio::fs::read(path).await.map_err(io)? } else { Vec::new() };
        let len = self.broadcast(vec![i64::try_from(bytes.len()).unwrap_or(i64::MAX)], root).await?;
        let len = len.into_i64().ok().and_then(|l| usize::try_from(l[0]).ok()).unwrap_or(0);
        let padded = len.next_multiple_of(4);
        let mut bytes = if mine { bytes } else { Vec::new() };
        bytes.resize(padded, 0);
        let tensor = Tensor::from_bytes(Dtype::I32, bytes).map_err(|e| RoundFailure::new(e.to_string()))?;
        let got = self.broadcast(tensor, root).await?;
        if !mine {
            tokio::fs::write(path, &got.as_bytes()[..len]).await.map_err(io)?;
        }
        Ok(ByteCount(len as u64))
    }

    /// Tells the group what this member's state is after its rounds so far; a latecomer gets it from those that said the
    /// same. The bytes are provided to anyone on the mesh who asks for their digest.
    ///
    /// # Errors
    /// When they cannot be kept.
    pub async fn share_state(&self, state: impl Into<Bytes>) -> Result<(), RoundFailure> {
        let state = state.into();
        let len = ByteCount(state.len() as u64);
        let failed = |e: crate::blobs::BlobError| RoundFailure::new(format!("the state cannot be kept: {e}"));
        let blob = self.handle.blobs().put(state, Access::Public).await.map_err(failed)?;
        let digest = StateDigest { group: self.id(), seq: self.group.upcoming(), blob, len };
        let (network, _) = self.handle.creator();
        self.group.note_state(Signed::sign(&network, &self.key, digest));
        Ok(())
    }

    /// The state that most members agreed on when this one joined, fetched from several of them at once; `None` where
    /// none had said.
    ///
    /// # Errors
    /// When nobody provides it.
    pub async fn fetch_state(&self) -> Result<Option<Bytes>, RoundFailure> {
        let agree = |a: &Signed<StateDigest>| self.states.iter().filter(|b| b.blob == a.blob && b.seq == a.seq).count();
        let Some(best) = self.states.iter().max_by_key(|s| (agree(s), s.seq)) else { return Ok(None) };
        let roster = self.group.members();
        let said = self.states.iter().filter(|s| s.blob == best.blob);
        let nodes = said.filter_map(|s| roster.iter().find(|m| m.hotkey.0 == s.signer())).map(|m| m.node);
        let sources = Sources::peers(nodes);
        let fetched = self.handle.transfer().fetch(best.blob, best.len, sources, Access::Public).await;
        fetched.map_err(|e| RoundFailure::new(format!("the group's state cannot be fetched: {e}")))?;
        let bytes = self.handle.blobs().get(best.blob, best.len).await;
        bytes.map(Some).map_err(|e| RoundFailure::new(format!("the group's state cannot be read: {e}")))
    }

    async fn round(&self, op: RoundOp, tensors: Vec<Tensor>) -> Result<Outcome, RoundFailure> {
        // Taken when the call is first polled: the order of rounds is that of the calls.
        let seq = self.group.turn(1);
        self.handle.round(&self.group, seq, op, tensors).await
    }
}

fn one(mut outcome: Outcome) -> Result<Tensor, RoundFailure> {
    outcome.tensors.pop().ok_or_else(|| RoundFailure::new("a round without a result"))
}
