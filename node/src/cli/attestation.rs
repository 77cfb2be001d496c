//! `attestation verify`: what a proof proves, with no network.

use std::path::Path;

use anyhow::Context as _;
use bytes::Bytes;
use serde::Serialize;
use sundara_proto::attestation::Outcome;
use sundara_proto::id::{BlobId, EnvId, Hotkey, JobId, NodeId};
use sundara_proto::job::Program;
use sundara_proto::pb;
use sundara_proto::units::ByteCount;
use sundara_proto::verdict::{Proof, VerdictKind};
use sundara_proto::wire;

use super::args::AttestationCommand;
use super::exit::{CliError, CliResult, Exit};
use super::out::Out;

/// What a proof that holds says.
#[derive(Debug, Serialize)]
struct Proven {
    /// Tag of the mesh: first 8 hexadecimal digits of the genesis, and the netuid.
    network: String,
    job: JobId,
    requester: Hotkey,
    program: String,
    input: BlobId,
    verdict: String,
    /// Whether a result stands behind the verdict.
    verified: bool,
    outcome: Option<String>,
    output: BlobId,
    output_bytes: ByteCount,
    env_id: EnvId,
    validator: Hotkey,
    /// Whether the validator is among those named by `--validator`; absent where none was.
    #[serde(skip_serializing_if = "Option::is_none")]
    validator_trusted: Option<bool>,
    issued_at_ms: u64,
    attestations: Vec<Attested>,
}

#[derive(Debug, Serialize)]
struct Attested {
    miner: Hotkey,
    executor: NodeId,
    outcome: String,
    output: BlobId,
    fuel: u64,
    wall_us: u64,
    agrees: bool,
}

pub(super) fn run(command: AttestationCommand) -> CliResult {
    let AttestationCommand::Verify { file, validator, json } = command;
    let trusted = validator
        .iter()
        .map(|text| text.parse::<Hotkey>().map_err(|e| CliError::new(Exit::Usage, format!("--validator: {e}"))))
        .collect::<Result<Vec<_>, _>>()?;
    let proof = read(&file)?;
    let mut proven = describe(&proof);
    if !trusted.is_empty() {
        proven.validator_trusted = Some(trusted.contains(&proven.validator));
    }
    Out { json }.show(&proven, text)?;
    if proven.validator_trusted == Some(false) {
        let message = format!("the verdict is by {}, none of those named by --validator", proven.validator);
        return Err(CliError::new(Exit::Proof, message));
    }
    Ok(Exit::Ok)
}

fn read(file: &Path) -> Result<Proof, CliError> {
    let size = std::fs::metadata(file).with_context(|| format!("cannot read {}", file.display()))?.len();
    let bad = |why: String| CliError::new(Exit::Proof, format!("{} proves nothing: {why}", file.display()));
    if size > Proof::MAX as u64 {
        return Err(bad(format!("{size} bytes are more than a proof has")));
    }
    let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let raw: pb::Proof = wire::decode_raw(Bytes::from(bytes), Proof::MAX).map_err(|e| bad(e.to_string()))?;
    Proof::verify(raw).map_err(|e| bad(e.to_string()))
}

fn describe(proof: &Proof) -> Proven {
    let (spec, verdict) = (&proof.spec, &proof.verdict);
    let attestations = proof.attestations.iter().map(|countersigned| {
        let a = &countersigned.attestation;
        Attested {
            miner: countersigned.miner(),
            executor: a.executor(),
            outcome: outcome_in_words(a.outcome),
            output: a.output,
            fuel: a.usage.fuel,
            wall_us: a.usage.wall_us,
            agrees: (Some(a.outcome), a.output, a.env_id) == (verdict.outcome, verdict.output, verdict.env_id),
        }
    });
    Proven {
        network: proof.network.tag(),
        job: spec.id(),
        requester: spec.requester(),
        program: program_in_words(&spec.program),
        input: spec.input,
        verdict: verdict_in_words(&verdict.kind),
        verified: verdict.kind.is_verified(),
        outcome: verdict.outcome.map(outcome_in_words),
        output: verdict.output,
        output_bytes: verdict.output_len,
        env_id: verdict.env_id,
        validator: verdict.validator(),
        validator_trusted: None,
        issued_at_ms: verdict.issued_at.0,
        attestations: attestations.collect(),
    }
}

fn text(p: &Proven) -> String {
    let trust = match p.validator_trusted {
        Some(true) => "  (one of --validator)",
        Some(false) => "  (NOT one of --validator)",
        None => "  (name those you believe with --validator)",
    };
    let mut lines = vec![
        "The proof holds: every signature is good, and the attestations carry the verdict.".to_owned(),
        format!("mesh       {}", p.network),
        format!("job        {}", p.job),
        format!("requester  {}", p.requester),
        format!("program    {}", p.program),
        format!("input      {}", p.input),
        format!("verdict    {}", p.verdict),
        format!("outcome    {}", p.outcome.as_deref().unwrap_or("none")),
        format!("output     {} ({})", p.output, p.output_bytes),
        format!("env        {}", p.env_id),
        format!("validator  {}{trust}", p.validator),
    ];
    for a in &p.attestations {
        let agrees = if a.agrees { "agrees" } else { "DISAGREES" };
        lines.push(format!(
            "attested   by miner {} on executor {}: {}, {} fuel, {agrees}",
            a.miner, a.executor, a.outcome, a.fuel
        ));
    }
    lines.join("\n")
}

fn verdict_in_words(kind: &VerdictKind) -> String {
    match kind {
        VerdictKind::Quorum(n) => format!("quorum of {n} distinct owners"),
        VerdictKind::Audited => "audited: re-executed by the validator with the same result".into(),
        VerdictKind::Unaudited => "unaudited: one replica, not drawn for an audit".into(),
        VerdictKind::Rejected(reason) => format!("rejected: {reason}"),
        VerdictKind::Failed(reason) => format!("failed: {reason}"),
    }
}

fn outcome_in_words(outcome: Outcome) -> String {
    match outcome {
        Outcome::Completed => "completed".into(),
        Outcome::ExitCode(code) => format!("exit code {code}"),
        Outcome::Trap(code) => format!("trap {code}"),
        Outcome::OutOfFuel => "out of fuel".into(),
        Outcome::MemoryLimit => "memory limit".into(),
        Outcome::OutputLimit => "output limit".into(),
        Outcome::InvalidModule => "invalid module".into(),
        Outcome::Aborted => "aborted".into(),
        Outcome::Indeterminate => "indeterminate".into(),
    }
}

fn program_in_words(program: &Program) -> String {
    match program {
        Program::Model { model, entry, .. } if entry.is_empty() => format!("model {model}"),
        Program::Model { model, entry, .. } => format!("model {model}, entry {entry}"),
        Program::Builtin { name } => format!("builtin {name}"),
    }
}
