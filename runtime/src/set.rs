//! Picks the backend by the kind of job.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::{Environment, Execution, ExecutionRequest, JobKind, JobRuntime, Limits, OutputSink, RuntimeError, Setup};

/// The backends of one executor, at most one a kind.
#[derive(Clone, Default)]
pub struct RuntimeSet {
    backends: Vec<Arc<dyn JobRuntime>>,
}

impl RuntimeSet {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a backend; it replaces an earlier one of its kind.
    #[must_use]
    pub fn with(mut self, backend: Arc<dyn JobRuntime>) -> Self {
        self.backends.retain(|other| other.kind() != backend.kind());
        self.backends.push(backend);
        self
    }

    /// The kinds that can run here.
    pub fn kinds(&self) -> Vec<JobKind> {
        self.backends.iter().map(|backend| backend.kind()).collect()
    }

    /// The backend of a kind.
    ///
    /// # Errors
    /// [`RuntimeError::Unsupported`] when there is none.
    pub fn get(&self, kind: JobKind) -> Result<&Arc<dyn JobRuntime>, RuntimeError> {
        self.backends.iter().find(|backend| backend.kind() == kind).ok_or(RuntimeError::Unsupported(kind))
    }

    /// [`JobRuntime::prepare`] on the backend of the program's kind.
    ///
    /// # Errors
    /// As there, and [`RuntimeError::Unsupported`].
    pub async fn prepare(&self, setup: &Arc<Setup>, limits: &Limits) -> Result<(), RuntimeError> {
        self.get(setup.program.kind())?.prepare(setup, limits).await
    }

    /// [`JobRuntime::run`] on the backend of the program's kind.
    ///
    /// # Errors
    /// As there, and [`RuntimeError::Unsupported`].
    pub async fn run(
        &self,
        request: ExecutionRequest,
        output: OutputSink,
        cancel: CancellationToken,
    ) -> Result<Execution, RuntimeError> {
        self.get(request.setup.program.kind())?.run(request, output, cancel).await
    }

    /// [`JobRuntime::env_id`] on the backend of the program's kind.
    ///
    /// # Errors
    /// [`RuntimeError::Unsupported`].
    pub fn env_id(&self, kind: JobKind, environment: &Environment) -> Result<[u8; 32], RuntimeError> {
        Ok(self.get(kind)?.env_id(environment))
    }
}
