//! What a guest may try, on both code generators: the answers are the same bits, or there is no digest.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::{command, comparable, component, module, request, run, setup, wasm};
use sundara_runtime::{
    AbortReason, Artifact, Execution, ExecutionRequest, IndeterminateReason, InvalidModule, JobRuntime, ModuleBytes,
    ModuleSource, Outcome, Program, RuntimeError, Setup, TrapKind, WasmTarget, collect,
};

/// Runs one request natively and interpreted and insists on the same answer.
async fn both(request: ExecutionRequest) -> (Execution, Bytes) {
    let (native, output) = run(&wasm(WasmTarget::Native), request.clone()).await;
    let (pulley, interpreted) = run(&wasm(WasmTarget::Pulley), request).await;
    assert_eq!(comparable(&native), comparable(&pulley));
    assert_eq!((native.digest(), &output), (pulley.digest(), &interpreted));
    (native, output)
}

async fn completes(body: &str) -> Bytes {
    let (execution, output) = both(request(setup(command(body)), b"", "")).await;
    assert_eq!(execution.outcome, Outcome::Completed, "{:?}", execution.stderr_tail);
    output
}

fn words(output: &[u8]) -> Vec<u64> {
    output.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

#[tokio::test]
async fn nan_payloads_are_canonical() {
    // Payloads from operands, from infinity minus infinity, from a square root and from 0/0, scalar and vector.
    let output = completes(
        "(func $main
           (f32.store (i32.const 2048) (f32.add (f32.reinterpret_i32 (i32.const 0x7fa12345)) (f32.const 1)))
           (f32.store (i32.const 2052) (f32.sub (f32.const inf) (f32.const inf)))
           (f64.store (i32.const 2056) (f64.sqrt (f64.const -1)))
           (f64.store (i32.const 2064) (f64.div (f64.const 0) (f64.const -0)))
           (v128.store (i32.const 2072) (f32x4.mul
             (v128.const i32x4 0x7fa12345 0xffc00001 0x7f800000 0) (v128.const f32x4 1 1 0 inf)))
           (f32.store (i32.const 2088) (f32.demote_f64 (f64.reinterpret_i64 (i64.const 0x7ff4000012345678))))
           (call $write (i32.const 2048) (i32.const 44)))",
    )
    .await;
    let quiet32 = 0x7fc0_0000_u32.to_le_bytes();
    let quiet64 = 0x7ff8_0000_0000_0000_u64.to_le_bytes();
    let mut expected = [quiet32, quiet32].concat();
    expected.extend([quiet64, quiet64].concat());
    expected.extend([quiet32; 5].concat());
    assert_eq!(output[..], expected);
}

#[tokio::test]
async fn clocks_are_virtual() {
    let output = completes(
        "(func $main
           (drop (call $clock_time_get (i32.const 0) (i64.const 0) (i32.const 2048)))
           (drop (call $clock_time_get (i32.const 0) (i64.const 0) (i32.const 2056)))
           (drop (call $clock_time_get (i32.const 1) (i64.const 0) (i32.const 2064)))
           (drop (call $clock_time_get (i32.const 1) (i64.const 0) (i32.const 2072)))
           (drop (call $clock_time_get (i32.const 2) (i64.const 0) (i32.const 2080)))
           (drop (call $clock_res_get (i32.const 1) (i32.const 2088)))
           (i64.store (i32.const 2096) (i64.extend_i32_u (call $clock_res_get (i32.const 9) (i32.const 2088))))
           (call $write (i32.const 2048) (i32.const 56)))",
    )
    .await;
    let wall = 1_767_225_600_000_000_000;
    let hour = 3_600_000_000_000;
    assert_eq!(words(&output), [wall, wall, hour + 1_000, hour + 2_000, hour + 3_000, 1_000, 28]);
}

