//! Drives one job from the requester's side: finds a validator that takes it, follows it, goes on to the next when one
//! falls silent, and believes only a verdict of a trusted validator over this very job.
//!
//! ```text
//! candidates in owner order ──submit──▶ acknowledged ─▶ started ─▶ output* ─▶ verdict
//!        ▲        │ no answer, refused (retryable), connection lost
//!        └────────┴── next candidate; after the last, wait a little and begin again, until not_after
//! ```
//!
//! Where no candidate is connected, the request goes on gossip, for whichever validator hears of it. So does an announced
//! one, at once; its validators are then only asked whether they have it (`watch`), never to begin it, and the first that
//! has it is followed like any other.
//!
//! Submitting twice is harmless: the job's id is the digest of what was signed, so a validator that knows it attaches the
//! requester to the same job.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use sundara_proto::crypto::Signed;
use sundara_proto::id::{BlobId, Hotkey, NodeId};
use sundara_proto::pb;
use sundara_proto::rules::select;
use sundara_proto::verdict::{Verdict, VerdictKind};

use super::track::Tracked;
use super::{Inner, wall_now};
use crate::api::jobs::{JobEvent, JobFailure, JobResult};

/// A validator answers a submission by persisting and acknowledging it; one that takes longer is passed over.
const ACKNOWLEDGE_WITHIN: Duration = Duration::from_secs(5);
/// Pause before all candidates are asked again; doubles up to [`ROUND_PAUSE_MAX`].
const ROUND_PAUSE: Duration = Duration::from_millis(100);
const ROUND_PAUSE_MAX: Duration = Duration::from_secs(5);
/// A request that nobody has taken is announced again this often; gossip forgets what it has seen after a minute.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(90);
/// A validator that says nothing for the job's wall limit and this much more is passed over: it covers queueing,
/// offers, image start and an audit of the same length.
const SILENCE_MARGIN: Duration = Duration::from_secs(60);

/// How one candidate left it.
enum Turn {
    /// Ask the next one; why.
    Next(String),
    /// No validator will take it.
    Refused(String),
}

/// Runs to the job's end.
pub(super) async fn drive(inner: Arc<Inner>, job: Arc<Tracked>) {
    let left = wall_now().until(job.spec.not_after);
    let end = tokio::select! {
        () = job.cancelled.cancelled() => JobEvent::Failed(JobFailure::Cancelled),
        () = inner.tasks.token().cancelled_owned() => JobEvent::Failed(JobFailure::ShutDown),
        end = rounds(&inner, &job) => end,
        // A verdict may come as late as the deadline itself; a little more lets it travel.
        () = tokio::time::sleep(left + ACKNOWLEDGE_WITHIN) => {
            JobEvent::Failed(JobFailure::Expired(inner.why_waiting()))
        }
    };
    inner.ended(&job, end);
}

async fn rounds(inner: &Arc<Inner>, job: &Arc<Tracked>) -> JobEvent {
    let mut pause = ROUND_PAUSE;
    let mut silent_owner: Option<Hotkey> = None;
    let mut announced: Option<Instant> = None;
    loop {
        let mut last = None;
        let candidates = candidates(inner, job, silent_owner);
        if (job.announced || candidates.is_empty()) && announced.is_none_or(|at| at.elapsed() >= ANNOUNCE_EVERY) {
            match inner.announce(job).await {
                Ok(()) => announced = Some(Instant::now()),
                Err(reason) => last = Some(format!("cannot be announced: {reason}")),
            }
        }
        for (validator, node) in candidates {
            if job.announced && !has(inner, job, node).await {
                continue;
            }
            match ask(inner, job, validator, node).await {
                Ok(event) => return event,
                Err(Turn::Refused(reason)) => return JobEvent::Failed(JobFailure::Refused(reason)),
                Err(Turn::Next(reason)) => {
                    tracing::debug!(job = %job.id(), %validator, %reason, "next validator");
                    silent_owner = Some(validator);
                    last = Some(format!("{validator}: {reason}"));
                }
            }
        }
        if last.is_none() && announced.is_some() {
            last = Some("it was announced, and no validator that is connected has taken it".to_owned());
        }
        inner.note_waiting(last);
        inner.directory_changed(pause).await;
        pause = (pause * 2).min(ROUND_PAUSE_MAX);
    }
}

/// Whether a validator says that it has the job.
async fn has(inner: &Inner, job: &Tracked, node: NodeId) -> bool {
    let request = pb::request::Kind::Watch(pb::WatchJob { job: job.id().into() });
    let answer = tokio::time::timeout(ACKNOWLEDGE_WITHIN, inner.net.request_one(node, request)).await;
    // The first answer says it; dropping the rest ends the watch.
    let Ok(Ok(pb::response::Kind::Job(pb::JobEvent { kind: Some(event) }))) = answer else { return false };
    matches!(event, pb::job_event::Kind::Acknowledged(_))
}

