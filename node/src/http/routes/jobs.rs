//! Routes of jobs.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequest, Path, Request, State};
use axum::http::{StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use prost::Message as _;
use sundara_proto::attestation::Outcome;
use sundara_proto::id::JobId;
use sundara_proto::units::ByteCount;
use sundara_proto::verdict::{Standing, VerdictKind};
use sundara_proto::wire::limit;
use tokio::io::AsyncWriteExt as _;

use super::{JsonBody, Query, Shared, list_limit, media_type};
use crate::api::{JobEvent, JobFailure, JobHandle, JobOrder, JobPhase, JobResult, JobSummary, SubmitError};
use crate::http::error::{ApiError, Code};
use crate::http::types::{EventView, InlineBytes, Items, JobRequest, JobView, Limit, MinerView, ResultView};

/// Time without a byte after which an upload is given up.
const UPLOAD_IDLE: Duration = Duration::from_secs(30);
/// How often a quiet event stream shows that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// `POST /v1/jobs`: JSON with everything, or the input as an octet stream with the rest as the query.
pub(super) async fn submit(State(shared): State<Shared>, request: Request) -> Result<Response, ApiError> {
    let (order, _spooled) = match media_type(&request) {
        Some("application/octet-stream") => upload(&shared, request).await?,
        _ => {
            let JsonBody(body) = JsonBody::<JobRequest>::from_request(request, &()).await?;
            (order(body)?, None)
        }
    };
    let job = shared.node.jobs().submit(order).await.map_err(refused)?;
    let view = view(&job).await;
    let location = format!("/v1/jobs/{}", view.id);
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, location)], Json(view)).into_response())
}

/// An order whose input is the request's body. The file lives until the job has read it.
async fn upload(shared: &Shared, request: Request) -> Result<(JobOrder, Option<tempfile::NamedTempFile>), ApiError> {
    let Query(fields) = Query::<JobRequest>::of(request.uri())?;
    let base = order(fields)?;
    let Ok(_permit) = shared.uploads.try_acquire() else {
        let error = ApiError::new(Code::Busy, "as many inputs are uploaded now as the node takes at once");
        return Err(error.hint("try again, or raise http.uploads_max"));
    };
    let mut body = request.into_body().into_data_stream();
    let mut inline: Vec<u8> = Vec::new();
    let mut spooled: Option<(tempfile::NamedTempFile, tokio::fs::File)> = None;
    let mut total = ByteCount(0);
    loop {
        let next = tokio::time::timeout(UPLOAD_IDLE, body.next()).await;
        let Some(piece) = next.map_err(|_| ApiError::new(Code::Timeout, "no byte of the input came for 30 s"))? else {
            break;
        };
        let piece = piece.map_err(|e| ApiError::new(Code::BadRequest, format!("the input broke off: {e}")))?;
        total.0 += piece.len() as u64;
        if total > limit::INPUT {
            let error = ApiError::new(Code::TooLarge, format!("an input has at most {}", limit::INPUT));
            return Err(error.hint("publish large data as a model, or cut the job into pieces"));
        }
        match &mut spooled {
            None if inline.len() + piece.len() <= limit::INLINE => inline.extend_from_slice(&piece),
            None => {
                let (named, mut file) = spool(shared).await?;
                file.write_all(&inline).await.map_err(spool_error)?;
                file.write_all(&piece).await.map_err(spool_error)?;
                inline = Vec::new();
                spooled = Some((named, file));
            }
            Some((_, file)) => file.write_all(&piece).await.map_err(spool_error)?,
        }
    }
    match spooled {
        None => Ok((base.input(Bytes::from(inline)), None)),
        Some((named, mut file)) => {
            file.flush().await.map_err(spool_error)?;
            Ok((base.input_file(named.path()), Some(named)))
        }
    }
}

async fn spool(shared: &Shared) -> Result<(tempfile::NamedTempFile, tokio::fs::File), ApiError> {
    let dir = shared.spool.clone();
    let made = tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(&dir)?;
        let named = tempfile::Builder::new().prefix("input-").tempfile_in(&dir)?;
        let file = named.reopen()?;
        Ok::<_, std::io::Error>((named, file))
    });
    let (named, file) = made.await.map_err(|e| spool_error(std::io::Error::other(e)))?.map_err(spool_error)?;
    Ok((named, tokio::fs::File::from_std(file)))
}

fn spool_error(error: std::io::Error) -> ApiError {
    ApiError::new(Code::Internal, format!("the input cannot be kept: {error}")).hint("make room in the data directory")
}

