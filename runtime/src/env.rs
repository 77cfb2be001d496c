//! Environment identity: inside one, equal jobs give equal bytes; across two, nothing is promised.
//!
//! Owns the encoding (verification.md: length-prefixed fields under BLAKE3). Each backend supplies the fields that
//! are its own: engine flags and version.

/// Derive context of the identity.
const CONTEXT: &str = "sundara-node env-id v1";

/// The part of an environment that the job's setup supplies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    /// Digest of the original module (never of a warm image) or of the container image.
    pub program: [u8; 32],
    /// Digest that stands for the model; zero for none.
    pub model_root: [u8; 32],
    /// Quantisation label; empty for none.
    pub quantisation: String,
}

/// The part that the backend supplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EngineIdentity<'a> {
    /// Everything that changes semantics: features, canonicalisation, host version.
    pub flags: &'a str,
    /// Engine version, or GPU architecture and driver major.
    pub version: &'a str,
}

/// `BLAKE3-derive(CONTEXT, fields)`; each field is a u32 little-endian length and its bytes, in the order of
/// verification.md: program, model root, quantisation, engine flags, engine version, tensor parallelism, batch.
pub(crate) fn env_id(environment: &Environment, engine: EngineIdentity<'_>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    let one = 1_u32.to_le_bytes();
    let fields: [&[u8]; 7] = [
        &environment.program,
        &environment.model_root,
        environment.quantisation.as_bytes(),
        engine.flags.as_bytes(),
        engine.version.as_bytes(),
        &one, // tensor parallelism
        &one, // batch
    ];
    for field in fields {
        let length = u32::try_from(field.len()).unwrap_or(u32::MAX);
        hasher.update(&length.to_le_bytes());
        hasher.update(field);
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_length_prefixed() {
        let engine = EngineIdentity { flags: "ab", version: "c" };
        let shifted = EngineIdentity { flags: "a", version: "bc" };
        let environment = Environment { program: [1; 32], model_root: [2; 32], quantisation: String::new() };
        assert_ne!(env_id(&environment, engine), env_id(&environment, shifted));
        assert_eq!(env_id(&environment, engine), env_id(&environment.clone(), engine));
        let quantised = Environment { quantisation: "q8".into(), ..environment.clone() };
        assert_ne!(env_id(&environment, engine), env_id(&quantised, engine));
    }
}
