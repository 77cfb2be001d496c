//! The one codec, and every size limit with its reason.
//!
//! On streams a frame is a little-endian `u32` length and a prost message. A length above the protocol's limit ends the
//! stream before a byte of the body is read, so a peer cannot make us allocate more than the limit.

use bytes::Bytes;
use prost::Message;

use crate::units::ByteCount;

/// Bytes of a frame's length prefix.
pub const PREFIX_LEN: usize = 4;

/// Limits of size. Each says what it protects.
pub mod limit {
    use super::ByteCount;

    /// First frame of a connection, before the peer is known: certificate, agent and version range fit in 1 KiB.
    pub const HELLO: usize = 4 << 10;
    /// One frame on /rpc: the largest holds an inline input or output and its attestations. A page of 500 entries of
    /// about 1.5 KiB fits too.
    pub const RPC_FRAME: usize = 1 << 20;
    /// One request on /rpc: a spec and an inline input. Smaller than a response's frame, since anyone may send requests.
    pub const RPC_REQUEST: usize = 192 << 10;
    /// Inputs and outputs up to this ride in the message itself; larger ones are blobs. 128 KiB keeps one job from holding
    /// up others on the same stream for more than a fraction of a millisecond.
    pub const INLINE: usize = 128 << 10;
    /// One chunk of streamed output.
    pub const OUTPUT_CHUNK: usize = 64 << 10;
    /// Anything on gossip: every node forwards it to about six others.
    pub const GOSSIP: usize = 64 << 10;
    /// A job request on gossip, its input included.
    pub const GOSSIP_JOB: usize = 4 << 10;
    /// A DHT record; rust-libp2p's own default cap is 65 KiB and packets are 16 KiB.
    pub const DHT_RECORD: usize = 4 << 10;
    /// First frames of /blob: a header lists ranges of a partial blob.
    pub const BLOB_FRAME: usize = 64 << 10;
    /// A request on /blob: a fetcher asks for a few ranges at a time.
    pub const BLOB_REQUEST: usize = 4 << 10;
    /// Ranges of one request: each costs the provider a path of the tree.
    pub const BLOB_REQUEST_RANGES: usize = 64;
    /// Ranges that a header lists; a provider with more names the first ones.
    pub const BLOB_HEADER_RANGES: usize = 2_048;
    /// A blob: with it group numbers and offsets stay far from overflow, and a tree's outboard below 4 GiB.
    pub const BLOB: ByteCount = ByteCount::gib(1024);
    /// A manifest: read whole into memory before anything about it is known.
    pub const MANIFEST: usize = 256 << 10;
    /// Parameters of a job, part of the signed spec that travels to every replica.
    pub const PARAMS: usize = 4 << 10;
    /// Signed payloads other than specs with parameters.
    pub const PAYLOAD: usize = 32 << 10;
    /// Input that a validator stores until the verdict.
    pub const INPUT: ByteCount = ByteCount::mib(256);
    /// Names of models, artifacts, exports, classes, agents.
    pub const NAME: usize = 128;
    /// Texts of reasons and descriptions.
    pub const TEXT: usize = 1 << 10;
    /// Artifacts of one model.
    pub const ARTIFACTS: usize = 256;
    /// Replicas of one attempt.
    pub const REPLICAS: usize = 16;
    /// Entries of one page.
    pub const PAGE_ENTRIES: usize = 500;
    /// Addresses, classes and models of one advert.
    pub const ADVERT_ITEMS: usize = 64;
    /// Members of a group: a rank fits a byte, a set of ranks 32 bytes, and every list of one item a member stays small.
    pub const MEMBERS: usize = 256;
    /// Parts of a round: one a reducer, and no more of them than of members.
    pub const PARTS: usize = 256;
    /// Tensors of a round; what has more is bucketed by its caller.
    pub const TENSORS: usize = 4_096;
    /// Chunks of a round: at 2^20 elements each it ends at 2^36 elements, and a bitmap of them takes 8 KiB.
    pub const CHUNKS: usize = 65_536;
    /// Groups of a chunk: 4 MiB of words are what a reducer holds of each member until the chunk settles.
    pub const CHUNK_GROUPS: usize = 256;
    /// A RoundOpen: 256 members, 256 parts with backups and 4,096 lengths.
    pub const ROUND_OPEN: usize = 128 << 10;
    /// One frame on /round: the exponents of 256 members' largest chunks are 1 MiB.
    pub const ROUND_FRAME: usize = (1 << 20) + (64 << 10);
    /// Digests in one report of settled chunks: 96 KiB of a request of 192.
    pub const REPORT_SUMS: usize = 3_072;
    /// Amendments of a round: each drops or moves what failed since the last, and a round that needs more is better begun
    /// again. All of them, at 32 KiB each, fit one frame behind their RoundOpen.
    pub const AMENDS: usize = 16;
    /// An encoded BlameCase: openings, commitments and tags of 256 members.
    pub const BLAME_CASE: usize = 16 << 20;
    /// Evidence inside another message; a larger case is a blob. With what stands around it, it fits gossip.
    pub const EVIDENCE: usize = 56 << 10;
}

