//! Opening a generation, rebuilding one, and making what can be made of a damaged one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::{info, warn};

use super::files;
use super::index::{Index, SharedIndex};
use super::journal::{Contents, Journal, RawOp};
use super::mark::Mark;
use super::tally::{Entry, Tally};
use crate::store::{StoreConfig, StoreError};

/// Below this size a database is never rebuilt: sled's files have a few segments that hold little.
const REBUILD_MIN_BYTES: u64 = 256 * 1024 * 1024;

/// A database this many times as large as its records is rebuilt when it is opened. sled's own cleaning keeps it
/// near two; a burst of deletions just before a stop can leave more.
const REBUILD_RATIO: u64 = 6;

/// A generation, opened, replayed and verified.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) generation: PathBuf,
    pub(super) index: Arc<SharedIndex>,
    pub(super) journal: Journal,
    pub(super) mark: Mark,
    pub(super) tally: Tally,
    pub(super) seq: u64,
}

/// Opens the newest generation of `dir`, making the first one if there is none.
pub(super) fn open(dir: &Path, config: &StoreConfig) -> Result<Loaded, StoreError> {
    let number = match files::newest_generation(dir)? {
        Some(number) => number,
        None => build(dir, 1, 0, config, |_| Ok(Tally::default()))?,
    };
    let generation = files::generation_path(dir, number);
    // sled mends some files (a cut-off tail without records) in an attempt that fails; what opens then still has to
    // tally.
    let loaded = match load(&generation, config) {
        Err(StoreError::Damaged { .. }) => load(&generation, config),
        loaded => loaded,
    };
    let number = match loaded {
        Ok(loaded) if !is_bloated(&loaded) => return Ok(loaded),
        Ok(loaded) => rebuild(dir, number, loaded, config)?,
        Err(damage @ StoreError::Damaged { .. }) if config.accept_data_loss => salvage(dir, number, &damage, config)?,
        Err(err) => return Err(err),
    };
    load(&files::generation_path(dir, number), config)
}

/// Reads journals and mark, replays, and checks that every record is there.
fn load(generation: &Path, config: &StoreConfig) -> Result<Loaded, StoreError> {
    let journals = Contents::read_all(generation)?.into_iter().collect::<Result<Vec<_>, _>>()?;
    let Some(last) = journals.last() else {
        return Err(StoreError::damaged(generation, "its journal is missing"));
    };
    check_chain(&journals)?;
    let mark = Mark::open(generation)?;
    if mark.seq > last.last_seq {
        let lost = mark.seq - last.last_seq;
        let detail = format!(
            "it ends after batch {} at byte {}, but {lost} more were acknowledged",
            last.last_seq, last.valid_len
        );
        return Err(StoreError::damaged(&last.path, detail));
    }
    let index = Index::open(generation, config.cache_bytes, false)?;
    for ops in journals.iter().flat_map(Contents::batches) {
        ops.into_iter().try_for_each(|op| index.apply(op))?;
    }
    let found = index.tally()?;
    if found != last.tally {
        let detail = format!(
            "it holds {} records of {} bytes that do not tally with the {} of {} bytes acknowledged up to batch {}",
            found.records, found.bytes, last.tally.records, last.tally.bytes, last.last_seq
        );
        return Err(StoreError::damaged(&generation.join(Index::DIR), detail));
    }
    let (seq, tally) = (last.last_seq, last.tally);
    let journal = Journal::resume(last)?;
    let index = Arc::new(SharedIndex::new(index));
    Ok(Loaded { generation: generation.to_path_buf(), index, journal, mark, tally, seq })
}

/// Every file must begin where the one before it ends. (What lies behind the last whole record of an earlier file was
/// cut off by a crash and is not in the chain.)
fn check_chain(journals: &[Contents]) -> Result<(), StoreError> {
    for pair in journals.windows(2) {
        let (before, after) = (&pair[0], &pair[1]);
        if before.last_seq != after.base_seq {
            let detail =
                format!("it ends after batch {}, the next file begins after {}", before.last_seq, after.base_seq);
            return Err(StoreError::damaged(&before.path, detail));
        }
    }
    Ok(())
}

