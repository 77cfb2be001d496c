//! Publishing takes the memory of a few buffers, however large the model is. In a process of its own, since it looks at the
//! whole process. `SUNDARA_PUBLISH_GIB` chooses the size; the full run takes 5.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Instant;

use sundara_node::Node;

const SIZE_ENV: &str = "SUNDARA_PUBLISH_GIB";
/// What the process may grow by: buffers, the tasks' stacks, and what the allocator keeps.
const GROWTH_KIB_MAX: u64 = 64 << 10;

/// A field of this process's status, in KiB.
fn kib(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A model whose only artifact is `bytes` long and takes no room on the disk until it is copied.
fn write_model(dir: &Path, bytes: u64) {
    std::fs::write(dir.join("empty.wasm"), wat::parse_str("(module (func (export \"_start\")))").unwrap()).unwrap();
    std::fs::File::create(dir.join("weights.bin")).unwrap().set_len(bytes).unwrap();
    let manifest =
        "name = \"large\"\nversion = 1\nprogram = \"empty.wasm\"\nartifacts = [\"weights.bin\"]\nlicense = \"MIT\"\n";
    std::fs::write(dir.join("model.toml"), manifest).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn publishing_takes_no_more_memory_for_a_larger_model() {
    let gib = std::env::var(SIZE_ENV).map_or(1, |gib| gib.parse::<u64>().unwrap());
    let (source, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_model(source.path(), gib << 30);
    let node = Node::builder().data_dir(data.path()).loopback().start().await.unwrap();
    // The peak begins anew at what is in use.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let (before, begun) = (kib("VmRSS"), Instant::now());
    let published = node.models().publish(source.path()).await.unwrap();
    let (peak, wall) = (kib("VmHWM"), begun.elapsed());
    assert!(published.size.0 > gib << 30);
    let grown = peak.saturating_sub(before);
    println!("published {gib} GiB in {:.1} s: from {before} KiB to {peak} KiB at most", wall.as_secs_f64());
    assert!(grown <= GROWTH_KIB_MAX, "grew by {grown} KiB");
    node.shutdown().await;
}