/// Why bytes are no message. All of it is the sender's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// More than the limit for its kind.
    #[error("message of {len} bytes exceeds the limit of {max}")]
    TooLarge {
        /// Bytes that came or were announced.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// Not decodable.
    #[error("not a valid message: {0}")]
    Decode(String),
    /// Decodable, but a field holds what it may not.
    #[error("field `{field}` is missing, out of range or malformed")]
    Field {
        /// Name in the schema.
        field: &'static str,
    },
}

impl WireError {
    /// A field that holds what it may not.
    pub const fn field(field: &'static str) -> Self {
        Self::Field { field }
    }
}

impl From<crate::id::IdError> for WireError {
    fn from(_: crate::id::IdError) -> Self {
        Self::field("id")
    }
}

/// A parsed message: cannot hold what `from_raw` refuses.
pub trait WireMessage: Sized {
    /// The generated message.
    type Raw: Message + Default;
    /// Largest encoding that is decoded at all.
    const MAX: usize = limit::PAYLOAD;
    /// Checks every field.
    fn from_raw(raw: Self::Raw) -> Result<Self, WireError>;
    /// The message as sent.
    fn to_raw(&self) -> Self::Raw;

    /// Encoded bytes.
    fn encode(&self) -> Vec<u8> {
        self.to_raw().encode_to_vec()
    }
    /// Bounds, decodes and checks.
    fn decode(bytes: &Bytes) -> Result<Self, WireError> {
        Self::from_raw(decode_raw(bytes.clone(), Self::MAX)?)
    }
}

/// Decodes a raw message of at most `max` bytes.
pub fn decode_raw<M: Message + Default>(bytes: Bytes, max: usize) -> Result<M, WireError> {
    check_len(bytes.len(), max)?;
    M::decode(bytes).map_err(|e| WireError::Decode(e.to_string()))
}

/// A frame: length prefix and message.
pub fn encode_frame<M: Message>(message: &M, max: usize) -> Result<Bytes, WireError> {
    let len = message.encoded_len();
    check_len(len, max)?;
    let prefix = u32::try_from(len).map_err(|_| WireError::TooLarge { len, max })?;
    let mut frame = bytes::BytesMut::with_capacity(PREFIX_LEN + len);
    frame.extend_from_slice(&prefix.to_le_bytes());
    message.encode(&mut frame).map_err(|e| WireError::Decode(e.to_string()))?;
    Ok(frame.freeze())
}

/// Length that a frame's prefix announces, checked before anything is allocated for it.
pub fn frame_len(prefix: [u8; PREFIX_LEN], max: usize) -> Result<usize, WireError> {
    let len = u32::from_le_bytes(prefix) as usize;
    check_len(len, max)?;
    Ok(len)
}

fn check_len(len: usize, max: usize) -> Result<(), WireError> {
    if len > max { Err(WireError::TooLarge { len, max }) } else { Ok(()) }
}

/// Exactly `N` bytes of a field.
pub fn array<const N: usize>(bytes: &[u8], field: &'static str) -> Result<[u8; N], WireError> {
    bytes.try_into().map_err(|_| WireError::field(field))
}

/// A 32-byte id of a field.
pub fn id<T: From<[u8; 32]>>(bytes: &[u8], field: &'static str) -> Result<T, WireError> {
    array::<32>(bytes, field).map(T::from)
}

/// A message field that must be there.
pub fn required<T>(value: Option<T>, field: &'static str) -> Result<T, WireError> {
    value.ok_or(WireError::field(field))
}

/// A text of at most `max` bytes without control characters.
pub fn text(value: String, max: usize, field: &'static str) -> Result<String, WireError> {
    if value.len() > max || value.chars().any(char::is_control) { Err(WireError::field(field)) } else { Ok(value) }
}

/// A name that is safe as a file name and as a key: `[a-z0-9A-Z._-]`, not starting with a dot, possibly empty.
pub fn name(value: String, field: &'static str) -> Result<String, WireError> {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if value.len() <= limit::NAME && !value.starts_with('.') && value.chars().all(safe) {
        Ok(value)
    } else {
        Err(WireError::field(field))
    }
}

/// A netuid.
pub fn netuid(value: u32) -> Result<u16, WireError> {
    u16::try_from(value).map_err(|_| WireError::field("netuid"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::pb;

    #[test]
    fn a_frame_is_bounded_before_it_is_read() {
        assert_eq!(frame_len(9_u32.to_le_bytes(), 9), Ok(9));
        assert_eq!(frame_len(u32::MAX.to_le_bytes(), 9), Err(WireError::TooLarge { len: u32::MAX as usize, max: 9 }));
    }

    #[test]
    fn frames_carry_their_length() {
        let message = pb::WatchJob { job: Bytes::from_static(&[7; 32]) };
        let frame = encode_frame(&message, 64).unwrap();
        let len = frame_len(frame[..4].try_into().unwrap(), 64).unwrap();
        assert_eq!(decode_raw::<pb::WatchJob>(frame.slice(4..4 + len), 64).unwrap(), message);
        assert!(encode_frame(&message, 10).is_err());
    }

    #[test]
    fn names_are_safe_as_file_names() {
        for bad in ["../x", ".hidden", "a/b", "a b", "ä", &"x".repeat(200)] {
            assert!(name(bad.to_owned(), "n").is_err(), "{bad}");
        }
        assert!(name("model.safetensors".to_owned(), "n").is_ok());
    }
}
