//! The services of the roles that work: executors, miner, validator, and what all of these share.

use std::sync::Arc;
use std::time::Duration;

use sundara_proto::id::ModelId;
use sundara_proto::names::Topic;
use sundara_proto::wire::limit;
use sundara_runtime::{BuiltinRuntime, RuntimeSet, WasmConfig, WasmRuntime};
use tokio::sync::{mpsc, watch};

use super::{Assembly, Ports, StartError};
use crate::domain::schedule::MinerProfile;
use crate::net::RequestKind;
use crate::service::{Tasks, Workers};
use crate::services::adverts::{self, AdvertsHandle, AdvertsParts};
use crate::services::audit::{self, AuditParts};
use crate::services::batches::{self, BatchesParts};
use crate::services::dispatch::{self, DispatchHandle, DispatchParts};
use crate::services::executor::{self, ExecutorParts, attached};
use crate::services::executors::{self, ExecutorsHandle, ExecutorsParts};
use crate::services::intake::{self, IntakeParts};
use crate::services::miner::{self, MinerHandle, MinerParts};
use crate::services::registry::RegistryHandle;
use crate::services::scores::{self, ScoresHandle, ScoresParts};
use crate::services::work::ExecutorHandle;
use crate::services::work::certs::{self, CertSlot};
use crate::services::work::pool::{Pool, PoolParts};
use crate::services::{ADMITTED_QUEUED_MAX, Convicted, EntrySender, entries};

/// Audits that wait for the validator's own executors.
const AUDITS_QUEUED_MAX: usize = 1_024;
/// What the audit service tells dispatch.
const AUDIT_NEWS_QUEUED_MAX: usize = 256;
/// Adverts on their way to the job machine.
const MINERS_QUEUED_MAX: usize = 1_024;

/// How often it is looked at which models are here. A validator only prefers miners by it.
const MODELS_LOOKED_AT_EVERY: Duration = Duration::from_secs(15);

/// Handles of what was started.
#[derive(Default)]
pub(crate) struct Work {
    pub(crate) adverts: Option<AdvertsHandle>,
    pub(crate) dispatch: Option<DispatchHandle>,
    pub(crate) scores: Option<ScoresHandle>,
    pub(crate) miner: Option<MinerHandle>,
    pub(crate) executors: Option<ExecutorsHandle>,
    pub(crate) attached: Option<attached::AttachedHandle>,
    pub(crate) pool: Option<Pool>,
}

impl Work {
    /// Takes nothing new and waits until nothing runs.
    pub(super) async fn drain(&self) {
        if let Some(attached) = &self.attached {
            attached.drain().await;
        }
        if let Some(miner) = &self.miner {
            miner.drain().await;
        }
        if let Some(dispatch) = &self.dispatch {
            dispatch.drain().await;
        }
    }
}

impl Assembly {
    /// Starts what the roles add to a light node.
    pub(super) async fn work(
        &self,
        ports: &Ports,
        convicted: mpsc::Receiver<Convicted>,
        tasks: &Tasks,
    ) -> Result<Work, StartError> {
        let data = |e: &dyn std::fmt::Display| StartError::Data(e.to_string());
        let mut work = Work::default();
        if self.bundle.executor {
            work.attached = Some(self.attached(ports, tasks)?);
        }
        if !(self.bundle.miner || self.bundle.validator) {
            return Ok(work);
        }
        let pool = self.pool(ports, tasks)?;
        let executors = ExecutorsParts {
            network: self.network,
            key: self.hotkey.clone(),
            net: ports.net.clone(),
            store: ports.store.clone(),
            pool: pool.clone(),
            tasks: tasks.child("executors"),
        };
        work.executors = Some(executors::start(executors).map_err(|e| data(&e))?);
        let (entries_tx, entries_rx) = entries(&ports.store).map_err(|e| data(&e))?;
        batches::start(BatchesParts {
            config: self.config.batches.clone(),
            network: self.network,
            epoch_length: self.config.network.epoch_ms,
            key: self.hotkey.clone(),
            net: ports.net.clone(),
            store: ports.store.clone(),
            entries: entries_rx,
            requests: ports.net.serve(&[RequestKind::Page]),
            tasks: tasks.child("batches"),
        })
        .map_err(|e| data(&e))?;
        let (miners_tx, miners_rx) = mpsc::channel(MINERS_QUEUED_MAX);
        if self.bundle.validator {
            let feeds = (miners_rx, convicted);
            let dispatch = self.validator(ports, tasks, &pool, entries_tx.clone(), feeds).await?;
            work.dispatch = Some(dispatch);
            let parts = ScoresParts {
                config: self.config.scores.clone(),
                network: self.network,
                epoch_length: self.config.network.epoch_ms,
                net: ports.net.clone(),
                directory: ports.directory.clone(),
                store: ports.store.clone(),
                validators: self.config.jobs.trusted_validators.clone(),
                tasks: tasks.child("scores"),
            };
            work.scores = Some(scores::start(parts).await.map_err(|e| data(&e))?);
        }
        if self.bundle.miner {
            work.miner = Some(self.miner(ports, tasks, &pool, entries_tx)?);
        }
        work.adverts = Some(
            adverts::start(AdvertsParts {
                network: self.network,
                key: self.hotkey.clone(),
                net: ports.net.clone(),
                offering: self.bundle.miner.then(|| pool.offering()),
                models: models_here(&ports.registry, tasks),
                miners: self.bundle.validator.then_some(miners_tx),
                tasks: tasks.child("adverts"),
            })
            .await,
        );
        work.pool = Some(pool);
        Ok(work)
    }