#[tokio::test]
async fn sleeping_takes_no_time_and_moves_the_clock() {
    // A relative sleep of a day on the monotonic clock; its event carries the user data.
    let output = completes(
        "(func $main
           (i64.store (i32.const 2048) (i64.const 77))
           (i32.store (i32.const 2064) (i32.const 1))
           (i64.store (i32.const 2072) (i64.const 86400000000000))
           (drop (call $poll_oneoff (i32.const 2048) (i32.const 3072) (i32.const 1) (i32.const 4096)))
           (drop (call $clock_time_get (i32.const 1) (i64.const 0) (i32.const 3080)))
           (call $write (i32.const 3072) (i32.const 16)) (call $write (i32.const 4096) (i32.const 4)))",
    )
    .await;
    let now = 3_600_000_000_000 + 86_400_000_000_000 + 1_000;
    assert_eq!(words(&output[..16]), [77, now]);
    assert_eq!(output[16..], 1_u32.to_le_bytes());
}

fn with_artifacts(bytes: Vec<u8>, directory: &std::path::Path, names: &[&str]) -> Setup {
    let mut setup = setup(bytes);
    for name in names {
        let path = directory.join(name.replace('/', "-"));
        std::fs::write(&path, name).unwrap();
        setup.artifacts.push(Artifact {
            name: (*name).into(),
            digest: *blake3::hash(name.as_bytes()).as_bytes(),
            path,
        });
    }
    setup
}

#[tokio::test]
async fn stat_and_listing_show_nothing_of_the_machine() {
    let guest = command(
        "(func $main
           (drop (call $path_filestat_get (i32.const 3) (i32.const 0) (i32.const 1064) (i32.const 5) (i32.const 2048)))
           (call $write (i32.const 2048) (i32.const 64))
           (drop (call $fd_filestat_get (call $open (i32.const 1040) (i32.const 8)) (i32.const 2048)))
           (call $write (i32.const 2048) (i32.const 64))
           (drop (call $fd_readdir (call $open (i32.const 1064) (i32.const 5))
             (i32.const 4096) (i32.const 4096) (i64.const 0) (i32.const 2048)))
           (call $write (i32.const 4096) (i32.load (i32.const 2048)))
           (i32.store (i32.const 2048) (call $path_unlink_file (i32.const 3) (i32.const 1040) (i32.const 8)))
           (call $write (i32.const 2048) (i32.const 4)))",
    );
    // Two machines: other directories, other order, other times of the files.
    let mut outputs = Vec::new();
    for names in [["b", "a", "c/d"], ["c/d", "b", "a"]] {
        let directory = tempfile::tempdir().unwrap();
        let setup = with_artifacts(guest.clone(), directory.path(), &names);
        let (execution, output) = both(request(setup, b"", "")).await;
        assert_eq!(execution.outcome, Outcome::Completed);
        outputs.push(output);
    }
    assert_eq!(outputs[0], outputs[1]);
    let output = &outputs[0];
    let wall = 1_767_225_600_000_000_000;
    assert_eq!((output[16], words(&output[40..64])), (3, vec![wall; 3]));
    assert_eq!((output[64 + 16], words(&output[64 + 32..64 + 40])), (4, vec![1]));
    let listing: Vec<u8> = output[128..output.len() - 4].to_vec();
    let mut names = Vec::new();
    let mut at = 0;
    while at < listing.len() {
        let length = u32::from_le_bytes(listing[at + 16..at + 20].try_into().unwrap()) as usize;
        names.push(String::from_utf8(listing[at + 24..at + 24 + length].to_vec()).unwrap());
        at += 24 + length;
    }
    assert_eq!(names, [".", "..", "a", "b", "c"]);
    assert_eq!(output[output.len() - 4..], 69_u32.to_le_bytes());
}

