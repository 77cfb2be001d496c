//! Liars in a round, thousands of them: each is found by the others and blamed, and nobody honest ever is.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use sundara_proto::crypto::{HotkeyPair, Network, Payload, Signed};
use sundara_proto::id::{Digest, GroupId, NodeId, RoundId};
use sundara_proto::pb;
use sundara_proto::round::{
    BlameCase, ChunkCommit, ChunkReceipt, ChunkTags, Equivocation, EquivocationKind, Evidence, FixedCommit,
    GroupMember, Mode, NonceSet, Omission, PartMove, Rank, Ranks, RoundAmend, RoundMember, RoundOp, RoundOpen,
    RoundPart, RoundSettings, SumCommit, nonce_hash, out_digest,
};
use sundara_proto::rules::round::blame::{CaseError, Guilty, Lie, Party, judge, judge_evidence};
use sundara_proto::rules::round::dtype::{Compress, Dtype, Wire, Word};
use sundara_proto::rules::round::exact::{self, ExactOp};
use sundara_proto::rules::round::fixed::{self, scales_digest};
use sundara_proto::rules::round::layout::GROUP;
use sundara_proto::rules::round::tags::{self, P, TagKey};
use sundara_proto::rules::round::tree::ChunkTree;
use sundara_proto::wire::{WireMessage as _, limit};

fn network() -> Network {
    Network::named("blame", 1)
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    fn bytes(&mut self) -> [u8; 32] {
        std::array::from_fn(|_| self.next() as u8)
    }
}

/// Place of the reducer's key behind those of the members.
const REDUCER: usize = 20;

fn key(n: usize) -> HotkeyPair {
    HotkeyPair::from_seed(&[n as u8 + 1; 32])
}

fn party(n: usize) -> GroupMember {
    GroupMember { hotkey: key(n).hotkey(), node: NodeId([n as u8; 32]) }
}

fn sign<T: Payload>(n: usize, value: T) -> Signed<T> {
    Signed::sign(&network(), &key(n), value)
}

/// How a trial goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Attack {
    None,
    Drop,
    Double,
    Negate,
    Flip,
    AddP,
    WrongShared,
    LowScale,
    HighScale,
    WrongNonce,
    ForeignCommit,
    LyingTag,
    OutOfRange,
    FalseAccuser,
    /// The reducer changes a word and a member's tag hides it.
    Collude,
}

/// One chunk as everyone signed it, all of it known.
struct Chunk {
    wire: Wire,
    open: Signed<RoundOpen>,
    scales: Vec<Vec<u8>>,
    shared: Vec<u8>,
    inputs: Vec<Vec<u8>>,
    output: Vec<u8>,
    commits: Vec<Signed<ChunkCommit>>,
    sum: Signed<SumCommit>,
    nonces: Signed<NonceSet>,
    tags: Vec<Signed<ChunkTags>>,
    out_tags: Vec<Vec<u64>>,
    liar: usize,
    group: usize,
}

fn open(members: usize, elements: u64, dtype: Dtype, compress: Compress, mode: Mode, op: RoundOp) -> Signed<RoundOpen> {
    let member = |n: usize| RoundMember { rank: n as Rank * 2, hotkey: party(n).hotkey, node: party(n).node };
    let part = RoundPart { reducer: party(REDUCER), backup: None, groups: 0..elements.div_ceil(GROUP as u64) };
    let open = RoundOpen {
        group: GroupId([7; 32]),
        roster: 1,
        seq: 2,
        leader: 0,
        op,
        dtype,
        lens: vec![elements],
        settings: RoundSettings { mode, compress, ..RoundSettings::default() },
        members: (0..members).map(member).collect(),
        parts: vec![part],
        chunk_groups: 4,
        deadline_ms: 1_000,
    };
    open.check().unwrap();
    sign(0, open)
}

fn put(word: Word, words: &mut [u8], k: usize, value: i64) {
    words[k * word.len()..(k + 1) * word.len()].copy_from_slice(&value.to_le_bytes()[..word.len()]);
}

fn get(word: Word, words: &[u8], k: usize) -> i64 {
    let mut wide = [0; 8];
    wide[..word.len()].copy_from_slice(&words[k * word.len()..(k + 1) * word.len()]);
    let shift = 64 - 8 * word.len() as u32;
    (i64::from_le_bytes(wide) << shift) >> shift
}

