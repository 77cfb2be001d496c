//! Who lied, judged from signed messages alone: by anyone, without the tensors, the network or the clock.
//!
//! [`judge`] opens one group of one chunk. What the parties signed says what they stand for:
//!
//! | signed | by | stands for |
//! | --- | --- | --- |
//! | RoundOpen, RoundAmends | leader | who has which rank, who sums which part |
//! | ChunkCommit | member | its words, through their root; its exponents |
//! | SumCommit | reducer | whose commitments it took, the shared exponents, its output, through the root |
//! | NonceSet | reducer | the nonces, and so rho |
//! | ChunkTags | member | the tags of its words, the digest of the output's tags |
//!
//! and who contradicts what it stands for is guilty:
//!
//! - a member whose opened words are beyond Q, or whose tag is not that of its opened words;
//! - the reducer, when the opened inputs do not come to the opened output, when its sum names commitments that an honest
//!   reducer would have refused, or when its nonces are not those that were committed to;
//! - the accuser, when all of that is right: then its tag of the output is wrong.
//!
//! Nobody is guilty by what others signed. A case that does not hold together, because something in it is missing, foreign
//! or badly signed, convicts nobody: it is an error, and its bearer is not believed. So an accuser can hold back evidence,
//! but make up none.
//!
//! A case may also carry exponents instead of openings, against a reducer whose shared exponents are not what the members'
//! come to. Shared ones below a participant's convict it; those above all participants' only where every member of the
//! round took part, for the exponents of one that was lost after it sent them count too.

use super::dtype::{Wire, Word};
use super::exact::{self, ExactOp};
use super::fixed::{check_range, max_exponents, scales_digest};
use super::layout::{Chunk, blocks};
use super::tags::{TagKey, rho};
use crate::crypto::{Network, Signed, SignedError};
use crate::id::{Digest, Hotkey, RoundId};
use crate::pb;
use crate::round::{
    BlameCase, ChunkCommit, ChunkReceipt, ChunkTags, Equivocation, EquivocationKind, Evidence, Mode, NonceSet,
    Omission, Rank, RoundAmend, RoundOpen, SumCommit, nonce_hash, out_digest,
};
use crate::wire::WireMessage as _;

mod signed;

pub use signed::{equivocation, omission};

/// Who in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Party {
    /// A member.
    Member(Rank),
    /// The reducer of the chunk.
    Reducer,
    /// Who opened or amended the round.
    Leader,
}

/// What someone did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Lie {
    /// A member committed to words that no honest one has.
    #[error("words beyond the range")]
    Range,
    /// A member's tag is not that of its words.
    #[error("a tag that is not that of the words")]
    Tag,
    /// A reducer's output is not what the inputs come to.
    #[error("an output that is not what the inputs come to")]
    Sum,
    /// A reducer took commitments that contradict its sum.
    #[error("a sum that contradicts the commitments it names")]
    Commitments,
    /// A reducer's shared exponents are not what the members' come to.
    #[error("shared exponents that are not the members' maximum")]
    Scales,
    /// A reducer's nonces are not those that were committed to.
    #[error("nonces that were not committed to")]
    Nonces,
    /// A member disputes what is right.
    #[error("a false accusation")]
    Accusation,
    /// Two different messages for one place.
    #[error("two messages for one place")]
    Equivocation,
    /// A reducer left out what it had given a receipt for.
    #[error("a receipt for what the sum leaves out")]
    Omission,
}

/// Somebody who lied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Guilty {
    /// The key that signed the lie.
    pub hotkey: Hotkey,
    /// Its part in the round.
    pub party: Party,
    /// The lie.
    pub lie: Lie,
}

/// Why a case convicts nobody. Its bearer is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CaseError {
    /// Something does not parse, or is not signed by its signer.
    #[error("{part}: {source}")]
    Signed {
        /// What.
        part: &'static str,
        /// Why.
        source: SignedError,
    },
    /// Something is missing, of another round, chunk or party, or does not match what others say of it.
    #[error("{0} is missing or does not belong to the case")]
    Foreign(&'static str),
    /// The evidence is a reference: fetch the case and judge that.
    #[error("the case has to be fetched first")]
    NotHere,
    /// Rounds of this mode or operation cannot be judged from one group.
    #[error("a group alone proves nothing in such a round")]
    NotJudgeable,
    /// Everyone said what is right.
    #[error("nothing is wrong")]
    NothingWrong,
}

fn ensure(holds: bool, what: &'static str) -> Result<(), CaseError> {
    if holds { Ok(()) } else { Err(CaseError::Foreign(what)) }
}

