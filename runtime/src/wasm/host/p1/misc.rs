//! Arguments, environment, clocks, polling, randomness, and what is refused.

use super::{Guest, Kind};
use crate::wasm::host::{ARGUMENTS, Ended, Errno, Fault, TICK_NS, WALL_CLOCK_S};

const CLOCK_REALTIME: u32 = 0;
/// Monotonic, process and thread time: all three are the virtual monotonic clock.
const CLOCK_LAST: u32 = 3;
const SUBSCRIPTION_BYTES: u32 = 48;
const EVENT_BYTES: u32 = 32;
/// Most subscriptions of one poll: bounds what is gathered on our side.
const SUBSCRIPTIONS_MAX: u32 = 4_096;
const TAG_CLOCK: u8 = 0;
const TAG_READ: u8 = 1;
const TAG_WRITE: u8 = 2;
const CLOCK_ABSOLUTE: u16 = 1;

/// Between these a stop is looked for; a multiple of the stream's block, so that the bytes do not depend on it.
const RANDOM_CHUNK_BYTES: usize = 1 << 20;

/// The constant wall clock in nanoseconds.
pub(super) const WALL_CLOCK_NS: u64 = WALL_CLOCK_S * 1_000_000_000;

/// One parsed subscription.
struct Subscription {
    user: [u8; 8],
    tag: u8,
    wait: Wait,
}

enum Wait {
    /// Fires at this moment of the monotonic clock.
    Until(u64),
    /// Ready now, with so many bytes.
    Ready(u64),
    Failed(Errno),
}

