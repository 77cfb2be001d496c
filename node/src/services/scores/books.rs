//! What is written down as it comes: this node's own tallies, and what other validators publish.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use sundara_proto::batch::{AuditEpoch, Batch};
use sundara_proto::crypto::Signed;
use sundara_proto::id::{Digest, Hotkey, JobId};
use sundara_proto::pb;
use sundara_proto::rules::select;
use sundara_proto::units::EpochLength;
use sundara_proto::verdict::Verdict;
use sundara_proto::wire::WireMessage as _;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::super::casebook::StoredCase;
use super::super::directory::Directory;
use super::super::pages;
use super::{EpochScores, SETTLE_FOR, ScoresConfig, miners};
use crate::domain::score::Sums;
use crate::net::{GossipMessage, GossipPayload};
use crate::service::wall_now;
use crate::store::{KeyRange, Keyspace, SharedStore, Store, StoreError, WriteBatch};

/// Own pages read in one go.
const CATCH_UP_PAGES: usize = 16;
/// Epochs of which running sums are held: the present one and those that are not open yet, with one to spare.
const OWN_EPOCHS: usize = 4;
/// Records deleted in one step of retention.
const RETAIN_STEP: usize = 256;

/// Sums of this validator's own verdicts, each job of which has one.
pub(super) struct OwnBooks {
    epochs: BTreeMap<u64, (Sums, u64)>,
    /// The epoch that the books begin with.
    from: u64,
    /// The last batch that is in the sums.
    read_to: Option<Bytes>,
}

impl OwnBooks {
    /// Reads from the batches of `epoch` on.
    pub(super) fn new(epoch: u64) -> Self {
        Self { epochs: BTreeMap::new(), from: epoch, read_to: None }
    }

    /// Adds what was paged since; `true` while there is more.
    pub(super) fn catch_up(&mut self, store: &dyn Store) -> Result<bool, StoreError> {
        let range = match &self.read_to {
            None => KeyRange::all().from(&pages::batch_key(self.from, 0)),
            Some(last) => KeyRange::all().after(last),
        };
        let found = store.scan(Keyspace::Batches, &range, CATCH_UP_PAGES)?;
        for (key, value) in found.items {
            if let Some(batch) = pages::batch_from(&value)
                && let Some((_, page)) = pages::get(store, batch.root.as_ref())?
            {
                let (sums, jobs) = self.epochs.entry(batch.epoch).or_default();
                for (_, verdict) in verdicts(&page, batch.epoch) {
                    sums.add(&verdict);
                    *jobs += 1;
                }
            }
            self.read_to = Some(key);
        }
        while self.epochs.len() > OWN_EPOCHS {
            self.epochs.pop_first();
        }
        Ok(found.next.is_some())
    }

    /// As far as is known from own verdicts.
    pub(super) fn of(&self, epoch: u64) -> EpochScores {
        let none = EpochScores { epoch, ..EpochScores::default() };
        match self.epochs.get(&epoch) {
            Some((sums, jobs)) => EpochScores { jobs: *jobs, miners: miners(sums), ..none },
            None => none,
        }
    }
}

/// Verdicts of a page that count in its epoch, with who signed each. Read, not verified: the page's author vouches for
/// its own.
pub(super) fn verdicts(page: &pb::Page, epoch: u64) -> impl Iterator<Item = (Hotkey, Verdict)> + '_ {
    page.entries.iter().filter_map(move |entry| {
        let Some(pb::entry::Kind::Verdict(raw)) = &entry.kind else { return None };
        let verdict = Verdict::decode(&raw.payload).ok()?;
        let in_time = verdict.epoch == epoch || verdict.epoch.checked_add(1) == Some(epoch);
        in_time.then_some((Hotkey::try_from(&raw.signer[..]).ok()?, verdict))
    })
}

/// Kinds of what is heard, as they stand in keys.
const COMMITMENT: u8 = 0;
const ROOT: u8 = 1;

/// Roots heard of an author in an epoch, in order.
pub(super) fn roots_of(epoch: u64) -> KeyRange {
    KeyRange::prefix(&[&epoch.to_be_bytes()[..], &[ROOT]].concat())
}

