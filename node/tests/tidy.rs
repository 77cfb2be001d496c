//! The walls of the house: floors, sans-IO, who may name whom, the top of the repository.
//!
//! `tidy/walls.rs` holds the rules as functions from sources to violations. Half of the tests here give them sources that
//! break each wall, so that a rule that has gone blind is noticed; the other half gives them the repository.
#![allow(clippy::unwrap_used)]

#[path = "tidy/source.rs"]
mod source;
#[path = "tidy/walls.rs"]
mod walls;

use std::path::{Path, PathBuf};

use source::{Source, blank, named_paths};
use walls::{Violation, check, heavy_dependencies, strays};

/// Walls that are breached today: path, and a part of what is said of it. The list only gets shorter: an entry that no
/// longer applies fails the test.
const KNOWN: &[(&str, &str)] = &[
    ("node/src/blobs.rs", "lines"),
    ("node/src/cli/client.rs", "tokio::spawn"),
    ("node/src/services/dispatch/live.rs", "tokio::spawn"),
    ("node/src/services/dispatch/perform.rs", "tokio::spawn"),
    ("node/src/services/reduce/leader.rs", "lines"),
    ("node/src/services/reduce/member.rs", "lines"),
    ("node/src/services/registry/publish.rs", "tokio::spawn"),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn collect(directory: &Path, root: &Path, sources: &mut Vec<Source>) {
    let mut entries: Vec<PathBuf> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            collect(&path, root, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(root).unwrap().to_string_lossy().replace('\\', "/");
            sources.push(Source::new(&name, &std::fs::read_to_string(&path).unwrap()));
        }
    }
}

fn repository() -> Vec<Source> {
    let mut sources = Vec::new();
    for part in ["proto/src", "runtime/src", "chain/src", "node/src"] {
        collect(&root().join(part), &root(), &mut sources);
    }
    assert!(sources.len() > 50, "the sources are where they are looked for");
    sources
}

#[test]
fn the_walls_stand() {
    let excused = |v: &Violation| KNOWN.iter().any(|(path, what)| v.path == *path && v.what.contains(what));
    let violations = check(&repository());
    let fresh: Vec<String> =
        violations.iter().filter(|v| !excused(v)).map(|v| format!("{}:{}: {}", v.path, v.line, v.what)).collect();
    assert!(fresh.is_empty(), "\n{}", fresh.join("\n"));
    for (path, what) in KNOWN {
        let needed = violations.iter().any(|v| v.path == *path && v.what.contains(what));
        assert!(needed, "{path} ({what}) is in order now: take it off the list");
    }
}

#[test]
fn the_top_of_the_repository_is_as_its_owner_laid_it() {
    let names: Vec<String> = std::fs::read_dir(root())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(strays(&names), Vec::<String>::new());
    assert_eq!(strays(&["src".to_owned(), ".ci".to_owned(), "docs".to_owned(), "node".to_owned()]), ["src", "docs"]);
}

