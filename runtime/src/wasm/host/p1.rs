//! WASI preview 1 (`wasi_snapshot_preview1`), all 46 functions, over the deterministic host.
//!
//! Owns the descriptor table and the boundary: pointers are checked here, and fuel is charged here. The one preopened
//! directory is `/` at descriptor 3. What would change a file says "read-only"; sockets say "not a socket".
//!
//! ```text
//! guest -> linker closure -> call(): base fuel, memory slice -> Guest method -> errno, or the end of the run
//! ```

use wasmtime::{Caller, Extern, Linker, Memory, Result};

use super::files::{NodeId, PATH_BYTES_MAX, ROOT};
use super::{BYTE_FUEL, CALL_FUEL, Ended, Errno, Fault, Host};

mod descriptors;
mod misc;
mod paths;
mod streams;

/// The import module.
const MODULE: &str = "wasi_snapshot_preview1";
/// Most open descriptors: bounds the table.
const DESCRIPTORS_MAX: usize = 1_024;
/// Most buffers of one vectored read or write: what POSIX calls `IOV_MAX`.
const VECTORS_MAX: u32 = 1_024;

/// What a descriptor stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Stdin,
    Stdout,
    Stderr,
    Node(NodeId),
}

#[derive(Clone, Copy, Debug)]
struct Descriptor {
    kind: Kind,
    offset: u64,
    flags: u16,
}

impl Descriptor {
    fn new(kind: Kind) -> Self {
        Self { kind, offset: 0, flags: 0 }
    }
}

/// Descriptors and the guest's memory.
#[derive(Debug)]
pub(crate) struct State {
    table: Vec<Option<Descriptor>>,
    memory: Option<Memory>,
}

impl Default for State {
    fn default() -> Self {
        let kinds = [Kind::Stdin, Kind::Stdout, Kind::Stderr, Kind::Node(ROOT)];
        Self { table: kinds.into_iter().map(|kind| Some(Descriptor::new(kind))).collect(), memory: None }
    }
}

impl State {
    fn get(&mut self, fd: u32) -> Result<&mut Descriptor, Errno> {
        self.table.get_mut(fd as usize).and_then(Option::as_mut).ok_or(Errno::BadDescriptor)
    }

    /// Opens at the lowest free number.
    fn open(&mut self, descriptor: Descriptor) -> Result<u32, Errno> {
        let free = self.table.iter().position(Option::is_none).unwrap_or(self.table.len());
        if free >= DESCRIPTORS_MAX {
            return Err(Errno::TooManyDescriptors);
        }
        if free == self.table.len() {
            self.table.push(None);
        }
        self.table[free] = Some(descriptor);
        u32::try_from(free).map_err(|_| Errno::TooManyDescriptors)
    }
}

/// One host call in progress.
struct Guest<'a> {
    memory: &'a mut [u8],
    host: &'a mut Host,
    fuel: u64,
}