fn root_key(epoch: u64, author: &Hotkey, sequence: u64) -> Vec<u8> {
    [&epoch.to_be_bytes()[..], &[ROOT], author.as_ref(), &sequence.to_be_bytes()].concat()
}

fn commitment_key(epoch: u64, author: &Hotkey) -> Vec<u8> {
    [&epoch.to_be_bytes()[..], &[COMMITMENT], author.as_ref()].concat()
}

/// A validator's audit commitment of one epoch, and what became of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Committed {
    commitment: Option<Digest>,
    pub(super) secret: Option<[u8; 32]>,
    pub(super) broken: bool,
}

/// What is known of an author's secret of an epoch.
pub(super) fn committed(store: &dyn Store, epoch: u64, author: &Hotkey) -> Result<Committed, StoreError> {
    let value = store.get(Keyspace::Heard, &commitment_key(epoch, author))?;
    Ok(value.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default())
}

/// Writes down what other validators publish.
pub(super) struct Listener {
    config: ScoresConfig,
    epoch_length: EpochLength,
    own: Hotkey,
    directory: Directory,
    store: SharedStore,
    validators: Vec<Hotkey>,
    /// Roots kept, by epoch and author.
    roots: HashMap<(u64, Hotkey), u32>,
}

impl Listener {
    pub(super) fn new(
        config: &ScoresConfig,
        epoch_length: EpochLength,
        own: Hotkey,
        directory: &Directory,
        store: &SharedStore,
        validators: Vec<Hotkey>,
    ) -> Result<Self, StoreError> {
        let mut roots: HashMap<(u64, Hotkey), u32> = HashMap::new();
        let mut range = Some(KeyRange::all());
        while let Some(r) = range {
            let page = store.scan(Keyspace::Heard, &r, RETAIN_STEP)?;
            for (_, value) in page.items {
                let raw = pb::Signed::decode(value).ok();
                let batch = raw.as_ref().and_then(|raw| Batch::decode(&raw.payload).ok());
                if let (Some(raw), Some(batch)) = (raw, batch)
                    && let Ok(author) = Hotkey::try_from(&raw.signer[..])
                {
                    *roots.entry((batch.epoch, author)).or_default() += 1;
                }
            }
            range = page.next;
        }
        let (config, directory, store) = (config.clone(), directory.clone(), store.clone());
        Ok(Self { config, epoch_length, own, directory, store, validators, roots })
    }

    pub(super) async fn run(
        mut self,
        mut batches: mpsc::Receiver<GossipMessage>,
        mut audits: mpsc::Receiver<GossipMessage>,
        token: CancellationToken,
    ) {
        loop {
            let message = tokio::select! {
                biased;
                () = token.cancelled() => return,
                message = batches.recv() => message,
                message = audits.recv() => message,
            };
            let heard = match message.map(|m| m.payload) {
                Some(GossipPayload::Batch(batch)) => self.on_batch(&batch).await,
                Some(GossipPayload::AuditEpoch(audit)) => self.on_audit(&audit),
                Some(_) => Ok(()),
                None => return,
            };
            if let Err(e) = heard {
                tracing::error!(error = %e, "what a validator published could not be kept");
            }
        }
    }

    /// Whether someone's verdicts count.
    fn counts(&self, author: &Hotkey) -> bool {
        if *author == self.own {
            return false;
        }
        if self.validators.is_empty() {
            return self.directory.snapshot().validators.contains_key(author);
        }
        self.validators.contains(author)
    }

    fn is_now(&self, epoch: u64) -> bool {
        let now = self.epoch_length.epoch(wall_now());
        epoch <= now + 1 && epoch + 1 >= now
    }

