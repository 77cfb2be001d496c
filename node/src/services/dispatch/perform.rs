//! Performs what the machine says: writes, messages, offers, audits, timers.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use sundara_proto::batch::FraudProof;
use sundara_proto::crypto::Signed;
use sundara_proto::id::{BlobId, Hotkey, JobId};
use sundara_proto::names::Topic;
use sundara_proto::pb;
use sundara_proto::verdict::{Verdict, VerdictKind};
use tokio_util::sync::CancellationToken;

use super::{Caught, Dispatch, JOBS, MINERS, clean_key, offer};
use crate::domain::job::{CleanRecord, Evidence, Input, JobRecord, Offence, Output, Part, Ruling};
use crate::services::casebook::StoredCase;
use crate::services::{AuditOrder, Staged, Watcher};
use crate::store::{Keyspace, StoreError, WriteBatch};

/// Caught miners listed in the status.
const CAUGHT_LISTED_MAX: usize = 64;
/// Pause before a verdict that could not be written is written again.
const REWRITE_AFTER: Duration = Duration::from_secs(1);

/// What waits for a commit.
#[derive(Default)]
pub(crate) struct Deferred {
    /// Messages to requesters, and the like.
    outputs: Vec<Output>,
    /// Jobs whose first record is in the commit: they are refused when it fails.
    begun: Vec<JobId>,
    /// Finished jobs: their watchers are told.
    finished: Vec<Told>,
    /// Entries for the next page.
    staged: Vec<Staged>,
    /// What was to be written, for another try where it must not be given up.
    rewrite: Option<WriteBatch>,
}

/// A verdict, and who is told.
struct Told {
    job: JobId,
    event: pb::job_event::Kind,
}

impl Dispatch {
    /// Performs outputs in order. Those that a crash must not take back wait for the commit of what is written here.
    pub(super) fn perform(&mut self, outputs: Vec<Output>) {
        let mut batch = WriteBatch::new();
        let mut relaxed = WriteBatch::new();
        let mut deferred = Deferred::default();
        for output in outputs {
            match output {
                Output::Persist { job, record } => self.write_job(&mut batch, &mut deferred, job, &record),
                Output::Finish(ruling) => self.finish(&mut batch, &mut deferred, *ruling),
                Output::RecordEvidence(evidence) => self.evidence(&mut batch, &evidence),
                Output::PersistMiner(record) => MINERS.put(&mut relaxed, record.miner.clone(), &record),
                Output::PersistClean(clean) => {
                    relaxed.put(Keyspace::Scores, clean_key(&clean), clean.clean.to_be_bytes().to_vec());
                }
                Output::Forget { job } => self.forget(&mut relaxed, job),
                output if output.needs_persist() && !batch.is_empty() => deferred.outputs.push(output),
                output => self.act(output),
            }
        }
        if !relaxed.is_empty() {
            drop(self.store.commit_relaxed(relaxed));
        }
        if !batch.is_empty() {
            self.commit(batch, deferred);
        }
    }

    fn commit(&mut self, batch: WriteBatch, mut deferred: Deferred) {
        if !deferred.finished.is_empty() {
            deferred.rewrite = Some(batch.clone());
        }
        let pending = self.store.commit(batch);
        self.commits.push(Box::pin(async move { (pending.await.map(drop), deferred) }));
    }

    pub(super) fn on_committed(&mut self, result: Result<(), StoreError>, deferred: Deferred) {
        if let Err(e) = result {
            self.on_commit_failed(&e, deferred);
            return;
        }
        for job in &deferred.begun {
            self.live.input_durable(job);
        }
        for output in deferred.outputs {
            self.act(output);
        }
        for told in deferred.finished {
            if let Some(live) = self.live.remove(&told.job) {
                live.tell(&told.event);
                if !live.has_inline_input {
                    self.let_go(live.spec.input);
                }
            }
        }
        for staged in deferred.staged {
            self.entries.send(staged);
        }
    }

    fn on_commit_failed(&mut self, error: &StoreError, mut deferred: Deferred) {
        tracing::error!(%error, "dispatch could not write");
        for job in std::mem::take(&mut deferred.begun) {
            // Nothing was acknowledged. The requester asks another validator; the machine lets go of the job.
            let refused = pb::Refused { reason: format!("store: {error}"), retryable: true };
            if let Some(live) = self.live.get(&job) {
                live.tell(&pb::job_event::Kind::Refused(refused));
            }
            self.take(Input::Cancelled { job });
        }
        // An acknowledged job must end: its verdict is written again until it is durable or the node stops. A job that is
        // stopped so begins anew at the next start.
        if let Some(batch) = deferred.rewrite.take() {
            let store = self.store.clone();
            let again = batch.clone();
            self.commits.push(Box::pin(async move {
                tokio::time::sleep(REWRITE_AFTER).await;
                let result = store.commit(again).await.map(drop);
                deferred.rewrite = Some(batch);
                (result, deferred)
            }));
        }
    }