impl Chunk {
    fn play(attack: Attack, random: &mut Random) -> Self {
        let members = if attack == Attack::AddP { 17 } else { 2 + random.below(4) };
        let elements = if random.below(4) == 0 { GROUP + 1 + random.below(GROUP) } else { 300 + random.below(300) };
        let compress = [Compress::None, Compress::Bf16, Compress::Int8][random.below(3)];
        let compress = if attack == Attack::AddP { Compress::None } else { compress };
        let open = open(members, elements as u64, Dtype::F32, compress, Mode::Verified, RoundOp::Mean);
        let wire = open.wire().unwrap();
        let liar = random.below(members);
        let mut tensors: Vec<Vec<u8>> = Vec::new();
        for _ in 0..members {
            let value = |random: &mut Random| (random.next() as i32 as f32 / 1e9).to_le_bytes();
            tensors.push((0..elements).flat_map(|_| value(random)).collect());
        }
        let scales: Vec<Vec<u8>> =
            tensors.iter().map(|t| fixed::block_exponents(wire, Dtype::F32, t, None).unwrap()).collect();
        let mut shared = scales[0].clone();
        scales.iter().for_each(|s| fixed::max_exponents(&mut shared, s));
        match attack {
            // Below what a member needs; such a member quantises as it can.
            Attack::LowScale => shared[0] -= 1,
            Attack::HighScale => shared[0] += 40,
            _ => {}
        }
        let mut inputs: Vec<Vec<u8>> = tensors
            .iter()
            .map(|tensor| {
                let mut words = vec![0; elements * wire.input().len()];
                fixed::quantise(wire, Dtype::F32, tensor, &shared, &mut words, None);
                words
            })
            .collect();
        let place = random.below(elements);
        if attack == Attack::OutOfRange {
            put(wire.input(), &mut inputs[liar], place, -i64::from(wire.q()) - 1);
        }
        let mut output = vec![0; elements * wire.output().len()];
        inputs.iter().for_each(|words| fixed::sum_into(wire, &mut output, words));
        let own = |k| get(wire.input(), &inputs[liar], k);
        let spoil: Vec<(usize, i64)> = match attack {
            Attack::Drop => (0..elements).map(|k| (k, -own(k))).collect(),
            Attack::Double => (0..elements).map(|k| (k, own(k))).collect(),
            Attack::Negate => (0..elements).map(|k| (k, -2 * own(k))).collect(),
            Attack::Flip | Attack::Collude => {
                vec![(place, if get(wire.output(), &output, place) > 0 { -1 } else { 1 })]
            }
            Attack::AddP => vec![(place, P as i64)],
            _ => Vec::new(),
        };
        for (k, change) in &spoil {
            let value = get(wire.output(), &output, *k) + change;
            put(wire.output(), &mut output, *k, value);
        }
        Self::sign(attack, random, wire, open, scales, shared, inputs, output, liar, place / GROUP)
    }

