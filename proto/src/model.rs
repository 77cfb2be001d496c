//! Published models: a manifest says what they are, a signed record gives a manifest a name.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::crypto::{Context, Network, Payload, Scheme, Signed};
use crate::id::{BlobId, Hotkey, ModelId};
use crate::job::Limits;
use crate::pb;
use crate::units::{ByteCount, UnixMillis};
use crate::wire::{self, WireError, WireMessage, limit};

/// A file of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artifact {
    /// Name under /model.
    pub name: String,
    /// Content.
    pub blob: BlobId,
    /// Its length.
    pub len: ByteCount,
}

/// When two results are the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "class", rename_all = "lowercase", deny_unknown_fields)]
pub enum Determinism {
    /// Digest for digest, within one environment.
    Exact,
    /// Element by element: |a - b| <= atol + rtol * |b|.
    Tolerance {
        /// Absolute part.
        atol: f64,
        /// Relative part.
        rtol: f64,
        /// Element type of the output: f32 or f64, little-endian.
        dtype: String,
    },
}

/// What a model is. Its encoded bytes are a blob from which the [`ModelId`] is derived.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelManifest {
    /// Name under its publisher's hotkey.
    pub name: String,
    /// Only goes up.
    pub version: u64,
    /// Engine that runs it; `wasm`.
    pub engine: String,
    /// The program, for wasm the module.
    pub program: Artifact,
    /// Files that it reads under /model.
    pub artifacts: Vec<Artifact>,
    /// What one execution may use at most.
    pub limits: Limits,
    /// When two results are the same.
    pub determinism: Determinism,
    /// Verification tier; 0 is exact.
    pub tier: u32,
    /// Hardware class that it needs; empty for any.
    pub hardware_class: String,
    /// Export that makes the warm image; empty for none.
    pub init: String,
    /// Export called by default; empty for `_start`.
    pub entry: String,
    /// For people.
    pub description: String,
    /// SPDX expression.
    pub license: String,
}

impl ModelManifest {
    /// Id of encoded manifest bytes.
    pub fn id_of(encoded: &[u8]) -> ModelId {
        ModelId(Context::MODEL.digest_one(encoded).0)
    }

    /// Every blob that the model needs, its program first.
    pub fn blobs(&self) -> impl Iterator<Item = &Artifact> {
        std::iter::once(&self.program).chain(&self.artifacts)
    }
}

fn artifact_from(raw: pb::Artifact) -> Result<Artifact, WireError> {
    let name = wire::name(raw.name, "artifact.name")?;
    if name.is_empty() {
        return Err(WireError::field("artifact.name"));
    }
    Ok(Artifact { name, blob: wire::id(&raw.blob, "artifact.blob")?, len: ByteCount(raw.len) })
}

fn artifact_to(artifact: &Artifact) -> pb::Artifact {
    pb::Artifact { name: artifact.name.clone(), blob: artifact.blob.into(), len: artifact.len.0 }
}

fn determinism_from(raw: pb::Determinism) -> Result<Determinism, WireError> {
    use pb::determinism::Class;
    match Class::try_from(raw.class) {
        Ok(Class::Exact) => Ok(Determinism::Exact),
        Ok(Class::Tolerance) => {
            let sane = |x: f64| x.is_finite() && x >= 0.0;
            if !sane(raw.atol) || !sane(raw.rtol) || !matches!(raw.dtype.as_str(), "f32" | "f64") {
                return Err(WireError::field("determinism"));
            }
            Ok(Determinism::Tolerance { atol: raw.atol, rtol: raw.rtol, dtype: raw.dtype })
        }
        _ => Err(WireError::field("determinism.class")),
    }
}

fn determinism_to(determinism: &Determinism) -> pb::Determinism {
    use pb::determinism::Class;
    match determinism {
        Determinism::Exact => pb::Determinism { class: Class::Exact.into(), ..Default::default() },
        Determinism::Tolerance { atol, rtol, dtype } => {
            pb::Determinism { class: Class::Tolerance.into(), atol: *atol, rtol: *rtol, dtype: dtype.clone() }
        }
    }
}

