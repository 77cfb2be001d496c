//! The version of what is stored, and the way from each to the next.
//!
//! Format 1 is the first. A change of what a keyspace holds adds one entry to [`MIGRATIONS`], which takes stores from
//! the format before to the one after; nothing is ever taken out. A migration works in bounded steps, each one batch
//! that also says where to go on: interrupted, it continues; it never runs twice over the same records.

use std::path::Path;

use bytes::Bytes;

use super::{Keyspace, Store, StoreError, WriteBatch};

const FORMAT_KEY: &[u8] = b"store/format";
const CURSOR_KEY: &[u8] = b"store/migration-cursor";

/// Steps from one format to the next. `MIGRATIONS[i]` leads from format `i + 1` to `i + 2`.
pub(super) const MIGRATIONS: &[Migration] = &[];

/// One step from a format to the next.
#[derive(Clone, Copy, Debug)]
pub struct Migration {
    /// What it changes, for the log.
    pub name: &'static str,
    /// Looks at the next records and says what to write. The argument is the cursor of the step before.
    pub step: fn(&dyn Store, Option<Bytes>) -> Result<MigrationStep, String>,
}

/// What one step of a migration wants.
#[derive(Debug, Default)]
pub struct MigrationStep {
    /// Writes that take effect together with the cursor.
    pub batch: WriteBatch,
    /// Where the next step begins; `None` when the migration is done.
    pub next: Option<Bytes>,
}

/// Brings `store` to the newest format that `migrations` lead to. A store without records gets that format at once;
/// so does one that lost its number, if `accept_data_loss`: what damaged it was most likely written by this version.
pub(super) fn run(
    store: &dyn Store,
    path: &Path,
    migrations: &[Migration],
    accept_data_loss: bool,
) -> Result<(), StoreError> {
    let newest = migrations.len() as u32 + 1;
    let format = match store.get(Keyspace::Meta, FORMAT_KEY)? {
        Some(bytes) => parse(&bytes).ok_or_else(|| StoreError::damaged(path, "its format number is not readable"))?,
        None if accept_data_loss || store.status().records == 0 => {
            let mut batch = WriteBatch::new();
            put_format(&mut batch, newest);
            store.commit(batch).wait()?;
            newest
        }
        None => return Err(StoreError::damaged(path, "its format number is missing")),
    };
    if format > newest {
        return Err(StoreError::NewerFormat { path: path.to_path_buf(), found: format, supported: newest });
    }
    for (from, migration) in (1..newest).zip(migrations).skip(format as usize - 1) {
        migrate(store, path, from, migration)?;
    }
    Ok(())
}

/// Goes from one format to the next, from where an earlier try stopped.
fn migrate(store: &dyn Store, path: &Path, from: u32, migration: &Migration) -> Result<(), StoreError> {
    tracing::info!(name = migration.name, from, "migrating the store");
    let failed = |reason| StoreError::Migration { path: path.to_path_buf(), from, to: from + 1, reason };
    let mut cursor = store.get(Keyspace::Meta, CURSOR_KEY)?;
    loop {
        let MigrationStep { mut batch, next } = (migration.step)(store, cursor).map_err(failed)?;
        match &next {
            Some(next) => batch.put(Keyspace::Meta, CURSOR_KEY, next.clone()),
            None => put_format(&mut batch, from + 1).delete(Keyspace::Meta, CURSOR_KEY),
        };
        store.commit(batch).wait()?;
        if next.is_none() {
            return Ok(());
        }
        cursor = next;
    }
}

fn put_format(batch: &mut WriteBatch, format: u32) -> &mut WriteBatch {
    batch.put(Keyspace::Meta, FORMAT_KEY, format.to_le_bytes().to_vec())
}

fn parse(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_le_bytes).filter(|&format| format > 0)
}
