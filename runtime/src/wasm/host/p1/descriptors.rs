//! Descriptors: attributes, positions, directory listing.

use super::misc::WALL_CLOCK_NS;
use super::{Descriptor, Guest, Kind};
use crate::wasm::host::files::ROOT;
use crate::wasm::host::{Errno, Fault};

const TYPE_UNKNOWN: u8 = 0;
const TYPE_DIRECTORY: u8 = 3;
const TYPE_FILE: u8 = 4;
/// Rights of a standard stream: read, status flags, write, status, poll.
const RIGHTS_STREAM: u64 = 1 << 1 | 1 << 3 | 1 << 6 | 1 << 21 | 1 << 27;
/// Rights of a file: read, seek, status flags, tell, advise, status, poll.
const RIGHTS_FILE: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 21 | 1 << 27;
/// Rights of a directory: open, list, read links, path status, status.
const RIGHTS_DIRECTORY: u64 = 1 << 3 | 1 << 13 | 1 << 14 | 1 << 15 | 1 << 18 | 1 << 21;
/// Append and non-blocking, which change nothing here; the other flags are for writing.
const FLAGS_KNOWN: u16 = 0b11111;
const DIRENT_BYTES: usize = 24;
const WHENCE_SET: u32 = 0;
const WHENCE_CURRENT: u32 = 1;
const WHENCE_END: u32 = 2;