#[tokio::test]
async fn growth_at_the_cap_is_refused_at_the_same_page() {
    let mut job = request(
        setup(command(
            "(func $main
               (loop $again (br_if $again (i32.ne (memory.grow (i32.const 1)) (i32.const -1))))
               (i32.store (i32.const 2048) (memory.size))
               (call $write (i32.const 2048) (i32.const 4)))",
        )),
        b"",
        "",
    );
    job.limits.memory_bytes = (100 << 16) + 1;
    // A guest that copes with it completes.
    let (execution, output) = both(job).await;
    assert_eq!((execution.outcome, &output[..]), (Outcome::Completed, &100_u32.to_le_bytes()[..]));
    assert_eq!(execution.usage.peak_memory_bytes, 100 << 16);
    // One that starts above the cap does not start.
    let mut job = request(setup(module(r#"(module (memory 200) (func (export "_start")))"#)), b"", "");
    job.limits.memory_bytes = 100 << 16;
    assert_eq!(both(job).await.0.outcome, Outcome::MemoryLimit);
    // Beyond the module's own maximum it is no matter of the cap.
    let text = r#"(module (memory 1 2) (func (export "_start")
        (drop (memory.grow (i32.const 9))) unreachable))"#;
    let (execution, _) = both(request(setup(module(text)), b"", "")).await;
    assert_eq!(execution.outcome, Outcome::Trap(TrapKind::Unreachable));
}

#[tokio::test]
async fn deep_recursion_has_no_digest_unless_fuel_ends_it_first() {
    let guest = module(r#"(module (func $f (export "_start") (call $f)))"#);
    let mut job = request(setup(guest), b"", "");
    for target in [WasmTarget::Native, WasmTarget::Pulley] {
        let (execution, _) = run(&wasm(target), job.clone()).await;
        assert_eq!(execution.outcome, Outcome::Indeterminate(IndeterminateReason::StackOverflow));
        assert_eq!((execution.digest(), execution.output_digest), (None, None));
    }
    job.limits.fuel = 1_000;
    assert_eq!(both(job).await.0.outcome, Outcome::OutOfFuel);
}

#[tokio::test]
async fn host_calls_cost_their_bytes() {
    let guest = |bytes: u32| {
        let body = format!(
            "(func $main (drop (memory.grow (i32.const 20)))
               (drop (call $random_get (i32.const 65536) (i32.const {bytes}))))"
        );
        request(setup(command(&body)), b"", "")
    };
    let (small, _) = both(guest(1)).await;
    let (large, _) = both(guest(1_000_001)).await;
    assert_eq!(large.usage.fuel - small.usage.fuel, 1_000_000);
    let mut starved = guest(1_000_001);
    starved.limits.fuel = 500_000;
    assert_eq!(both(starved).await.0.outcome, Outcome::OutOfFuel);
    // Bulk instructions too: filling a mebibyte is not one unit.
    let text = r#"(module (memory 16) (func (export "_start")
        (memory.fill (i32.const 0) (i32.const 1) (i32.const 1048576))))"#;
    assert!(both(request(setup(module(text)), b"", "")).await.0.usage.fuel > 1 << 20);
}

#[tokio::test]
async fn bad_pointers_and_descriptors_are_error_numbers() {
    let output = completes(
        "(func $main
           (i32.store (i32.const 0) (i32.const -16)) (i32.store (i32.const 4) (i32.const 64))
           (i32.store (i32.const 2048) (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 12)))
           (i32.store (i32.const 2052) (call $fd_write (i32.const 1) (i32.const -4) (i32.const 1) (i32.const 12)))
           (i32.store (i32.const 2056) (call $fd_write (i32.const 9) (i32.const 0) (i32.const 1) (i32.const 12)))
           (i32.store (i32.const 2060) (call $random_get (i32.const 65536) (i32.const -1)))
           (i32.store (i32.const 2064) (call $poll_oneoff (i32.const 0) (i32.const 0) (i32.const -1) (i32.const 0)))
           (i32.store (i32.const 2068) (call $fd_write (i32.const 1) (i32.const 0) (i32.const -1) (i32.const 12)))
           (call $write (i32.const 2048) (i32.const 24)))",
    )
    .await;
    let numbers: Vec<u32> = output.chunks(4).map(|number| u32::from_le_bytes(number.try_into().unwrap())).collect();
    assert_eq!(numbers, [21, 21, 8, 21, 28, 28]);
}

async fn invalid(bytes: Vec<u8>) -> InvalidModule {
    let (execution, _) = both(request(setup(bytes), b"", "")).await;
    assert!(execution.digest().is_some());
    match execution.outcome {
        Outcome::InvalidModule(what) => what,
        other => panic!("{other:?}: {:?}", execution.stderr_tail),
    }
}

