//! The walls of ARCHITECTURE.md as functions from sources to violations.

use super::source::{Source, is_test, lines_with, named_paths, test_files};

/// What is wrong where.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Violation {
    pub(crate) path: String,
    pub(crate) line: usize,
    pub(crate) what: String,
}

impl Violation {
    fn new(source: &Source, line: usize, what: impl Into<String>) -> Self {
        Self { path: source.path.clone(), line, what: what.into() }
    }
}

/// What a file that decides may not name: it takes time, randomness and bytes as arguments.
const AMBIENT: &[&str] = &[
    "tokio",
    "libp2p",
    "sled",
    "reqwest",
    "Instant",
    "SystemTime",
    "std::fs",
    "std::net",
    "std::thread",
    "std::env",
    "std::process",
    "thread_rng",
    "rand::rng",
    "rand::random",
    "OsRng",
    "from_os_rng",
    "getrandom",
];

/// Modules of the node by floor. A module that is not listed fails: say where it belongs.
const FLOORS: &[(&str, u8)] = &[
    ("domain", 1),
    ("sim", 1),
    ("net", 2),
    ("store", 2),
    ("blobs", 2),
    ("service", 2),
    ("services", 3),
    ("api", 3),
    ("builder", 3),
    ("presets", 3),
    ("config", 3),
    ("http", 4),
    ("testnet", 4),
    ("telemetry", 4),
    ("cli", 4),
];

/// Modules of floor 2 that hold the outside world; none knows another.
const PORTS: &[&str] = &["net", "store", "blobs"];

/// Rooms of services/ that are no services, but what services share: the order for an executor and its pool, the view of
/// the validators, and the forms in which evidence and pages are kept. They know no service themselves.
const SHARED: &[&str] = &["work", "directory", "casebook", "pages"];

/// What one service may name of another: handles, which are bounded channels that the builder wires, and what comes
/// through them.
const HANDLES: &[(&str, &[&str])] = &[
    ("registry", &["RegistryHandle", "RegistryError", "LocalModel"]),
    ("transfer", &["TransferHandle", "TransferError"]),
];

/// What the floor of people may touch besides itself.
const TOUCHED: &[(&str, &[&str])] = &[
    ("http", &["api", "config", "service"]),
    ("cli", &["api", "builder", "presets", "config", "http", "service", "telemetry", "testnet"]),
];

/// Other crates of the workspace that a part of it may name.
const CRATES: &[(&str, &[&str])] = &[
    ("proto/src/", &[]),
    ("runtime/src/", &["sundara_proto"]),
    ("chain/src/", &["sundara_proto"]),
    ("node/src/domain", &["sundara_proto"]),
    ("node/src/sim", &["sundara_proto"]),
    ("node/src/net", &["sundara_proto"]),
    ("node/src/store", &["sundara_proto"]),
    ("node/src/blobs", &["sundara_proto"]),
];

/// Longest file, its inline tests aside: style.md's "near 500".
pub(crate) const LINES_MAX: usize = 550;

/// All violations, in order.
pub(crate) fn check(sources: &[Source]) -> Vec<Violation> {
    let tests = test_files(sources);
    let mut all = Vec::new();
    for source in sources.iter().filter(|source| !is_test(&source.path, &tests)) {
        let code = source.code();
        ambient(source, &code, &mut all);
        crates(source, &code, &mut all);
        if source.path.starts_with("node/src/") {
            floors(source, &mut all);
            roles(source, &code, &mut all);
            spawns(source, &code, &mut all);
        }
        form(source, &mut all);
    }
    all.sort();
    all.dedup();
    all
}

fn decides(path: &str) -> bool {
    let mirror = ["chain/src/weights", "chain/src/yuma"];
    path.starts_with("proto/src/")
        || ["node/src/domain", "node/src/sim"].iter().chain(&mirror).any(|prefix| path.starts_with(prefix))
}

fn ambient(source: &Source, code: &str, all: &mut Vec<Violation>) {
    if !decides(&source.path) {
        return;
    }
    for word in AMBIENT {
        for line in lines_with(code, word) {
            all.push(Violation::new(source, line, format!("decides, and names `{word}`: take it as an argument")));
        }
    }
}

fn crates(source: &Source, code: &str, all: &mut Vec<Violation>) {
    let Some((_, allowed)) = CRATES.iter().find(|(prefix, _)| source.path.starts_with(prefix)) else { return };
    for krate in ["sundara_proto", "sundara_runtime", "sundara_chain", "sundara_node"] {
        if !allowed.contains(&krate) {
            for line in lines_with(code, krate) {
                all.push(Violation::new(source, line, format!("names `{krate}`, which is beside or above it")));
            }
        }
    }
}

fn floor(module: &str) -> Option<u8> {
    FLOORS.iter().find(|(name, _)| *name == module).map(|(_, floor)| *floor)
}

