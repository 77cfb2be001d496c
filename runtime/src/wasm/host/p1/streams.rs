//! Reading and writing: standard streams and files, vectored.

use super::{Guest, Kind, VECTORS_MAX};
use crate::wasm::host::files::NodeId;
use crate::wasm::host::{Errno, Fault};

impl Guest<'_> {
    pub(super) fn fd_write(&mut self, fd: u32, vectors: u32, count: u32, out: u32) -> Result<(), Fault> {
        let kind = self.host.p1.get(fd)?.kind;
        let total = self.vectors_total(vectors, count)?;
        match kind {
            Kind::Stdout | Kind::Stderr => {}
            Kind::Stdin => return Err(Errno::BadDescriptor.into()),
            Kind::Node(_) => return Err(Errno::ReadOnly.into()),
        }
        self.range(out, 4)?;
        self.charge_bytes(total as usize)?;
        for index in 0..count {
            let (at, length) = self.vector(vectors, index)?;
            let range = self.range(at, length)?;
            if kind == Kind::Stdout {
                self.host.write_stdout(&self.memory[range])?;
            } else {
                self.host.stderr.push(&self.memory[range]);
            }
        }
        Ok(self.write_u32(out, total)?)
    }

    pub(super) fn fd_pwrite(&mut self, fd: u32, _: u32, _: u32, _: u64, _: u32) -> Result<(), Fault> {
        match self.host.p1.get(fd)?.kind {
            Kind::Node(_) => Err(Errno::ReadOnly.into()),
            _ => Err(Errno::NotSeekable.into()),
        }
    }

    pub(super) fn fd_read(&mut self, fd: u32, vectors: u32, count: u32, out: u32) -> Result<(), Fault> {
        let descriptor = *self.host.p1.get(fd)?;
        self.vectors_total(vectors, count)?;
        self.range(out, 4)?;
        let read = match descriptor.kind {
            Kind::Stdin => self.read_stdin(vectors, count)?,
            Kind::Node(node) => {
                let read = self.read_file(node, vectors, count, descriptor.offset)?;
                self.host.p1.get(fd)?.offset = descriptor.offset.saturating_add(u64::from(read));
                read
            }
            Kind::Stdout | Kind::Stderr => return Err(Errno::BadDescriptor.into()),
        };
        Ok(self.write_u32(out, read)?)
    }

    pub(super) fn fd_pread(&mut self, fd: u32, vectors: u32, count: u32, offset: u64, out: u32) -> Result<(), Fault> {
        let Kind::Node(node) = self.host.p1.get(fd)?.kind else { return Err(Errno::NotSeekable.into()) };
        self.vectors_total(vectors, count)?;
        self.range(out, 4)?;
        let read = self.read_file(node, vectors, count, offset)?;
        Ok(self.write_u32(out, read)?)
    }

    fn read_stdin(&mut self, vectors: u32, count: u32) -> Result<u32, Fault> {
        let mut read = 0;
        for index in 0..count {
            let (at, length) = self.vector(vectors, index)?;
            let chunk = self.host.stdin.take(length as usize);
            self.charge_bytes(chunk.len())?;
            self.write(at, &chunk)?;
            read += chunk.len() as u32;
            if chunk.len() < length as usize {
                break;
            }
        }
        Ok(read)
    }

    /// Reads straight into guest memory: one system call a buffer for an artifact.
    fn read_file(&mut self, node: NodeId, vectors: u32, count: u32, offset: u64) -> Result<u32, Fault> {
        let left = self.host.files.left(node, offset)?;
        let mut read = 0_u32;
        for index in 0..count {
            let (at, length) = self.vector(vectors, index)?;
            let most = left.saturating_sub(u64::from(read)).min(u64::from(length)) as u32;
            let range = self.range(at, most)?;
            self.charge_bytes(range.len())?;
            let buffer = &mut self.memory[range];
            read += self.host.files.read_at(node, buffer, offset.saturating_add(u64::from(read)))? as u32;
            if most < length {
                break;
            }
        }
        Ok(read)
    }

    /// Checks every buffer before any byte moves, and that the sum fits the result.
    fn vectors_total(&self, vectors: u32, count: u32) -> Result<u32, Errno> {
        if count > VECTORS_MAX {
            return Err(Errno::Invalid);
        }
        let mut total = 0_u32;
        for index in 0..count {
            let (at, length) = self.vector(vectors, index)?;
            self.range(at, length)?;
            total = total.checked_add(length).ok_or(Errno::Invalid)?;
        }
        Ok(total)
    }
}
