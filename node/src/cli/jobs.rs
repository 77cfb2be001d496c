//! `job submit|watch|list|cancel`.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use futures::StreamExt as _;
use hyper::Method;
use serde_json::{Value, json};
use sundara_proto::id::{BlobId, JobId};
use sundara_proto::wire::limit;

use super::args::{ClientArgs, JobCommand, SubmitArgs};
use super::client::Client;
use super::exit::{CliError, CliResult, Exit};
use super::out::{self, Out};
use crate::http::{EventView, InlineBytes, Items, JobRequest, JobView, ResultView};

/// Inputs up to this ride in the JSON body; larger ones are streamed.
const INLINE_MAX: u64 = 256 << 10;
/// Most bytes of an output that is read at once.
const OUTPUT_BYTES_MAX: usize = limit::INPUT.0 as usize;

pub(super) async fn run(command: JobCommand) -> CliResult {
    match command {
        JobCommand::Submit(args) => submit(*args).await,
        JobCommand::Watch { id, stream, output, proof, client } => {
            let follow = Follow { stream, output, proof, print: false };
            follow.run(&connect(&client)?, parse(&id)?, Out { json: client.json }).await
        }
        JobCommand::List { limit, client } => list(limit, &client).await,
        JobCommand::Cancel { id, client } => {
            let view: JobView =
                connect(&client)?.json(Method::DELETE, &format!("/v1/jobs/{}", parse(&id)?), None::<&()>).await?;
            Out { json: client.json }.show(&view, |view| format!("{} {}", view.id, view.phase))?;
            Ok(Exit::Ok)
        }
    }
}

fn connect(args: &ClientArgs) -> Result<Client, CliError> {
    Client::new(&args.api)
}

fn parse(id: &str) -> Result<JobId, CliError> {
    id.parse().map_err(|e| CliError::new(Exit::Usage, format!("{e}")))
}

async fn submit(args: SubmitArgs) -> CliResult {
    let client = connect(&args.client)?;
    let out = Out { json: args.client.json };
    let request = request(&args)?;
    let job = match &args.input {
        None => post(&client, &request).await?,
        Some(path) if path == Path::new("-") => {
            // Its length is not known before it ends, so it is streamed whatever it comes to.
            upload(&client, &request, standard_input()?).await?
        }
        Some(path) => {
            let len = std::fs::metadata(path).with_context(|| format!("--input {}", path.display()))?.len();
            if len <= INLINE_MAX {
                let bytes = std::fs::read(path).with_context(|| format!("--input {}", path.display()))?;
                post(&client, &JobRequest { input: Some(InlineBytes::of(&bytes)), ..request }).await?
            } else {
                let file = tokio::fs::File::open(path).await.with_context(|| format!("--input {}", path.display()))?;
                let bar = out::bytes_bar("input".into(), len);
                let job = upload(&client, &request, file_with(&bar, file)).await?;
                bar.finish_and_clear();
                job
            }
        }
    };
    let waits = args.wait || args.stream || args.output.is_some() || args.proof.is_some();
    if !waits {
        out.show(&job, |job| job.id.to_string())?;
        return Ok(Exit::Ok);
    }
    out::note(&format!("job {}", job.id));
    let print = args.output.is_none();
    Follow { stream: args.stream, output: args.output, proof: args.proof, print }.run(&client, job.id, out).await
}

fn request(args: &SubmitArgs) -> Result<JobRequest, CliError> {
    let params = match args.params.as_deref().map(|text| (text, text.strip_prefix('@'))) {
        None => None,
        Some((_, Some(file))) => {
            let mut bytes = Vec::new();
            let open = std::fs::File::open(file).with_context(|| format!("--params @{file}"))?;
            open.take(limit::PARAMS as u64 + 1).read_to_end(&mut bytes)?;
            Some(bytes)
        }
        Some((text, None)) => Some(text.as_bytes().to_vec()),
    };
    Ok(JobRequest {
        model: args.model.clone(),
        builtin: args.builtin.clone(),
        entry: args.entry.clone(),
        params: params.as_deref().map(InlineBytes::of),
        seed: Some(args.seed),
        replicas: Some(args.replicas),
        hardware_class: args.hardware_class.clone(),
        stream: Some(args.stream),
        not_after_s: args.not_after,
        announce: args.announce.then_some(true),
        ..JobRequest::default()
    })
}

async fn post(client: &Client, request: &JobRequest) -> Result<JobView, CliError> {
    client.json(Method::POST, "/v1/jobs", Some(request)).await
}

