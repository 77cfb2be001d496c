//! Paths: opening and looking; everything that would change the tree is refused.

use super::{Descriptor, Guest, Kind};
use crate::wasm::host::files::NodeId;
use crate::wasm::host::{Errno, Fault};

const OPEN_CREATE: u32 = 1;
const OPEN_DIRECTORY: u32 = 2;
const OPEN_EXCLUSIVE: u32 = 4;
const OPEN_TRUNCATE: u32 = 8;
const RIGHT_WRITE: u64 = 1 << 6;

impl Guest<'_> {
    fn lookup(&mut self, fd: u32, path: u32, length: u32) -> Result<NodeId, Fault> {
        let Kind::Node(base) = self.host.p1.get(fd)?.kind else { return Err(Errno::NotDirectory.into()) };
        let path = self.path(path, length)?;
        Ok(self.host.files.resolve(base, &path)?)
    }

    #[allow(clippy::too_many_arguments)] // the interface's own
    pub(super) fn path_open(
        &mut self,
        fd: u32,
        _lookup: u32,
        path: u32,
        length: u32,
        open: u32,
        base: u64,
        _inheriting: u64,
        flags: u32,
        out: u32,
    ) -> Result<(), Fault> {
        let node = match self.lookup(fd, path, length) {
            Err(Fault::Errno(Errno::NoEntry)) if open & OPEN_CREATE != 0 => return Err(Errno::ReadOnly.into()),
            found => found?,
        };
        let directory = self.host.files.is_directory(node);
        if open & OPEN_CREATE != 0 && open & OPEN_EXCLUSIVE != 0 {
            return Err(Errno::Exists.into());
        }
        if open & OPEN_DIRECTORY != 0 && !directory {
            return Err(Errno::NotDirectory.into());
        }
        if open & OPEN_TRUNCATE != 0 || (base & RIGHT_WRITE != 0 && !directory) {
            return Err(Errno::ReadOnly.into());
        }
        if !directory {
            // Found here rather than at the first read: the artifact can be read.
            self.host.files.stat(node)?;
        }
        self.range(out, 4)?;
        let flags = (flags & 0b11111) as u16;
        let opened = self.host.p1.open(Descriptor { flags, ..Descriptor::new(Kind::Node(node)) })?;
        Ok(self.write_u32(out, opened)?)
    }

    pub(super) fn path_filestat_get(
        &mut self,
        fd: u32,
        _lookup: u32,
        path: u32,
        length: u32,
        out: u32,
    ) -> Result<(), Fault> {
        let node = self.lookup(fd, path, length)?;
        self.write_filestat(Kind::Node(node), out)
    }

    pub(super) fn path_readlink(
        &mut self,
        fd: u32,
        path: u32,
        length: u32,
        _buffer: u32,
        _buffer_length: u32,
        _out: u32,
    ) -> Result<(), Fault> {
        self.lookup(fd, path, length)?;
        Err(Errno::Invalid.into())
    }

    pub(super) fn path_create_directory(&mut self, fd: u32, _: u32, _: u32) -> Result<(), Fault> {
        self.read_only(fd)
    }

    #[allow(clippy::too_many_arguments)] // the interface's own
    pub(super) fn path_filestat_set_times(
        &mut self,
        fd: u32,
        _: u32,
        _: u32,
        _: u32,
        _: u64,
        _: u64,
        _: u32,
    ) -> Result<(), Fault> {
        self.read_only(fd)
    }

    #[allow(clippy::too_many_arguments)] // the interface's own
    pub(super) fn path_link(&mut self, fd: u32, _: u32, _: u32, _: u32, _: u32, _: u32, _: u32) -> Result<(), Fault> {
        self.read_only(fd)
    }

    pub(super) fn path_remove_directory(&mut self, fd: u32, _: u32, _: u32) -> Result<(), Fault> {
        self.read_only(fd)
    }

    pub(super) fn path_rename(&mut self, fd: u32, _: u32, _: u32, _: u32, _: u32, _: u32) -> Result<(), Fault> {
        self.read_only(fd)
    }

    pub(super) fn path_symlink(&mut self, _: u32, _: u32, fd: u32, _: u32, _: u32) -> Result<(), Fault> {
        self.read_only(fd)
    }

    pub(super) fn path_unlink_file(&mut self, fd: u32, _: u32, _: u32) -> Result<(), Fault> {
        self.read_only(fd)
    }
}
