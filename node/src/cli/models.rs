//! `model publish|list|show|fetch|pin|rm|gc`.

use std::time::Duration;

use hyper::Method;
use serde_json::{Value, json};

use super::args::{ClientArgs, ModelArgs, ModelCommand};
use super::client::Client;
use super::exit::{CliError, CliResult, Exit};
use super::jobs::encode;
use super::out::{self, Out};
use crate::api::Progress;
use crate::http::{Items, ModelRequest, PinRequest, PublishRequest};

/// How often a bar is drawn anew: a request to this machine each.
const LOOK_EVERY: Duration = Duration::from_millis(200);

pub(super) async fn run(command: ModelCommand) -> CliResult {
    match command {
        ModelCommand::Publish { dir, client } => {
            // The node reads it: a path that is relative here is not relative there.
            let path = std::path::absolute(&dir)?;
            let (of, api) = (path.display().to_string(), Client::new(&client.api)?);
            let body = PublishRequest { path };
            let published = api.json(Method::POST, "/v1/models", Some(&body));
            show::<Value>(&client, &watched(&api, "packing", &of, published).await?)
        }
        ModelCommand::List(client) => list(&client).await,
        ModelCommand::Show(args) => {
            let path = format!("/v1/models/show?model={}", encode(&args.model));
            let model: Value = Client::new(&args.client.api)?.get(&path).await?;
            show(&args.client, &model)
        }
        ModelCommand::Fetch(args) => act(&args, "fetch", "fetching").await,
        ModelCommand::Pin { undo, model } => {
            let body = PinRequest { model: model.model.clone(), pinned: Some(!undo) };
            let client = Client::new(&model.client.api)?;
            let answer: Value = client.json(Method::POST, "/v1/models/pin", Some(&body)).await?;
            show(&model.client, &answer)
        }
        ModelCommand::Rm(args) => act(&args, "rm", "removing").await,
        ModelCommand::Gc(client) => {
            let freed: Value = Client::new(&client.api)?.json(Method::POST, "/v1/models/gc", Some(&json!({}))).await?;
            show(&client, &freed)
        }
    }
}

async fn act(args: &ModelArgs, verb: &str, doing: &str) -> CliResult {
    let (body, client) = (ModelRequest { model: args.model.clone() }, Client::new(&args.client.api)?);
    let path = format!("/v1/models/{verb}");
    let answer = client.json(Method::POST, &path, Some(&body));
    show::<Value>(&args.client, &watched(&client, doing, &args.model, answer).await?)
}

/// Shows how far the node is with `of` until it answers.
async fn watched<T>(
    client: &Client,
    doing: &str,
    of: &str,
    answer: impl Future<Output = Result<T, CliError>>,
) -> Result<T, CliError> {
    let bar = out::spinner(format!("{doing} {of}"));
    let watch = async {
        let mut looks = tokio::time::interval(LOOK_EVERY);
        // Nobody sees it: nothing is asked.
        while !bar.is_hidden() {
            looks.tick().await;
            let Ok(list) = client.get::<Items<Progress>>("/v1/models/progress").await else { continue };
            if let Some(progress) = list.items.iter().find(|progress| progress.of == of) {
                out::measure(&bar, progress.done.0, progress.size.0);
            }
        }
        std::future::pending::<std::convert::Infallible>().await
    };
    let answer = tokio::select! {
        answer = answer => answer,
        never = watch => match never {},
    };
    bar.finish_and_clear();
    answer
}

async fn list(client: &ClientArgs) -> CliResult {
    let models: Items<Value> = Client::new(&client.api)?.get("/v1/models").await?;
    Out { json: client.json }.show(&models.items, |items| match items.is_empty() {
        true => {
            "no models are here; `model publish DIR` publishes one, `model fetch PUBLISHER/NAME` brings one".to_owned()
        }
        false => out::columns(items),
    })?;
    Ok(Exit::Ok)
}

fn show<T: serde::Serialize>(client: &ClientArgs, value: &T) -> Result<Exit, CliError> {
    let value = serde_json::to_value(value)?;
    Out { json: client.json }.show(&value, out::fields)?;
    Ok(Exit::Ok)
}
