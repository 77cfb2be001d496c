//! The read-only tree: `/model` from the artifacts, `/job/seed` and `/job/params` from the job.
//!
//! Owns names, lookup and reading. Built on the first use of a path: most small jobs read standard input alone.
//! Artifacts are opened on first use and read straight into guest memory. Nothing of the machine shows: sizes are the
//! contents', inode numbers are a hash of the path, every time is the constant wall clock, entries are sorted.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use bytes::Bytes;

use super::{Ended, Errno, Fault};
use crate::{RuntimeError, Setup};

/// Longest path a guest may name.
pub(crate) const PATH_BYTES_MAX: usize = 4_096;

/// A file or directory, as an index into the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NodeId(u32);

/// The root, which is the only preopened directory.
pub(crate) const ROOT: NodeId = NodeId(0);

/// What can be known of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) directory: bool,
    pub(crate) size: u64,
    pub(crate) inode: u64,
}

#[derive(Debug)]
enum Content {
    Directory(BTreeMap<String, NodeId>),
    Bytes(Bytes),
    Artifact(usize),
}

#[derive(Debug)]
struct Node {
    parent: NodeId,
    inode: u64,
    content: Content,
}

#[derive(Debug)]
struct OpenArtifact {
    file: File,
    size: u64,
}

/// The tree of one run.
#[derive(Debug)]
pub(crate) struct Files {
    setup: Arc<Setup>,
    /// Parameters and seed; absent during init.
    job: Option<(Bytes, u64)>,
    nodes: Vec<Node>,
    artifacts: Vec<Option<OpenArtifact>>,
}

impl Files {
    pub(crate) fn for_job(setup: Arc<Setup>, params: Bytes, seed: u64) -> Self {
        Self { setup, job: Some((params, seed)), nodes: Vec::new(), artifacts: Vec::new() }
    }

    pub(crate) fn for_init(setup: Arc<Setup>) -> Self {
        Self { setup, job: None, nodes: Vec::new(), artifacts: Vec::new() }
    }

    fn build(&mut self) {
        if !self.nodes.is_empty() {
            return;
        }
        let setup = Arc::clone(&self.setup);
        self.artifacts.resize_with(setup.artifacts.len(), || None);
        self.nodes.push(Node { parent: ROOT, inode: inode_of("/"), content: Content::Directory(BTreeMap::new()) });
        self.directory("job");
        if let Some((params, seed)) = self.job.clone() {
            self.insert("job/params", Content::Bytes(params));
            self.insert("job/seed", Content::Bytes(Bytes::from(seed.to_string())));
        }
        self.directory("model");
        for (index, artifact) in setup.artifacts.iter().enumerate() {
            self.insert(&format!("model/{}", artifact.name), Content::Artifact(index));
        }
    }

    /// Finds or makes the directory of a plain relative path.
    fn directory(&mut self, path: &str) -> NodeId {
        let mut at = ROOT;
        let mut end = 0;
        for part in path.split('/') {
            end += part.len();
            let known = match &self.node(at).content {
                Content::Directory(children) => children.get(part).copied(),
                _ => None,
            };
            at = known.unwrap_or_else(|| self.append(at, part, &path[..end], Content::Directory(BTreeMap::new())));
            end += 1;
        }
        at
    }

    fn insert(&mut self, path: &str, content: Content) {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        let parent = self.directory(directory);
        self.append(parent, name, path, content);
    }

    fn append(&mut self, parent: NodeId, name: &str, path: &str, content: Content) -> NodeId {
        let id = NodeId(u32::try_from(self.nodes.len()).unwrap_or(u32::MAX));
        self.nodes.push(Node { parent, inode: inode_of(path), content });
        if let Content::Directory(children) = &mut self.nodes[parent.0 as usize].content {
            children.insert(name.to_owned(), id);
        }
        id
    }

    fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    /// Whether a node is a directory.
    pub(crate) fn is_directory(&mut self, id: NodeId) -> bool {
        self.build();
        matches!(self.node(id).content, Content::Directory(_))
    }

    /// Walks a path from a directory. `..` stops at the root: stepping above it is not permitted.
    pub(crate) fn resolve(&mut self, base: NodeId, path: &str) -> Result<NodeId, Errno> {
        self.build();
        if path.len() > PATH_BYTES_MAX {
            return Err(Errno::NameTooLong);
        }
        if path.is_empty() {
            return Err(Errno::NoEntry);
        }
        if path.starts_with('/') {
            return Err(Errno::NotPermitted);
        }
        let mut at = base;
        for part in path.split('/') {
            let node = self.node(at);
            let Content::Directory(children) = &node.content else { return Err(Errno::NotDirectory) };
            at = match part {
                "" | "." => at,
                ".." if at == ROOT => return Err(Errno::NotPermitted),
                ".." => node.parent,
                name => *children.get(name).ok_or(Errno::NoEntry)?,
            };
        }
        Ok(at)
    }

    /// What can be known of a node; opens an artifact, whose size is asked for.
    pub(crate) fn stat(&mut self, id: NodeId) -> Result<Stat, Fault> {
        self.build();
        let (directory, size) = match &self.node(id).content {
            Content::Directory(_) => (true, 0),
            Content::Bytes(bytes) => (false, bytes.len() as u64),
            &Content::Artifact(index) => (false, self.artifact(index)?.size),
        };
        Ok(Stat { directory, size, inode: self.node(id).inode })
    }

    /// Entries of a directory after `.` and `..`, in the order of their bytes.
    pub(crate) fn entries(&mut self, id: NodeId) -> Result<Vec<(String, NodeId)>, Errno> {
        self.build();
        let node = self.node(id);
        let Content::Directory(children) = &node.content else { return Err(Errno::NotDirectory) };
        let mut entries = vec![(".".to_owned(), id), ("..".to_owned(), node.parent)];
        entries.extend(children.iter().map(|(name, child)| (name.clone(), *child)));
        Ok(entries)
    }

