//! Warm images: equal to init and start in one instance, whatever the cache has been through.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use bytes::Bytes;
use common::{command, comparable, request, run, setup, wasm};
use sundara_runtime::{
    Artifact, Execution, ExecutionRequest, InitFault, InvalidModule, JobRuntime, Outcome, Setup, WasmConfig,
    WasmRuntime, WasmTarget,
};

/// Init reads `/model/w` into memory, draws randomness, grows the memory and moves a global; the start writes all of
/// it, with its own randomness and clock.
const GUEST: &str = r#"
(global $moved (mut i64) (i64.const 1))
(data (i32.const 1072) "model/w")
(func (export "init")
  (drop (memory.grow (i32.const 3)))
  (i64.store (i32.const 2048) (i64.extend_i32_u (call $read (call $open (i32.const 1072) (i32.const 7)))))
  (drop (call $random_get (i32.const 2056) (i32.const 32)))
  (drop (call $clock_time_get (i32.const 1) (i64.const 0) (i32.const 2088)))
  (call $write (i32.const 2048) (i32.const 8))
  (i32.store (i32.const 262144) (i32.const 99))
  (global.set $moved (i64.const 42)))
(func $main
  (i64.store (i32.const 2096) (global.get $moved))
  (drop (call $random_get (i32.const 2104) (i32.const 32)))
  (drop (call $clock_time_get (i32.const 1) (i64.const 0) (i32.const 2136)))
  (i32.store (i32.const 2144) (memory.size))
  (i32.store (i32.const 2148) (memory.grow (i32.const 1)))
  (call $write (i32.const 2048) (i32.const 104))
  (call $write (i32.const 65536) (i32.const 1000))
  (call $write (i32.const 262144) (i32.const 4))
  (call $pump (i32.const 0)))
"#;
/// The same program with an instruction that wizer refuses, so that init runs in every run.
const COLD: &str = "(table 1 funcref) (func $never (table.set (i32.const 0) (ref.null func)))";

fn guest(directory: &Path, body: &str) -> Setup {
    let content = vec![5_u8; 50_000];
    let path = directory.join("w");
    std::fs::write(&path, &content).unwrap();
    let mut setup = setup(command(body));
    setup.artifacts.push(Artifact { name: "w".into(), digest: *blake3::hash(&content).as_bytes(), path });
    setup.init = Some("init".into());
    setup
}

fn cached(directory: &Path, target: WasmTarget) -> WasmRuntime {
    let cache_dir = Some(directory.to_owned());
    WasmRuntime::new(WasmConfig { target, workers: 1, cache_dir, ..WasmConfig::default() }).unwrap()
}

async fn answer(runtime: &dyn JobRuntime, request: ExecutionRequest) -> (Execution, Bytes) {
    let (execution, output) = run(runtime, request).await;
    assert_eq!(execution.outcome, Outcome::Completed, "{:?}", execution.stderr_tail);
    (execution, output)
}

#[tokio::test]
async fn warm_equals_cold_bit_for_bit() {
    let directory = tempfile::tempdir().unwrap();
    let cache = tempfile::tempdir().unwrap();
    let ask = |body: &str| request(guest(directory.path(), body), b"input", "");
    let native = wasm(WasmTarget::Native);
    let (warm, output) = answer(&native, ask(GUEST)).await;
    // The image, again, from memory; then made anew, interpreted, and through a disk.
    let (again, repeated) = answer(&native, ask(GUEST)).await;
    assert_eq!((comparable(&warm), &output), (comparable(&again), &repeated));
    let (pulley, interpreted) = answer(&wasm(WasmTarget::Pulley), ask(GUEST)).await;
    assert_eq!((comparable(&warm), &output), (comparable(&pulley), &interpreted));
    for _ in 0..2 {
        let (disk, mapped) = answer(&cached(cache.path(), WasmTarget::Native), ask(GUEST)).await;
        assert_eq!((comparable(&warm), &output), (comparable(&disk), &mapped));
    }
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 3, "one image, its hash, the key");

    // The cold program differs by a table and a function, hence in its environment and its init randomness.
    let (cold, in_one) = answer(&native, ask(&format!("{GUEST}{COLD}"))).await;
    let (cold_pulley, interpreted) = answer(&wasm(WasmTarget::Pulley), ask(&format!("{GUEST}{COLD}"))).await;
    assert_eq!((comparable(&cold), &in_one), (comparable(&cold_pulley), &interpreted));
    assert_eq!((cold.usage.fuel, cold.usage.peak_memory_bytes), (warm.usage.fuel, warm.usage.peak_memory_bytes));
    assert_eq!((&in_one[..8], &in_one[40..]), (&output[..8], &output[40..]));
    assert_ne!(in_one[8..40], output[8..40]);
    assert_eq!(output.len(), 104 + 1000 + 4 + 5);
    assert_eq!(output[..8], 50_000_u64.to_le_bytes());
}

