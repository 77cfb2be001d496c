//! Values that cross the boundary, named as the interfaces name them.

use wasmtime::component::{ComponentType, Lift, Lower, Resource, flags};

use super::IoError;
use crate::wasm::host::{Errno, WALL_CLOCK_S};

#[derive(ComponentType, Lower, Lift)]
#[component(variant)]
pub(super) enum StreamError {
    #[component(name = "last-operation-failed")]
    #[allow(dead_code)] // in the interface, and nothing here fails that way
    LastOperationFailed(Resource<IoError>),
    #[component(name = "closed")]
    Closed,
}

#[derive(Clone, Copy, ComponentType, Lower, Lift)]
#[component(record)]
pub(super) struct Datetime {
    pub(super) seconds: u64,
    pub(super) nanoseconds: u32,
}

/// The constant wall clock.
pub(super) const NOW: Datetime = Datetime { seconds: WALL_CLOCK_S, nanoseconds: 0 };

macro_rules! wit_enum {
    ($name:ident { $($case:ident = $wit:literal),* $(,)? }) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, ComponentType, Lower, Lift)]
        #[component(enum)]
        #[repr(u8)]
        #[allow(dead_code)] // every case is in the interface
        pub(super) enum $name {
            $(#[component(name = $wit)] $case),*
        }
    };
}

wit_enum!(DescriptorType {
    Unknown = "unknown",
    BlockDevice = "block-device",
    CharacterDevice = "character-device",
    Directory = "directory",
    Fifo = "fifo",
    SymbolicLink = "symbolic-link",
    RegularFile = "regular-file",
    Socket = "socket",
});

wit_enum!(Advice {
    Normal = "normal",
    Sequential = "sequential",
    Random = "random",
    WillNeed = "will-need",
    DontNeed = "dont-need",
    NoReuse = "no-reuse",
});

wit_enum!(ErrorCode {
    Access = "access",
    WouldBlock = "would-block",
    Already = "already",
    BadDescriptor = "bad-descriptor",
    Busy = "busy",
    Deadlock = "deadlock",
    Quota = "quota",
    Exist = "exist",
    FileTooLarge = "file-too-large",
    IllegalByteSequence = "illegal-byte-sequence",
    InProgress = "in-progress",
    Interrupted = "interrupted",
    Invalid = "invalid",
    Io = "io",
    IsDirectory = "is-directory",
    Loop = "loop",
    TooManyLinks = "too-many-links",
    MessageSize = "message-size",
    NameTooLong = "name-too-long",
    NoDevice = "no-device",
    NoEntry = "no-entry",
    NoLock = "no-lock",
    InsufficientMemory = "insufficient-memory",
    InsufficientSpace = "insufficient-space",
    NotDirectory = "not-directory",
    NotEmpty = "not-empty",
    NotRecoverable = "not-recoverable",
    Unsupported = "unsupported",
    NoTty = "no-tty",
    NoSuchDevice = "no-such-device",
    Overflow = "overflow",
    NotPermitted = "not-permitted",
    Pipe = "pipe",
    ReadOnly = "read-only",
    InvalidSeek = "invalid-seek",
    TextFileBusy = "text-file-busy",
    CrossDevice = "cross-device",
});

impl From<Errno> for ErrorCode {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::BadDescriptor => Self::BadDescriptor,
            Errno::Exists => Self::Exist,
            Errno::IsDirectory => Self::IsDirectory,
            Errno::NameTooLong => Self::NameTooLong,
            Errno::NoEntry => Self::NoEntry,
            Errno::NotDirectory => Self::NotDirectory,
            Errno::NotPermitted => Self::NotPermitted,
            Errno::ReadOnly => Self::ReadOnly,
            Errno::NotSeekable => Self::InvalidSeek,
            Errno::NotSupported | Errno::NotSocket => Self::Unsupported,
            Errno::TooManyDescriptors => Self::InsufficientMemory,
            Errno::BadPointer | Errno::Invalid => Self::Invalid,
        }
    }
}

#[derive(Clone, Copy, ComponentType, Lower, Lift)]
#[component(record)]
pub(super) struct DescriptorStat {
    #[component(name = "type")]
    pub(super) kind: DescriptorType,
    #[component(name = "link-count")]
    pub(super) link_count: u64,
    pub(super) size: u64,
    #[component(name = "data-access-timestamp")]
    pub(super) accessed: Option<Datetime>,
    #[component(name = "data-modification-timestamp")]
    pub(super) modified: Option<Datetime>,
    #[component(name = "status-change-timestamp")]
    pub(super) changed: Option<Datetime>,
}

#[derive(ComponentType, Lower, Lift)]
#[component(record)]
pub(super) struct DirectoryEntry {
    #[component(name = "type")]
    pub(super) kind: DescriptorType,
    pub(super) name: String,
}

#[derive(Clone, Copy, ComponentType, Lower, Lift)]
#[component(record)]
pub(super) struct MetadataHash {
    pub(super) lower: u64,
    pub(super) upper: u64,
}

#[derive(ComponentType, Lower, Lift)]
#[component(variant)]
#[allow(dead_code)] // parsed, and refused whatever it says
pub(super) enum NewTimestamp {
    #[component(name = "no-change")]
    NoChange,
    #[component(name = "now")]
    Now,
    #[component(name = "timestamp")]
    Timestamp(Datetime),
}

flags! {
    DescriptorFlags {
        #[component(name = "read")]
        const READ;
        #[component(name = "write")]
        const WRITE;
        #[component(name = "file-integrity-sync")]
        const FILE_INTEGRITY_SYNC;
        #[component(name = "data-integrity-sync")]
        const DATA_INTEGRITY_SYNC;
        #[component(name = "requested-write-sync")]
        const REQUESTED_WRITE_SYNC;
        #[component(name = "mutate-directory")]
        const MUTATE_DIRECTORY;
    }
}

flags! {
    PathFlags {
        #[component(name = "symlink-follow")]
        const SYMLINK_FOLLOW;
    }
}

flags! {
    OpenFlags {
        #[component(name = "create")]
        const CREATE;
        #[component(name = "directory")]
        const DIRECTORY;
        #[component(name = "exclusive")]
        const EXCLUSIVE;
        #[component(name = "truncate")]
        const TRUNCATE;
    }
}
