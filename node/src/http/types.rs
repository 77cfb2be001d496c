//! Bodies of requests and answers, as openapi.json describes them. The command line reads the same types.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use sundara_proto::id::{BlobId, EnvId, Hotkey, JobId};
use sundara_proto::job::Limits;

/// Bytes in JSON: as text, or base64.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum InlineBytes {
    /// The bytes of a text.
    Utf8(String),
    /// Any bytes, in standard base64 with padding.
    Base64(String),
}

impl InlineBytes {
    /// As base64.
    pub fn of(bytes: &[u8]) -> Self {
        Self::Base64(BASE64.encode(bytes))
    }

    /// The bytes; `None` for what is not base64.
    pub fn decode(&self) -> Option<Vec<u8>> {
        match self {
            Self::Utf8(text) => Some(text.clone().into_bytes()),
            Self::Base64(text) => BASE64.decode(text).ok(),
        }
    }
}

/// A job to submit: `model` or `builtin`, everything else has a default. As JSON it may carry its input; otherwise the
/// input is the body and these are the query.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JobRequest {
    /// Published model, `PUBLISHER/NAME[@VERSION]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Reference job that every node has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub builtin: Option<String>,
    /// Export to call instead of the model's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entry: Option<String>,
    /// Standard input. JSON bodies only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<InlineBytes>,
    /// Read by the job as /job/params, at most 4 KiB. JSON bodies only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub params: Option<InlineBytes>,
    /// The same as base64, for queries.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub params_base64: Option<String>,
    /// Seed of the job's randomness; 0 unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Miners of distinct owners, 1 to 16; 1 unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u8>,
    /// Hardware class wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hardware_class: Option<String>,
    /// Whether output comes while it is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<bool>,
    /// Seconds within which a validator must begin it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_after_s: Option<u64>,
    /// Put it on gossip; the requester may leave before the result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub announce: Option<bool>,
    /// What one execution may use; the manifest's limits unless set. JSON bodies only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
}

/// A job of this node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobView {
    /// Its id.
    pub id: JobId,
    /// What runs, for people.
    pub program: String,
    /// submitting, acknowledged, running, finished or failed.
    pub phase: String,
    /// When it was submitted, Unix milliseconds.
    pub submitted_at_ms: u64,
    /// Kind of the verdict, or why there is none.
    pub detail: String,
    /// The result, once there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<ResultView>,
}

/// A verified result.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ResultView {
    /// The job.
    pub job: JobId,
    /// What the verdict rests on: `quorum(K)`, `audited`, `unaudited`.
    pub verdict: String,
    /// How the program ended: `completed`, `exit_code(N)`, `trap(N)`, `out_of_fuel`, `memory_limit`, `output_limit`,
    /// `invalid_module`.
    pub outcome: String,
    /// Digest of the output.
    pub output: BlobId,
    /// Its length in bytes.
    pub output_bytes: u64,
    /// Environment in which it was computed.
    pub env_id: EnvId,
    /// Who ruled.
    pub validator: Hotkey,
    /// Attempt that it rests on.
    pub attempt: u32,
    /// Who took part.
    pub miners: Vec<MinerView>,
    /// Submitted to verdict, milliseconds.
    pub latency_ms: f64,
}

/// A miner in a verdict.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MinerView {
    /// Who.
    pub hotkey: Hotkey,
    /// agreed, disagreed, withheld or faulted.
    pub standing: String,
    /// Offer to attestation, microseconds.
    pub latency_us: u64,
}

/// Data of a server-sent event; its name is that of the variant.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum EventView {
    /// `output`: a piece of output, provisional until the verdict.
    Output {
        /// Attempt that made it.
        attempt: u32,
        /// Place in the output, bytes.
        offset: u64,
        /// The bytes, base64.
        base64: String,
        /// The same as text where it is UTF-8.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        text: Option<String>,
    },
    /// `verdict`: the verified result. Last.
    Verdict(Box<ResultView>),
    /// `failed`: no result. Last.
    Failed {
        /// refused, rejected, failed, cancelled, expired or shut_down.
        reason: String,
        /// For people.
        message: String,
    },
    /// `acknowledged`: a validator has it.
    Acknowledged {
        /// Who.
        validator: Hotkey,
        /// Its place in the job's order of owners.
        rank: u32,
    },
    /// `started`: miners work on it. Output of earlier attempts is void.
    Started {
        /// From 0.
        attempt: u32,
    },
}

/// A directory to publish.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublishRequest {
    /// The directory, on the node's machine; it holds a model.toml.
    pub path: std::path::PathBuf,
}

/// A model to act on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelRequest {
    /// `PUBLISHER/NAME[@VERSION]`.
    pub model: String,
}

/// A model to pin, or no longer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinRequest {
    /// `PUBLISHER/NAME[@VERSION]`.
    pub model: String,
    /// Whether it is kept; true unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned: Option<bool>,
}

/// A request without fields.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

/// An invite to write.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InviteRequest {
    /// Seconds for which it may be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub life_s: Option<u64>,
}

/// A list, so that answers can grow fields.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Items<T> {
    /// The items.
    pub items: Vec<T>,
}

/// Which epoch.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Epoch {
    /// Its number; the present one unless given.
    pub epoch: Option<u64>,
}

/// How many items of a list.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limit {
    /// At most so many, the newest first.
    pub limit: Option<usize>,
}