impl Guest<'_> {
    /// Charges fuel before the work is done.
    fn charge(&mut self, units: u64) -> Result<(), Fault> {
        match self.fuel.checked_sub(units) {
            Some(left) => {
                self.fuel = left;
                Ok(())
            }
            None => {
                self.fuel = 0;
                Err(Ended::OutOfFuel.into())
            }
        }
    }

    fn charge_bytes(&mut self, bytes: usize) -> Result<(), Fault> {
        self.charge((bytes as u64).saturating_mul(BYTE_FUEL))
    }

    fn range(&self, at: u32, length: u32) -> Result<std::ops::Range<usize>, Errno> {
        let start = at as usize;
        let end = start.checked_add(length as usize).ok_or(Errno::BadPointer)?;
        if end <= self.memory.len() { Ok(start..end) } else { Err(Errno::BadPointer) }
    }

    fn bytes(&self, at: u32, length: u32) -> Result<&[u8], Errno> {
        Ok(&self.memory[self.range(at, length)?])
    }

    fn read<const N: usize>(&self, at: u32) -> Result<[u8; N], Errno> {
        let mut value = [0; N];
        let length = u32::try_from(N).map_err(|_| Errno::BadPointer)?;
        value.copy_from_slice(self.bytes(at, length)?);
        Ok(value)
    }

    fn read_u32(&self, at: u32) -> Result<u32, Errno> {
        Ok(u32::from_le_bytes(self.read(at)?))
    }

    fn write(&mut self, at: u32, value: &[u8]) -> Result<(), Errno> {
        let length = u32::try_from(value.len()).map_err(|_| Errno::BadPointer)?;
        let range = self.range(at, length)?;
        self.memory[range].copy_from_slice(value);
        Ok(())
    }

    fn write_u32(&mut self, at: u32, value: u32) -> Result<(), Errno> {
        self.write(at, &value.to_le_bytes())
    }

    fn write_u64(&mut self, at: u32, value: u64) -> Result<(), Errno> {
        self.write(at, &value.to_le_bytes())
    }

    /// The `index`th (pointer, length) of a vector; the arithmetic wraps nowhere.
    fn vector(&self, vectors: u32, index: u32) -> Result<(u32, u32), Errno> {
        let at = vectors.checked_add(index.checked_mul(8).ok_or(Errno::BadPointer)?).ok_or(Errno::BadPointer)?;
        Ok((self.read_u32(at)?, self.read_u32(at.checked_add(4).ok_or(Errno::BadPointer)?)?))
    }

    fn path(&mut self, at: u32, length: u32) -> Result<String, Fault> {
        self.charge(super::PATH_FUEL)?;
        if length as usize > PATH_BYTES_MAX {
            return Err(Errno::NameTooLong.into());
        }
        self.charge_bytes(length as usize)?;
        let bytes = self.bytes(at, length)?;
        match std::str::from_utf8(bytes) {
            Ok(path) if !path.contains('\0') => Ok(path.to_owned()),
            _ => Err(Errno::Invalid.into()),
        }
    }
}

/// The number of an error in preview 1.
fn number(errno: Errno) -> i32 {
    match errno {
        Errno::BadDescriptor => 8,
        Errno::Exists => 20,
        Errno::BadPointer => 21,
        Errno::Invalid => 28,
        Errno::IsDirectory => 31,
        Errno::TooManyDescriptors => 33,
        Errno::NameTooLong => 37,
        Errno::NoEntry => 44,
        Errno::NotDirectory => 54,
        Errno::NotSocket => 57,
        Errno::NotSupported => 58,
        Errno::NotPermitted => 63,
        Errno::ReadOnly => 69,
        Errno::NotSeekable => 70,
    }
}

/// Runs one host call: base charge, memory, fuel back to the store, errors to numbers or to the end of the run.
fn call(mut caller: Caller<'_, Host>, body: impl FnOnce(&mut Guest<'_>) -> Result<(), Fault>) -> Result<i32> {
    let fuel = caller.get_fuel()?;
    let known = caller.data().p1.memory;
    let memory = known.or_else(|| caller.get_export("memory").and_then(Extern::into_memory));
    let (memory, host) = match memory {
        Some(memory) => {
            caller.data_mut().p1.memory = Some(memory);
            memory.data_and_store_mut(&mut caller)
        }
        None => (&mut [][..], caller.data_mut()),
    };
    let mut guest = Guest { memory, host, fuel };
    let result = guest.charge(CALL_FUEL).and_then(|()| body(&mut guest));
    let left = guest.fuel;
    caller.set_fuel(left)?;
    match result {
        Ok(()) => Ok(0),
        Err(Fault::Errno(errno)) => Ok(number(errno)),
        Err(Fault::End(ended)) => Err(caller.data_mut().end(ended)),
    }
}

/// Defines one import whose closure body runs inside [`call`].
macro_rules! import {
    ($linker:ident, $name:ident($($arg:ident: $ty:ty),*)) => {
        $linker.func_wrap(MODULE, stringify!($name), |caller: Caller<'_, Host>, $($arg: $ty),*| {
            call(caller, |guest| guest.$name($($arg),*))
        })?;
    };
}