fn verify<T: crate::crypto::Payload>(
    network: &Network,
    raw: &pb::Signed,
    part: &'static str,
) -> Result<Signed<T>, CaseError> {
    Signed::verify(network, raw.clone()).map_err(|source| CaseError::Signed { part, source })
}

/// Judges whatever evidence. At least one is guilty, or it is an error.
pub fn judge_evidence(network: &Network, evidence: &Evidence) -> Result<Vec<Guilty>, CaseError> {
    match evidence {
        Evidence::Blame(case) => judge(network, case),
        Evidence::Equivocation(pair) => equivocation(network, pair).map(|guilty| vec![guilty]),
        Evidence::Omission(left_out) => omission(network, left_out).map(|guilty| vec![guilty]),
        Evidence::Case { .. } => Err(CaseError::NotHere),
    }
}

/// Judges a case. At least one is guilty, members first, or it is an error.
pub fn judge(network: &Network, case: &BlameCase) -> Result<Vec<Guilty>, CaseError> {
    let court = Court::sit(network, case)?;
    let commits = match court.commits(network, case)? {
        Ok(commits) => commits,
        Err(guilty) => return Ok(vec![guilty]),
    };
    if !case.scales.is_empty() {
        return court.scales(case, &commits).map(|guilty| vec![guilty]);
    }
    match (court.open.wire(), court.open.settings.mode) {
        (Some(wire), Mode::Verified) => court.verified(network, case, &commits, wire),
        (None, Mode::Verified | Mode::Exact) => court.exact(case, &commits),
        _ => Err(CaseError::NotJudgeable),
    }
}

/// The round, the chunk and the sum that a case is about.
struct Court {
    open: Signed<RoundOpen>,
    id: RoundId,
    chunk: Chunk,
    sum: Signed<SumCommit>,
    sum_digest: Digest,
}

impl Court {
    fn sit(network: &Network, case: &BlameCase) -> Result<Self, CaseError> {
        let open: Signed<RoundOpen> = verify(network, &case.open, "RoundOpen")?;
        ensure(open.is_by_its_leader(), "RoundOpen")?;
        let id = open.id();
        let sum: Signed<SumCommit> = verify(network, &case.sum, "SumCommit")?;
        ensure(sum.round == id && sum.participants.is_subset(&open.ranks()), "SumCommit")?;
        let map = open.check().map_err(|_| CaseError::Foreign("RoundOpen"))?;
        let chunk = map.chunk(sum.chunk).ok_or(CaseError::Foreign("SumCommit"))?;
        let part = &open.parts[chunk.part];
        let mut reducers = vec![part.reducer.hotkey];
        reducers.extend(part.backup.map(|backup| backup.hotkey));
        for raw in &case.amends {
            let amend: Signed<RoundAmend> = verify(network, raw, "RoundAmend")?;
            let by = open.member(amend.leader).map(|leader| leader.hotkey.0);
            ensure(amend.round == id && amend.fits(&open) && by == Some(amend.signer()), "RoundAmend")?;
            let moves = amend.moves.iter().filter(|one| one.part as usize == chunk.part);
            reducers.extend(moves.map(|one| one.reducer.hotkey));
        }
        ensure(reducers.contains(&sum.reducer()), "SumCommit")?;
        Ok(Self { sum_digest: sum.digest(), open, id, chunk, sum })
    }

    fn reducer(&self, lie: Lie) -> Guilty {
        Guilty { hotkey: self.sum.reducer(), party: Party::Reducer, lie }
    }

    fn hotkey(&self, rank: Rank) -> Result<Hotkey, CaseError> {
        self.open.member(rank).map(|member| member.hotkey).ok_or(CaseError::Foreign("rank"))
    }

    fn member(&self, rank: Rank, lie: Lie) -> Result<Guilty, CaseError> {
        Ok(Guilty { hotkey: self.hotkey(rank)?, party: Party::Member(rank), lie })
    }