    fn write_job(&mut self, batch: &mut WriteBatch, deferred: &mut Deferred, job: JobId, record: &JobRecord) {
        JOBS.put(batch, job.0.to_vec(), record);
        if let Some(live) = self.live.get_mut(&job)
            && !live.input_kept
        {
            live.input_kept = true;
            deferred.begun.push(job);
            if let Some(input) = live.inline_input(&self.store) {
                batch.put(Keyspace::Inputs, job.0.to_vec(), input);
            }
        }
    }

    fn finish(&mut self, batch: &mut WriteBatch, deferred: &mut Deferred, ruling: Ruling) {
        let job = ruling.verdict.job;
        self.count(&ruling.verdict);
        let verdict = Signed::sign(&self.network, &self.key, ruling.verdict);
        let inline_output =
            self.live.get(&job).filter(|_| verdict.kind.is_verified()).and_then(|live| live.output(&verdict.output));
        let finished = pb::Finished {
            verdict: Some(verdict.to_wire()),
            attestations: ruling.attestations.iter().map(|a| a.to_raw()).collect(),
            inline_output,
        };
        JOBS.put(batch, job.0.to_vec(), &ruling.record);
        batch.put(Keyspace::Verdicts, job.0.to_vec(), finished.encode_to_vec());
        batch.delete(Keyspace::Inputs, job.0.to_vec());
        let attestations = finished.attestations.iter().cloned().map(pb::entry::Kind::Attestation);
        let entries = attestations.chain([pb::entry::Kind::Verdict(verdict.to_wire())]);
        for kind in entries {
            deferred.staged.push(self.entries.stage(batch, pb::Entry { kind: Some(kind) }));
        }
        deferred.finished.push(Told { job, event: pb::job_event::Kind::Finished(finished) });
    }

    /// Deletes what is kept of a job, its output blob included.
    fn forget(&self, batch: &mut WriteBatch, job: JobId) {
        if let Some(pb::job_event::Kind::Finished(finished)) = self.stored_verdict(&job)
            && finished.inline_output.is_none()
            && let Some(raw) = finished.verdict
            && let Ok(verdict) = Signed::<Verdict>::trusted(raw)
            && verdict.output_len.0 > 0
        {
            self.let_go(verdict.output);
        }
        for keyspace in [Keyspace::Jobs, Keyspace::Verdicts, Keyspace::Inputs] {
            batch.delete(keyspace, job.0.to_vec());
        }
    }

    /// Takes back one use of a private blob.
    fn let_go(&self, blob: BlobId) {
        let blobs = self.blobs.clone();
        self.tasks.spawn("let-go", async move {
            if let Err(e) = blobs.remove(blob).await {
                tracing::debug!(%blob, error = %e, "blob not removed");
            }
        });
    }

    fn count(&self, verdict: &Verdict) {
        let kind = match verdict.kind {
            VerdictKind::Quorum(_) => 0,
            VerdictKind::Audited => 1,
            VerdictKind::Unaudited => 2,
            VerdictKind::Rejected(_) => 3,
            VerdictKind::Failed(_) => 4,
        };
        self.status.send_modify(|s| s.verdicts[kind] += 1);
    }

    /// Outputs that touch no disk.
    fn act(&mut self, output: Output) {
        match output {
            Output::Acknowledge { job, rank } => self.tell(&job, acknowledged(rank)),
            Output::Attach { job, rank, attempt } => {
                self.tell(&job, acknowledged(rank));
                if let Some(attempt) = attempt {
                    self.tell(&job, pb::job_event::Kind::Started(pb::Started { attempt }));
                }
            }
            Output::Replay { job } => self.replay(job),
            Output::Refuse { job, reason, retryable } => {
                if let Some(live) = self.live.remove(&job) {
                    live.tell(&pb::job_event::Kind::Refused(pb::Refused { reason, retryable }));
                }
            }
            Output::SendOffer { part, node, commit_reveal, stream, env_id: _, deadline } => {
                self.send_offer(part, node, commit_reveal, stream, deadline);
            }
            Output::SendReveal { part, node } => self.send_reveal(part, node),
            Output::SendAbandon { part, node, reason } => self.send_abandon(part, node, reason),
            Output::RequestAudit { job, attempt, engine, env_id: _, deadline } => {
                self.request_audit(job, attempt, engine, deadline);
            }
            Output::AbandonAudit { job } => {
                if let Some(audit) = self.live.get_mut(&job).and_then(|live| live.audit.take()) {
                    audit.cancel();
                }
            }
            Output::Started { job, attempt } => {
                self.tell(&job, pb::job_event::Kind::Started(pb::Started { attempt }));
            }
            Output::ForwardOutput { job, attempt, offset, data } => {
                self.tell(&job, pb::job_event::Kind::Output(pb::Output { attempt, offset, data }));
            }
            Output::DropMiner { miner, reason, until } => self.dropped(miner, reason, until),
            Output::SetTimer { at } => self.timer = Some(self.begun + at),
            // Written in `perform`, which never passes them here.
            Output::Persist { .. }
            | Output::Finish(_)
            | Output::RecordEvidence(_)
            | Output::PersistMiner(_)
            | Output::PersistClean(_)
            | Output::Forget { .. } => tracing::error!("a write reached act"),
        }
    }

