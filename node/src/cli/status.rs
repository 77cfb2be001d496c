//! `peers`, `status`, `evidence`, `scores` and `executor`.

use std::path::PathBuf;

use hyper::Method;
use serde_json::Value;

use super::args::{ClientArgs, ExecutorCommand};
use super::client::Client;
use super::exit::{CliResult, Exit};
use super::out::{self, Out};
use crate::api::{Case, EpochScores, Invite, KnownExecutor, MinerScore, ValidatorPages};
use crate::http::{InviteRequest, Items};

pub(super) async fn peers(args: ClientArgs) -> CliResult {
    let peers: Items<Value> = Client::new(&args.api)?.get("/v1/peers").await?;
    Out { json: args.json }.show(&peers.items, |peers| {
        if peers.is_empty() {
            return "no peers are known yet; `status` says what is missing".to_owned();
        }
        let columns = ["peer_id", "state", "roles", "hotkey", "rtt_us", "connections", "reason"];
        let cell = |peer: &Value, name: &str| match peer.get(name) {
            None | Some(Value::Null) => "-".to_owned(),
            Some(Value::String(text)) => text.clone(),
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(","),
            Some(other) => other.to_string(),
        };
        let row = |peer: &Value| columns.iter().map(|name| cell(peer, name)).collect();
        out::table(&columns, &peers.iter().map(row).collect::<Vec<_>>())
    })?;
    Ok(Exit::Ok)
}

pub(super) async fn status(args: ClientArgs) -> CliResult {
    let status: Value = Client::new(&args.api)?.get("/v1/status").await?;
    Out { json: args.json }.show(&status, out::fields)?;
    Ok(Exit::Ok)
}

pub(super) async fn evidence(limit: usize, args: ClientArgs) -> CliResult {
    let cases: Items<Case> = Client::new(&args.api)?.get(&format!("/v1/evidence?limit={limit}")).await?;
    Out { json: args.json }.show(&cases.items, |cases| {
        if cases.is_empty() {
            return "no offence is known".to_owned();
        }
        let row = |case: &Case| {
            let believed = if case.believed { "yes" } else { "no" };
            let cells = [&case.accused.to_string(), &case.offence, &case.accuser.to_string(), believed, &case.detail];
            cells.map(|cell: &str| cell.to_owned()).to_vec()
        };
        out::table(&["accused", "offence", "accuser", "believed", "detail"], &cases.iter().map(row).collect::<Vec<_>>())
    })?;
    Ok(Exit::Ok)
}

pub(super) async fn scores(epoch: Option<u64>, args: ClientArgs) -> CliResult {
    let query = epoch.map(|epoch| format!("?epoch={epoch}")).unwrap_or_default();
    let scores: EpochScores = Client::new(&args.api)?.get(&format!("/v1/scores{query}")).await?;
    Out { json: args.json }.show(&scores, |scores| {
        let basis = match (scores.settled, scores.complete) {
            (false, _) => "from this validator's own verdicts; the pages of others are not open yet",
            (true, true) => "from the pages of all validators",
            (true, false) => "from the pages of all validators, of which some are missing",
        };
        let row =
            |m: &MinerScore| vec![m.hotkey.to_string(), format!("{:.6}", m.score as f64 / 1e6), m.jobs.to_string()];
        let miners = out::table(&["miner", "score", "jobs"], &scores.miners.iter().map(row).collect::<Vec<_>>());
        let row = |v: &ValidatorPages| {
            let pages = format!("{} of {}", v.read, v.heard + v.missing);
            vec![v.hotkey.to_string(), pages, v.verdicts.to_string(), format!("{:?}", v.draws), v.neglected.to_string()]
        };
        let heading = ["validator", "pages", "verdicts", "draws", "neglected"];
        let validators = out::table(&heading, &scores.validators.iter().map(row).collect::<Vec<_>>());
        format!("epoch {}, {} jobs, {basis}\n{miners}\n{validators}", scores.epoch, scores.jobs)
    })?;
    Ok(Exit::Ok)
}

pub(super) async fn executor(command: ExecutorCommand) -> CliResult {
    match command {
        ExecutorCommand::Invite { file, life, client } => invite(file, life, client).await,
        ExecutorCommand::List(args) => {
            let list: Items<KnownExecutor> = Client::new(&args.api)?.get("/v1/executors").await?;
            Out { json: args.json }.show(&list.items, |list| {
                let row = |e: &KnownExecutor| {
                    let state = match (e.in_process, e.attached) {
                        (true, _) => "inside",
                        (false, true) => "attached",
                        (false, false) => "away",
                    };
                    let figures = [e.slots.to_string(), e.running.to_string()];
                    let [slots, running] = figures;
                    vec![e.node.to_string(), state.to_owned(), e.hardware_class.clone(), slots, running]
                };
                let heading = ["node", "state", "class", "slots", "running"];
                out::table(&heading, &list.iter().map(row).collect::<Vec<_>>())
            })?;
            Ok(Exit::Ok)
        }
        ExecutorCommand::Revoke { node, client } => {
            let path = format!("/v1/executors/{node}");
            let answer: Value = Client::new(&client.api)?.json(Method::DELETE, &path, None::<&()>).await?;
            Out { json: client.json }.show(&answer, |_| format!("sent {node} away"))?;
            Ok(Exit::Ok)
        }
    }
}

async fn invite(file: PathBuf, life: Option<u64>, client: ClientArgs) -> CliResult {
    // Before the node makes an invite that nobody could use.
    if std::fs::symlink_metadata(&file).is_ok() {
        return Err(sundara_chain::keys::KeyError::Exists { path: file }.into());
    }
    let body = InviteRequest { life_s: life };
    let invite: Invite = Client::new(&client.api)?.json(Method::POST, "/v1/executors/invites", Some(&body)).await?;
    invite.write(&file)?;
    let owner = invite.addresses.first().map_or("ADDR", String::as_str);
    let text = format!(
        "wrote {}, good for one executor. Start it with --validator in the place of --miner if this node is a validator:\n  \
         sundara-node --role executor --miner {owner} --invite {0}",
        file.display()
    );
    Out { json: client.json }.show(&serde_json::json!({ "file": file }), |_| text)?;
    Ok(Exit::Ok)
}