#[tokio::test]
async fn programs_that_run_nowhere_have_a_verdict() {
    assert_eq!(invalid(b"\0asm\x01\0\0\0\xff".to_vec()).await, InvalidModule::Malformed);
    assert_eq!(invalid(b"not wasm at all".to_vec()).await, InvalidModule::Malformed);
    for text in [
        // Threads, relaxed SIMD, 64-bit memory, several memories, tail calls: not in the language.
        r#"(module (memory 1 1 shared) (func (export "_start")))"#,
        r#"(module (func (export "_start") (drop (i8x16.relaxed_swizzle (v128.const i64x2 0 0) (v128.const i64x2 0 0)))))"#,
        r#"(module (memory i64 1) (func (export "_start")))"#,
        r#"(module (memory 1) (memory 1) (func (export "_start")))"#,
        r#"(module (func $f (export "_start") (return_call $f)))"#,
    ] {
        assert_eq!(invalid(module(text)).await, InvalidModule::Malformed, "{text}");
    }
    let import = r#"(module (import "env" "gettimeofday" (func)) (func (export "_start")))"#;
    assert_eq!(invalid(module(import)).await, InvalidModule::UnknownImport);
    let mistyped = r#"(module (import "wasi_snapshot_preview1" "fd_write" (func)) (func (export "_start")))"#;
    assert_eq!(invalid(module(mistyped)).await, InvalidModule::UnknownImport);
    assert_eq!(invalid(module("(module)")).await, InvalidModule::NoEntry);
    let argument = r#"(module (func (export "_start") (param i32)))"#;
    assert_eq!(invalid(module(argument)).await, InvalidModule::NoEntry);
    let table = r#"(module (table 70000 funcref) (func (export "_start")))"#;
    assert_eq!(invalid(module(table)).await, InvalidModule::TooLarge);
    let tables = format!(r#"(module {} (func (export "_start")))"#, "(table 1 funcref)".repeat(17));
    assert_eq!(invalid(module(&tables)).await, InvalidModule::TooLarge);
}

#[tokio::test]
async fn a_program_that_is_not_its_digest_is_the_executors_fault() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program.wasm");
    std::fs::write(&path, b"something else").unwrap();
    let runtime = wasm(WasmTarget::Native);
    for bytes in [ModuleBytes::Path(path), ModuleBytes::Inline(Bytes::from_static(b"something else"))] {
        let source = ModuleSource { digest: [1; 32], bytes };
        let answer = collect(&runtime, request(Setup::new(Program::Wasm(source)), b"", ""), Default::default()).await;
        let Err(RuntimeError::Loading(fault)) = answer else { panic!("{answer:?}") };
        assert!(matches!(*fault, RuntimeError::DigestMismatch { .. }));
    }
}

#[tokio::test]
async fn entries_by_name_return_exit_codes() {
    let text = r#"(module (global $g (mut i32) (i32.const 0))
        (func (export "_initialize") (global.set $g (i32.add (global.get $g) (i32.const 7))))
        (func (export "gradient") (result i32) (global.get $g))
        (func (export "plain")))"#;
    let mut job = request(setup(module(text)), b"", "");
    job.entry = "gradient".into();
    assert_eq!(both(job.clone()).await.0.outcome, Outcome::ExitCode(7));
    job.entry = "plain".into();
    assert_eq!(both(job.clone()).await.0.outcome, Outcome::Completed);
    for missing in ["_initialize", "absent", ""] {
        job.entry = missing.into();
        assert_eq!(both(job.clone()).await.0.outcome, Outcome::InvalidModule(InvalidModule::NoEntry));
    }
}

#[tokio::test]
async fn a_flood_without_a_reader_ends_at_the_wall_limit() {
    let flood = "(func $main (loop $again (call $write (i32.const 65536) (i32.const 65536)) (br $again)))";
    let mut job = request(setup(command(flood)), b"", "");
    job.limits.wall = Duration::from_millis(50);
    job.limits.fuel = u64::MAX / 4;
    job.limits.output_bytes = u64::MAX;
    let (sink, _held) = sundara_runtime::OutputSink::channel();
    let execution = wasm(WasmTarget::Native).run(job, sink, Default::default()).await.unwrap();
    assert_eq!(execution.outcome, Outcome::Aborted(AbortReason::WallClock));
}