    #[allow(clippy::too_many_arguments)]
    fn sign(
        attack: Attack,
        random: &mut Random,
        wire: Wire,
        open: Signed<RoundOpen>,
        scales: Vec<Vec<u8>>,
        shared: Vec<u8>,
        inputs: Vec<Vec<u8>>,
        output: Vec<u8>,
        liar: usize,
        group: usize,
    ) -> Self {
        let (round, members) = (open.id(), inputs.len());
        let secrets: Vec<[u8; 32]> = (0..members).map(|_| random.bytes()).collect();
        let commit = |n: usize| {
            let odd = attack == Attack::WrongShared && n == liar;
            let shared = if odd { Digest([9; 32]) } else { scales_digest(&shared) };
            let commit = ChunkCommit {
                round,
                attempt: if attack == Attack::ForeignCommit && n == liar { 4 } else { 3 },
                chunk: 0,
                rank: n as Rank * 2,
                root: ChunkTree::of(&inputs[n]).root(),
                len: inputs[n].len() as u64,
                fixed: Some(FixedCommit { scale: scales_digest(&scales[n]), shared, nonce: nonce_hash(&secrets[n]) }),
            };
            sign(n, commit)
        };
        let commits: Vec<Signed<ChunkCommit>> = (0..members).map(commit).collect();
        let sum = SumCommit {
            round,
            attempt: 3,
            chunk: 0,
            participants: open.ranks(),
            commits: commits.iter().map(Signed::<ChunkCommit>::digest).collect(),
            shared: Some(scales_digest(&shared)),
            out_root: ChunkTree::of(&output).root(),
        };
        let sum = sign(REDUCER, sum);
        let mut nonces = secrets;
        if random.below(3) == 0 {
            nonces[random.below(members)] = [0; 32];
        }
        if attack == Attack::WrongNonce {
            nonces[liar] = random.bytes();
        }
        let rho = tags::rho(&round, 0, &sum.digest(), &sum.commits, &nonces);
        let nonces = sign(REDUCER, NonceSet { round, attempt: 3, chunk: 0, sum: sum.digest(), nonces });
        let key = TagKey::new(&rho);
        let of = |words: &[u8], word| {
            let mut tags = Vec::new();
            key.tags(words, word, &mut tags);
            tags
        };
        let right = of(&output, wire.output());
        let mut total = vec![0; right.len()];
        inputs.iter().for_each(|words| tags::add_all(&mut total, &of(words, wire.input())));
        let (mut tags, mut out_tags) = (Vec::new(), Vec::new());
        for (n, words) in inputs.iter().enumerate() {
            let (mut own, mut out) = (of(words, wire.input()), right.clone());
            match attack {
                Attack::LyingTag if n == liar => own[group] = tags::add_mod(own[group], 1 + random.next() % (P - 1)),
                Attack::FalseAccuser if n == liar => out[group] = tags::add_mod(out[group], 1),
                Attack::Collude if n == liar => {
                    let missing = (right[group] + P - total[group]) % P;
                    own[group] = tags::add_mod(own[group], missing);
                }
                _ => {}
            }
            let all = ChunkTags {
                round,
                attempt: 3,
                chunk: 0,
                rank: n as Rank * 2,
                sum: sum.digest(),
                nonces: nonces.digest(),
                tags: own,
                out: out_digest(&out),
            };
            tags.push(sign(n, all));
            out_tags.push(out);
        }
        Self { wire, open, scales, shared, inputs, output, commits, sum, nonces, tags, out_tags, liar, group }
    }

    /// What members conclude from what they see, and the first group that is wrong.
    fn disputed(&self) -> Option<usize> {
        let mut total = vec![0; self.out_tags[0].len()];
        self.tags.iter().for_each(|tags| tags::add_all(&mut total, &tags.tags));
        let out_of_range = fixed::finish(self.wire, &self.output, self.inputs.len()).err().map(|e| e.index / GROUP);
        let differ = |out: &Vec<u64>| out.iter().zip(&total).position(|(a, b)| a != b);
        out_of_range.or_else(|| self.out_tags.iter().find_map(differ))
    }

    fn case(&self, accuser: Option<usize>, group: usize) -> BlameCase {
        let open = |words: &[u8], word: Word| ChunkTree::of(words).open(words, group, word.len()).unwrap();
        BlameCase {
            open: self.open.to_wire(),
            amends: Vec::new(),
            sum: self.sum.to_wire(),
            commits: self.commits.iter().map(Signed::to_wire).collect(),
            nonces: Some(self.nonces.to_wire()),
            tags: self.tags.iter().map(Signed::to_wire).collect(),
            accuser: accuser.map(|n| n as Rank * 2),
            out_tags: accuser.map_or_else(Vec::new, |n| self.out_tags[n].clone()),
            group: group as u32,
            inputs: self.inputs.iter().map(|words| open(words, self.wire.input())).collect(),
            output: Some(open(&self.output, self.wire.output())),
            scales: Vec::new(),
            shared: Bytes::new(),
        }
    }

    fn about_scales(&self) -> BlameCase {
        let scales = self.scales.iter().map(|s| Bytes::copy_from_slice(s)).collect();
        let shared = Bytes::copy_from_slice(&self.shared);
        let none = BlameCase { nonces: None, tags: Vec::new(), inputs: Vec::new(), output: None, ..self.case(None, 0) };
        BlameCase { scales, shared, ..none }
    }

    fn reducer(&self, lie: Lie) -> Vec<Guilty> {
        vec![Guilty { hotkey: key(REDUCER).hotkey(), party: Party::Reducer, lie }]
    }

    fn member(&self, lie: Lie) -> Vec<Guilty> {
        vec![Guilty { hotkey: key(self.liar).hotkey(), party: Party::Member(self.liar as Rank * 2), lie }]
    }
}

