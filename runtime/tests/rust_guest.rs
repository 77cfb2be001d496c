//! A guest of Rust's standard library, as a command and as a component: what it sees is what the suite says.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::Command;

use bytes::Bytes;
use common::{comparable, component, request, run, setup, wasm};
use sundara_runtime::{Artifact, Execution, Outcome, Setup, TrapKind, WasmTarget};

/// Compiles the guest; `None` where the toolchain lacks the target.
fn compile(directory: &Path) -> Option<Vec<u8>> {
    let libraries = Command::new("rustc")
        .args(["--print", "target-libdir", "--target", "wasm32-wasip1"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let libraries = String::from_utf8(libraries.stdout).unwrap();
    if !libraries.trim_end().lines().last().is_some_and(|path| Path::new(path).is_dir()) {
        return None;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guests/world.rs");
    let output = directory.join("world.wasm");
    let status = Command::new("rustc")
        .args(["--edition", "2024", "--target", "wasm32-wasip1", "-O", "-C", "panic=abort", "-o"])
        .args([output.as_path(), source.as_path()])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(status.success(), "rustc for wasm32-wasip1");
    Some(std::fs::read(output).unwrap())
}

fn guest(wasm: &[u8], directory: &Path, init: bool) -> Setup {
    let content = vec![2; 500_000];
    let path = directory.join("weights");
    std::fs::write(&path, &content).unwrap();
    let mut setup = setup(wasm.to_vec());
    let digest = *blake3::hash(&content).as_bytes();
    setup.artifacts.push(Artifact { name: "deep/weights".into(), digest, path });
    setup.init = init.then(|| "init".into());
    setup
}

async fn both(setup: Setup, input: &str) -> (Execution, Bytes) {
    let request = request(setup, input.as_bytes(), "the parameters");
    let (native, output) = run(&wasm(WasmTarget::Native), request.clone()).await;
    let (pulley, interpreted) = run(&wasm(WasmTarget::Pulley), request).await;
    assert_eq!(comparable(&native), comparable(&pulley));
    assert_eq!(output, interpreted);
    assert_eq!(&native.stderr_tail[..18], b"to standard error\n", "{:?}", native.stderr_tail);
    (native, output)
}

#[tokio::test]
async fn the_standard_library_sees_a_constant_world() {
    let directory = tempfile::tempdir().unwrap();
    let Some(command) = compile(directory.path()) else {
        eprintln!("skipped: no target wasm32-wasip1 (`rustup target add wasm32-wasip1`)");
        return;
    };
    let (cold, output) = both(guest(&command, directory.path(), false), "hello").await;
    assert_eq!(cold.outcome, Outcome::Completed);
    let text = String::from_utf8(output.to_vec()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "warm false weights 1000000 input hello");
    assert_eq!(lines[1], "since init 1µs slept 1000.000001s wall Ok(1767225600s)");
    assert_eq!(
        lines[4..],
        [
            r#"seed Ok("0") params Ok("the parameters")"#,
            r#"args ["job"] vars []"#,
            r#"/: Ok(["/job", "/model"])"#,
            r#"/job: Ok(["/job/params", "/job/seed"])"#,
            r#"/model: Ok(["/model/deep"])"#,
            r#"/model/deep: Ok(["/model/deep/weights"])"#,
            "/etc: Err(NotFound)",
            "size 500000 file true modified Ok(SystemTime { tv_sec: 1767225600, tv_nsec: 0 })",
            "write Err(ReadOnlyFilesystem)",
            "remove Err(ReadOnlyFilesystem)",
        ]
    );

    // Warm, all but what init decided is the same, and only the start is paid for.
    let (warm, output) = both(guest(&command, directory.path(), true), "hello").await;
    let warm_text = String::from_utf8(output.to_vec()).unwrap();
    let warm_lines: Vec<&str> = warm_text.lines().collect();
    assert_eq!(warm_lines[0], "warm true weights 1000000 input hello");
    assert_eq!(warm_lines[1], "since init 3600s slept 1000.000001s wall Ok(1767225600s)");
    assert_ne!(warm_lines[2], lines[2]);
    assert_eq!(warm_lines[4..], lines[4..]);
    assert!(warm.usage.fuel < cold.usage.fuel);

    let (execution, _) = both(guest(&command, directory.path(), true), "panic").await;
    assert_eq!(execution.outcome, Outcome::Trap(TrapKind::Unreachable));
    let (execution, _) = both(guest(&command, directory.path(), true), "exit").await;
    assert_eq!(execution.outcome, Outcome::ExitCode(3));

    // The component reaches the same world by other calls.
    let (execution, output) = both(guest(&component(&command), directory.path(), false), "hello").await;
    assert_eq!(execution.outcome, Outcome::Completed);
    assert_eq!(String::from_utf8(output.to_vec()).unwrap(), text);
}
