//! Models made ready: manifest and files by digest, once for any number of jobs.
//!
//! Owns the cache of setups that the runtime shares between the jobs of one model. Does not own files or fetching (the
//! registry), nor compiled code and warm images (the runtime).
//!
//! Invariants: any number of jobs of one model wait for one fetch; at most [`MODELS_MAX`] models are kept, the one used
//! longest ago goes first; a failed fetch is not kept.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sundara_proto::id::{BlobId, EnvId, ModelId, NodeId};
use sundara_proto::job::{JobSpec, Limits, Program};
use sundara_proto::rules::env::Environment;
use sundara_runtime as runtime;
use tokio::sync::OnceCell;

use super::engine_of;
use crate::services::registry::{LocalModel, RegistryHandle};
use crate::services::work::ExecutorFault;

/// Models kept ready. Each is a few paths; what is large (code, images) the runtime bounds.
const MODELS_MAX: usize = 64;

/// Time between looks for newly pinned models.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// What does not differ from job to job of one model.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) setup: Arc<runtime::Setup>,
    /// Environment in which it runs here.
    pub(super) env_id: EnvId,
    /// Most that the model's publisher allows; `None` for builtin jobs.
    pub(super) limits: Option<Limits>,
    /// Export called when the job names none.
    pub(super) entry: String,
    /// Keeps the files in place.
    _files: Option<LocalModel>,
}

#[derive(Clone, Default)]
struct Slot {
    ready: Arc<OnceCell<Arc<Ready>>>,
    last_used: u64,
}

#[derive(Default)]
struct Cache {
    slots: HashMap<ModelId, Slot>,
    clock: u64,
}

/// The cache.
pub(super) struct Models {
    registry: RegistryHandle,
    runtime: runtime::RuntimeSet,
    cache: Mutex<Cache>,
}

impl Models {
    pub(super) fn new(registry: RegistryHandle, runtime: runtime::RuntimeSet) -> Self {
        Self { registry, runtime, cache: Mutex::default() }
    }

    /// What a job runs.
    pub(super) async fn of(&self, spec: &JobSpec, hints: &[NodeId]) -> Result<Arc<Ready>, ExecutorFault> {
        match &spec.program {
            Program::Builtin { name } => self.builtin(name).map(Arc::new),
            Program::Model { model, manifest, .. } => self.model(*model, *manifest, hints).await,
        }
    }

    /// Fetches and compiles a model before its first job.
    pub(super) async fn prepare(&self, model: ModelId, manifest: BlobId) -> Result<(), ExecutorFault> {
        let ready = self.model(model, manifest, &[]).await?;
        let limits = runtime_limits(&ready.limits.unwrap_or_default());
        self.runtime.prepare(&ready.setup, &limits).await.map_err(|e| fault(&e))
    }

    /// Makes every pinned model ready, and those that are pinned later, so that their first job is as fast as the next.
    pub(super) async fn keep_warm(&self) {
        let mut done: HashSet<ModelId> = HashSet::new();
        loop {
            let listed = self.registry.list().await.unwrap_or_else(|error| {
                tracing::warn!(%error, "pinned models are not known; none is made ready");
                Vec::new()
            });
            let pinned = listed.into_iter().filter(|m| m.pinned && m.local).take(MODELS_MAX);
            for model in pinned {
                if !done.insert(model.model) {
                    continue;
                }
                match self.prepare(model.model, model.manifest).await {
                    Ok(()) => tracing::info!(name = %model.name, model = %model.model, "model is ready"),
                    Err(fault) => tracing::warn!(name = %model.name, %fault, "pinned model could not be made ready"),
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Forgets a model whose files are not what they were.
    pub(super) fn forget(&self, model: &ModelId) {
        self.cache().slots.remove(model);
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn builtin(&self, name: &str) -> Result<Ready, ExecutorFault> {
        let env_id = self.env_id(runtime::JobKind::Builtin, &Environment::of_builtin(name))?;
        Ok(Ready {
            setup: Arc::new(runtime::Setup::builtin(name)),
            env_id,
            limits: None,
            entry: runtime::ENTRY_DEFAULT.to_owned(),
            _files: None,
        })
    }

    async fn model(&self, model: ModelId, manifest: BlobId, hints: &[NodeId]) -> Result<Arc<Ready>, ExecutorFault> {
        let cell = {
            let mut cache = self.cache();
            cache.clock += 1;
            let now = cache.clock;
            if cache.slots.len() >= MODELS_MAX && !cache.slots.contains_key(&model) {
                let oldest = cache.slots.iter().min_by_key(|(_, slot)| slot.last_used).map(|(id, _)| *id);
                oldest.and_then(|id| cache.slots.remove(&id));
            }
            let slot = cache.slots.entry(model).or_default();
            slot.last_used = now;
            slot.ready.clone()
        };
        let ready = cell.get_or_try_init(|| self.load(model, manifest, hints)).await?;
        Ok(ready.clone())
    }

    async fn load(&self, model: ModelId, manifest: BlobId, hints: &[NodeId]) -> Result<Arc<Ready>, ExecutorFault> {
        let local = self.registry.local(model, manifest, hints.to_vec()).await;
        let local = local.map_err(|e| ExecutorFault { reason: format!("model: {e}"), retryable: e.is_retryable() })?;
        let environment = Environment::of_model(model, &local.manifest);
        let env_id = self.env_id(runtime::JobKind::Wasm, &environment)?;
        let program = runtime::ModuleSource::path(environment.program, &local.program);
        let artifacts = local.artifacts.iter().map(|(name, blob, path)| runtime::Artifact {
            name: name.clone(),
            digest: blob.0,
            path: path.clone(),
        });
        let setup = runtime::Setup {
            init: Some(local.manifest.init.clone()).filter(|init| !init.is_empty()),
            artifacts: artifacts.collect(),
            model_root: environment.model_root,
            quantisation: environment.quantisation,
            ..runtime::Setup::new(runtime::Program::Wasm(program))
        };
        let entry = local.manifest.entry.clone();
        Ok(Arc::new(Ready {
            setup: Arc::new(setup),
            env_id,
            limits: Some(local.manifest.limits),
            entry: if entry.is_empty() { runtime::ENTRY_DEFAULT.to_owned() } else { entry },
            _files: Some(local),
        }))
    }

    fn env_id(&self, kind: runtime::JobKind, environment: &Environment) -> Result<EnvId, ExecutorFault> {
        let engine = engine_of(&self.runtime, kind)
            .ok_or_else(|| ExecutorFault::lasting(format!("this executor has no engine for {kind:?} jobs")))?;
        Ok(environment.env_id(&engine))
    }
}

/// Limits as the runtime takes them.
pub(super) fn runtime_limits(limits: &Limits) -> runtime::Limits {
    runtime::Limits {
        fuel: limits.fuel,
        memory_bytes: limits.memory.0,
        output_bytes: limits.output.0,
        wall: limits.wall(),
    }
}

/// A runtime error as its sources tell it.
pub(super) fn fault(error: &runtime::RuntimeError) -> ExecutorFault {
    let mut reason = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        reason = format!("{reason}: {cause}");
        source = cause.source();
    }
    ExecutorFault { reason, retryable: error.is_retryable() }
}