impl Guest<'_> {
    pub(super) fn fd_advise(&mut self, fd: u32, _: u64, _: u64, advice: u32) -> Result<(), Fault> {
        match self.host.p1.get(fd)?.kind {
            Kind::Node(_) if advice <= 5 => Ok(()),
            Kind::Node(_) => Err(Errno::Invalid.into()),
            _ => Err(Errno::NotSeekable.into()),
        }
    }

    pub(super) fn fd_allocate(&mut self, fd: u32, _: u64, _: u64) -> Result<(), Fault> {
        self.read_only(fd)
    }

    pub(super) fn fd_filestat_set_size(&mut self, fd: u32, _: u64) -> Result<(), Fault> {
        self.read_only(fd)
    }

    pub(super) fn fd_filestat_set_times(&mut self, fd: u32, _: u64, _: u64, _: u32) -> Result<(), Fault> {
        self.read_only(fd)
    }

    /// The answer to what would change an open descriptor or something below it.
    pub(super) fn read_only(&mut self, fd: u32) -> Result<(), Fault> {
        self.host.p1.get(fd)?;
        Err(Errno::ReadOnly.into())
    }

    pub(super) fn fd_close(&mut self, fd: u32) -> Result<(), Fault> {
        self.host.p1.get(fd)?;
        self.host.p1.table[fd as usize] = None;
        Ok(())
    }

    pub(super) fn fd_datasync(&mut self, fd: u32) -> Result<(), Fault> {
        self.host.p1.get(fd)?;
        Ok(())
    }

    pub(super) fn fd_sync(&mut self, fd: u32) -> Result<(), Fault> {
        self.fd_datasync(fd)
    }

    pub(super) fn fd_fdstat_get(&mut self, fd: u32, out: u32) -> Result<(), Fault> {
        let descriptor = *self.host.p1.get(fd)?;
        let (kind, base, inheriting) = match descriptor.kind {
            Kind::Node(node) if self.host.files.is_directory(node) => {
                (TYPE_DIRECTORY, RIGHTS_DIRECTORY, RIGHTS_DIRECTORY | RIGHTS_FILE)
            }
            Kind::Node(_) => (TYPE_FILE, RIGHTS_FILE, 0),
            _ => (TYPE_UNKNOWN, RIGHTS_STREAM, 0),
        };
        let mut stat = [0; 24];
        stat[0] = kind;
        stat[2..4].copy_from_slice(&descriptor.flags.to_le_bytes());
        stat[8..16].copy_from_slice(&base.to_le_bytes());
        stat[16..24].copy_from_slice(&inheriting.to_le_bytes());
        Ok(self.write(out, &stat)?)
    }

    pub(super) fn fd_fdstat_set_flags(&mut self, fd: u32, flags: u32) -> Result<(), Fault> {
        let flags = u16::try_from(flags).ok().filter(|flags| flags & !FLAGS_KNOWN == 0).ok_or(Errno::Invalid)?;
        self.host.p1.get(fd)?.flags = flags;
        Ok(())
    }

    pub(super) fn fd_fdstat_set_rights(&mut self, fd: u32, _: u64, _: u64) -> Result<(), Fault> {
        self.host.p1.get(fd)?;
        Ok(())
    }

    pub(super) fn fd_filestat_get(&mut self, fd: u32, out: u32) -> Result<(), Fault> {
        let kind = self.host.p1.get(fd)?.kind;
        self.write_filestat(kind, out)
    }

    /// Constant device and times, size and inode of the contents and the path.
    pub(super) fn write_filestat(&mut self, kind: Kind, out: u32) -> Result<(), Fault> {
        let (file_type, size, inode) = match kind {
            Kind::Node(node) => {
                let stat = self.host.files.stat(node)?;
                (if stat.directory { TYPE_DIRECTORY } else { TYPE_FILE }, stat.size, stat.inode)
            }
            _ => (TYPE_UNKNOWN, 0, 0),
        };
        let mut stat = [0; 64];
        stat[8..16].copy_from_slice(&inode.to_le_bytes());
        stat[16] = file_type;
        stat[24] = 1;
        stat[32..40].copy_from_slice(&size.to_le_bytes());
        for at in [40, 48, 56] {
            stat[at..at + 8].copy_from_slice(&WALL_CLOCK_NS.to_le_bytes());
        }
        Ok(self.write(out, &stat)?)
    }

    /// Descriptor 3 stays the preopened root until the guest closes or renumbers it.
    fn preopened(&mut self, fd: u32) -> Result<(), Errno> {
        match self.host.p1.get(fd)?.kind {
            Kind::Node(ROOT) if fd == 3 => Ok(()),
            _ => Err(Errno::BadDescriptor),
        }
    }

    pub(super) fn fd_prestat_get(&mut self, fd: u32, out: u32) -> Result<(), Fault> {
        self.preopened(fd)?;
        Ok(self.write(out, &[0, 0, 0, 0, 1, 0, 0, 0])?)
    }

    pub(super) fn fd_prestat_dir_name(&mut self, fd: u32, path: u32, length: u32) -> Result<(), Fault> {
        self.preopened(fd)?;
        if length < 1 {
            return Err(Errno::NameTooLong.into());
        }
        Ok(self.write(path, b"/")?)
    }

    pub(super) fn fd_renumber(&mut self, from: u32, to: u32) -> Result<(), Fault> {
        let moved = *self.host.p1.get(from)?;
        *self.host.p1.get(to)? = moved;
        if from != to {
            self.host.p1.table[from as usize] = None;
        }
        Ok(())
    }

    pub(super) fn fd_seek(&mut self, fd: u32, offset: i64, whence: u32, out: u32) -> Result<(), Fault> {
        let descriptor = *self.host.p1.get(fd)?;
        let Kind::Node(node) = descriptor.kind else { return Err(Errno::NotSeekable.into()) };
        let base = match whence {
            WHENCE_SET => 0,
            WHENCE_CURRENT => descriptor.offset,
            WHENCE_END => self.host.files.left(node, 0)?,
            _ => return Err(Errno::Invalid.into()),
        };
        let position = base.checked_add_signed(offset).ok_or(Errno::Invalid)?;
        self.write_u64(out, position)?;
        self.host.p1.get(fd)?.offset = position;
        Ok(())
    }

    pub(super) fn fd_tell(&mut self, fd: u32, out: u32) -> Result<(), Fault> {
        let Descriptor { kind: Kind::Node(_), offset, .. } = *self.host.p1.get(fd)? else {
            return Err(Errno::NotSeekable.into());
        };
        Ok(self.write_u64(out, offset)?)
    }

    /// Entries from `cookie` on, the last one cut where the buffer ends, as the interface has it.
    pub(super) fn fd_readdir(&mut self, fd: u32, buffer: u32, length: u32, cookie: u64, out: u32) -> Result<(), Fault> {
        let Kind::Node(node) = self.host.p1.get(fd)?.kind else { return Err(Errno::NotDirectory.into()) };
        self.charge(crate::wasm::host::PATH_FUEL)?;
        let range = self.range(buffer, length)?;
        let entries = self.host.files.entries(node)?;
        // Listing copies every name, wherever the cookie stands.
        self.charge_bytes(entries.iter().map(|(name, _)| name.len() + DIRENT_BYTES).sum())?;
        let mut packed = Vec::new();
        for (index, (name, child)) in entries.iter().enumerate().skip(usize::try_from(cookie).unwrap_or(usize::MAX)) {
            if packed.len() >= range.len() {
                break;
            }
            let kind = if self.host.files.is_directory(*child) { TYPE_DIRECTORY } else { TYPE_FILE };
            packed.extend_from_slice(&(index as u64 + 1).to_le_bytes());
            packed.extend_from_slice(&self.host.files.inode(*child).to_le_bytes());
            packed.extend_from_slice(&(name.len() as u32).to_le_bytes());
            packed.extend_from_slice(&u32::from(kind).to_le_bytes());
            packed.extend_from_slice(name.as_bytes());
        }
        packed.truncate(range.len());
        self.write(buffer, &packed)?;
        Ok(self.write_u32(out, packed.len() as u32)?)
    }
}