/// The order that a request makes.
fn order(request: JobRequest) -> Result<JobOrder, ApiError> {
    let bad = |message: &str| ApiError::new(Code::BadRequest, message.to_owned());
    let mut order = match (&request.model, &request.builtin) {
        (Some(model), None) => JobOrder::model(model),
        (None, Some(name)) => JobOrder::builtin(name),
        _ => return Err(bad("name a `model` or a `builtin`, one of them")),
    };
    if let Some(input) = &request.input {
        order = order.input(input.decode().ok_or_else(|| bad("`input.base64` is not base64 with padding"))?);
    }
    let params = match (&request.params, &request.params_base64) {
        (Some(params), None) => Some(params.clone()),
        (None, Some(text)) => Some(InlineBytes::Base64(text.clone())),
        (None, None) => None,
        _ => return Err(bad("name `params` or `params_base64`, one of them")),
    };
    if let Some(params) = params {
        order = order.params(params.decode().ok_or_else(|| bad("the parameters are not base64 with padding"))?);
    }
    if let Some(entry) = request.entry {
        order = order.entry(entry);
    }
    if let Some(seed) = request.seed {
        order = order.seed(seed);
    }
    if let Some(replicas) = request.replicas {
        order = order.replicas(replicas);
    }
    if let Some(class) = request.hardware_class {
        order = order.hardware_class(class);
    }
    if let Some(seconds) = request.not_after_s {
        order = order.not_after(Duration::from_secs(seconds));
    }
    if let Some(limits) = request.limits {
        order = order.limits(limits);
    }
    Ok(order.stream(request.stream.unwrap_or_default()).announce(request.announce.unwrap_or_default()))
}

fn refused(error: SubmitError) -> ApiError {
    let code = match &error {
        SubmitError::TooMany { .. } => Code::Busy,
        SubmitError::Store(_) => Code::Internal,
        _ => Code::Refused,
    };
    ApiError::new(code, error.to_string())
}

/// `GET /v1/jobs`.
pub(super) async fn list(State(shared): State<Shared>, Query(limit): Query<Limit>) -> Json<Items<JobView>> {
    let jobs = shared.node.jobs().list(list_limit(limit.limit));
    Json(Items { items: jobs.into_iter().map(|summary| summary_view(summary, None)).collect() })
}

/// `GET /v1/jobs/{id}`.
pub(super) async fn show(State(shared): State<Shared>, Path(id): Path<String>) -> Result<Json<JobView>, ApiError> {
    Ok(Json(view(&find(&shared, &id)?).await))
}

/// `DELETE /v1/jobs/{id}`: asks the validator to stop.
pub(super) async fn cancel(State(shared): State<Shared>, Path(id): Path<String>) -> Result<Json<JobView>, ApiError> {
    let job = find(&shared, &id)?;
    job.cancel().await;
    Ok(Json(view(&job).await))
}