/// Adds the world to a linker.
pub(crate) fn link(linker: &mut Linker<Host>) -> Result<()> {
    import!(linker, args_get(argv: u32, buffer: u32));
    import!(linker, args_sizes_get(count: u32, bytes: u32));
    import!(linker, environ_get(environ: u32, buffer: u32));
    import!(linker, environ_sizes_get(count: u32, bytes: u32));
    import!(linker, clock_res_get(id: u32, out: u32));
    import!(linker, clock_time_get(id: u32, precision: u64, out: u32));
    import!(linker, fd_advise(fd: u32, offset: u64, length: u64, advice: u32));
    import!(linker, fd_allocate(fd: u32, offset: u64, length: u64));
    import!(linker, fd_close(fd: u32));
    import!(linker, fd_datasync(fd: u32));
    import!(linker, fd_fdstat_get(fd: u32, out: u32));
    import!(linker, fd_fdstat_set_flags(fd: u32, flags: u32));
    import!(linker, fd_fdstat_set_rights(fd: u32, base: u64, inheriting: u64));
    import!(linker, fd_filestat_get(fd: u32, out: u32));
    import!(linker, fd_filestat_set_size(fd: u32, size: u64));
    import!(linker, fd_filestat_set_times(fd: u32, accessed: u64, modified: u64, flags: u32));
    import!(linker, fd_pread(fd: u32, vectors: u32, count: u32, offset: u64, out: u32));
    import!(linker, fd_prestat_get(fd: u32, out: u32));
    import!(linker, fd_prestat_dir_name(fd: u32, path: u32, length: u32));
    import!(linker, fd_pwrite(fd: u32, vectors: u32, count: u32, offset: u64, out: u32));
    import!(linker, fd_read(fd: u32, vectors: u32, count: u32, out: u32));
    import!(linker, fd_readdir(fd: u32, buffer: u32, length: u32, cookie: u64, out: u32));
    import!(linker, fd_renumber(from: u32, to: u32));
    import!(linker, fd_seek(fd: u32, offset: i64, whence: u32, out: u32));
    import!(linker, fd_sync(fd: u32));
    import!(linker, fd_tell(fd: u32, out: u32));
    import!(linker, fd_write(fd: u32, vectors: u32, count: u32, out: u32));
    import!(linker, path_create_directory(fd: u32, path: u32, length: u32));
    import!(linker, path_filestat_get(fd: u32, lookup: u32, path: u32, length: u32, out: u32));
    import!(linker, path_filestat_set_times(fd: u32, lookup: u32, path: u32, length: u32, accessed: u64, modified: u64, flags: u32));
    import!(linker, path_link(fd: u32, lookup: u32, path: u32, length: u32, to_fd: u32, to: u32, to_length: u32));
    import!(linker, path_open(fd: u32, lookup: u32, path: u32, length: u32, open: u32, base: u64, inheriting: u64, flags: u32, out: u32));
    import!(linker, path_readlink(fd: u32, path: u32, length: u32, buffer: u32, buffer_length: u32, out: u32));
    import!(linker, path_remove_directory(fd: u32, path: u32, length: u32));
    import!(linker, path_rename(fd: u32, path: u32, length: u32, to_fd: u32, to: u32, to_length: u32));
    import!(linker, path_symlink(old: u32, old_length: u32, fd: u32, path: u32, length: u32));
    import!(linker, path_unlink_file(fd: u32, path: u32, length: u32));
    import!(linker, poll_oneoff(subscriptions: u32, events: u32, count: u32, out: u32));
    import!(linker, proc_raise(signal: u32));
    import!(linker, random_get(buffer: u32, length: u32));
    import!(linker, sched_yield());
    import!(linker, sock_accept(fd: u32, flags: u32, out: u32));
    import!(linker, sock_recv(fd: u32, vectors: u32, count: u32, flags: u32, out: u32, out_flags: u32));
    import!(linker, sock_send(fd: u32, vectors: u32, count: u32, flags: u32, out: u32));
    import!(linker, sock_shutdown(fd: u32, how: u32));
    linker.func_wrap(MODULE, "proc_exit", |mut caller: Caller<'_, Host>, code: i32| -> Result<()> {
        Err(caller.data_mut().end(Ended::Exit(code)))
    })?;
    Ok(())
}
