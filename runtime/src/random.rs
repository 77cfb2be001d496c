//! The randomness that guests see: ChaCha20 streams that depend on the job alone.
//!
//! Owns the keys. The derive contexts and the byte order are part of the environment: changing them changes outputs.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::SeedableRng;

const JOB_CONTEXT: &str = "sundara-node job randomness v1";
const INIT_CONTEXT: &str = "sundara-node init randomness v1";
const INSECURE_CONTEXT: &str = "sundara-node insecure seed v1";

/// The stream of a job: keyed by its key and seed (little-endian).
pub(crate) fn job_stream(job_key: &[u8; 32], seed: u64) -> ChaCha20Rng {
    stream(JOB_CONTEXT, job_key, &seed.to_le_bytes())
}

/// The stream of an init export: keyed by the environment, since its state is shared by all jobs of it.
pub(crate) fn init_stream(env_id: &[u8; 32]) -> ChaCha20Rng {
    stream(INIT_CONTEXT, env_id, &[])
}

/// The 128-bit seed for hash maps (`wasi:random/insecure-seed`), apart from the stream so that its use moves nothing.
pub(crate) fn insecure_seed(job_key: &[u8; 32]) -> (u64, u64) {
    let key = blake3::derive_key(INSECURE_CONTEXT, job_key);
    let part = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&key[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    (part(0), part(8))
}

fn stream(context: &str, key: &[u8; 32], suffix: &[u8]) -> ChaCha20Rng {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    hasher.update(key);
    hasher.update(suffix);
    ChaCha20Rng::from_seed(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use rand_chacha::rand_core::Rng;

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