fn is_bloated(loaded: &Loaded) -> bool {
    let bytes = files::dir_bytes(&loaded.generation.join(Index::DIR));
    bytes > REBUILD_MIN_BYTES.max(loaded.tally.bytes.saturating_mul(REBUILD_RATIO))
}

/// Builds generation `number` with the records that `fill` puts in, continuing after batch `seq`.
fn build(
    dir: &Path,
    number: u64,
    seq: u64,
    config: &StoreConfig,
    fill: impl FnOnce(&Index) -> Result<Tally, StoreError>,
) -> Result<u64, StoreError> {
    let draft = files::new_draft(dir, number)?;
    let index = Index::open(&draft, config.cache_bytes, true)?;
    let tally = fill(&index)?;
    index.sync()?;
    drop(index);
    Mark::create(&draft, seq)?;
    Journal::create(&draft, seq, tally)?;
    files::publish_draft(dir, number, &draft)?;
    Ok(number)
}

/// Copies the records of a sound but bloated generation into the next one.
fn rebuild(dir: &Path, number: u64, loaded: Loaded, config: &StoreConfig) -> Result<u64, StoreError> {
    info!(
        records = loaded.tally.records,
        bytes = loaded.tally.bytes,
        "rebuilding the store: it takes far more room than its records"
    );
    let next = build(dir, number + 1, loaded.seq, config, |index| {
        loaded.index.read(|all| all.old().for_each(false, |full_key, value| put(index, full_key, value)))?;
        index.tally()
    })?;
    drop(loaded);
    files::delete_generation(dir, number)?;
    Ok(next)
}

/// Copies what can still be read of a damaged generation into the next one and sets the damaged one aside.
fn salvage(dir: &Path, number: u64, damage: &StoreError, config: &StoreConfig) -> Result<u64, StoreError> {
    let generation = files::generation_path(dir, number);
    warn!(%damage, "accepting the loss of data");
    let journals: Vec<_> = Contents::read_all(&generation)?.into_iter().flatten().collect();
    let marked = Mark::open(&generation).map_or(0, |mark| mark.seq);
    let seq = journals.iter().map(|journal| journal.last_seq).max().unwrap_or_default().max(marked);
    let mut kept = Tally::default();
    let next = build(dir, number + 1, seq, config, |index| {
        // From both ends up to what cannot be read; then whatever the journals know better.
        match Index::open(&generation, config.cache_bytes, false) {
            Ok(old) => {
                for reversed in [false, true] {
                    if let Err(err) = old.for_each(reversed, |full_key, value| put(index, full_key, value)) {
                        warn!(%err, "the database cannot be read to its end");
                        continue;
                    }
                    break;
                }
            }
            Err(err) => warn!(%err, "nothing of the database can be read"),
        }
        for ops in journals.iter().flat_map(Contents::batches) {
            ops.into_iter().try_for_each(|op| index.apply(op))?;
        }
        kept = index.tally()?;
        Ok(kept)
    })?;
    let aside = files::set_aside(dir, number)?;
    warn!(records = kept.records, bytes = kept.bytes, aside = %aside.display(), "went on with what could be read; the damaged files were set aside, delete them when they are no longer wanted");
    Ok(next)
}

fn put(index: &Index, full_key: &[u8], value: &[u8]) -> Result<(), StoreError> {
    let (&keyspace, key) = full_key.split_first().unwrap_or((&0, &[]));
    index.apply(RawOp { keyspace, key, value: Some(value) })
}

/// How one write changes a tally; `old` is what was held under the key before.
pub(super) fn account(tally: &mut Tally, old: Option<Entry>, new: Option<Entry>) {
    if let Some(old) = old {
        tally.remove(old);
    }
    if let Some(new) = new {
        tally.add(new);
    }
}
