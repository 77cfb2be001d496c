//! Disputes about a group, and what proves that somebody lied.

use std::collections::BTreeMap;

use sundara_proto::crypto::{Network, Signed};
use sundara_proto::id::{BlobId, Hotkey, NodeId};
use sundara_proto::pb;
use sundara_proto::round::{BlameCase, Evidence, NonceSet, Rank, Ranks, RoundAmend, RoundOpen, SumCommit};
use sundara_proto::rules::round::blame;
use sundara_proto::rules::round::tree::Opening;
use sundara_proto::units::ByteCount;
use sundara_proto::wire::WireMessage as _;

use super::Ctx;
use crate::blobs::{Access, Sources};

/// A group whose tags do not add up, or that is looked at as a sample, while its openings come.
#[derive(Debug)]
pub(super) struct Dispute {
    pub(super) group: u32,
    /// A sample: nobody is accused.
    pub(super) sample: bool,
    tags: Vec<pb::Signed>,
    inputs: BTreeMap<Rank, Opening>,
    output: Option<Opening>,
}

impl Dispute {
    /// `tags`: everyone's, where they are known.
    pub(super) fn new(tags: Vec<pb::Signed>) -> Self {
        Self { group: 0, sample: false, tags, inputs: BTreeMap::new(), output: None }
    }

    /// A group that is drawn, not suspected.
    pub(super) fn sample(group: u32) -> Self {
        Self { group, sample: true, ..Self::new(Vec::new()) }
    }

    /// Takes an opening. Whether all are there.
    pub(super) fn take(&mut self, opening: pb::RoundOpening, participants: &Ranks) -> bool {
        if opening.group != self.group {
            return false;
        }
        let Ok(parsed) = Opening::from_raw(opening.opening) else { return false };
        match opening.rank.map(Rank::try_from) {
            None => self.output = Some(parsed),
            Some(Ok(rank)) if participants.contains(rank) => {
                self.inputs.insert(rank, parsed);
            }
            Some(_) => {}
        }
        self.output.is_some() && self.inputs.len() == participants.len()
    }

    /// The case, for anyone to judge.
    pub(super) fn case(
        &mut self,
        open: &Signed<RoundOpen>,
        amends: &[Signed<RoundAmend>],
        sum: &Signed<SumCommit>,
        commits: &[pb::Signed],
        nonces: Option<&Signed<NonceSet>>,
        accuser: Option<(Rank, &[u64])>,
    ) -> BlameCase {
        BlameCase {
            open: open.to_wire(),
            amends: amends.iter().map(Signed::to_wire).collect(),
            sum: sum.to_wire(),
            commits: commits.to_vec(),
            nonces: nonces.map(Signed::to_wire),
            tags: std::mem::take(&mut self.tags),
            accuser: accuser.map(|(rank, _)| rank),
            out_tags: accuser.map(|(_, tags)| tags.to_vec()).unwrap_or_default(),
            group: self.group,
            inputs: std::mem::take(&mut self.inputs).into_values().collect(),
            output: self.output.take(),
            scales: Vec::new(),
            shared: bytes::Bytes::new(),
        }
    }
}

/// Who is guilty by this evidence; nobody where it proves nothing, or is not here.
pub(super) fn check(network: &Network, evidence: &Evidence) -> Vec<Hotkey> {
    match blame::judge_evidence(network, evidence) {
        Ok(guilty) => guilty.into_iter().map(|one| one.hotkey).collect(),
        Err(e) => {
            tracing::debug!(error = %e, "evidence proves nothing");
            Vec::new()
        }
    }
}

/// Fetches a case that travels as a blob.
pub(super) async fn fetch(ctx: &Ctx, blob: BlobId, len: ByteCount, from: NodeId) -> Option<Evidence> {
    let got = ctx.transfer.fetch(blob, len, Sources::peers([from]), Access::Public).await;
    if let Err(e) = got {
        tracing::info!(error = %e, "a case could not be fetched");
        return None;
    }
    let bytes = ctx.blobs.get(blob, len).await.ok()?;
    BlameCase::decode(&bytes).ok().map(|case| Evidence::Blame(Box::new(case)))
}