#[tokio::test]
async fn a_damaged_or_foreign_image_is_never_loaded() {
    let directory = tempfile::tempdir().unwrap();
    let (cache, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ask = || request(guest(directory.path(), GUEST), b"", "");
    let (_, expected) = answer(&cached(cache.path(), WasmTarget::Native), ask()).await;
    let code = std::fs::read_dir(cache.path()).unwrap().map(|entry| entry.unwrap().path());
    let code = code.into_iter().find(|path| path.extension().is_some_and(|it| it == "cwasm")).unwrap();
    let whole = std::fs::read(&code).unwrap();

    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    for damaged in [flipped, whole[..whole.len() / 2].to_vec(), Vec::new(), vec![0; whole.len()]] {
        std::fs::write(&code, damaged).unwrap();
        let (_, output) = answer(&cached(cache.path(), WasmTarget::Native), ask()).await;
        assert_eq!(output, expected);
        assert_eq!(std::fs::read(&code).unwrap().len(), whole.len(), "it was made again");
    }
    // Another node's files, hash and all, are made under another key.
    answer(&cached(other.path(), WasmTarget::Native), ask()).await;
    for name in [code.clone(), code.with_extension("mac")] {
        std::fs::write(other.path().join(name.file_name().unwrap()), b"poison").unwrap();
        std::fs::copy(&name, other.path().join(name.file_name().unwrap())).unwrap();
    }
    let (_, output) = answer(&cached(other.path(), WasmTarget::Native), ask()).await;
    assert_eq!(output, expected);
    // The interpreter keeps its own code; the same name with other settings is refused by the engine and made again.
    let (_, output) = answer(&cached(cache.path(), WasmTarget::Pulley), ask()).await;
    assert_eq!(output, expected);
}

#[tokio::test]
async fn the_cache_is_bounded() {
    let cache = tempfile::tempdir().unwrap();
    let cache_dir = Some(cache.path().to_owned());
    let settings = WasmConfig { workers: 1, cache_dir, cache_bytes_max: 1, programs_max: 2, ..WasmConfig::default() };
    let runtime = WasmRuntime::new(settings).unwrap();
    for code in 0..6 {
        let body = format!("(func $main (call $proc_exit (i32.const {code})))");
        run(&runtime, request(setup(command(&body)), b"", "")).await;
    }
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 3, "the newest code, its hash, the key");
}

#[tokio::test]
async fn a_failing_init_is_an_outcome() {
    let directory = tempfile::tempdir().unwrap();
    for (init, fault) in [
        ("unreachable", InitFault::Trap),
        ("(call $proc_exit (i32.const 0))", InitFault::Exit),
        (
            "(loop $l (br_if $l (i32.ne (memory.grow (i32.const 1)) (i32.const -1)))) unreachable",
            InitFault::MemoryLimit,
        ),
    ] {
        for cold in ["", COLD] {
            let body = format!(r#"(func (export "init") {init}) (func $main) {cold}"#);
            for target in [WasmTarget::Native, WasmTarget::Pulley] {
                let (execution, _) = run(&wasm(target), request(guest(directory.path(), &body), b"", "")).await;
                assert_eq!(execution.outcome, Outcome::InitFailed(fault), "{init} {cold}");
                assert!(execution.digest().is_some());
            }
        }
    }
    let (execution, _) =
        run(&wasm(WasmTarget::Native), request(guest(directory.path(), "(func $main)"), b"", "")).await;
    assert_eq!(execution.outcome, Outcome::InvalidModule(InvalidModule::NoEntry));
}

#[tokio::test]
async fn a_component_starts_warm_too() {
    let text = r#"(component
        (core module $m (global $g (mut i32) (i32.const 1)) (memory (export "memory") 1)
            (func (export "init") (global.set $g (i32.const 0)) (i32.store (i32.const 8) (i32.const 5)))
            (func (export "run") (result i32)
                (if (i32.ne (i32.load (i32.const 8)) (i32.const 5)) (then unreachable)) (global.get $g)))
        (core instance $i (instantiate $m))
        (func (export "init") (canon lift (core func $i "init")))
        (func (export "work") (result (result)) (canon lift (core func $i "run"))))"#;
    let mut setup = setup(common::module(text));
    let mut outcomes = Vec::new();
    for init in [None, Some("init".to_owned())] {
        setup.init = init;
        let mut job = request(setup.clone(), b"", "");
        job.entry = "work".into();
        let (native, _) = run(&wasm(WasmTarget::Native), job.clone()).await;
        let (pulley, _) = run(&wasm(WasmTarget::Pulley), job).await;
        assert_eq!(comparable(&native), comparable(&pulley));
        outcomes.push(native.outcome);
    }
    assert_eq!(outcomes[0], Outcome::Trap(sundara_runtime::TrapKind::Unreachable));
    assert_eq!(outcomes[1], Outcome::Completed);
}
