//! Settling the directory at start: what a kill left half done is finished or removed.

use std::collections::HashMap;
use std::fs;

use sundara_proto::blob::GroupRanges;
use sundara_proto::id::BlobId;
use sundara_proto::units::ByteCount;

use super::Blobs;
use super::access::Access;
use super::error::BlobError;
use super::import::demote;
use super::index::Entry;
use super::layout::{Kind, Layout, Meta, now, parse_name};
use super::tree::Shape;

/// Which files of one blob were found.
#[derive(Debug, Default)]
struct Found {
    data: Option<u64>,
    part: bool,
}

/// Reads the directory into the index. Hashes nothing: that is done at first use.
pub(crate) fn settle(blobs: &Blobs) -> Result<(), BlobError> {
    let layout = blobs.layout();
    let temp = layout.temp_dir();
    fs::create_dir_all(&temp).map_err(BlobError::io("create", &temp))?;
    for leftover in fs::read_dir(&temp).map_err(BlobError::io("list", &temp))?.flatten() {
        let _ = fs::remove_file(leftover.path());
    }
    for (id, found) in list(layout)? {
        match entry_of(layout, &id, &found) {
            Some(entry) => blobs.index().insert(entry),
            None => {
                tracing::debug!(blob = %id, "removing leftovers of an unfinished write");
                layout.discard(&id).iter().for_each(|path| {
                    let _ = fs::remove_file(path);
                });
            }
        }
    }
    let victims = blobs.index().reserve(0, blobs.config().max_bytes.0);
    match victims {
        Ok(victims) => blobs.unlink(&victims),
        Err(e) => tracing::warn!(error = %e, "blobs exceed their cap already"),
    }
    Ok(())
}

fn list(layout: &Layout) -> Result<HashMap<BlobId, Found>, BlobError> {
    let mut found: HashMap<BlobId, Found> = HashMap::new();
    let root = layout.root();
    for dir in fs::read_dir(root).map_err(BlobError::io("list", root))?.flatten() {
        let path = dir.path();
        if !path.is_dir() || path == layout.temp_dir() {
            continue;
        }
        for file in fs::read_dir(&path).map_err(BlobError::io("list", &path))?.flatten() {
            let Some((id, kind)) = parse_name(&file.file_name()) else { continue };
            let entry = found.entry(id).or_default();
            match kind {
                Kind::Data => entry.data = file.metadata().ok().map(|m| m.len()),
                Kind::Part => entry.part = true,
                Kind::Outboard | Kind::Meta | Kind::Map => {}
            }
        }
    }
    Ok(found)
}

/// The blob behind the files; `None` when there is none that counts.
fn entry_of(layout: &Layout, id: &BlobId, found: &Found) -> Option<Entry> {
    let meta = layout.read_meta(id);
    match (found.data, found.part, meta) {
        (Some(len), _, Some((meta, used))) => {
            let shape = Shape::new(*id, meta.len);
            let outboard = fs::metadata(layout.outboard(id)).map_or(0, |m| m.len());
            let sound = len == meta.len.0 && outboard == shape.outboard_len();
            let partial = (!sound).then(|| {
                tracing::error!(blob = %id, len, wanted = meta.len.0, outboard, "blob is damaged on disk: a file has another length");
                GroupRanges::empty()
            });
            if partial.is_some() && demote(layout, id).is_err() {
                return None;
            }
            Some(Entry::new(shape, meta, partial, used))
        }
        (Some(len), _, None) => {
            tracing::warn!(blob = %id, "the record beside a blob is missing or torn: nobody may read it until it is published or granted again");
            let meta = Meta::new(ByteCount(len), Access::local(), 1);
            layout.write_meta(id, &meta, false).ok()?;
            Some(Entry::new(Shape::new(*id, meta.len), meta, None, now()))
        }
        (None, true, Some((meta, used))) => {
            let shape = Shape::new(*id, meta.len);
            let mut claimed = layout.read_map(id).unwrap_or_default();
            claimed = claimed.intersect(&GroupRanges::all(meta.len));
            Some(Entry::new(shape, meta, Some(claimed), used))
        }
        (None, _, _) => None,
    }
}