#[test]
fn the_tests_that_the_map_names_exist() {
    let map = std::fs::read_to_string(root().join("node/ARCHITECTURE.md")).unwrap();
    let mut named = 0;
    for (path, test) in map.split('`').filter_map(|word| word.split_once(".rs::")) {
        let path = format!("{path}.rs");
        let source = std::fs::read_to_string(root().join(&path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        assert!(source.contains(&format!("fn {test}(")), "{path} has no test {test}");
        named += 1;
    }
    assert!(named > 30, "the table of attacks is where it is looked for: {named}");
}

#[test]
fn agreement_depends_on_nothing_heavy() {
    let manifest = std::fs::read_to_string(root().join("proto/Cargo.toml")).unwrap();
    assert_eq!(heavy_dependencies(&manifest), Vec::<String>::new());
    let bad = "[dependencies]\nbytes.workspace = true\ntokio.workspace = true\nsled = \"1\"\n[dev-dependencies]\nclap = \"4\"\n";
    assert_eq!(heavy_dependencies(bad), ["tokio", "sled"]);
}

/// What is said of one file with this code, its opening line aside.
fn said(path: &str, code: &str) -> Vec<String> {
    let source = Source::new(path, &format!("//! It owns something.\n{code}"));
    check(&[source]).into_iter().map(|v| v.what).collect()
}

fn breaks(path: &str, code: &str, what: &str) {
    let said = said(path, code);
    assert!(said.iter().any(|s| s.contains(what)), "{path} `{code}` was let through: {said:?}");
}

fn passes(path: &str, code: &str) {
    assert_eq!(said(path, code), Vec::<String>::new(), "{path} `{code}`");
}

#[test]
fn what_decides_names_nothing_ambient() {
    for path in [
        "proto/src/rules/new.rs",
        "node/src/domain/new.rs",
        "node/src/domain.rs",
        "node/src/sim/x.rs",
        "chain/src/yuma.rs",
    ] {
        for code in [
            "use tokio::sync::mpsc;",
            "use libp2p::PeerId;",
            "fn f(db: &sled::Db) {}",
            "let t = Instant::now();",
            "use std::time::{Duration, SystemTime};",
            "let x = rand::random::<u64>();",
            "let x = rand::rng().next_u64();",
            "std::fs::read(p)",
            "std::env::var(n)",
        ] {
            breaks(path, code, "decides, and names");
        }
        passes(
            path,
            "use std::time::Duration; // Instant::now() would be wrong\nconst S: &str = \"tokio\"; fn instant() {}",
        );
        passes(path, "#[cfg(test)]\nmod tests { use std::time::Instant; }\nfn f() {}");
        breaks(path, "#[cfg(test)]\nmod tests { fn g() {} }\nuse tokio::time;", "tokio");
    }
    passes("node/src/net/new.rs", "use libp2p::PeerId; let t = tokio::time::Instant::now();");
}

#[test]
fn imports_point_down() {
    breaks("node/src/domain/job.rs", "use crate::store::Store;", "points up");
    breaks("node/src/net/rpc.rs", "fn f(c: &crate::services::Watcher) {}", "points up");
    breaks("node/src/services/intake.rs", "use crate::{domain::Now, http::serve};", "points up");
    breaks("node/src/services/intake.rs", "use super::super::cli::run;", "points up");
    breaks("node/src/store.rs", "use sundara_node::api::Node;", "points up");
    breaks("node/src/api.rs", "use crate::{\n    net::{NetHandle, id},\n    cli::args,\n};", "points up");
    passes("node/src/services/intake.rs", "use crate::{domain::{Now, audit::Epochs}, net::NetHandle, store};");
    passes("node/src/cli/jobs.rs", "use super::out; use crate::api::Node;");
    breaks("node/src/stray.rs", "fn f() {}", "no floor");
}

#[test]
fn crates_know_only_what_lies_below() {
    breaks("proto/src/job.rs", "use sundara_chain::types::Neuron;", "beside or above");
    breaks("runtime/src/wasm.rs", "use sundara_node::store::Store;", "beside or above");
    breaks("runtime/src/wasm.rs", "use sundara_chain::keys;", "beside or above");
    breaks("node/src/net/cert.rs", "use sundara_runtime::JobRuntime;", "beside or above");
    breaks("node/src/domain/job.rs", "use sundara_runtime::Usage;", "beside or above");
    passes("runtime/src/wasm.rs", "use sundara_proto::id::EnvId;");
    passes("node/src/services/executor.rs", "use sundara_runtime::JobRuntime;");
}

#[test]
fn ports_do_not_know_each_other() {
    breaks("node/src/net/dht.rs", "use crate::store::SharedStore;", "ports never");
    breaks("node/src/store/disk.rs", "use crate::net::NetHandle;", "ports never");
    breaks("node/src/blobs.rs", "fn f(s: &crate::store::SharedStore) {}", "ports never");
    passes("node/src/net/dht.rs", "use crate::net::id; use super::gossip;");
}

#[test]
fn services_do_not_know_each_other() {
    breaks("node/src/services/intake.rs", "use super::dispatch::Machine;", "never import one another");
    breaks("node/src/services/dispatch/live.rs", "use super::super::audit::Order;", "never import one another");
    breaks("node/src/services/miner.rs", "use crate::services::executor::Run;", "never import one another");
    breaks("node/src/services/miner.rs", "use crate::services::registry::Books;", "never import one another");
    breaks("node/src/services/work/pool.rs", "use crate::services::directory::Directory;", "never import one another");
    passes("node/src/services/miner.rs", "use crate::services::registry::{LocalModel, RegistryHandle};");
    passes("node/src/services/miner.rs", "use super::work::pool::Pool; use super::EntrySender;");
    passes("node/src/services/miner/log.rs", "use super::admission::Decline; use crate::services::EntrySender;");
}

#[test]
fn people_touch_what_is_theirs() {
    breaks("node/src/http/routes.rs", "use crate::store::Store;", "may not touch");
    breaks("node/src/http.rs", "use crate::services::jobs;", "may not touch");
    breaks("node/src/cli/jobs.rs", "use crate::net::NetHandle;", "may not touch");
    passes("node/src/cli/node.rs", "use crate::builder::Builder; use crate::presets::Role;");
    passes("node/src/http/routes.rs", "use crate::api::Node; use super::error::Problem;");
}

#[test]
fn roles_tasks_and_form() {
    breaks("node/src/services/adverts.rs", "if role == Role::Miner {}", "names a role");
    passes("node/src/presets.rs", "if role == Role::Miner {}");
    breaks("node/src/net/rpc.rs", "tokio::spawn(f());", "service.rs");
    breaks("node/src/net/rpc.rs", "let (tx, rx) = mpsc::unbounded_channel();", "bounded");
    passes("node/src/service.rs", "tokio::spawn(f());");
    assert_eq!(check(&[Source::new("proto/src/x.rs", "use bytes::Bytes;")]).len(), 1, "no opening");
    breaks("proto/src/x.rs", &"// line\n".repeat(walls::LINES_MAX), "lines");
    passes("proto/src/x.rs", &format!("#[cfg(test)]\nmod tests {{\n{}}}", "// line\n".repeat(walls::LINES_MAX)));
}

#[test]
fn files_of_test_modules_are_not_held_to_the_walls() {
    let parent = Source::new("node/src/domain/x.rs", "//! x\n#[cfg(test)]\npub(crate) mod kit;\nmod real;");
    let kit = Source::new("node/src/domain/x/kit.rs", "use tokio::time;");
    let below = Source::new("node/src/domain/x/kit/more.rs", "use tokio::time;");
    assert_eq!(check(&[parent.clone(), kit, below]), []);
    let attributed = "//! y\n#[cfg(all(test, feature = \"x\"))]\n#[allow(dead_code)]\nmod kit;\n";
    let kit = Source::new("node/src/domain/y/kit.rs", "use tokio::time;");
    assert_eq!(check(&[Source::new("node/src/domain/y.rs", attributed), kit]), []);
    assert_eq!(check(&[Source::new("node/src/domain/z/tests.rs", "use tokio::time;")]), []);
    let real = Source::new("node/src/domain/x/real.rs", "//! real\nuse tokio::time;");
    assert_eq!(check(&[parent, real]).len(), 1);
}

#[test]
fn sources_are_read_as_rust() {
    let text = "let s = \"a // b\"; /* x /* y */ z */ let c = '\"'; let r = r#\"tokio \"q\"#; fn f<'a>(x: &'a str) {} b'\\'' ok";
    let code = blank(text);
    for gone in ["a // b", "x", "tokio", "\""] {
        assert!(!code.replace("&'a str", "").replace("(x", "").contains(gone), "{gone} in {code}");
    }
    for kept in ["let s", "let c", "fn f<'a>", "ok"] {
        assert!(code.contains(kept), "{kept} in {code}");
    }
    let source = Source::new("node/src/a/b.rs", "use crate::{x::{self, y::Z}, w as v};\nfn f() { super::q::r() }");
    let paths: Vec<(usize, String)> =
        named_paths(&source, "sundara_node").into_iter().map(|n| (n.line, n.path.join("::"))).collect();
    let expected = [(1, "x"), (1, "x::y::Z"), (1, "w"), (2, "a::q::r")];
    assert_eq!(paths, expected.map(|(line, path)| (line, path.to_owned())));
}
