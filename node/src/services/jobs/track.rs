//! One submitted job as its requester sees it: a log of events that any number of readers follow, and an end.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use sundara_proto::crypto::Signed;
use sundara_proto::id::{Hotkey, JobId};
use sundara_proto::job::{JobSpec, Program};
use sundara_proto::units::UnixMillis;
use tokio::sync::watch;

use crate::api::jobs::{JobEvent, JobFailure, JobPhase, JobResult, JobSummary};

/// Output kept for readers that come late. More is in the result.
const OUTPUT_KEPT_MAX: usize = 1 << 20;

/// How a job ended.
pub(crate) type End = Result<Arc<JobResult>, JobFailure>;

/// A job of this node. Shared by its driver and every handle.
pub(crate) struct Tracked {
    id: JobId,
    pub(super) spec: Signed<JobSpec>,
    pub(super) inline_input: Option<Bytes>,
    /// It went to whoever takes it, over gossip; no validator is asked to begin it.
    pub(super) announced: bool,
    pub(super) submitted_at: UnixMillis,
    pub(super) submitted: Instant,
    state: Mutex<State>,
    /// Counts changes of `state`, to wake readers.
    changed: watch::Sender<u64>,
    /// Cancelled by the requester.
    pub(super) cancelled: tokio_util::sync::CancellationToken,
}

struct State {
    events: Vec<JobEvent>,
    /// Bytes of output among the events.
    output_kept: usize,
    phase: JobPhase,
    /// The validator that acknowledged it last.
    validator: Option<Hotkey>,
    end: Option<End>,
}

impl Tracked {
    pub(super) fn new(
        spec: Signed<JobSpec>,
        inline_input: Option<Bytes>,
        announced: bool,
        submitted_at: UnixMillis,
    ) -> Self {
        Self {
            id: spec.id(),
            spec,
            inline_input,
            announced,
            submitted_at,
            submitted: Instant::now(),
            state: Mutex::new(State {
                events: Vec::new(),
                output_kept: 0,
                phase: JobPhase::Submitting,
                validator: None,
                end: None,
            }),
            changed: watch::Sender::new(0),
            cancelled: tokio_util::sync::CancellationToken::new(),
        }
    }

    pub(crate) fn id(&self) -> JobId {
        self.id
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what happened. After the end nothing is noted: the requester sees one result.
    pub(super) fn push(&self, event: JobEvent) {
        {
            let mut state = self.state();
            if state.end.is_some() {
                return;
            }
            match &event {
                JobEvent::Acknowledged { validator, .. } => {
                    // It is durable; it may run already.
                    if state.phase == JobPhase::Submitting {
                        state.phase = JobPhase::Acknowledged;
                    }
                    state.validator = Some(*validator);
                }
                JobEvent::Started { .. } => state.phase = JobPhase::Running,
                JobEvent::Output { data, .. } => {
                    if state.output_kept + data.len() > OUTPUT_KEPT_MAX {
                        return;
                    }
                    state.output_kept += data.len();
                }
                JobEvent::Finished(result) => {
                    state.phase = JobPhase::Finished;
                    state.end = Some(Ok(result.clone()));
                }
                JobEvent::Failed(failure) => {
                    state.phase = JobPhase::Failed;
                    state.end = Some(Err(failure.clone()));
                }
            }
            state.events.push(event);
        }
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
    }

    pub(super) fn validator(&self) -> Option<Hotkey> {
        self.state().validator
    }

    pub(super) fn end(&self) -> Option<End> {
        self.state().end.clone()
    }

    pub(crate) async fn ended(&self) -> End {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(end) = self.end() {
                return end;
            }
            if changed.changed().await.is_err() {
                return Err(JobFailure::ShutDown);
            }
        }
    }

    pub(crate) fn events(self: Arc<Self>) -> Pin<Box<dyn Stream<Item = JobEvent> + Send>> {
        let changed = self.changed.subscribe();
        futures::stream::unfold((self, changed, 0, false), |(job, mut changed, next, over)| async move {
            loop {
                if over {
                    return None;
                }
                changed.mark_unchanged();
                let event = job.state().events.get(next).cloned();
                if let Some(event) = event {
                    let over = matches!(event, JobEvent::Finished(_) | JobEvent::Failed(_));
                    return Some((event, (job, changed, next + 1, over)));
                }
                if changed.changed().await.is_err() {
                    return None;
                }
            }
        })
        .boxed()
    }

    pub(crate) fn summary(&self) -> JobSummary {
        let state = self.state();
        let detail = match &state.end {
            None => state.validator.map(|v| format!("at {v}")).unwrap_or_default(),
            Some(Ok(result)) => kind_in_words(result.kind()),
            Some(Err(failure)) => failure.to_string(),
        };
        JobSummary {
            id: self.id,
            program: program_in_words(&self.spec.program),
            phase: state.phase,
            submitted_at: self.submitted_at,
            detail,
        }
    }
}

/// For people.
fn program_in_words(program: &Program) -> String {
    match program {
        Program::Model { model, entry, .. } if entry.is_empty() => format!("model {}", &model.to_string()[..12]),
        Program::Model { model, entry, .. } => format!("model {} entry {entry}", &model.to_string()[..12]),
        Program::Builtin { name } => format!("builtin {name}"),
    }
}

/// For people.
fn kind_in_words(kind: &sundara_proto::verdict::VerdictKind) -> String {
    use sundara_proto::verdict::VerdictKind as K;
    match kind {
        K::Quorum(n) => format!("quorum({n})"),
        K::Audited => "audited".to_owned(),
        K::Unaudited => "unaudited".to_owned(),
        K::Rejected(reason) => format!("rejected: {reason}"),
        K::Failed(reason) => format!("failed: {reason}"),
    }
}