/// `GET /v1/jobs/{id}/output`: the verified output.
pub(super) async fn output(State(shared): State<Shared>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let job = ended(&shared, &id)?;
    let bytes = job.output().await.map_err(failed)?;
    let headers = [(header::CONTENT_TYPE, "application/octet-stream"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    Ok((headers, Body::from(bytes)).into_response())
}

/// `GET /v1/jobs/{id}/proof`: what `attestation verify` reads.
pub(super) async fn proof(State(shared): State<Shared>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let result = ended(&shared, &id)?.result().await.map_err(failed)?;
    let headers = [(header::CONTENT_TYPE, "application/octet-stream"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    Ok((headers, Body::from(result.proof().encode_to_vec())).into_response())
}

/// `GET /v1/jobs/{id}/events`: everything that happened and happens to it, until its end.
pub(super) async fn events(
    State(shared): State<Shared>,
    Path(id): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let job = find(&shared, &id)?;
    let events = job.events().take_until(shared.stop.cancelled_owned()).map(|event| {
        let (name, data) = event_view(event);
        let event = Event::default().event(name);
        Ok(event.json_data(&data).unwrap_or_else(|_| Event::default().event("error")))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

fn find(shared: &Shared, id: &str) -> Result<JobHandle, ApiError> {
    let parsed: JobId =
        id.parse().map_err(|_| ApiError::new(Code::BadRequest, "a job's id is 64 hexadecimal digits"))?;
    shared.node.jobs().get(parsed).ok_or_else(|| ApiError::not_found("job", parsed))
}

fn ended(shared: &Shared, id: &str) -> Result<JobHandle, ApiError> {
    let job = find(shared, id)?;
    match job.summary().phase {
        JobPhase::Finished | JobPhase::Failed => Ok(job),
        _ => {
            let error = ApiError::new(Code::Conflict, "the job has not ended");
            Err(error.hint(format!("follow it at /v1/jobs/{id}/events")))
        }
    }
}

fn failed(failure: JobFailure) -> ApiError {
    ApiError::new(Code::JobFailed, failure.to_string())
}

async fn view(job: &JobHandle) -> JobView {
    let summary = job.summary();
    let result = match summary.phase {
        JobPhase::Finished => job.result().await.ok(),
        _ => None,
    };
    summary_view(summary, result.as_deref())
}

fn summary_view(summary: JobSummary, result: Option<&JobResult>) -> JobView {
    let phase = match summary.phase {
        JobPhase::Submitting => "submitting",
        JobPhase::Acknowledged => "acknowledged",
        JobPhase::Running => "running",
        JobPhase::Finished => "finished",
        JobPhase::Failed => "failed",
    };
    JobView {
        id: summary.id,
        program: summary.program,
        phase: phase.to_owned(),
        submitted_at_ms: summary.submitted_at.0,
        detail: summary.detail,
        result: result.map(result_view),
    }
}

fn result_view(result: &JobResult) -> ResultView {
    let verdict = &result.verdict;
    let miners = verdict.replicas.iter().map(|replica| MinerView {
        hotkey: replica.miner,
        standing: standing(replica.standing).to_owned(),
        latency_us: replica.latency_us,
    });
    ResultView {
        job: verdict.job,
        verdict: kind(&verdict.kind),
        outcome: verdict.outcome.map(outcome).unwrap_or_default(),
        output: verdict.output,
        output_bytes: verdict.output_len.0,
        env_id: verdict.env_id,
        validator: verdict.validator(),
        attempt: verdict.attempt,
        miners: miners.collect(),
        latency_ms: result.latency.as_secs_f64() * 1_000.0,
    }
}

fn event_view(event: JobEvent) -> (&'static str, EventView) {
    match event {
        JobEvent::Acknowledged { validator, rank } => ("acknowledged", EventView::Acknowledged { validator, rank }),
        JobEvent::Started { attempt } => ("started", EventView::Started { attempt }),
        JobEvent::Output { attempt, offset, data } => {
            let text = std::str::from_utf8(&data).ok().map(str::to_owned);
            ("output", EventView::Output { attempt, offset, base64: BASE64.encode(&data), text })
        }
        JobEvent::Finished(result) => ("verdict", EventView::Verdict(Box::new(result_view(&result)))),
        JobEvent::Failed(failure) => {
            let reason = reason(&failure).to_owned();
            ("failed", EventView::Failed { reason, message: failure.to_string() })
        }
    }
}

fn reason(failure: &JobFailure) -> &'static str {
    match failure {
        JobFailure::Refused(_) => "refused",
        JobFailure::Rejected(_) => "rejected",
        JobFailure::Failed(_) => "failed",
        JobFailure::Cancelled => "cancelled",
        JobFailure::Expired(_) => "expired",
        JobFailure::ShutDown => "shut_down",
    }
}

fn kind(kind: &VerdictKind) -> String {
    match kind {
        VerdictKind::Quorum(n) => format!("quorum({n})"),
        VerdictKind::Audited => "audited".into(),
        VerdictKind::Unaudited => "unaudited".into(),
        VerdictKind::Rejected(_) => "rejected".into(),
        VerdictKind::Failed(_) => "failed".into(),
    }
}

fn outcome(outcome: Outcome) -> String {
    match outcome {
        Outcome::Completed => "completed".into(),
        Outcome::ExitCode(code) => format!("exit_code({code})"),
        Outcome::Trap(code) => format!("trap({code})"),
        Outcome::OutOfFuel => "out_of_fuel".into(),
        Outcome::MemoryLimit => "memory_limit".into(),
        Outcome::OutputLimit => "output_limit".into(),
        Outcome::InvalidModule => "invalid_module".into(),
        Outcome::Aborted => "aborted".into(),
        Outcome::Indeterminate => "indeterminate".into(),
    }
}

fn standing(standing: Standing) -> &'static str {
    match standing {
        Standing::Agreed => "agreed",
        Standing::Disagreed => "disagreed",
        Standing::Withheld => "withheld",
        Standing::Faulted => "faulted",
    }
}