async fn upload(
    client: &Client,
    request: &JobRequest,
    source: impl tokio::io::AsyncRead + Send + 'static,
) -> Result<JobView, CliError> {
    let Value::Object(fields) = serde_json::to_value(request)? else {
        return Err(CliError::new(Exit::Failure, "the request has no fields"));
    };
    let mut query: Vec<String> = Vec::new();
    for (name, value) in fields {
        match (name.as_str(), value) {
            ("params", value) => {
                let base64 = value.get("base64").and_then(Value::as_str).unwrap_or_default().to_owned();
                query.push(format!("params_base64={}", encode(&base64)));
            }
            (_, Value::String(text)) => query.push(format!("{name}={}", encode(&text))),
            (_, value) => query.push(format!("{name}={value}")),
        }
    }
    client.upload(&format!("/v1/jobs?{}", query.join("&")), source).await
}

/// This command's own standard input, read as a file: a terminal, a pipe or a file.
fn standard_input() -> std::io::Result<tokio::fs::File> {
    let input = std::os::fd::AsFd::as_fd(&std::io::stdin()).try_clone_to_owned()?;
    Ok(tokio::fs::File::from_std(std::fs::File::from(input)))
}

fn file_with(bar: &indicatif::ProgressBar, file: tokio::fs::File) -> impl tokio::io::AsyncRead + Send + 'static {
    let bar = bar.clone();
    Box::pin(tokio_util::io::InspectReader::new(file, move |bytes| bar.inc(bytes.len() as u64)))
}

/// Percent-encodes what may not stand in a query's value.
pub(super) fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// How a job is followed to its end.
struct Follow {
    /// Output to standard output while it is made.
    stream: bool,
    /// Verified output to a file.
    output: Option<PathBuf>,
    /// Proof to a file.
    proof: Option<PathBuf>,
    /// Verified output to standard output.
    print: bool,
}

impl Follow {
    async fn run(self, client: &Client, id: JobId, out: Out) -> CliResult {
        let mut events = std::pin::pin!(client.events(&format!("/v1/jobs/{id}/events")).await?);
        let bar = out::spinner("looking for a validator".into());
        let mut streamed = Streamed::default();
        let mut ended = None;
        while let Some(event) = events.next().await {
            let event = event?;
            match view(&event.name, &event.data)? {
                Some(EventView::Acknowledged { validator, .. }) => {
                    bar.set_message(format!("validator {validator} has it"))
                }
                Some(EventView::Started { attempt }) => bar.set_message(format!("running, attempt {attempt}")),
                Some(EventView::Output { offset, base64, .. }) if self.stream && !out.json => {
                    let piece = InlineBytes::Base64(base64).decode().context("a piece of output is not base64")?;
                    bar.suspend(|| streamed.print(out, offset, &piece))?;
                }
                Some(EventView::Output { .. }) | None => {}
                Some(last @ (EventView::Verdict(_) | EventView::Failed { .. })) => {
                    ended = Some(last);
                    break;
                }
            }
        }
        bar.finish_and_clear();
        match ended {
            Some(EventView::Verdict(result)) => self.finished(client, *result, streamed, out).await,
            Some(EventView::Failed { reason, message }) => {
                if out.json {
                    out.show(&json!({ "job": id, "failed": reason, "message": message }), |_| String::new())?;
                }
                Err(CliError::new(Exit::Job, message))
            }
            _ => Err(CliError::new(
                Exit::Unreachable,
                format!(
                    "the node stopped before job {id} ended, and forgets it; submit it again when the node is back"
                ),
            )),
        }
    }

    async fn finished(&self, client: &Client, result: ResultView, streamed: Streamed, out: Out) -> CliResult {
        let id = result.job;
        if let Some(file) = &self.proof {
            let bytes = client.bytes(&format!("/v1/jobs/{id}/proof"), limit::RPC_FRAME).await?;
            std::fs::write(file, &bytes).with_context(|| format!("--proof {}", file.display()))?;
        }
        let prints = !out.json && (self.stream || self.print);
        let complete = self.stream && streamed.is(&result);
        if self.output.is_some() || (prints && !complete) {
            let bytes = client.bytes(&format!("/v1/jobs/{id}/output"), OUTPUT_BYTES_MAX).await?;
            if BlobId::of(&bytes) != result.output {
                return Err(CliError::new(Exit::Failure, "the output is not the one that the verdict names"));
            }
            if let Some(file) = &self.output {
                std::fs::write(file, &bytes).with_context(|| format!("--output {}", file.display()))?;
            }
            if prints && !complete {
                streamed.complete(out, &bytes)?;
            }
        }
        if out.json {
            out.show(&result, |_| String::new())?;
        } else {
            out::note(&format!(
                "{}, {} in {:.1} ms by {} miner(s), validator {}",
                result.verdict,
                result.outcome,
                result.latency_ms,
                result.miners.len(),
                result.validator
            ));
        }
        if result.outcome == "completed" {
            return Ok(Exit::Ok);
        }
        Err(CliError::new(Exit::Job, format!("the program did not complete: {}", result.outcome)))
    }
}

