//! `wasi:filesystem`: one preopened, read-only directory `/`.

use wasmtime::Result;
use wasmtime::component::{Linker, Resource};

use super::types::{
    Advice, DescriptorFlags, DescriptorStat, DescriptorType, DirectoryEntry, ErrorCode, MetadataHash, NOW,
    NewTimestamp, OpenFlags, PathFlags,
};
use super::{CHUNK_BYTES_MAX, Call, Interface, IoError, Listing, Opened, Reader, Writer, interface};
use crate::wasm::host::files::{NodeId, ROOT};
use crate::wasm::host::{Errno, Fault, Host, PATH_FUEL};

type Handle = Resource<Opened>;

pub(super) fn link(linker: &mut Linker<Host>) -> Result<()> {
    let mut types = interface(linker, "filesystem/types")?;
    types.resource::<Opened>("descriptor")?;
    types.resource::<IoError>("error")?;
    types.resource::<Reader>("input-stream")?;
    types.resource::<Writer>("output-stream")?;
    types.resource::<Listing>("directory-entry-stream")?;
    looking(&mut types)?;
    reading(&mut types)?;
    changing(&mut types)?;
    types.plain("filesystem-error-code", |_, (_,): (Resource<IoError>,)| Ok(None::<ErrorCode>))?;

    let mut preopens = interface(linker, "filesystem/preopens")?;
    preopens.resource::<Opened>("descriptor")?;
    preopens.plain("get-directories", |call, (): ()| Ok(vec![(call.push(Opened { node: ROOT })?, "/".to_owned())]))
}

fn kind(directory: bool) -> DescriptorType {
    if directory { DescriptorType::Directory } else { DescriptorType::RegularFile }
}

fn lookup(call: &mut Call<'_>, base: &Handle, path: &str) -> Result<NodeId, Fault> {
    call.charge(PATH_FUEL)?;
    call.charge_bytes(path.len() as u64)?;
    let base = call.get(base)?.node;
    if !call.host.files.is_directory(base) {
        return Err(Errno::NotDirectory.into());
    }
    Ok(call.host.files.resolve(base, path)?)
}

fn stat(call: &mut Call<'_>, node: NodeId) -> Result<DescriptorStat, Fault> {
    let stat = call.host.files.stat(node)?;
    let time = Some(NOW);
    Ok(DescriptorStat {
        kind: kind(stat.directory),
        link_count: 1,
        size: stat.size,
        accessed: time,
        modified: time,
        changed: time,
    })
}

fn hash(call: &mut Call<'_>, node: NodeId) -> MetadataHash {
    MetadataHash { lower: call.host.files.inode(node), upper: 0 }
}

/// Attributes, by handle and by path.
fn looking(types: &mut Interface<'_>) -> Result<()> {
    types.file("[method]descriptor.get-flags", |_, (_,): (Handle,)| Ok(DescriptorFlags::READ))?;
    types.file("[method]descriptor.get-type", |call, (handle,): (Handle,)| {
        let node = call.get(&handle)?.node;
        Ok(kind(call.host.files.is_directory(node)))
    })?;
    types.file("[method]descriptor.stat", |call, (handle,): (Handle,)| {
        let node = call.get(&handle)?.node;
        stat(call, node)
    })?;
    types.file("[method]descriptor.stat-at", |call, (handle, _, path): (Handle, PathFlags, String)| {
        let node = lookup(call, &handle, &path)?;
        stat(call, node)
    })?;
    types.plain("[method]descriptor.is-same-object", |call, (one, other): (Handle, Handle)| {
        let one = call.get(&one)?.node;
        Ok(one == call.get(&other)?.node)
    })?;
    types.file("[method]descriptor.metadata-hash", |call, (handle,): (Handle,)| {
        let node = call.get(&handle)?.node;
        Ok(hash(call, node))
    })?;
    types.file("[method]descriptor.metadata-hash-at", |call, (handle, _, path): (Handle, PathFlags, String)| {
        let node = lookup(call, &handle, &path)?;
        Ok(hash(call, node))
    })?;
    types.file("[method]descriptor.readlink-at", |call, (handle, path): (Handle, String)| {
        lookup(call, &handle, &path)?;
        Err::<String, _>(Errno::Invalid.into())
    })
}

