//! `config show`.

use std::collections::BTreeMap;

use serde_json::json;

use super::args::{ConfigCommand, LogArgs};
use super::exit::{CliResult, Exit};
use super::out::Out;

pub(super) fn run(command: ConfigCommand, log: &LogArgs) -> CliResult {
    let ConfigCommand::Show { node, json } = command;
    let shown = node.resolve(log)?.shown()?;
    let out = Out { json };
    if json {
        let all: BTreeMap<_, _> =
            shown.iter().map(|s| (&s.key, json!({ "value": s.value, "origin": s.origin }))).collect();
        out.show(&all, |_| String::new())?;
        return Ok(Exit::Ok);
    }
    let mut lines = Vec::new();
    let mut section = "";
    for setting in &shown {
        let (head, name) = setting.key.split_once('.').unwrap_or(("", &setting.key));
        if head != section {
            lines.push(format!("{}[{head}]", if lines.is_empty() { "" } else { "\n" }));
            section = head;
        }
        let line = if setting.value.is_null() {
            format!("# {name} is not set")
        } else {
            format!("{name} = {}", setting.value)
        };
        lines.push(format!("{line:<48} # {}", setting.origin));
    }
    out.line(&lines.join("\n"))?;
    Ok(Exit::Ok)
}