    /// The participants' commitments, or the reducer where its sum names what it must not. A payload is what the sum
    /// names, its signature is not: a bad signature is the case's own fault.
    fn commits(&self, network: &Network, case: &BlameCase) -> Result<Result<Vec<ChunkCommit>, Guilty>, CaseError> {
        let wire = self.open.wire();
        if self.sum.shared.is_some() != wire.is_some() {
            return Ok(Err(self.reducer(Lie::Commitments)));
        }
        ensure(case.commits.len() == self.sum.commits.len(), "ChunkCommits")?;
        let len = (self.chunk.len() * self.open.word_lens().0) as u64;
        let mut commits = Vec::with_capacity(case.commits.len());
        for ((rank, digest), raw) in self.sum.participants.iter().zip(&self.sum.commits).zip(&case.commits) {
            let named = crate::crypto::Context::CHUNK_COMMIT.digest_one(&raw.payload);
            ensure(named == *digest, "ChunkCommit")?;
            let Ok(commit) = ChunkCommit::decode(&raw.payload) else {
                return Ok(Err(self.reducer(Lie::Commitments)));
            };
            let place = (commit.round, commit.attempt, commit.chunk, commit.rank, commit.len);
            let here = place == (self.id, self.sum.attempt, self.sum.chunk, rank, len);
            if !here || commit.fixed.map(|fixed| fixed.shared) != self.sum.shared {
                return Ok(Err(self.reducer(Lie::Commitments)));
            }
            let signed: Signed<ChunkCommit> = verify(network, raw, "ChunkCommit")?;
            ensure(signed.signer() == self.hotkey(rank)?.0, "ChunkCommit")?;
            commits.push(commit);
        }
        Ok(Ok(commits))
    }

    /// A case about exponents.
    fn scales(&self, case: &BlameCase, commits: &[ChunkCommit]) -> Result<Guilty, CaseError> {
        let shared = self.sum.shared.ok_or(CaseError::NotJudgeable)?;
        ensure(scales_digest(&case.shared) == shared && case.scales.len() == commits.len(), "exponents")?;
        let guilty = Ok(self.reducer(Lie::Scales));
        let count = blocks(self.chunk.len());
        let mut most = vec![0; count];
        for (scale, commit) in case.scales.iter().zip(commits) {
            ensure(commit.fixed.is_some_and(|fixed| fixed.scale == scales_digest(scale)), "exponents")?;
            if scale.len() != count {
                return guilty;
            }
            max_exponents(&mut most, scale);
        }
        if case.shared.len() != count || case.shared.iter().zip(&most).any(|(shared, most)| shared < most) {
            return guilty;
        }
        let all = self.sum.participants == self.open.ranks();
        if all && *case.shared != *most { guilty } else { Err(CaseError::NothingWrong) }
    }

