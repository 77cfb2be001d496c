//! The randomness that guests see: ChaCha20 streams that depend on the job alone.
//!
//! Owns the keys. The derive contexts and the byte order are part of the environment: changing them changes outputs.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

const JOB_CONTEXT: &str = "sundara-node job randomness v1";
const INIT_CONTEXT: &str = "sundara-node init randomness v1";
const INSECURE_CONTEXT: &str = "sundara-node insecure seed v1";

/// The stream of a job: keyed by its key and seed (little-endian).
pub(crate) fn job_stream(job_key: &[u8; 32], seed: u64) -> ChaCha20Rng {
    stream(JOB_CONTEXT, job_key, &seed.to_le_bytes())
}

/// The stream of an init export: keyed by the environment, since its state is shared by all jobs of it.
fn init_stream(env_id: &[u8; 32]) -> ChaCha20Rng {
    stream(INIT_CONTEXT, env_id, &[])
}

/// The 128-bit seed for hash maps (`wasi:random/insecure-seed`), apart from the stream so that its use moves nothing.
fn insecure_seed(job_key: &[u8; 32]) -> (u64, u64) {
    let key = blake3::derive_key(INSECURE_CONTEXT, job_key);
    let part = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&key[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    (part(0), part(8))
}

/// A stream that is made on first use: most small jobs draw nothing.
#[derive(Debug)]
pub(crate) struct Randomness {
    key: Key,
    stream: Option<ChaCha20Rng>,
}

#[derive(Debug)]
enum Key {
    Job([u8; 32], u64),
    Init([u8; 32]),
}

impl Randomness {
    /// Of a job.
    pub(crate) fn of_job(job_key: [u8; 32], seed: u64) -> Self {
        Self { key: Key::Job(job_key, seed), stream: None }
    }

    /// Of an init export.
    pub(crate) fn of_init(env_id: [u8; 32]) -> Self {
        Self { key: Key::Init(env_id), stream: None }
    }

    /// The next bytes of the stream.
    pub(crate) fn fill(&mut self, buffer: &mut [u8]) {
        let key = &self.key;
        let stream = self.stream.get_or_insert_with(|| match key {
            Key::Job(job_key, seed) => job_stream(job_key, *seed),
            Key::Init(env_id) => init_stream(env_id),
        });
        stream.fill_bytes(buffer);
    }

    /// The seed for hash maps, apart from the stream.
    pub(crate) fn insecure_seed(&self) -> (u64, u64) {
        match &self.key {
            Key::Job(key, _) | Key::Init(key) => insecure_seed(key),
        }
    }
}

fn stream(context: &str, key: &[u8; 32], suffix: &[u8]) -> ChaCha20Rng {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    hasher.update(key);
    hasher.update(suffix);
    ChaCha20Rng::from_seed(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frozen_stream() {
        let mut bytes = [0; 8];
        job_stream(&[7; 32], 42).fill_bytes(&mut bytes);
        let mut again = [0; 8];
        job_stream(&[7; 32], 42).fill_bytes(&mut again);
        assert_eq!(bytes, again);
        job_stream(&[7; 32], 43).fill_bytes(&mut again);
        assert_ne!(bytes, again);
    }
}
