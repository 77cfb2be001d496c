//! What every honest node must agree on.
//!
//! This crate owns the wire messages, the identities and digests, everything that is signed, and the rules that two
//! independent implementations must compute to the same bits. It is sans-IO: no runtime, no sockets, no clock, no
//! ambient randomness. Time, seeds and keys are arguments.
//!
//! A peer's bytes are checked once, here: [`wire`] bounds and decodes them, and each module's `TryFrom` turns the raw
//! [`pb`] messages into types that cannot hold a malformed value. What travels further up is parsed.
//!
//! | module | holds |
//! | --- | --- |
//! | [`id`] | digests and names of things: `NodeId`, `JobId`, `ModelId`, `BlobId`, `Hotkey` |
//! | [`units`] | `ByteCount`, `UnixMillis`, `BlockNumber` |
//! | [`crypto`] | derive contexts, key pairs, [`crypto::Signed`] |
//! | [`wire`] | the one codec and every size limit |
//! | [`names`] | protocol ids, gossip topics, DHT keys |
//! | [`cert`], [`job`], [`attestation`], [`verdict`], [`model`], [`advert`], [`batch`], [`blob`], [`round`] | what is said |
//! | [`rules`] | what is computed from it |

pub mod advert;
pub mod attestation;
pub mod batch;
pub mod blob;
pub mod cert;
pub mod crypto;
pub mod id;
pub mod job;
pub mod model;
pub mod names;
pub mod round;
pub mod rules;
pub mod units;
pub mod verdict;
pub mod wire;

/// Raw wire messages, as generated from `proto/schema`. Unchecked: parse before use.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod pb {
    include!(concat!(env!("OUT_DIR"), "/sundara.v1.rs"));
}