/// As it travels.
fn judged(case: &BlameCase) -> Result<Vec<Guilty>, CaseError> {
    let case = BlameCase::decode(&case.encode().into()).unwrap();
    judge(&network(), &case)
}

fn trials(attack: Attack, count: u64) {
    let mut found = 0;
    for seed in 0..count {
        let mut random = Random(seed * 1_000 + attack as u64);
        let chunk = Chunk::play(attack, &mut random);
        let accuser = random.below(chunk.inputs.len());
        let disputed = chunk.disputed();
        let wanted = match attack {
            Attack::Drop | Attack::Double | Attack::Negate | Attack::Flip | Attack::AddP => {
                assert!(disputed.is_some(), "{attack:?} {seed} went by");
                chunk.reducer(Lie::Sum)
            }
            Attack::WrongShared | Attack::ForeignCommit => chunk.reducer(Lie::Commitments),
            Attack::WrongNonce => {
                if chunk.nonces.nonces[chunk.liar] == [0; 32] {
                    continue;
                }
                chunk.reducer(Lie::Nonces)
            }
            Attack::LowScale | Attack::HighScale => {
                assert_eq!(judged(&chunk.about_scales()), Ok(chunk.reducer(Lie::Scales)), "{attack:?} {seed}");
                found += 1;
                continue;
            }
            Attack::LyingTag => {
                assert_eq!(disputed, Some(chunk.group), "{attack:?} {seed}");
                chunk.member(Lie::Tag)
            }
            Attack::OutOfRange => chunk.member(Lie::Range),
            Attack::FalseAccuser => {
                assert_eq!(disputed, Some(chunk.group), "{attack:?} {seed}");
                chunk.member(Lie::Accusation)
            }
            Attack::Collude => {
                assert_eq!(disputed, None, "{seed}: the two hide from the others, not from who opens the group");
                [chunk.member(Lie::Tag), chunk.reducer(Lie::Sum)].concat()
            }
            Attack::None => {
                assert_eq!(disputed, None, "{seed}");
                for accuser in [None, Some(accuser)] {
                    assert_eq!(judged(&chunk.case(accuser, chunk.group)), Err(CaseError::NothingWrong), "{seed}");
                }
                assert_eq!(judged(&chunk.about_scales()), Err(CaseError::NothingWrong), "{seed}");
                found += 1;
                continue;
            }
        };
        let accuser = if attack == Attack::FalseAccuser { chunk.liar } else { accuser };
        let case = chunk.case(Some(accuser), disputed.unwrap_or(chunk.group));
        assert_eq!(judged(&case), Ok(wanted), "{attack:?} {seed}");
        found += 1;
    }
    assert!(found * 10 >= count * 6, "{attack:?}: only {found} of {count} trials count");
}

