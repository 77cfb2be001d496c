//! A guest of Rust's standard library that prints everything it can find out about its world.

use std::collections::HashMap;
use std::io::Read;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};

/// What init keeps: an order that depends on randomness, the weights, a moment.
static STATE: OnceLock<(HashMap<u32, u32>, Vec<u8>, Instant)> = OnceLock::new();

#[unsafe(no_mangle)]
pub extern "C" fn init() {
    let weights = std::fs::read("/model/deep/weights").unwrap();
    let _ = STATE.set(((0..100).map(|at| (at, at * at)).collect(), weights, Instant::now()));
}

fn main() {
    let warm = STATE.get().is_some();
    if !warm {
        init();
    }
    let (map, weights, moment) = STATE.get().unwrap();
    let mut input = String::new();
    std::io::stdin().read_to_string(&mut input).unwrap();
    let now = Instant::now();
    std::thread::sleep(Duration::from_secs(1_000));
    println!("warm {warm} weights {} input {input}", weights.iter().map(|byte| u64::from(*byte)).sum::<u64>());
    println!("since init {:?} slept {:?} wall {:?}", now - *moment, now.elapsed(), SystemTime::UNIX_EPOCH.elapsed());
    println!("order {:?}", map.keys().collect::<Vec<_>>());
    println!("fresh order {:?}", (0..20).collect::<std::collections::HashSet<_>>());
    println!("seed {:?} params {:?}", std::fs::read_to_string("/job/seed"), std::fs::read_to_string("/job/params"));
    println!("args {:?} vars {:?}", std::env::args().collect::<Vec<_>>(), std::env::vars().collect::<Vec<_>>());
    for directory in ["/", "/job", "/model", "/model/deep", "/etc"] {
        let list = std::fs::read_dir(directory).map(|entries| entries.map(|entry| entry.unwrap().path()).collect());
        println!("{directory}: {:?}", list.map_err(|error| error.kind()).map(|list: Vec<_>| list));
    }
    let status = std::fs::metadata("/model/deep/weights").unwrap();
    println!("size {} file {} modified {:?}", status.len(), status.is_file(), status.modified());
    println!("write {:?}", std::fs::write("/model/new", "x").map_err(|error| error.kind()));
    println!("remove {:?}", std::fs::remove_file("/job/seed").map_err(|error| error.kind()));
    eprintln!("to standard error");
    match input.as_str() {
        "panic" => panic!("asked to"),
        "exit" => std::process::exit(3),
        _ => {}
    }
}