    fn runtime(&self) -> Result<RuntimeSet, StartError> {
        let wasm = WasmConfig {
            workers: self.config.executor.slots() as usize,
            cache_dir: self.data_dir.as_ref().map(|dir| dir.join("wasm")),
            ..WasmConfig::default()
        };
        let wasm = WasmRuntime::new(wasm).map_err(|e| StartError::Data(format!("wasm engine: {e}")))?;
        Ok(RuntimeSet::new().with(Arc::new(wasm)).with(Arc::new(BuiltinRuntime::new())))
    }

    fn executor(&self, ports: &Ports, cert: CertSlot, tasks: &Tasks) -> Result<ExecutorHandle, StartError> {
        let parts = ExecutorParts {
            config: self.config.executor.clone(),
            network: self.network,
            key: self.node_key.clone(),
            cert,
            runtime: self.runtime()?,
            registry: ports.registry.clone(),
            blobs: ports.blobs.clone(),
            transfer: ports.transfer.clone(),
            scratch: self.blobs_dir().with_file_name("scratch"),
            misbehaviour: self.misbehaviour,
            tasks: tasks.child("executor"),
        };
        executor::start(parts).map_err(|e| StartError::Data(format!("executor: {e}")))
    }

    /// The executors that this node owns, with the one inside it.
    fn pool(&self, ports: &Ports, tasks: &Tasks) -> Result<Pool, StartError> {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let pool = Pool::new(PoolParts {
            config: self.config.pool.clone(),
            network: self.network,
            owner: self.hotkey.hotkey(),
            net: ports.net.clone(),
            blobs: ports.blobs.clone(),
            transfer: ports.transfer.clone(),
            workers: Workers::new("pool", cores),
            tasks: tasks.child("pool"),
        });
        let node = self.node_key.node_id();
        let class = &self.config.executor.hardware_class;
        let cert = certs::keep_own(self.network, self.hotkey.clone(), node, class, &tasks.child("executor"));
        let handle = self.executor(ports, cert, tasks)?;
        pool.add_in_process(node, handle);
        Ok(pool)
    }

    fn attached(&self, ports: &Ports, tasks: &Tasks) -> Result<attached::AttachedHandle, StartError> {
        let invite = self.invite.clone().ok_or_else(|| {
            let reason = "an executor needs its owner's invitation: --role executor --miner ADDR --invite FILE";
            StartError::Config(reason.to_owned())
        })?;
        let (cert_tx, cert) = watch::channel(None);
        let executor = self.executor(ports, cert, tasks)?;
        Ok(attached::start(attached::AttachedParts {
            network: self.network,
            invite,
            addresses: self.owner_addresses.clone(),
            net: ports.net.clone(),
            store: ports.store.clone(),
            blobs: ports.blobs.clone(),
            executor,
            cert: cert_tx,
            tasks: tasks.child("attached"),
        }))
    }