impl Guest<'_> {
    pub(super) fn args_sizes_get(&mut self, count: u32, bytes: u32) -> Result<(), Fault> {
        let length: usize = ARGUMENTS.iter().map(|argument| argument.len() + 1).sum();
        self.write_u32(count, ARGUMENTS.len() as u32)?;
        self.write_u32(bytes, length as u32)?;
        Ok(())
    }

    pub(super) fn args_get(&mut self, argv: u32, buffer: u32) -> Result<(), Fault> {
        let mut at = buffer;
        for (index, argument) in ARGUMENTS.iter().enumerate() {
            let slot = argv.checked_add(index as u32 * 4).ok_or(Errno::BadPointer)?;
            self.write_u32(slot, at)?;
            self.write(at, argument.as_bytes())?;
            at = at.checked_add(argument.len() as u32).ok_or(Errno::BadPointer)?;
            self.write(at, &[0])?;
            at += 1;
        }
        Ok(())
    }

    pub(super) fn environ_sizes_get(&mut self, count: u32, bytes: u32) -> Result<(), Fault> {
        self.write_u32(count, 0)?;
        self.write_u32(bytes, 0)?;
        Ok(())
    }

    pub(super) fn environ_get(&mut self, _environ: u32, _buffer: u32) -> Result<(), Fault> {
        Ok(())
    }

    pub(super) fn clock_res_get(&mut self, id: u32, out: u32) -> Result<(), Fault> {
        if id > CLOCK_LAST {
            return Err(Errno::Invalid.into());
        }
        Ok(self.write_u64(out, TICK_NS)?)
    }

    pub(super) fn clock_time_get(&mut self, id: u32, _precision: u64, out: u32) -> Result<(), Fault> {
        let now = match id {
            CLOCK_REALTIME => WALL_CLOCK_NS,
            1..=CLOCK_LAST => self.host.clock.now(),
            _ => return Err(Errno::Invalid.into()),
        };
        Ok(self.write_u64(out, now)?)
    }

    pub(super) fn random_get(&mut self, buffer: u32, length: u32) -> Result<(), Fault> {
        let range = self.range(buffer, length)?;
        self.charge_bytes(length as usize)?;
        for part in self.memory[range].chunks_mut(RANDOM_CHUNK_BYTES) {
            if let Some(reason) = self.host.control.stopped() {
                return Err(Ended::Aborted(reason).into());
            }
            self.host.randomness.fill(part);
        }
        Ok(())
    }

    pub(super) fn sched_yield(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    pub(super) fn proc_raise(&mut self, _signal: u32) -> Result<(), Fault> {
        Err(Errno::NotSupported.into())
    }

    /// Files and streams are always ready. Only when nothing else is does time pass, up to the earliest moment.
    pub(super) fn poll_oneoff(&mut self, subscriptions: u32, events: u32, count: u32, out: u32) -> Result<(), Fault> {
        if count == 0 || count > SUBSCRIPTIONS_MAX {
            return Err(Errno::Invalid.into());
        }
        self.charge_bytes(count as usize * (SUBSCRIPTION_BYTES + EVENT_BYTES) as usize)?;
        self.range(subscriptions, count * SUBSCRIPTION_BYTES)?;
        self.range(events, count * EVENT_BYTES)?;
        let mut waits = Vec::with_capacity(count as usize);
        for index in 0..count {
            waits.push(self.subscription(subscriptions + index * SUBSCRIPTION_BYTES)?);
        }
        let earliest = waits.iter().map(|one| if let Wait::Until(moment) = one.wait { moment } else { 0 }).min();
        self.host.clock.sleep_until(earliest.unwrap_or(0));
        let now = self.host.clock.peek();
        let mut written = 0;
        for one in waits {
            let (errno, bytes) = match one.wait {
                Wait::Until(moment) if moment > now => continue,
                Wait::Until(_) => (0, 0),
                Wait::Ready(bytes) => (0, bytes),
                Wait::Failed(errno) => (super::number(errno), 0),
            };
            let mut event = [0; EVENT_BYTES as usize];
            event[..8].copy_from_slice(&one.user);
            event[8..10].copy_from_slice(&(errno as u16).to_le_bytes());
            event[10] = one.tag;
            event[16..24].copy_from_slice(&bytes.to_le_bytes());
            self.write(events + written * EVENT_BYTES, &event)?;
            written += 1;
        }
        Ok(self.write_u32(out, written)?)
    }

    fn subscription(&mut self, at: u32) -> Result<Subscription, Fault> {
        let bytes: [u8; SUBSCRIPTION_BYTES as usize] = self.read(at)?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let mut user = [0; 8];
        user.copy_from_slice(&bytes[..8]);
        let tag = bytes[8];
        let wait = match tag {
            TAG_CLOCK => self.clock_wait(word(16), long(24), word(40) as u16),
            TAG_READ | TAG_WRITE => match self.readiness(word(16), tag) {
                Ok(bytes) => Wait::Ready(bytes),
                Err(Fault::Errno(errno)) => Wait::Failed(errno),
                Err(end) => return Err(end),
            },
            _ => return Err(Errno::Invalid.into()),
        };
        Ok(Subscription { user, tag, wait })
    }

    fn clock_wait(&mut self, id: u32, timeout: u64, flags: u16) -> Wait {
        let now = self.host.clock.peek();
        let absolute = flags & CLOCK_ABSOLUTE != 0;
        match id {
            CLOCK_REALTIME if absolute => Wait::Until(now.saturating_add(timeout.saturating_sub(WALL_CLOCK_NS))),
            1..=CLOCK_LAST if absolute => Wait::Until(timeout),
            0..=CLOCK_LAST => Wait::Until(now.saturating_add(timeout)),
            _ => Wait::Failed(Errno::Invalid),
        }
    }

    fn readiness(&mut self, fd: u32, tag: u8) -> Result<u64, Fault> {
        let descriptor = *self.host.p1.get(fd)?;
        match (descriptor.kind, tag) {
            (Kind::Stdin, TAG_READ) => Ok(self.host.stdin.left() as u64),
            (Kind::Stdout | Kind::Stderr, TAG_WRITE) => Ok(u64::from(u16::MAX)),
            (Kind::Node(node), TAG_READ) => self.host.files.left(node, descriptor.offset),
            _ => Err(Errno::BadDescriptor.into()),
        }
    }

    pub(super) fn sock_accept(&mut self, fd: u32, _flags: u32, _out: u32) -> Result<(), Fault> {
        self.no_socket(fd)
    }

    pub(super) fn sock_recv(
        &mut self,
        fd: u32,
        _vectors: u32,
        _count: u32,
        _flags: u32,
        _out: u32,
        _out_flags: u32,
    ) -> Result<(), Fault> {
        self.no_socket(fd)
    }

    pub(super) fn sock_send(
        &mut self,
        fd: u32,
        _vectors: u32,
        _count: u32,
        _flags: u32,
        _out: u32,
    ) -> Result<(), Fault> {
        self.no_socket(fd)
    }

    pub(super) fn sock_shutdown(&mut self, fd: u32, _how: u32) -> Result<(), Fault> {
        self.no_socket(fd)
    }

    fn no_socket(&mut self, fd: u32) -> Result<(), Fault> {
        self.host.p1.get(fd)?;
        Err(Errno::NotSocket.into())
    }
}
