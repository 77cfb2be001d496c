//! The casebook: what this node keeps of offences, found by itself or proven by others, and for how long.
//!
//! **Owns** the stored form, its order (by time, so that the oldest goes first) and its limits. **Does not own** who writes:
//! dispatch writes what its validator found, in the batch of the verdict; the services `proofs` and `scores` what they
//! heard. Acts on nothing by itself.

use bytes::Bytes;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use sundara_proto::id::{Hotkey, JobId};
use sundara_proto::pb;
use sundara_proto::units::UnixMillis;

use crate::store::{KeyRange, Keyspace, ProtoTable, Store, StoreError, Table, WriteBatch, time_key, time_key_unix_ms};

/// Records deleted in one step of retention.
const RETAIN_STEP: usize = 256;

const CASES: ProtoTable<StoredCase> = Table::new(Keyspace::Evidence);

/// How long evidence of offences is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct EvidenceConfig {
    /// Days that evidence is kept.
    pub keep_days: u64,
    /// Cases kept, the newest; one takes about 4 KiB, and 40 KiB at most.
    pub kept_max: usize,
    /// Proofs kept of one accuser whose word does not count here (`jobs.trusted_validators`): hotkeys are free.
    pub per_stranger_max: usize,
}

impl Default for EvidenceConfig {
    /// Half a year, 40 MiB of usual cases.
    fn default() -> Self {
        Self { keep_days: 180, kept_max: 10_000, per_stranger_max: 16 }
    }
}

/// One offence as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// When it was noted here, Unix milliseconds.
    pub at_ms: u64,
    /// Who did it.
    pub accused: Hotkey,
    /// Who says so.
    pub accuser: Hotkey,
    /// `wrong_result`, `broken_commitment`, `withheld`, `foreign_attestation` or `equivocation`.
    pub offence: String,
    /// For people.
    pub detail: String,
    /// The job; zeros where it is about none.
    pub job: JobId,
    /// The attempt.
    pub attempt: u32,
    /// Whether this node acted on it: its own finding, or the word of a validator that it trusts.
    pub believed: bool,
    /// Whether the record holds a signed proof that others can check.
    pub proven: bool,
}

/// What is kept of an offence. A stored form: numbers never change.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct StoredCase {
    #[prost(string, tag = "1")]
    pub(crate) offence: String,
    #[prost(string, tag = "2")]
    pub(crate) detail: String,
    #[prost(bytes = "bytes", tag = "3")]
    pub(crate) job: Bytes,
    #[prost(uint32, tag = "4")]
    pub(crate) attempt: u32,
    #[prost(uint64, tag = "5")]
    pub(crate) at_ms: u64,
    /// The accused attestation, where there is one and no proof holds it.
    #[prost(message, optional, tag = "6")]
    pub(crate) attested: Option<pb::CountersignedAttestation>,
    /// What the accuser's own executor found.
    #[prost(message, optional, tag = "7")]
    pub(crate) reference: Option<pb::Signed>,
    /// The broken commitment.
    #[prost(bytes = "bytes", tag = "8")]
    pub(crate) commitment: Bytes,
    /// The fraud proof.
    #[prost(message, optional, tag = "9")]
    pub(crate) proof: Option<pb::Signed>,
    #[prost(bytes = "bytes", tag = "10")]
    pub(crate) accused: Bytes,
    #[prost(bytes = "bytes", tag = "11")]
    pub(crate) accuser: Bytes,
    #[prost(bool, tag = "12")]
    pub(crate) believed: bool,
    /// Two signed statements that contradict each other, for an equivocation.
    #[prost(message, repeated, tag = "13")]
    pub(crate) statements: Vec<pb::Signed>,
}

impl StoredCase {
    /// Writes it down. One case of an accuser against an accused over one job a millisecond: a second one replaces it.
    pub(crate) fn record(&self, batch: &mut WriteBatch) {
        let id = [&self.accused[..], &self.job, &self.accuser].concat();
        CASES.put(batch, time_key(self.at_ms, &id), self);
    }