impl WireMessage for ModelManifest {
    type Raw = pb::ModelManifest;
    const MAX: usize = limit::MANIFEST;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        if raw.artifacts.len() > limit::ARTIFACTS {
            return Err(WireError::field("artifacts"));
        }
        let artifacts = raw.artifacts.into_iter().map(artifact_from).collect::<Result<Vec<_>, _>>()?;
        let mut names: Vec<&str> = artifacts.iter().map(|a| a.name.as_str()).collect();
        names.sort_unstable();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(WireError::field("artifacts"));
        }
        let name = wire::name(raw.name, "name")?;
        if name.is_empty() || raw.engine != "wasm" {
            return Err(WireError::field(if name.is_empty() { "name" } else { "engine" }));
        }
        Ok(Self {
            name,
            version: raw.version,
            engine: raw.engine,
            program: artifact_from(wire::required(raw.program, "program")?)?,
            artifacts,
            limits: Limits::from_raw(wire::required(raw.limits, "limits")?)?,
            determinism: determinism_from(wire::required(raw.determinism, "determinism")?)?,
            tier: raw.tier,
            hardware_class: wire::name(raw.hardware_class, "hardware_class")?,
            init: wire::name(raw.init, "init")?,
            entry: wire::name(raw.entry, "entry")?,
            description: wire::text(raw.description, limit::TEXT, "description")?,
            license: wire::text(raw.license, limit::NAME, "license")?,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::ModelManifest {
            name: self.name.clone(),
            version: self.version,
            engine: self.engine.clone(),
            program: Some(artifact_to(&self.program)),
            artifacts: self.artifacts.iter().map(artifact_to).collect(),
            limits: Some(self.limits.to_raw()),
            determinism: Some(determinism_to(&self.determinism)),
            tier: self.tier,
            hardware_class: self.hardware_class.clone(),
            init: self.init.clone(),
            entry: self.entry.clone(),
            description: self.description.clone(),
            license: self.license.clone(),
        }
    }
}

/// Gives a manifest a name and a version for a while. Signed by the publisher's hotkey; the value of a DHT record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelRecord {
    /// Mesh in which it holds.
    pub network: Network,
    /// Name under the signer's hotkey.
    pub name: String,
    /// Only goes up.
    pub version: u64,
    /// The model.
    pub model: ModelId,
    /// Blob of its manifest.
    pub manifest: BlobId,
    /// When it was signed.
    pub issued_at: UnixMillis,
    /// At most [`ModelRecord::LIFE_MAX`] later; the publisher signs anew.
    pub expires_at: UnixMillis,
}

impl ModelRecord {
    /// Longest life of one signature. A publisher that is gone for longer lets its names lapse.
    pub const LIFE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
}

impl Signed<ModelRecord> {
    /// Whose name it is.
    pub fn publisher(&self) -> Hotkey {
        Hotkey(self.signer())
    }
}

impl WireMessage for ModelRecord {
    type Raw = pb::ModelRecord;
    const MAX: usize = 1 << 10;

    fn from_raw(raw: Self::Raw) -> Result<Self, WireError> {
        let name = wire::name(raw.name, "name")?;
        if name.is_empty() {
            return Err(WireError::field("name"));
        }
        let (issued_at, expires_at) = (UnixMillis(raw.issued_at_ms), UnixMillis(raw.expires_at_ms));
        if expires_at > issued_at.plus(Self::LIFE_MAX) {
            return Err(WireError::field("expires_at_ms"));
        }
        Ok(Self {
            network: Network { genesis: wire::array(&raw.genesis, "genesis")?, netuid: wire::netuid(raw.netuid)? },
            name,
            version: raw.version,
            model: wire::id(&raw.model, "model")?,
            manifest: wire::id(&raw.manifest, "manifest")?,
            issued_at,
            expires_at,
        })
    }

    fn to_raw(&self) -> Self::Raw {
        pb::ModelRecord {
            genesis: Bytes::copy_from_slice(&self.network.genesis),
            netuid: self.network.netuid.into(),
            name: self.name.clone(),
            version: self.version,
            model: self.model.into(),
            manifest: self.manifest.into(),
            issued_at_ms: self.issued_at.0,
            expires_at_ms: self.expires_at.0,
        }
    }
}

impl Payload for ModelRecord {
    const CONTEXT: &'static str = "model-record";
    const SCHEME: Scheme = Scheme::Sr25519;
}