/// An event of a job; `None` for one that this version does not know.
fn view(name: &str, data: &str) -> Result<Option<EventView>, CliError> {
    if !matches!(name, "acknowledged" | "started" | "output" | "verdict" | "failed") {
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(data).with_context(|| format!("event {name}"))?))
}

/// What of the output is on standard output already. Replicas of every attempt compute the same, so a new attempt goes
/// on where the last one stopped; the verdict tells whether what was printed is right.
#[derive(Default)]
struct Streamed {
    len: u64,
    hasher: blake3::Hasher,
}

impl Streamed {
    fn print(&mut self, out: Out, offset: u64, piece: &[u8]) -> std::io::Result<()> {
        // Before what is printed: seen. Beyond it: a gap, which the verified output fills at the end.
        let Some(skip) = self.len.checked_sub(offset).and_then(|skip| usize::try_from(skip).ok()) else {
            return Ok(());
        };
        let Some(new) = piece.get(skip..) else { return Ok(()) };
        self.hasher.update(new);
        self.len += new.len() as u64;
        out.bytes(new)
    }

    fn is(&self, result: &ResultView) -> bool {
        self.len == result.output_bytes && *self.hasher.finalize().as_bytes() == result.output.0
    }

    fn complete(&self, out: Out, verified: &[u8]) -> Result<(), CliError> {
        let printed = usize::try_from(self.len).ok().and_then(|len| verified.split_at_checked(len));
        match printed {
            Some((printed, rest)) if blake3::hash(printed) == self.hasher.finalize() => Ok(out.bytes(rest)?),
            _ => Err(CliError::new(
                Exit::Job,
                "what was streamed is not the verified output; get that with --output FILE",
            )),
        }
    }
}

async fn list(limit: usize, args: &ClientArgs) -> CliResult {
    let client = connect(args)?;
    let jobs: Items<JobView> = client.get(&format!("/v1/jobs?limit={limit}")).await?;
    // A node that is no miner has none of these.
    let offers: Option<Items<Value>> = match client.get(&format!("/v1/miner/jobs?limit={limit}")).await {
        Ok(offers) => Some(offers),
        Err(error) if error.exit == Exit::Refused => None,
        Err(error) => return Err(error),
    };
    let all = json!({ "jobs": jobs.items, "miner": offers.as_ref().map(|o| &o.items) });
    Out { json: args.json }.show(&all, |_| text(&jobs.items, offers.as_ref().map(|o| o.items.as_slice())))?;
    Ok(Exit::Ok)
}

fn text(jobs: &[JobView], offers: Option<&[Value]>) -> String {
    let rows: Vec<Vec<String>> =
        jobs.iter().map(|j| vec![j.id.to_string(), j.phase.clone(), j.program.clone(), j.detail.clone()]).collect();
    let mut parts = vec![match rows.is_empty() {
        true => "no jobs were submitted here".to_owned(),
        false => out::table(&["job", "phase", "program", "detail"], &rows),
    }];
    if let Some(offers) = offers {
        parts.push(match offers.is_empty() {
            true => "no job was offered to this miner".to_owned(),
            false => out::columns(offers),
        });
    }
    parts.join("\n\n")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_encoded() {
        assert_eq!(encode("5Fabc/digits@3 +&="), "5Fabc%2Fdigits%403%20%2B%26%3D");
    }

    #[test]
    fn every_event_is_told_apart_by_its_data() {
        let hotkey = "5HDvhV6WDCjCKyrXqGQSDYqQAzkzabNhctmiDYEqgBC66BsX";
        let parse = |name: &str, data: Value| view(name, &data.to_string()).unwrap().unwrap();
        assert!(matches!(
            parse("acknowledged", json!({"validator": hotkey, "rank": 0})),
            EventView::Acknowledged { .. }
        ));
        assert!(matches!(parse("started", json!({"attempt": 1})), EventView::Started { attempt: 1 }));
        let output = json!({"attempt": 0, "offset": 0, "base64": "aGk="});
        assert!(matches!(parse("output", output), EventView::Output { .. }));
        assert!(matches!(parse("failed", json!({"reason": "x", "message": "y"})), EventView::Failed { .. }));
        assert!(view("new kind", "{}").unwrap().is_none());
        assert!(view("started", "no json").is_err());
    }
}
