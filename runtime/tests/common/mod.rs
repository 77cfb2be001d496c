//! Guests in text form and helpers shared by the suites.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::sync::Arc;

use bytes::Bytes;
use sundara_runtime::{
    Execution, ExecutionRequest, JobRuntime, ModuleSource, Program, Setup, WasmConfig, WasmRuntime, WasmTarget, collect,
};

/// Imports and helpers: `$write`, `$open`, `$pump` (a descriptor to stdout), `$number` (`/job/params` as decimal).
/// Memory: 0 an iovec, 8 a count, 16 a descriptor, 1024 names, 65536 a buffer of 64 KiB.
const PRELUDE: &str = r#"
(import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_open"
  (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
(import "wasi_snapshot_preview1" "random_get" (func $random_get (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "clock_time_get" (func $clock_time_get (param i32 i64 i32) (result i32)))
(import "wasi_snapshot_preview1" "clock_res_get" (func $clock_res_get (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "poll_oneoff" (func $poll_oneoff (param i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_filestat_get" (func $fd_filestat_get (param i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_filestat_get"
  (func $path_filestat_get (param i32 i32 i32 i32 i32) (result i32)))
(import "wasi_snapshot_preview1" "fd_readdir" (func $fd_readdir (param i32 i32 i32 i64 i32) (result i32)))
(import "wasi_snapshot_preview1" "path_unlink_file" (func $path_unlink_file (param i32 i32 i32) (result i32)))
(memory (export "memory") 2)
(data (i32.const 1024) "job/params")
(data (i32.const 1040) "job/seed")
(data (i32.const 1056) "model/")
(data (i32.const 1064) "model")
(func $write_to (param $fd i32) (param $at i32) (param $length i32)
  (i32.store (i32.const 0) (local.get $at)) (i32.store (i32.const 4) (local.get $length))
  (drop (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 12))))
(func $write (param $at i32) (param $length i32) (call $write_to (i32.const 1) (local.get $at) (local.get $length)))
(func $open (param $at i32) (param $length i32) (result i32) (local $errno i32)
  (local.set $errno (call $path_open (i32.const 3) (i32.const 0) (local.get $at) (local.get $length)
    (i32.const 0) (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 16)))
  (if (local.get $errno) (then (call $proc_exit (i32.const 1))))
  (i32.load (i32.const 16)))
(func $read (param $fd i32) (result i32)
  (i32.store (i32.const 0) (i32.const 65536)) (i32.store (i32.const 4) (i32.const 65536))
  (if (call $fd_read (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8))
    (then (call $proc_exit (i32.const 2))))
  (i32.load (i32.const 8)))
(func $pump_to (param $out i32) (param $fd i32) (local $count i32)
  (loop $more
    (local.set $count (call $read (local.get $fd)))
    (if (local.get $count) (then
      (call $write_to (local.get $out) (i32.const 65536) (local.get $count))
      (br $more)))))
(func $pump (param $fd i32) (call $pump_to (i32.const 1) (local.get $fd)))
(func $number (result i32) (local $at i32) (local $end i32) (local $value i32)
  (local.set $end (i32.add (i32.const 65536) (call $read (call $open (i32.const 1024) (i32.const 10)))))
  (local.set $at (i32.const 65536))
  (block $done (loop $digit
    (br_if $done (i32.eq (local.get $at) (local.get $end)))
    (local.set $value (i32.add (i32.mul (local.get $value) (i32.const 10))
      (i32.sub (i32.load8_u (local.get $at)) (i32.const 48))))
    (local.set $at (i32.add (local.get $at) (i32.const 1)))
    (br $digit)))
  (local.get $value))
"#;

/// A command: the prelude and a body that defines `$main`.
pub fn command(body: &str) -> Vec<u8> {
    wat::parse_str(format!(r#"(module {PRELUDE} {body} (export "_start" (func $main)))"#)).unwrap()
}

/// A module that stands alone.
pub fn module(text: &str) -> Vec<u8> {
    wat::parse_str(text).unwrap()
}

/// The same command as a preview 2 component.
pub fn component(core: &[u8]) -> Vec<u8> {
    wit_component::ComponentEncoder::default()
        .module(core)
        .unwrap()
        .adapter(
            "wasi_snapshot_preview1",
            wasi_preview1_component_adapter_provider::WASI_SNAPSHOT_PREVIEW1_COMMAND_ADAPTER,
        )
        .unwrap()
        .encode()
        .unwrap()
}

/// The wasm counterparts of the builtin jobs, by their names.
pub fn job(name: &str) -> Vec<u8> {
    command(match name {
        "echo" => "(func $main (call $pump (i32.const 0)))",
        "stderr" => "(func $main (call $pump_to (i32.const 2) (i32.const 0)))",
        "params" => "(func $main (call $pump (call $open (i32.const 1024) (i32.const 10))))",
        "seed" => "(func $main (call $pump (call $open (i32.const 1040) (i32.const 8))))",
        "random" => {
            "(func $main (local $count i32)
               (local.set $count (call $number))
               (drop (call $random_get (i32.const 65536) (local.get $count)))
               (call $write (i32.const 65536) (local.get $count)))"
        }
        "model" => {
            // The parameters behind `model/`.
            "(func $main (local $count i32)
               (local.set $count (call $read (call $open (i32.const 1024) (i32.const 10))))
               (memory.copy (i32.const 1062) (i32.const 65536) (local.get $count))
               (call $pump (call $open (i32.const 1056) (i32.add (i32.const 6) (local.get $count)))))"
        }
        "exit" => "(func $main (call $proc_exit (call $number)))",
        "trap" => "(func $main unreachable)",
        "spin" => "(func $main (loop $again (br $again)))",
        "flood" => "(func $main (loop $again (call $write (i32.const 65536) (i32.const 65536)) (br $again)))",
        "alloc" => {
            "(func $main (loop $again
               (br_if $again (i32.ne (memory.grow (i32.const 1)) (i32.const -1))) unreachable))"
        }
        other => panic!("no guest named {other}"),
    })
}

/// A wasm setup.
pub fn setup(bytes: Vec<u8>) -> Setup {
    Setup::new(Program::Wasm(ModuleSource::inline(bytes)))
}

/// A request with input and parameters.
pub fn request(setup: Setup, input: &[u8], params: &str) -> ExecutionRequest {
    let mut request = ExecutionRequest::new(Arc::new(setup), Bytes::copy_from_slice(input));
    request.params = Bytes::copy_from_slice(params.as_bytes());
    request
}

/// A wasm runtime without a disk cache.
pub fn wasm(target: WasmTarget) -> WasmRuntime {
    WasmRuntime::new(WasmConfig { target, workers: 2, ..WasmConfig::default() }).unwrap()
}

/// Runs a request and gathers its output.
pub async fn run(runtime: &dyn JobRuntime, request: ExecutionRequest) -> (Execution, Bytes) {
    collect(runtime, request, Default::default()).await.unwrap()
}

/// What two machines of one environment must agree on.
pub fn comparable(execution: &Execution) -> (sundara_runtime::Outcome, Option<[u8; 32]>, u64, u64) {
    (execution.outcome, execution.output_digest, execution.usage.fuel, execution.usage.peak_memory_bytes)
}