/// Trusted validators that can be reached, in the job's owner order; one that just fell silent goes last.
fn candidates(inner: &Inner, job: &Tracked, silent: Option<Hotkey>) -> Vec<(Hotkey, NodeId)> {
    let view = inner.directory.snapshot();
    let reachable = &view.validators;
    // Stakes are equal until the ledger says otherwise.
    let trusted: Vec<(Hotkey, u64)> =
        reachable.keys().filter(|h| inner.config.trusted_validators.contains(h)).map(|h| (*h, 1)).collect();
    let mut order = select::owner_order(&job.id(), &trusted);
    if let Some(silent) = silent
        && order.len() > 1
        && order[0] == silent
    {
        order.rotate_left(1);
    }
    order.into_iter().filter_map(|h| reachable.get(&h).map(|node| (h, *node))).collect()
}

async fn ask(inner: &Arc<Inner>, job: &Arc<Tracked>, validator: Hotkey, node: NodeId) -> Result<JobEvent, Turn> {
    let request = pb::request::Kind::Submit(pb::JobRequest {
        spec: Some(job.spec.to_wire()),
        inline_input: job.inline_input.clone(),
        announce: false,
    });
    let mut responses = inner.net.request(node, request).await.map_err(|e| Turn::Next(e.to_string()))?;
    let silence = job.spec.limits.wall() + SILENCE_MARGIN;
    let mut wait = ACKNOWLEDGE_WITHIN;
    loop {
        let next = tokio::time::timeout(wait, responses.next()).await;
        let response = match next {
            Err(_) => return Err(Turn::Next(format!("no answer for {} s", wait.as_secs()))),
            Ok(None) => return Err(Turn::Next("ended the answer without a verdict".to_owned())),
            Ok(Some(Err(e))) => return Err(Turn::Next(e.to_string())),
            Ok(Some(Ok(response))) => response,
        };
        let pb::response::Kind::Job(pb::JobEvent { kind: Some(event) }) = response else {
            return Err(Turn::Next("answered with something else".to_owned()));
        };
        match event {
            pb::job_event::Kind::Acknowledged(a) => {
                wait = silence;
                job.push(JobEvent::Acknowledged { validator, rank: a.rank });
            }
            pb::job_event::Kind::Started(s) => job.push(JobEvent::Started { attempt: s.attempt }),
            pb::job_event::Kind::Output(o) => {
                job.push(JobEvent::Output { attempt: o.attempt, offset: o.offset, data: o.data });
            }
            pb::job_event::Kind::Refused(r) if r.retryable => return Err(Turn::Next(r.reason)),
            pb::job_event::Kind::Refused(r) => return Err(Turn::Refused(r.reason)),
            pb::job_event::Kind::Finished(f) => return finished(inner, job, validator, f).map_err(Turn::Next),
        }
    }
}

/// Believes a verdict, or says why not.
fn finished(inner: &Inner, job: &Tracked, validator: Hotkey, f: pb::Finished) -> Result<JobEvent, String> {
    let raw = f.verdict.ok_or("sent no verdict")?;
    let verdict = Signed::<Verdict>::verify(&inner.network, raw).map_err(|e| format!("verdict: {e}"))?;
    if verdict.validator() != validator {
        return Err("verdict is signed by another validator".to_owned());
    }
    if verdict.job != job.id() {
        return Err("verdict is of another job".to_owned());
    }
    match &verdict.kind {
        VerdictKind::Rejected(reason) => return Ok(JobEvent::Failed(JobFailure::Rejected(reason.clone()))),
        VerdictKind::Failed(reason) => return Ok(JobEvent::Failed(JobFailure::Failed(reason.clone()))),
        VerdictKind::Quorum(_) | VerdictKind::Audited | VerdictKind::Unaudited => {}
    }
    let output = checked_output(&verdict, f.inline_output)?;
    Ok(JobEvent::Finished(Arc::new(JobResult {
        network: inner.network,
        spec: job.spec.clone(),
        verdict,
        attestations: f.attestations,
        output,
        latency: job.submitted.elapsed(),
    })))
}

fn checked_output(verdict: &Verdict, inline: Option<Bytes>) -> Result<Option<Bytes>, String> {
    match inline {
        Some(bytes) if BlobId::of(&bytes) == verdict.output => Ok(Some(bytes)),
        Some(_) => Err("output does not match the verdict's digest".to_owned()),
        None if verdict.output_len.0 == 0 => Ok(Some(Bytes::new())),
        None => Ok(None),
    }
}