    fn shown(self) -> Option<Case> {
        Some(Case {
            at_ms: self.at_ms,
            accused: Hotkey::try_from(&self.accused[..]).ok()?,
            accuser: Hotkey::try_from(&self.accuser[..]).ok()?,
            job: JobId::try_from(&self.job[..]).ok()?,
            attempt: self.attempt,
            believed: self.believed,
            proven: self.proof.is_some() || !self.statements.is_empty(),
            offence: self.offence,
            detail: self.detail,
        })
    }
}

/// The newest cases first, at most `limit`.
///
/// # Errors
/// When the store cannot be read.
pub(crate) fn list(store: &dyn Store, limit: usize) -> Result<Vec<Case>, StoreError> {
    let (rows, _) = CASES.scan(store, &KeyRange::all().reversed(), limit)?;
    Ok(rows.into_iter().filter_map(|(_, case)| case.shown()).collect())
}

/// Who accuses whom, of every case kept, oldest first. Reads in pages.
///
/// # Errors
/// When the store cannot be read.
pub(crate) fn each(store: &dyn Store, mut f: impl FnMut(&StoredCase)) -> Result<(), StoreError> {
    let mut range = Some(KeyRange::all());
    while let Some(r) = range {
        let page = store.scan(Keyspace::Evidence, &r, RETAIN_STEP)?;
        for (_, value) in page.items {
            if let Ok(case) = StoredCase::decode(value) {
                f(&case);
            }
        }
        range = page.next;
    }
    Ok(())
}

/// Deletes what is older than it is kept for, and the oldest beyond the number kept. Returns how many went.
///
/// # Errors
/// When the store cannot be read or written.
pub(crate) async fn retain(store: &dyn Store, config: &EvidenceConfig, now: UnixMillis) -> Result<usize, StoreError> {
    let mut kept = 0_usize;
    each(store, |_| kept += 1)?;
    let mut over = kept.saturating_sub(config.kept_max);
    let oldest = now.0.saturating_sub(config.keep_days.saturating_mul(24 * 3_600_000));
    let mut gone = 0;
    let mut range = Some(KeyRange::all());
    while let Some(r) = range {
        let page = store.scan(Keyspace::Evidence, &r, RETAIN_STEP)?;
        let mut batch = WriteBatch::new();
        for (key, _) in &page.items {
            if over == 0 && time_key_unix_ms(key).is_some_and(|at| at >= oldest) {
                break;
            }
            over = over.saturating_sub(1);
            gone += 1;
            batch.delete(Keyspace::Evidence, key.clone());
        }
        // In order of time: the first that stays is followed by others that stay.
        let whole_page = batch.len() == page.items.len();
        if !batch.is_empty() {
            store.commit(batch).await?;
        }
        range = page.next.filter(|_| whole_page);
    }
    Ok(gone)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    const DAY: u64 = 24 * 3_600_000;

    fn write(store: &MemoryStore, at_ms: u64, accused: u8) {
        let case = StoredCase {
            offence: "withheld".into(),
            job: vec![3; 32].into(),
            at_ms,
            accused: vec![accused; 32].into(),
            accuser: vec![9; 32].into(),
            ..StoredCase::default()
        };
        let mut batch = WriteBatch::new();
        case.record(&mut batch);
        store.commit(batch).wait().unwrap();
    }

    #[tokio::test]
    async fn evidence_goes_by_age_and_by_number_oldest_first() {
        let store = MemoryStore::new();
        for n in 0..1_000_u64 {
            write(&store, n * DAY, u8::try_from(n % 200).unwrap());
        }
        let now = UnixMillis(999 * DAY);
        let by_age = EvidenceConfig { keep_days: 700, kept_max: 5_000, ..EvidenceConfig::default() };
        assert_eq!(retain(&store, &by_age, now).await.unwrap(), 299);
        assert_eq!(retain(&store, &by_age, now).await.unwrap(), 0);
        let by_number = EvidenceConfig { keep_days: 700, kept_max: 100, ..EvidenceConfig::default() };
        assert_eq!(retain(&store, &by_number, now).await.unwrap(), 601);
        let left = list(&store, 1_000).unwrap();
        assert_eq!(left.len(), 100);
        assert_eq!((left[0].at_ms, left[99].at_ms), (999 * DAY, 900 * DAY), "the newest stay, newest first");
    }
}
