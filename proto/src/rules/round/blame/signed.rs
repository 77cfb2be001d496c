//! Lies that a pair of signed messages proves.

use super::*;

/// Two messages of one signer for one place: its guilt.
///
/// A leader opens a group's round of one seq once, and after it failed goes on with the next seq. A member that sends its
/// words again, in the same attempt, sends the commitment that it has.
pub fn equivocation(network: &Network, pair: &Equivocation) -> Result<Guilty, CaseError> {
    ensure(pair.first.signer == pair.second.signer && pair.first.payload != pair.second.payload, "second message")?;
    let party = match pair.kind {
        EquivocationKind::Open => same(network, pair, "RoundOpen", |open: &Signed<RoundOpen>| {
            let key = open.is_by_its_leader().then_some((open.group, open.seq));
            (key.map_or_else(|| open.id().0, |(group, _)| group.0), key.map(|(_, seq)| seq), 0, Party::Leader)
        }),
        EquivocationKind::Amend => same(network, pair, "RoundAmend", |amend: &Signed<RoundAmend>| {
            (amend.round.0, None, amend.number, Party::Leader)
        }),
        EquivocationKind::Commit => same(network, pair, "ChunkCommit", |commit: &Signed<ChunkCommit>| {
            (commit.round.0, Some(commit.attempt.into()), commit.chunk, Party::Member(commit.rank))
        }),
        EquivocationKind::Sum => same(network, pair, "SumCommit", |sum: &Signed<SumCommit>| {
            (sum.round.0, Some(sum.attempt.into()), sum.chunk, Party::Reducer)
        }),
        EquivocationKind::Nonces => same(network, pair, "NonceSet", |set: &Signed<NonceSet>| {
            (set.round.0, Some(set.attempt.into()), set.chunk, Party::Reducer)
        }),
    }?;
    let hotkey = Hotkey::try_from(pair.first.signer.as_ref()).map_err(|_| CaseError::Foreign("signer"))?;
    Ok(Guilty { hotkey, party, lie: Lie::Equivocation })
}

/// What the two have to share.
type Place = ([u8; 32], Option<u64>, u32, Party);

fn same<T: crate::crypto::Payload>(
    network: &Network,
    pair: &Equivocation,
    part: &'static str,
    place: impl Fn(&Signed<T>) -> Place,
) -> Result<Party, CaseError> {
    let first = place(&verify(network, &pair.first, part)?);
    let second = place(&verify(network, &pair.second, part)?);
    ensure(first == second, "second message")?;
    Ok(first.3)
}

/// A receipt whose words the sum of the same attempt leaves out, or has others for: the reducer's guilt.
pub fn omission(network: &Network, left_out: &Omission) -> Result<Guilty, CaseError> {
    let receipt: Signed<ChunkReceipt> = verify(network, &left_out.receipt, "ChunkReceipt")?;
    let sum: Signed<SumCommit> = verify(network, &left_out.sum, "SumCommit")?;
    let one_place = (receipt.round, receipt.attempt, receipt.chunk) == (sum.round, sum.attempt, sum.chunk);
    ensure(one_place && receipt.signer() == sum.signer(), "SumCommit")?;
    let guilty = Guilty { hotkey: sum.reducer(), party: Party::Reducer, lie: Lie::Omission };
    let Some(place) = sum.participants.position(receipt.rank) else { return Ok(guilty) };
    // The sum names a payload, so it needs no signature to be held against the sum's author.
    let payload = &left_out.commit.as_ref().ok_or(CaseError::Foreign("ChunkCommit"))?.payload;
    let named = crate::crypto::Context::CHUNK_COMMIT.digest_one(payload);
    ensure(sum.commits.get(place) == Some(&named), "ChunkCommit")?;
    match ChunkCommit::decode(payload) {
        Ok(commit) if commit.root == receipt.root => Err(CaseError::NothingWrong),
        _ => Ok(guilty),
    }
}