    /// The inode number of a node.
    pub(crate) fn inode(&mut self, id: NodeId) -> u64 {
        self.build();
        self.node(id).inode
    }

    /// Bytes between an offset and the end of a file.
    pub(crate) fn left(&mut self, id: NodeId, offset: u64) -> Result<u64, Fault> {
        let stat = self.stat(id)?;
        if stat.directory { Err(Errno::IsDirectory.into()) } else { Ok(stat.size.saturating_sub(offset)) }
    }

    /// Fills a buffer from an offset; the count is short only at the end of the file.
    pub(crate) fn read_at(&mut self, id: NodeId, buffer: &mut [u8], offset: u64) -> Result<usize, Fault> {
        let left = self.left(id, offset)?;
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let buffer = &mut buffer[..count];
        match &self.node(id).content {
            Content::Directory(_) => return Err(Errno::IsDirectory.into()),
            Content::Bytes(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                buffer.copy_from_slice(&bytes[start..start + count]);
            }
            &Content::Artifact(index) => {
                let name = &self.setup.artifacts[index].name;
                let failed = |source| unreadable(name, source);
                let Some(open) = &self.artifacts[index] else { return Err(Errno::BadDescriptor.into()) };
                read_exact_at(&open.file, buffer, offset).map_err(failed)?;
            }
        }
        Ok(count)
    }

    fn artifact(&mut self, index: usize) -> Result<&OpenArtifact, Fault> {
        let artifact = &self.setup.artifacts[index];
        let slot = &mut self.artifacts[index];
        if slot.is_none() {
            let failed = |source| unreadable(&artifact.name, source);
            let file = File::open(&artifact.path).map_err(failed)?;
            let size = file.metadata().map_err(failed)?.len();
            *slot = Some(OpenArtifact { file, size });
        }
        slot.as_ref().ok_or(Fault::Errno(Errno::BadDescriptor))
    }
}

/// A fault of this executor: the caller said that the artifact is here.
fn unreadable(name: &str, source: std::io::Error) -> Fault {
    Ended::Fault(RuntimeError::Read { what: format!("artifact {name}"), source }).into()
}

/// The same for a path on every machine, and distinct between paths, which some programs rely on.
fn inode_of(path: &str) -> u64 {
    let hash = blake3::hash(path.as_bytes());
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(bytes) >> 1
}

#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !buffer.is_empty() {
        let count = file.seek_read(buffer, offset)?;
        if count == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        buffer = &mut buffer[count..];
        offset += count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Artifact;

    fn tree(directory: &std::path::Path) -> Files {
        let mut setup = Setup::builtin("none");
        for name in ["z.bin", "a/deep.bin", "a.bin"] {
            let path = directory.join(name.replace('/', "-"));
            std::fs::write(&path, format!("content of {name}")).unwrap();
            setup.artifacts.push(Artifact { name: name.into(), digest: [0; 32], path });
        }
        setup.validate().unwrap();
        Files::for_job(Arc::new(setup), Bytes::from_static(b"p"), 42)
    }

    #[test]
    fn names_resolve_inside_the_tree_only() {
        let directory = tempfile::tempdir().unwrap();
        let mut files = tree(directory.path());
        let deep = files.resolve(ROOT, "model/a/./../a//deep.bin").unwrap();
        let mut buffer = [0; 64];
        let count = files.read_at(deep, &mut buffer, 11).unwrap();
        assert_eq!(&buffer[..count], b"a/deep.bin");
        assert_eq!(files.resolve(ROOT, "model/../.."), Err(Errno::NotPermitted));
        assert_eq!(files.resolve(ROOT, "/model"), Err(Errno::NotPermitted));
        assert_eq!(files.resolve(ROOT, "model/z.bin/"), Err(Errno::NotDirectory));
        assert_eq!(files.resolve(ROOT, "model/none"), Err(Errno::NoEntry));
        assert_eq!(files.resolve(ROOT, ""), Err(Errno::NoEntry));
        assert_eq!(files.resolve(ROOT, &"a/".repeat(4_000)), Err(Errno::NameTooLong));
    }

    #[test]
    fn entries_are_sorted_and_stats_are_constant() {
        let directory = tempfile::tempdir().unwrap();
        let mut files = tree(directory.path());
        let model = files.resolve(ROOT, "model").unwrap();
        let names: Vec<_> = files.entries(model).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, [".", "..", "a", "a.bin", "z.bin"]);
        let seed = files.resolve(ROOT, "job/seed").unwrap();
        let stat = files.stat(seed).unwrap();
        assert_eq!((stat.directory, stat.size, stat.inode), (false, 2, inode_of("job/seed")));
        let mut buffer = [0; 8];
        assert_eq!(files.read_at(seed, &mut buffer, 0).unwrap(), 2);
        assert_eq!(&buffer[..2], b"42");
        assert_eq!(files.read_at(seed, &mut buffer, u64::MAX).unwrap(), 0);
    }

    #[test]
    fn a_missing_artifact_is_the_executors_fault() {
        let mut setup = Setup::builtin("none");
        setup.artifacts.push(Artifact { name: "gone".into(), digest: [0; 32], path: "/nonexistent/gone".into() });
        let mut files = Files::for_init(Arc::new(setup));
        let gone = files.resolve(ROOT, "model/gone").unwrap();
        assert!(matches!(files.stat(gone), Err(Fault::End(Ended::Fault(RuntimeError::Read { .. })))));
        assert_eq!(files.resolve(ROOT, "job/seed"), Err(Errno::NoEntry));
    }
}