#[tokio::test]
async fn limits_above_the_configuration_are_declined() {
    let mut job = request(setup(module(r#"(module (func (export "_start")))"#)), b"", "");
    job.limits.memory_bytes = 5 << 30;
    let runtime = wasm(WasmTarget::Native);
    let answer = collect(&runtime, job.clone(), Default::default()).await;
    assert!(matches!(answer, Err(RuntimeError::InvalidRequest(_))), "{answer:?}");
    let settings = sundara_runtime::WasmConfig { memory_budget_bytes: 1 << 20, ..Default::default() };
    let small = sundara_runtime::WasmRuntime::new(settings).unwrap();
    job.limits.memory_bytes = 2 << 20;
    let answer = collect(&small, job.clone(), Default::default()).await;
    assert!(matches!(answer, Err(RuntimeError::LimitTooHigh { asked, .. }) if asked == 2 << 20), "{answer:?}");
    job.limits.memory_bytes = 1 << 20;
    assert_eq!(run(&small, job).await.0.outcome, Outcome::Completed);
}

#[tokio::test]
async fn components_agree_with_commands_and_between_generators() {
    let directory = tempfile::tempdir().unwrap();
    let core = command(
        "(func $main
           (drop (call $clock_time_get (i32.const 0) (i64.const 0) (i32.const 2048)))
           (drop (call $path_filestat_get (i32.const 3) (i32.const 0) (i32.const 1064) (i32.const 5) (i32.const 3072)))
           (i64.store (i32.const 2056) (i64.load8_u (i32.const 3088)))
           (drop (call $random_get (i32.const 2064) (i32.const 32)))
           (i64.store (i32.const 2096) (i64.extend_i32_u
             (call $path_unlink_file (i32.const 3) (i32.const 1040) (i32.const 8))))
           (call $write (i32.const 2048) (i32.const 56))
           (call $pump (call $open (i32.const 1040) (i32.const 8)))
           (call $pump (i32.const 0)))",
    );
    let ask = |bytes: Vec<u8>| request(with_artifacts(bytes, directory.path(), &["b", "a/c"]), b"input", "");
    let (_, from_core) = both(ask(core.clone())).await;
    let (execution, from_component) = both(ask(component(&core))).await;
    assert_eq!(execution.outcome, Outcome::Completed, "{:?}", execution.stderr_tail);
    assert_eq!(from_component, from_core);
}

#[tokio::test]
async fn an_import_that_does_not_exist_traps_when_a_component_calls_it() {
    let text = r#"(component
        (import "wasi:sockets/instance-network@0.2.0" (instance $network
            (export "network" (type $network (sub resource)))
            (export "instance-network" (func (result (own $network))))))
        (core func $open (canon lower (func $network "instance-network")))
        (core module $m (import "n" "open" (func $open (result i32)))
            (func (export "run") (result i32) (drop (call $open)) (i32.const 0))
            (func (export "idle") (result i32) (i32.const 0)))
        (core instance $i (instantiate $m (with "n" (instance (export "open" (func $open))))))
        (func $run (result (result)) (canon lift (core func $i "run")))
        (func (export "call") (result (result)) (canon lift (core func $i "run")))
        (func (export "idle") (result (result)) (canon lift (core func $i "idle")))
        (instance (export "wasi:cli/run@0.2.0") (export "run" (func $run))))"#;
    let mut job = request(setup(module(text)), b"", "");
    for (entry, outcome) in [
        ("_start", Outcome::Trap(TrapKind::HostCall)),
        ("call", Outcome::Trap(TrapKind::HostCall)),
        ("idle", Outcome::Completed),
        ("absent", Outcome::InvalidModule(InvalidModule::NoEntry)),
    ] {
        job.entry = entry.into();
        let (execution, _) = both(job.clone()).await;
        assert_eq!(execution.outcome, outcome, "{entry}: {:?}", execution.stderr_tail);
    }
}