    fn tell(&mut self, job: &JobId, event: pb::job_event::Kind) {
        if let Some(live) = self.live.get_mut(job) {
            live.progress(event);
        }
    }

    /// Answers from the store whoever asked for a job that has its verdict.
    fn replay(&mut self, job: JobId) {
        let Some(live) = self.live.remove(&job) else { return };
        let event = self.stored_verdict(&job).unwrap_or_else(|| {
            let reason = "the verdict of this job is kept no longer".to_owned();
            pb::job_event::Kind::Refused(pb::Refused { reason, retryable: false })
        });
        live.tell(&event);
    }

    fn stored_verdict(&self, job: &JobId) -> Option<pb::job_event::Kind> {
        let stored = self.store.get(Keyspace::Verdicts, job.as_ref());
        let finished = stored.inspect_err(|e| tracing::error!(%job, error = %e, "verdict cannot be read")).ok()??;
        pb::Finished::decode(finished).ok().map(pb::job_event::Kind::Finished)
    }

    /// A requester that comes back, or another validator that wonders whether the job is taken.
    pub(super) fn on_watch(&mut self, job: JobId, asker: Hotkey, watcher: Watcher) {
        let unknown = || pb::Refused { reason: "job is not known here".to_owned(), retryable: true };
        if let Some(live) = self.live.get(&job) {
            let mine = live.spec.requester() == asker;
            super::live::tell(&watcher, acknowledged(0));
            if mine {
                self.live.watch(&job, watcher);
            }
            return;
        }
        // A finished job's record no longer says whose it was; whoever knows its id may learn that it is over, and only
        // through a new submission, which carries the requester's signature, what came of it.
        let known = self.store.get(Keyspace::Jobs, job.as_ref()).ok().flatten().is_some();
        let event = if known { acknowledged(0) } else { pb::job_event::Kind::Refused(unknown()) };
        super::live::tell(&watcher, event);
    }

    fn send_offer(
        &mut self,
        part: Part,
        node: sundara_proto::id::NodeId,
        commit_reveal: bool,
        stream: bool,
        deadline: Duration,
    ) {
        let Some(live) = self.live.get_mut(&part.job) else { return };
        let inline_input = live.inline_input(&self.store);
        if live.has_inline_input && inline_input.is_none() {
            let reason = "input is gone from the store".to_owned();
            self.queue(Input::Undelivered { part, reason });
            return;
        }
        let order = offer::Order {
            part,
            node,
            request: pb::Offer {
                spec: Some(live.spec.to_wire()),
                attempt: part.attempt,
                commit_reveal,
                stream,
                inline_input,
                deadline_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
                validator: self.key.hotkey().into(),
            },
            input: (!live.has_inline_input).then_some(live.spec.input),
            requester: live.spec.requester(),
            deadline,
        };
        let cut = live.offered(part);
        let courier = self.courier();
        self.tasks.spawn("offer", courier.offer(order, cut));
    }

    fn courier(&self) -> offer::Courier {
        offer::Courier {
            network: self.network,
            net: self.net.clone(),
            blobs: self.blobs.clone(),
            transfer: self.transfer.clone(),
            certs: Arc::clone(&self.certs),
            inputs: self.inputs.clone(),
        }
    }

    fn send_reveal(&mut self, part: Part, node: sundara_proto::id::NodeId) {
        let Some(live) = self.live.get_mut(&part.job) else { return };
        let requester = live.spec.requester();
        let cut = live.cut(part);
        let courier = self.courier();
        let within = Duration::from_millis(self.config.reveal_ms);
        self.tasks.spawn("reveal", courier.reveal(part, node, requester, within, cut));
    }