fn floors(source: &Source, all: &mut Vec<Violation>) {
    let module = source.module();
    let Some(own) = module.first() else { return };
    let Some(own_floor) = floor(own) else {
        all.push(Violation::new(source, 1, format!("module `{own}` has no floor: list it in tests/tidy/walls.rs")));
        return;
    };
    for named in named_paths(source, "sundara_node") {
        let Some(other) = named.path.first() else { continue };
        let Some(other_floor) = floor(other) else { continue };
        let mut complain = |what: String| all.push(Violation::new(source, named.line, what));
        if other_floor > own_floor {
            complain(format!("import points up: `{own}` is on floor {own_floor}, `{other}` on {other_floor}"));
        }
        if own != other && PORTS.contains(&own.as_str()) && PORTS.contains(&other.as_str()) {
            complain(format!("ports never import each other: `{own}` names `{other}`"));
        }
        if let Some((_, touched)) = TOUCHED.iter().find(|(name, _)| name == own)
            && own != other
            && !touched.contains(&other.as_str())
        {
            complain(format!("`{own}` may not touch `{other}`, only {}", touched.join(", ")));
        }
        if own == "services" && other == "services" {
            services(&module, &named.path, &mut complain);
        }
    }
}

/// A service names another's handle or a shared room, nothing else of another.
fn services(module: &[String], named: &[String], complain: &mut impl FnMut(String)) {
    let (Some(own), Some(other)) = (module.get(1), named.get(1)) else { return };
    // A name in services.rs itself: the channels.
    let is_room = other.chars().next().is_some_and(char::is_lowercase) && named.len() > 2;
    if own == other || !is_room {
        return;
    }
    if SHARED.contains(&other.as_str()) && !SHARED.contains(&own.as_str()) {
        return;
    }
    let handles = HANDLES.iter().find(|(name, _)| name == other).map_or(&[][..], |(_, names)| names);
    if !named.get(2).is_some_and(|name| handles.contains(&name.as_str())) {
        complain(format!("services never import one another: `{own}` names `{}`", named.join("::")));
    }
}

/// Only presets.rs says what a role is made of; people (the command line, the testnet) say which one they want.
fn roles(source: &Source, code: &str, all: &mut Vec<Violation>) {
    let people = source.module().first().and_then(|module| floor(module)) == Some(4);
    if source.path == "node/src/presets.rs" || people {
        return;
    }
    for role in ["Light", "Executor", "Miner", "Validator"] {
        for line in lines_with(code, &format!("Role::{role}")) {
            all.push(Violation::new(source, line, "names a role, which presets.rs alone does"));
        }
    }
}

/// Every task has a name, an owner and a shutdown: service.rs gives them.
fn spawns(source: &Source, code: &str, all: &mut Vec<Violation>) {
    if source.path == "node/src/service.rs" {
        return;
    }
    for word in ["tokio::spawn", "task::spawn", "unbounded_channel", "mpsc::unbounded"] {
        for line in lines_with(code, word) {
            all.push(Violation::new(
                source,
                line,
                format!("`{word}`: tasks are spawned by service.rs, queues are bounded"),
            ));
        }
    }
}

fn form(source: &Source, all: &mut Vec<Violation>) {
    if !source.text.starts_with("//!") {
        all.push(Violation::new(source, 1, "opens without saying what it owns (`//!`)"));
    }
    let lines =
        source.text.find("#[cfg(test)]\nmod ").map_or(source.text.as_str(), |at| &source.text[..at]).lines().count();
    if lines > LINES_MAX {
        all.push(Violation::new(source, lines, format!("has {lines} lines; {LINES_MAX} at most")));
    }
}

/// What stands at the top of the repository. Dotfiles are free; `target` and `shared` are no part of it.
const TOP: &[&str] = &[
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "benches",
    "chain",
    "examples",
    "node",
    "proto",
    "runtime",
    "rust-toolchain.toml",
];

/// Names at the top of the repository that do not belong there.
pub(crate) fn strays(names: &[String]) -> Vec<String> {
    let free = |name: &str| name.starts_with('.') || TOP.contains(&name) || matches!(name, "target" | "shared");
    names.iter().filter(|name| !free(name)).cloned().collect()
}

/// Crates that a manifest of a floor that decides may not depend on.
pub(crate) fn heavy_dependencies(manifest: &str) -> Vec<String> {
    const HEAVY: &[&str] = &["tokio", "libp2p", "sled", "axum", "wasmtime", "subxt", "bollard", "clap"];
    let mut section = "";
    let mut found = Vec::new();
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            section = line;
        }
        let name = line.split(['.', '=', ' ']).next().unwrap_or_default();
        if section == "[dependencies]" && HEAVY.contains(&name) {
            found.push(name.to_owned());
        }
    }
    found
}