/// Opening, reading, listing.
fn reading(types: &mut Interface<'_>) -> Result<()> {
    types.file(
        "[method]descriptor.open-at",
        |call, (handle, _, path, open, flags): (Handle, PathFlags, String, OpenFlags, DescriptorFlags)| {
            open_at(call, &handle, &path, open, flags)
        },
    )?;
    types.file("[method]descriptor.read-via-stream", |call, (handle, offset): (Handle, u64)| {
        let node = call.get(&handle)?.node;
        call.host.files.left(node, offset)?;
        call.push(Reader::File { node, offset })
    })?;
    types.file("[method]descriptor.read", |call, (handle, most, offset): (Handle, u64, u64)| {
        let node = call.get(&handle)?.node;
        let left = call.host.files.left(node, offset)?;
        let count = most.min(left).min(CHUNK_BYTES_MAX);
        call.charge_bytes(count)?;
        let mut buffer = vec![0; usize::try_from(count).unwrap_or(0)];
        let read = call.host.files.read_at(node, &mut buffer, offset)?;
        buffer.truncate(read);
        Ok((buffer, count == left))
    })?;
    types.file("[method]descriptor.advise", |_, (_, _, _, _): (Handle, u64, u64, Advice)| Ok(()))?;
    for name in ["sync", "sync-data"] {
        types.file(&format!("[method]descriptor.{name}"), |_, (_,): (Handle,)| Ok(()))?;
    }
    types.file("[method]descriptor.read-directory", |call, (handle,): (Handle,)| {
        let node = call.get(&handle)?.node;
        let mut entries = call.host.files.entries(node)?;
        entries.drain(..2); // `.` and `..` are not listed in this world
        call.charge(PATH_FUEL)?;
        call.charge_bytes(entries.iter().map(|(name, _)| name.len() as u64).sum())?;
        call.push(Listing { entries: entries.into_iter() })
    })?;
    types.file("[method]directory-entry-stream.read-directory-entry", |call, (list,): (Resource<Listing>,)| {
        Ok(call
            .get(&list)?
            .entries
            .next()
            .map(|(name, node)| DirectoryEntry { kind: kind(call.host.files.is_directory(node)), name }))
    })
}

fn open_at(
    call: &mut Call<'_>,
    base: &Handle,
    path: &str,
    open: OpenFlags,
    flags: DescriptorFlags,
) -> Result<Handle, Fault> {
    let node = match lookup(call, base, path) {
        Err(Fault::Errno(Errno::NoEntry)) if open.contains(OpenFlags::CREATE) => return Err(Errno::ReadOnly.into()),
        found => found?,
    };
    let directory = call.host.files.is_directory(node);
    if open.contains(OpenFlags::CREATE | OpenFlags::EXCLUSIVE) {
        return Err(Errno::Exists.into());
    }
    if open.contains(OpenFlags::DIRECTORY) && !directory {
        return Err(Errno::NotDirectory.into());
    }
    if open.contains(OpenFlags::TRUNCATE) || (flags.contains(DescriptorFlags::WRITE) && !directory) {
        return Err(Errno::ReadOnly.into());
    }
    call.host.files.stat(node)?;
    call.push(Opened { node })
}

/// Whatever would change the tree is refused.
fn changing(types: &mut Interface<'_>) -> Result<()> {
    fn refused<T>() -> Result<T, Fault> {
        Err(Errno::ReadOnly.into())
    }
    types.file("[method]descriptor.write-via-stream", |_, (_, _): (Handle, u64)| refused::<Resource<Writer>>())?;
    types.file("[method]descriptor.append-via-stream", |_, (_,): (Handle,)| refused::<Resource<Writer>>())?;
    types.file("[method]descriptor.set-size", |_, (_, _): (Handle, u64)| refused::<()>())?;
    types.file("[method]descriptor.set-times", |_, (_, _, _): (Handle, NewTimestamp, NewTimestamp)| refused::<()>())?;
    types.file("[method]descriptor.write", |_, (_, _, _): (Handle, Vec<u8>, u64)| refused::<u64>())?;
    for name in ["create-directory-at", "remove-directory-at", "unlink-file-at"] {
        types.file(&format!("[method]descriptor.{name}"), |_, (_, _): (Handle, String)| refused::<()>())?;
    }
    types.file(
        "[method]descriptor.set-times-at",
        |_, (_, _, _, _, _): (Handle, PathFlags, String, NewTimestamp, NewTimestamp)| refused::<()>(),
    )?;
    types.file("[method]descriptor.link-at", |_, (_, _, _, _, _): (Handle, PathFlags, String, Handle, String)| {
        refused::<()>()
    })?;
    types.file("[method]descriptor.rename-at", |_, (_, _, _, _): (Handle, String, Handle, String)| refused::<()>())?;
    types.file("[method]descriptor.symlink-at", |_, (_, _, _): (Handle, String, String)| refused::<()>())
}
