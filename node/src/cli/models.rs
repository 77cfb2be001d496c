//! `model publish|list|show|fetch|pin|rm|gc`.

use hyper::Method;
use serde_json::{Value, json};

use super::args::{ClientArgs, ModelArgs, ModelCommand};
use super::client::Client;
use super::exit::{CliError, CliResult, Exit};
use super::jobs::encode;
use super::out::{self, Out};
use crate::http::{Items, ModelRequest, PinRequest, PublishRequest};

pub(super) async fn run(command: ModelCommand) -> CliResult {
    match command {
        ModelCommand::Publish { dir, client } => {
            // The node reads it: a path that is relative here is not relative there.
            let path = std::path::absolute(&dir)?;
            let bar = out::spinner(format!("packing {}", path.display()));
            let body = PublishRequest { path };
            let published: Value = Client::new(&client.api)?.json(Method::POST, "/v1/models", Some(&body)).await?;
            bar.finish_and_clear();
            show(&client, &published)
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
    let bar = out::spinner(format!("{doing} {}", args.model));
    let body = ModelRequest { model: args.model.clone() };
    let answer = Client::new(&args.client.api)?.json(Method::POST, &format!("/v1/models/{verb}"), Some(&body)).await;
    bar.finish_and_clear();
    show::<Value>(&args.client, &answer?)
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