macro_rules! tests {
    ($($name:ident: $attack:ident, $count:literal;)*) => {
        $(#[test] fn $name() { trials(Attack::$attack, $count); })*
    };
}

tests! {
    nobody_is_guilty_of_an_honest_round: None, 400;
    a_dropped_member_convicts_the_reducer: Drop, 300;
    a_doubled_member_convicts_the_reducer: Double, 300;
    a_negated_member_convicts_the_reducer: Negate, 300;
    one_changed_integer_convicts_the_reducer: Flip, 400;
    adding_p_convicts_the_reducer: AddP, 60;
    commitments_under_other_exponents_convict_the_reducer: WrongShared, 200;
    commitments_of_another_attempt_convict_the_reducer: ForeignCommit, 200;
    exponents_below_a_members_convict_the_reducer: LowScale, 200;
    exponents_above_all_members_convict_the_reducer: HighScale, 200;
    invented_nonces_convict_the_reducer: WrongNonce, 200;
    a_lying_tag_convicts_the_member: LyingTag, 400;
    words_beyond_the_range_convict_the_member: OutOfRange, 300;
    a_false_accusation_convicts_the_accuser: FalseAccuser, 400;
    a_member_that_covers_for_the_reducer_goes_down_with_it: Collude, 300;
}

/// Takes the evidence of honest rounds apart and puts it together wrongly: nobody is convicted by it.
#[test]
fn made_up_cases_convict_nobody() {
    for seed in 0..300 {
        let mut random = Random(seed);
        let (chunk, other) = (Chunk::play(Attack::None, &mut random), Chunk::play(Attack::None, &mut random));
        let liar = key(chunk.liar);
        let mut case = chunk.case(Some(chunk.liar), chunk.group);
        let forge = |raw: &pb::Signed, flip: usize| {
            let mut payload = raw.payload.to_vec();
            let place = flip % payload.len();
            payload[place] ^= 1 << (flip % 8);
            pb::Signed { payload: payload.into(), ..raw.clone() }
        };
        let flip = random.next() as usize >> 8;
        match random.below(16) {
            0 => case.sum = forge(&case.sum, flip),
            1 => case.commits[0] = forge(&case.commits[0], flip),
            2 => case.tags[0] = forge(&case.tags[0], flip),
            3 => case.nonces = Some(forge(&chunk.nonces.to_wire(), flip)),
            4 => case.open = forge(&case.open, flip),
            5 => case.sum = other.sum.to_wire(),
            6 => case.nonces = Some(other.nonces.to_wire()),
            7 => case.tags = other.tags.iter().map(Signed::to_wire).collect(),
            8 => case.inputs.rotate_left(1),
            9 => case.output = Some(case.inputs[0].clone()),
            // Signed by who has no business to.
            10 => case.sum = Signed::sign(&network(), &liar, chunk.sum.value().clone()).to_wire(),
            11 => case.nonces = Some(Signed::sign(&network(), &liar, chunk.nonces.value().clone()).to_wire()),
            12 => {
                let place = (chunk.liar + 1) % chunk.inputs.len();
                case.tags[place] = Signed::sign(&network(), &liar, chunk.tags[place].value().clone()).to_wire();
            }
            13 => {
                let place = (chunk.liar + 1) % chunk.inputs.len();
                case.commits[place].signature = Bytes::from_static(&[1; 64]);
            }
            14 => case.out_tags[chunk.group] ^= 1,
            _ => case.group = 200,
        }
        if case == chunk.case(Some(chunk.liar), chunk.group) {
            continue;
        }
        let verdict = judge(&network(), &case);
        assert!(verdict.is_err(), "{seed}: {verdict:?}");
    }
}

#[test]
fn another_round_of_the_same_group_proves_nothing() {
    let chunk = Chunk::play(Attack::Flip, &mut Random(1));
    let mut open = chunk.open.value().clone();
    open.seq += 1;
    let mut case = chunk.case(None, chunk.group);
    case.open = sign(0, open).to_wire();
    assert_eq!(judged(&case), Err(CaseError::Foreign("SumCommit")));
    assert_eq!(
        judge(&Network::named("other", 1), &chunk.case(None, chunk.group)).unwrap_err().to_string(),
        "RoundOpen: signature does not match its payload and signer"
    );
}

#[test]
fn a_part_that_moved_is_judged_with_its_amendment() {
    let chunk = Chunk::play(Attack::Flip, &mut Random(3));
    let sum = sign(REDUCER + 1, chunk.sum.value().clone());
    let nonces = NonceSet { sum: sum.digest(), ..chunk.nonces.value().clone() };
    let mut case = chunk.case(None, chunk.group);
    (case.sum, case.nonces, case.tags) = (sum.to_wire(), Some(sign(REDUCER + 1, nonces).to_wire()), Vec::new());
    assert_eq!(judged(&case), Err(CaseError::Foreign("SumCommit")));
    let amend = |n: usize| RoundAmend {
        round: chunk.open.id(),
        number: 1,
        leader: n as Rank * 2,
        dropped: Ranks::empty(),
        moves: vec![PartMove { part: 0, reducer: party(REDUCER + 1) }],
        keep: [].into_iter().collect(),
    };
    case.amends = vec![sign(REDUCER + 1, amend(1)).to_wire()];
    assert_eq!(judged(&case), Err(CaseError::Foreign("RoundAmend")), "nobody moves a part to itself");
    case.amends = vec![sign(1, amend(1)).to_wire()];
    let guilty = Guilty { hotkey: key(REDUCER + 1).hotkey(), party: Party::Reducer, lie: Lie::Sum };
    assert_eq!(judged(&case), Ok(vec![guilty]));
}

#[test]
fn a_lost_members_exponents_may_stand() {
    // Rank 0 sent the greatest exponents and was lost before its commitment.
    let chunk = Chunk::play(Attack::HighScale, &mut Random(5));
    let without: Vec<Signed<ChunkCommit>> = chunk.commits[1..].to_vec();
    let mut ranks = chunk.sum.participants;
    ranks.remove(0);
    let sum = SumCommit {
        participants: ranks,
        commits: without.iter().map(Signed::<ChunkCommit>::digest).collect(),
        ..chunk.sum.value().clone()
    };
    let mut case = chunk.about_scales();
    case.sum = sign(REDUCER, sum).to_wire();
    case.commits.remove(0);
    case.scales.remove(0);
    assert_eq!(judged(&case), Err(CaseError::NothingWrong));
}

fn raw_pair<T: Payload>(kind: EquivocationKind, first: &Signed<T>, second: &Signed<T>) -> Evidence {
    Evidence::Equivocation(Equivocation { kind, first: first.to_wire(), second: second.to_wire() })
}

fn guilt(n: usize, party: Party, lie: Lie) -> Result<Vec<Guilty>, CaseError> {
    Ok(vec![Guilty { hotkey: key(n).hotkey(), party, lie }])
}

#[test]
fn two_messages_for_one_place_convict_their_signer() {
    for seed in 0..200 {
        let chunk = Chunk::play(Attack::None, &mut Random(seed));
        let judged = |evidence: Evidence| judge_evidence(&network(), &evidence);
        // Different sums to different members.
        let mut sum = chunk.sum.value().clone();
        sum.out_root = Digest([seed as u8; 32]);
        let other = sign(REDUCER, sum.clone());
        let lie = Lie::Equivocation;
        assert_eq!(judged(raw_pair(EquivocationKind::Sum, &chunk.sum, &other)), guilt(REDUCER, Party::Reducer, lie));
        // Another attempt, another signer, or the same words signed twice are none.
        sum.attempt += 1;
        assert!(judged(raw_pair(EquivocationKind::Sum, &chunk.sum, &sign(REDUCER, sum.clone()))).is_err());
        assert!(judged(raw_pair(EquivocationKind::Sum, &chunk.sum, &sign(1, other.value().clone()))).is_err());
        let again = sign(REDUCER, chunk.sum.value().clone());
        assert!(judged(raw_pair(EquivocationKind::Sum, &chunk.sum, &again)).is_err());
        assert!(judged(raw_pair(EquivocationKind::Nonces, &chunk.sum, &other)).is_err());

        let commit = ChunkCommit { root: Digest([1; 32]), ..chunk.commits[1].value().clone() };
        let pair = raw_pair(EquivocationKind::Commit, &chunk.commits[1], &sign(1, commit));
        assert_eq!(judged(pair), guilt(1, Party::Member(2), lie));
        let mut nonces = chunk.nonces.value().clone();
        nonces.nonces[0] = [7; 32];
        let pair = raw_pair(EquivocationKind::Nonces, &chunk.nonces, &sign(REDUCER, nonces));
        assert_eq!(judged(pair), guilt(REDUCER, Party::Reducer, lie));
        let mut open = chunk.open.value().clone();
        open.deadline_ms += 1;
        assert_eq!(
            judged(raw_pair(EquivocationKind::Open, &chunk.open, &sign(0, open.clone()))),
            guilt(0, Party::Leader, lie)
        );
        assert!(
            judged(raw_pair(EquivocationKind::Open, &sign(1, open.clone()), &sign(1, chunk.open.value().clone())))
                .is_err()
        );
        open.seq += 1;
        assert!(judged(raw_pair(EquivocationKind::Open, &chunk.open, &sign(0, open))).is_err());
    }
}

#[test]
fn a_receipt_for_what_is_left_out_convicts_the_reducer() {
    for seed in 0..200 {
        let chunk = Chunk::play(Attack::None, &mut Random(seed));
        let victim = chunk.liar;
        let receipt = ChunkReceipt {
            round: chunk.open.id(),
            attempt: 3,
            chunk: 0,
            rank: victim as Rank * 2,
            root: chunk.commits[victim].root,
        };
        let judged = |receipt: ChunkReceipt, by: usize, sum: &Signed<SumCommit>, commit: Option<pb::Signed>| {
            let receipt = sign(by, receipt).to_wire();
            judge_evidence(&network(), &Evidence::Omission(Omission { receipt, sum: sum.to_wire(), commit }))
        };
        let named = Some(chunk.commits[victim].to_wire());
        assert_eq!(judged(receipt, REDUCER, &chunk.sum, named.clone()), Err(CaseError::NothingWrong));
        assert!(judged(receipt, REDUCER, &chunk.sum, None).is_err());
        let mut sum = chunk.sum.value().clone();
        sum.participants.remove(victim as Rank * 2);
        sum.commits.remove(victim);
        if sum.commits.is_empty() {
            continue;
        }
        let without = sign(REDUCER, sum);
        assert_eq!(judged(receipt, REDUCER, &without, None), guilt(REDUCER, Party::Reducer, Lie::Omission));
        assert!(judged(receipt, victim, &without, None).is_err(), "a receipt that the reducer did not sign");
        let later = ChunkReceipt { attempt: 4, ..receipt };
        assert!(judged(later, REDUCER, &without, None).is_err(), "of another attempt");
        let other = ChunkReceipt { root: Digest([1; 32]), ..receipt };
        assert_eq!(judged(other, REDUCER, &chunk.sum, named), guilt(REDUCER, Party::Reducer, Lie::Omission));
    }
}

#[test]
fn exact_rounds_are_computed_again() {
    let mut random = Random(11);
    for (trial, op) in
        [RoundOp::Sum, RoundOp::Mean, RoundOp::Min, RoundOp::Max].into_iter().cycle().take(60).enumerate()
    {
        let (members, elements) = (3, 5_000);
        let open = open(members, elements as u64, Dtype::F64, Compress::None, Mode::Exact, op);
        let inputs: Vec<Vec<u8>> = (0..members)
            .map(|_| (0..elements).flat_map(|_| (random.next() as i64 as f64).to_le_bytes()).collect())
            .collect();
        let slices: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
        let mut output = vec![0; elements * 8];
        exact::reduce(ExactOp::of(op).unwrap(), Dtype::F64, &slices, &mut output);
        let place = random.below(output.len());
        let lies = trial % 5 != 0;
        if lies {
            output[place] ^= 1;
        }
        let round: RoundId = open.id();
        let commit = |n: usize| ChunkCommit {
            round,
            attempt: 0,
            chunk: 0,
            rank: n as Rank * 2,
            root: ChunkTree::of(&inputs[n]).root(),
            len: inputs[n].len() as u64,
            fixed: None,
        };
        let commits: Vec<Signed<ChunkCommit>> = (0..members).map(|n| sign(n, commit(n))).collect();
        let sum = SumCommit {
            round,
            attempt: 0,
            chunk: 0,
            participants: open.ranks(),
            commits: commits.iter().map(Signed::<ChunkCommit>::digest).collect(),
            shared: None,
            out_root: ChunkTree::of(&output).root(),
        };
        let group = place / 8 / GROUP;
        let opening = |words: &[u8]| ChunkTree::of(words).open(words, group, 8).unwrap();
        let case = BlameCase {
            open: open.to_wire(),
            amends: Vec::new(),
            sum: sign(REDUCER, sum).to_wire(),
            commits: commits.iter().map(Signed::to_wire).collect(),
            nonces: None,
            tags: Vec::new(),
            accuser: None,
            out_tags: Vec::new(),
            group: group as u32,
            inputs: inputs.iter().map(|words| opening(words)).collect(),
            output: Some(opening(&output)),
            scales: Vec::new(),
            shared: Bytes::new(),
        };
        let wanted = if lies { guilt(REDUCER, Party::Reducer, Lie::Sum) } else { Err(CaseError::NothingWrong) };
        assert_eq!(judged(&case), wanted, "{trial}");
    }
}

#[test]
fn a_case_travels_whole_or_as_a_blob() {
    let mut seen = [false; 2];
    for seed in 0..40 {
        let chunk = Chunk::play(Attack::Flip, &mut Random(seed));
        let case = chunk.case(None, chunk.group);
        let fits = case.encode().len() <= limit::EVIDENCE;
        seen[usize::from(fits)] = true;
        let (evidence, blob) = Evidence::of_case(case.clone());
        match judge_evidence(&network(), &evidence) {
            Ok(guilty) => assert!(fits && blob.is_none() && guilty == chunk.reducer(Lie::Sum)),
            Err(e) => {
                assert_eq!((e, fits), (CaseError::NotHere, false));
                assert_eq!(judged(&BlameCase::decode(&blob.unwrap()).unwrap()), Ok(chunk.reducer(Lie::Sum)));
            }
        }
    }
    assert_eq!(seen, [true; 2], "cases of both sizes");
}