    /// The words of the group: of each participant, and of the output.
    fn words<'a>(&self, case: &'a BlameCase, commits: &[ChunkCommit]) -> Result<(Vec<&'a [u8]>, &'a [u8]), CaseError> {
        let group = case.group as usize;
        ensure(group < self.chunk.group_count() && case.inputs.len() == commits.len(), "Opening")?;
        let (input, output) = self.open.word_lens();
        let len = |word_len: usize| (self.chunk.len() * word_len) as u64;
        let inputs = case.inputs.iter().zip(commits).map(|(opening, commit)| {
            opening.verify(&commit.root, len(input), group, input).ok_or(CaseError::Foreign("Opening"))
        });
        let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
        let opening = case.output.as_ref().ok_or(CaseError::Foreign("Opening"))?;
        let out = opening.verify(&self.sum.out_root, len(output), group, output);
        Ok((inputs, out.ok_or(CaseError::Foreign("Opening"))?))
    }

    fn verified(
        &self,
        network: &Network,
        case: &BlameCase,
        commits: &[ChunkCommit],
        wire: Wire,
    ) -> Result<Vec<Guilty>, CaseError> {
        let (inputs, output) = self.words(case, commits)?;
        let ranks: Vec<Rank> = self.sum.participants.iter().collect();
        let checked = match self.rho(network, case, commits)? {
            Some(Err(guilty)) => return Ok(vec![guilty]),
            Some(Ok((digest, rho))) => Some((TagKey::new(&rho), self.tags(network, case, &digest)?)),
            None => None,
        };
        let mut guilty = Vec::new();
        for (rank, words) in ranks.iter().zip(&inputs) {
            let stated = checked.as_ref().and_then(|(key, tags)| Some((key, tags.iter().find(|t| t.rank == *rank)?)));
            if !check_range(wire.input(), words, wire.q().into()) {
                guilty.push(self.member(*rank, Lie::Range)?);
            } else if let Some((key, tags)) = stated
                && (tags.tags.len() != self.chunk.group_count()
                    || tags.tags[case.group as usize] != key.tag(words, wire.input()))
            {
                guilty.push(self.member(*rank, Lie::Tag)?);
            }
        }
        if !adds_up(wire, &inputs, output) {
            guilty.push(self.reducer(Lie::Sum));
        }
        if guilty.is_empty() {
            guilty.push(self.accuser(case, checked, output, wire.output())?);
        }
        Ok(guilty)
    }

    /// The NonceSet's digest and what it makes of rho; `None` without a NonceSet.
    #[allow(clippy::type_complexity)]
    fn rho(
        &self,
        network: &Network,
        case: &BlameCase,
        commits: &[ChunkCommit],
    ) -> Result<Option<Result<(Digest, Digest), Guilty>>, CaseError> {
        let Some(raw) = &case.nonces else { return Ok(None) };
        let set: Signed<NonceSet> = verify(network, raw, "NonceSet")?;
        let place = (set.round, set.attempt, set.chunk, set.sum, set.signer());
        let here = (self.id, self.sum.attempt, self.sum.chunk, self.sum_digest, self.sum.signer());
        ensure(place == here, "NonceSet")?;
        let right = |(nonce, commit): (&[u8; 32], &ChunkCommit)| {
            *nonce == [0; 32] || commit.fixed.is_some_and(|fixed| fixed.nonce == nonce_hash(nonce))
        };
        if set.nonces.len() != commits.len() || !set.nonces.iter().zip(commits).all(right) {
            return Ok(Some(Err(self.reducer(Lie::Nonces))));
        }
        let rho = rho(&self.id, self.sum.chunk, &self.sum_digest, &self.sum.commits, &set.nonces);
        Ok(Some(Ok((set.digest(), rho))))
    }

    /// The participants' tags under a NonceSet; some may be missing.
    fn tags(&self, network: &Network, case: &BlameCase, nonces: &Digest) -> Result<Vec<Signed<ChunkTags>>, CaseError> {
        let mut all: Vec<Signed<ChunkTags>> = Vec::with_capacity(case.tags.len());
        for raw in &case.tags {
            let tags: Signed<ChunkTags> = verify(network, raw, "ChunkTags")?;
            let place = (tags.round, tags.attempt, tags.chunk, tags.sum, tags.nonces);
            let here = place == (self.id, self.sum.attempt, self.sum.chunk, self.sum_digest, *nonces);
            let by = self.sum.participants.contains(tags.rank) && self.hotkey(tags.rank)?.0 == tags.signer();
            ensure(here && by && all.last().is_none_or(|last| last.rank < tags.rank), "ChunkTags")?;
            all.push(tags);
        }
        Ok(all)
    }

    /// All else being right, the accuser is guilty if its own tag of the output is not.
    fn accuser(
        &self,
        case: &BlameCase,
        checked: Option<(TagKey, Vec<Signed<ChunkTags>>)>,
        output: &[u8],
        word: Word,
    ) -> Result<Guilty, CaseError> {
        let (Some(rank), Some((key, tags))) = (case.accuser, checked) else { return Err(CaseError::NothingWrong) };
        let own = tags.iter().find(|tags| tags.rank == rank).ok_or(CaseError::Foreign("accuser"))?;
        ensure(out_digest(&case.out_tags) == own.out, "tags of the output")?;
        let stated = case.out_tags.get(case.group as usize);
        let right = case.out_tags.len() == self.chunk.group_count() && stated == Some(&key.tag(output, word));
        if right { Err(CaseError::NothingWrong) } else { self.member(rank, Lie::Accusation) }
    }

    /// In exact mode the group is computed again.
    fn exact(&self, case: &BlameCase, commits: &[ChunkCommit]) -> Result<Vec<Guilty>, CaseError> {
        let op = ExactOp::of(self.open.op).ok_or(CaseError::NotJudgeable)?;
        let (inputs, output) = self.words(case, commits)?;
        let mut again = vec![0; output.len()];
        exact::reduce(op, self.open.dtype, &inputs, &mut again);
        if again == output { Err(CaseError::NothingWrong) } else { Ok(vec![self.reducer(Lie::Sum)]) }
    }
}

/// Whether the output is the sum of the inputs, every word of it exactly. A sum within range follows.
fn adds_up(wire: Wire, inputs: &[&[u8]], output: &[u8]) -> bool {
    let (input, out) = (wire.input(), wire.output());
    let bound = i128::from(wire.q_out(inputs.len()));
    (0..output.len() / out.len()).all(|k| {
        let sum: i128 = inputs.iter().map(|words| word_at(input, words, k)).sum();
        let stated = word_at(out, output, k);
        sum == stated && stated.abs() <= bound
    })
}

fn word_at(word: Word, words: &[u8], k: usize) -> i128 {
    match word {
        Word::W8 => i8::from_le_bytes(words.as_chunks().0[k]).into(),
        Word::W16 => i16::from_le_bytes(words.as_chunks().0[k]).into(),
        Word::W32 => i32::from_le_bytes(words.as_chunks().0[k]).into(),
        Word::W64 => i64::from_le_bytes(words.as_chunks().0[k]).into(),
    }
}
