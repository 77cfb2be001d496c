//! Environment identity: inside one, equal jobs give equal bytes; across two, nothing is promised.
//!
//! Owns the encoding that requester, validator, miner and executor must share. Does not own what an engine's flags are:
//! each backend describes itself in words, and those words are part of the identity.

use crate::crypto::Context;
use crate::id::{EngineId, EnvId, ModelId};
use crate::model::ModelManifest;

/// The part of an environment that comes with the job; the engine is the other part.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Environment {
    /// Digest of the original module (never of a warm image) or of the container image.
    pub program: [u8; 32],
    /// Digest that stands for the model and all its artifacts; zeros for none.
    pub model_root: [u8; 32],
    /// Quantisation label; empty for none.
    pub quantisation: String,
}

impl Environment {
    /// Environment of a published model. The ModelId is the root: it is derived from the manifest, which names every
    /// artifact by digest.
    pub fn of_model(model: ModelId, manifest: &ModelManifest) -> Self {
        Self { program: manifest.program.blob.0, model_root: model.0, quantisation: String::new() }
    }

    /// Environment of a builtin job, which has no bytes but a name.
    pub fn of_builtin(name: &str) -> Self {
        let program = Context::ENV.digest(&[b"builtin", name.as_bytes()]).0;
        Self { program, model_root: [0; 32], quantisation: String::new() }
    }

    /// Identity of this environment on `engine`: length-prefixed program, model root, quantisation, engine, tensor
    /// parallelism and batch. The last two are 1 until an engine exists that offers more.
    pub fn env_id(&self, engine: &EngineId) -> EnvId {
        let one = 1_u32.to_le_bytes();
        let fields: [&[u8]; 6] =
            [&self.program, &self.model_root, self.quantisation.as_bytes(), engine.as_ref(), &one, &one];
        EnvId(Context::ENV.digest(&fields).0)
    }
}

/// Identity of an engine. `flags` names everything that can change a result (features, canonicalisation, host version);
/// `version` is the engine's own, or GPU architecture and driver major.
pub fn engine_id(flags: &str, version: &str) -> EngineId {
    EngineId(Context::ENGINE.digest(&[flags.as_bytes(), version.as_bytes()]).0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_counts_and_none_runs_into_the_next() {
        let base = Environment { program: [1; 32], model_root: [2; 32], quantisation: "q8".into() };
        let engine = engine_id("ab", "c");
        assert_ne!(engine, engine_id("a", "bc"));
        let ids = [
            base.env_id(&engine),
            base.env_id(&engine_id("a", "bc")),
            Environment { program: [3; 32], ..base.clone() }.env_id(&engine),
            Environment { model_root: [3; 32], ..base.clone() }.env_id(&engine),
            Environment { quantisation: String::new(), ..base.clone() }.env_id(&engine),
        ];
        for (i, a) in ids.iter().enumerate() {
            assert!(ids.iter().skip(i + 1).all(|b| a != b), "{i}");
        }
        assert_eq!(base.env_id(&engine), base.clone().env_id(&engine));
        assert_ne!(Environment::of_builtin("a"), Environment::of_builtin("b"));
    }
}