    fn miner(
        &self,
        ports: &Ports,
        tasks: &Tasks,
        pool: &Pool,
        entries: EntrySender,
    ) -> Result<MinerHandle, StartError> {
        let parts = MinerParts {
            config: self.config.miner.clone(),
            network: self.network,
            key: self.hotkey.clone(),
            net: ports.net.clone(),
            store: ports.store.clone(),
            blobs: ports.blobs.clone(),
            registry: ports.registry.clone(),
            pool: pool.clone(),
            limits: self.config.executor.limits,
            workers: Workers::new("miner", std::thread::available_parallelism().map_or(2, usize::from)),
            entries,
            data_dir: self.blobs_dir(),
            misbehaviour: self.misbehaviour,
            tasks: tasks.child("miner"),
        };
        miner::start(parts).map_err(|e| StartError::Data(e.to_string()))
    }

    async fn validator(
        &self,
        ports: &Ports,
        tasks: &Tasks,
        pool: &Pool,
        entries: EntrySender,
        (miners, convicted): (mpsc::Receiver<MinerProfile>, mpsc::Receiver<Convicted>),
    ) -> Result<DispatchHandle, StartError> {
        let data = |e: &dyn std::fmt::Display| StartError::Data(e.to_string());
        let epochs = audit::epochs(&ports.store, self.config.network.epoch_ms).await.map_err(|e| data(&e))?;
        let (orders_tx, orders) = mpsc::channel(AUDITS_QUEUED_MAX);
        let (news, audit_news) = mpsc::channel(AUDIT_NEWS_QUEUED_MAX);
        let (admitted_tx, admitted) = mpsc::channel(ADMITTED_QUEUED_MAX);
        let dispatch = dispatch::start(DispatchParts {
            config: self.config.dispatch.clone(),
            network: self.network,
            key: self.hotkey.clone(),
            incentive: self.config.network.incentive.unwrap_or_else(crate::domain::score::builtin_incentive),
            net: ports.net.clone(),
            directory: ports.directory.clone(),
            store: ports.store.clone(),
            blobs: ports.blobs.clone(),
            transfer: ports.transfer.clone(),
            entries,
            admitted,
            audits: orders_tx,
            audit_news,
            miners,
            convicted,
            epoch: epochs.current(),
            tasks: tasks.child("dispatch"),
        })
        .map_err(|e| data(&e))?;
        audit::start(
            AuditParts {
                network: self.network,
                epoch_length: self.config.network.epoch_ms,
                key: self.hotkey.clone(),
                net: ports.net.clone(),
                store: ports.store.clone(),
                pool: pool.clone(),
                orders,
                news,
                tasks: tasks.child("audit"),
            },
            epochs,
        );
        intake::start(IntakeParts {
            config: self.config.intake.clone(),
            network: self.network,
            net: ports.net.clone(),
            registry: ports.registry.clone(),
            transfer: ports.transfer.clone(),
            blobs: ports.blobs.clone(),
            directory: ports.directory.clone(),
            validators: self.config.jobs.trusted_validators.clone(),
            requests: ports.net.serve(&[RequestKind::Submit, RequestKind::Watch, RequestKind::Cancel]),
            announced: ports.net.subscribe(Topic::Jobs).await,
            admitted: admitted_tx,
            tasks: tasks.child("intake"),
        });
        Ok(dispatch)
    }
}

/// Models whose blobs are all here, looked at every now and then: eviction and removal show too.
fn models_here(registry: &RegistryHandle, tasks: &Tasks) -> watch::Receiver<Vec<ModelId>> {
    let (tx, rx) = watch::channel(Vec::new());
    let (registry, token) = (registry.clone(), tasks.token());
    tasks.spawn("models-here", async move {
        let mut every = tokio::time::interval(MODELS_LOOKED_AT_EVERY);
        loop {
            tokio::select! {
                () = token.cancelled() => return,
                _ = every.tick() => {}
            }
            match registry.list().await {
                Ok(models) => {
                    let here: Vec<ModelId> =
                        models.iter().filter(|m| m.local).map(|m| m.model).take(limit::ADVERT_ITEMS).collect();
                    tx.send_if_modified(|old| {
                        let changed = *old != here;
                        *old = here;
                        changed
                    });
                }
                Err(e) => tracing::warn!(error = %e, "models cannot be listed"),
            }
        }
    });
    rx
}