    fn send_abandon(&mut self, part: Part, node: sundara_proto::id::NodeId, reason: String) {
        if let Some(live) = self.live.get_mut(&part.job) {
            live.cut(part).cancel();
        }
        let net = self.net.clone();
        let request = pb::request::Kind::Abandon(pb::Abandon { job: part.job.into(), attempt: part.attempt, reason });
        self.tasks.spawn("abandon", async move {
            if let Err(e) = net.request_one(node, request).await {
                tracing::debug!(job = %part.job, miner = %part.miner, error = %e, "abandon not delivered");
            }
        });
    }

    fn request_audit(&mut self, job: JobId, attempt: u32, engine: sundara_proto::id::EngineId, deadline: Duration) {
        let store = self.store.clone();
        let Some(live) = self.live.get_mut(&job) else { return };
        let cancel = CancellationToken::new();
        live.audit = Some(cancel.clone());
        let order = AuditOrder {
            job,
            attempt,
            spec: live.spec.clone(),
            engine,
            inline_input: live.inline_input(&store),
            deadline,
            cancel,
        };
        if self.audits.try_send(order).is_err() {
            let reason = "the validator's own executor has too many audits queued".to_owned();
            let result = crate::domain::job::AuditResult::Failed { reason };
            self.queue(Input::Audited { job, attempt, result });
        }
    }

    /// Hands the machine an input after the one that is being performed.
    fn queue(&self, input: Input) {
        let inputs = self.inputs.clone();
        tokio::spawn(async move {
            // The loop is gone only when the node is.
            let _stopped = inputs.send(super::FromOffer { input, output: None }).await;
        });
    }

    fn dropped(&self, miner: Hotkey, reason: String, until: sundara_proto::units::UnixMillis) {
        tracing::warn!(%miner, %reason, until_ms = until.0, "miner dropped from scheduling");
        let at_ms = crate::service::wall_now().0;
        self.status.send_modify(|s| {
            if s.caught.len() == CAUGHT_LISTED_MAX {
                s.caught.remove(0);
            }
            s.caught.push(Caught { miner, reason, at_ms });
        });
    }

    fn evidence(&self, batch: &mut WriteBatch, evidence: &Evidence) {
        let proof = self.fraud_proof(evidence);
        let stored = StoredCase {
            offence: evidence.offence.name().to_owned(),
            detail: evidence.detail.clone(),
            job: evidence.part.job.into(),
            attempt: evidence.part.attempt,
            at_ms: evidence.at.0,
            attested: evidence.accused.as_ref().map(|a| a.to_raw()),
            reference: evidence.reference.as_ref().map(|r| r.to_wire()),
            commitment: evidence.commitment.map(Bytes::from).unwrap_or_default(),
            proof: proof.as_ref().map(Signed::to_wire),
            accused: evidence.part.miner.into(),
            accuser: self.key.hotkey().into(),
            believed: true,
            statements: Vec::new(),
        };
        stored.record(batch);
        if let Some(proof) = proof {
            let net = self.net.clone();
            self.tasks.spawn("fraud-proof", async move {
                let gossip = pb::Gossip { kind: Some(pb::gossip::Kind::FraudProof(proof.to_wire())) };
                if let Err(e) = net.publish(Topic::Proofs, gossip).await {
                    tracing::debug!(error = %e, "fraud proof not published; it is kept");
                }
            });
        }
    }

    fn fraud_proof(&self, evidence: &Evidence) -> Option<Signed<FraudProof>> {
        if evidence.offence != Offence::WrongResult {
            return None;
        }
        let (accused, reference) = (evidence.accused.as_ref()?, evidence.reference.as_ref()?);
        let spec = self.live.get(&evidence.part.job)?.spec.to_wire();
        let proof =
            FraudProof { network: self.network, spec, accused: accused.to_raw(), reference: reference.to_wire() };
        Some(Signed::sign(&self.network, &self.key, proof))
    }
}

fn acknowledged(rank: u32) -> pb::job_event::Kind {
    pb::job_event::Kind::Acknowledged(pb::Acknowledged { rank })
}

/// A stored count of clean audits, see [`clean_key`].
pub(super) fn clean_from(key: &[u8], value: &[u8]) -> Option<CleanRecord> {
    let (miner, env_id) = key.split_at_checked(32)?;
    Some(CleanRecord {
        miner: Hotkey::try_from(miner).ok()?,
        env_id: env_id.try_into().ok()?,
        clean: u32::from_be_bytes(value.try_into().ok()?),
    })
}