    /// Keeps a root, or, where another stands in its place, the proof that its author said two things.
    pub(super) async fn on_batch(&mut self, batch: &Signed<Batch>) -> Result<(), StoreError> {
        let author = batch.author();
        if !self.counts(&author) || !self.is_now(batch.epoch) {
            return Ok(());
        }
        let key = root_key(batch.epoch, &author, batch.sequence);
        let wire = batch.to_wire();
        if let Some(known) = self.store.get(Keyspace::Heard, &key)? {
            let known = pb::Signed::decode(known).unwrap_or_default();
            if known.payload != wire.payload {
                return self.equivocated(author, &known, &wire).await;
            }
            return Ok(());
        }
        let kept = self.roots.entry((batch.epoch, author)).or_default();
        if *kept >= self.config.roots_max {
            return Ok(());
        }
        *kept += 1;
        let mut write = WriteBatch::new();
        write.put(Keyspace::Heard, key, wire.encode_to_vec());
        self.retain(&mut write)?;
        // A crash that loses it makes an epoch incomplete, which its result says.
        drop(self.store.commit_relaxed(write));
        Ok(())
    }

    async fn equivocated(&self, author: Hotkey, one: &pb::Signed, other: &pb::Signed) -> Result<(), StoreError> {
        tracing::warn!(validator = %author, "signed two batches of one place");
        let case = StoredCase {
            offence: "equivocation".to_owned(),
            detail: "signed two different batches of one place in its chain".to_owned(),
            job: JobId([0; 32]).into(),
            at_ms: wall_now().0,
            accused: author.into(),
            accuser: self.own.into(),
            believed: true,
            statements: vec![one.clone(), other.clone()],
            ..StoredCase::default()
        };
        let mut batch = WriteBatch::new();
        case.record(&mut batch);
        self.store.commit(batch).await.map(drop)
    }

    /// Notes a commitment, the first of its epoch, and whether a secret opens the one that was made before.
    pub(super) fn on_audit(&mut self, audit: &Signed<AuditEpoch>) -> Result<(), StoreError> {
        let author = Hotkey(audit.signer());
        if !self.counts(&author) {
            return Ok(());
        }
        let mut write = WriteBatch::new();
        if self.is_now(audit.epoch) {
            let mut known = committed(self.store.as_ref(), audit.epoch, &author)?;
            let before = known.clone();
            match known.commitment {
                None => known.commitment = Some(audit.commitment),
                Some(first) => known.broken |= first != audit.commitment,
            }
            put_committed(&mut write, audit.epoch, &author, &before, &known);
        }
        if let Some((epoch, secret)) = audit.revealed.filter(|(epoch, _)| self.is_now(*epoch)) {
            let mut known = committed(self.store.as_ref(), epoch, &author)?;
            let before = known.clone();
            // A secret whose commitment was not heard shows nothing.
            if let Some(commitment) = known.commitment {
                known.broken |= select::audit_commitment(epoch, &secret) != commitment;
                known.secret = Some(secret);
                put_committed(&mut write, epoch, &author, &before, &known);
            }
        }
        if !write.is_empty() {
            drop(self.store.commit_relaxed(write));
        }
        Ok(())
    }

    /// Deletes what is too old to be settled, a bounded number at a time.
    fn retain(&mut self, write: &mut WriteBatch) -> Result<(), StoreError> {
        let oldest = self.epoch_length.epoch(wall_now()).saturating_sub(pages::OPEN_AFTER_EPOCHS + SETTLE_FOR);
        let range = KeyRange::all().until(&oldest.to_be_bytes());
        for (key, value) in self.store.scan(Keyspace::Heard, &range, RETAIN_STEP)?.items {
            let raw = pb::Signed::decode(value).ok();
            let root = raw.as_ref().and_then(|raw| Some((raw, Batch::decode(&raw.payload).ok()?.root)));
            if let Some((raw, root)) = root {
                write.delete(Keyspace::Pages, pages::foreign_key(&raw.signer, &root));
            }
            write.delete(Keyspace::Heard, key);
        }
        self.roots.retain(|(epoch, _), _| *epoch >= oldest);
        Ok(())
    }
}

fn put_committed(write: &mut WriteBatch, epoch: u64, author: &Hotkey, before: &Committed, known: &Committed) {
    let same = (before.commitment, before.secret, before.broken) == (known.commitment, known.secret, known.broken);
    if !same {
        let value = serde_json::to_vec(known).unwrap_or_default();
        write.put(Keyspace::Heard, commitment_key(epoch, author), value);
    }
}
