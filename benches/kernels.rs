//! The loops of map-reduce, one core, beside a stream triad in the same run.
//!
//! `cargo bench -p sundara-proto --bench kernels`: it needs nothing of the node, so it is built with the protocol alone.
//!
//! First a table: what each kernel moves a second (bytes read and written), and that as a part of what the triad moves,
//! with this processor's vector unit and without. That tells a loop that is vectorised from one that is not. The target is
//! half. A run is one chunk, and the next run another, all of them together larger than the caches; what counts is the
//! fastest of many, since whatever else the machine does only slows them. Then criterion's own measurements, of one chunk
//! that stays in the cache. `-- --table` leaves them out.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use sundara_proto::id::Digest;
use sundara_proto::rules::round::dtype::{Compress, Dtype, Wire};
use sundara_proto::rules::round::exact::{self, ExactOp};
use sundara_proto::rules::round::fixed;
use sundara_proto::rules::round::layout::blocks;
use sundara_proto::rules::round::tags::TagKey;
use sundara_proto::rules::round::tree::ChunkTree;
use sundara_proto::rules::round::{Level, level};

/// Elements of a chunk.
const CHUNK: usize = 1 << 20;
/// Chunks that the table goes through: 192 MiB and more.
const CHUNKS: usize = 12;
/// Runs of which the fastest counts.
const RUNS: usize = 120;

fn tensor(dtype: Dtype, elements: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let values = (0..elements).map(|_| next());
    match dtype {
        Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
        // The upper half of a float is a bf16, and as f16 finite too where its exponent is small.
        _ => values.flat_map(|x| ((x.to_bits() >> 16) as u16 & 0xbfff).to_le_bytes()).collect(),
    }
}

/// The fastest of many runs over one chunk after the other, as bytes a second.
fn fastest<T>(chunks: &mut [T], bytes: usize, mut run: impl FnMut(&mut T)) -> f64 {
    let mut least = Duration::MAX;
    for n in 0..RUNS {
        let chunk = &mut chunks[n % CHUNKS];
        let begin = Instant::now();
        run(chunk);
        least = least.min(begin.elapsed());
    }
    bytes as f64 / least.as_secs_f64()
}

fn triad() -> f64 {
    let of = |x| vec![x; CHUNK / 2];
    let mut arrays: Vec<[Vec<f64>; 3]> = (0..CHUNKS).map(|_| [of(0.0), of(1.0), of(2.0)]).collect();
    fastest(&mut arrays, CHUNK / 2 * 24, |[a, b, c]| {
        let factor = black_box(3.0);
        for ((a, b), c) in a.iter_mut().zip(&*b).zip(&*c) {
            *a = b + factor * c;
        }
        black_box(a);
    })
}

/// Everything that the kernels work on.
struct Field {
    wire: Wire,
    dtype: Dtype,
    tensor: Vec<u8>,
    exponents: Vec<u8>,
    words: Vec<u8>,
    sum: Vec<u8>,
    out: Vec<u8>,
    residual: Vec<f32>,
    key: TagKey,
    tags: Vec<u64>,
}

impl Field {
    fn new(dtype: Dtype, compress: Compress, members: usize, elements: usize) -> Self {
        let wire = Wire::of(dtype, compress, members).expect("a wire");
        let tensor = tensor(dtype, elements);
        let exponents = fixed::block_exponents(wire, dtype, &tensor, None).expect("finite");
        assert_eq!(exponents.len(), blocks(elements));
        let mut words = vec![0; elements * wire.input().len()];
        fixed::quantise(wire, dtype, &tensor, &exponents, &mut words, None);
        let sum = vec![0; elements * wire.output().len()];
        let out = tensor.clone();
        let key = TagKey::new(&Digest([7; 32]));
        let tags = Vec::with_capacity(elements / 4_096 + 1);
        Self { wire, dtype, tensor, exponents, words, sum, out, residual: vec![0.0; elements], key, tags }
    }
}

/// A kernel: its name, the bytes that it moves, what it does.
type Kernel = (&'static str, fn(&Field) -> usize, fn(&mut Field, Level));

const KERNELS: [Kernel; 9] = [
    (
        "block exponents",
        |f| f.tensor.len(),
        |f, _| {
            black_box(fixed::block_exponents(f.wire, f.dtype, &f.tensor, None).expect("finite"));
        },
    ),
    (
        "quantise",
        |f| f.tensor.len() + f.words.len(),
        |f, level| {
            fixed::quantise_at(level, f.wire, f.dtype, &f.tensor, &f.exponents, &mut f.words, None);
        },
    ),
    (
        "quantise, error feedback",
        |f| f.tensor.len() + f.words.len() + 8 * f.residual.len(),
        |f, level| {
            fixed::quantise_at(level, f.wire, f.dtype, &f.tensor, &f.exponents, &mut f.words, Some(&mut f.residual));
        },
    ),
    (
        "check range",
        |f| f.words.len(),
        |f, _| {
            black_box(fixed::check_range(f.wire.input(), &f.words, f.wire.q().into()));
        },
    ),
    (
        "sum",
        |f| f.words.len() + 2 * f.sum.len(),
        |f, level| {
            fixed::sum_into_at(level, f.wire, &mut f.sum, &f.words);
        },
    ),
    (
        "tags of inputs",
        |f| f.words.len(),
        |f, level| {
            f.tags.clear();
            f.key.tags_at(level, &f.words, f.wire.input(), &mut f.tags);
        },
    ),
    (
        "tags of outputs",
        |f| f.sum.len(),
        |f, level| {
            f.tags.clear();
            f.key.tags_at(level, &f.sum, f.wire.output(), &mut f.tags);
        },
    ),
    (
        "dequantise, mean of 3",
        |f| f.sum.len() + f.out.len(),
        |f, _| {
            fixed::dequantise(f.wire, f.dtype, &f.sum, &f.exponents, 3, &mut f.out).expect("in range");
        },
    ),
    (
        "root",
        |f| f.words.len(),
        |f, _| {
            black_box(ChunkTree::of(&f.words));
        },
    ),
];

const FIELDS: [(&str, Dtype, Compress, usize); 5] = [
    ("f32 as i32", Dtype::F32, Compress::None, 4),
    ("f32 as i32, summed as i64", Dtype::F32, Compress::None, 32),
    ("f32 as i16", Dtype::F32, Compress::Bf16, 4),
    ("f32 as i8", Dtype::F32, Compress::Int8, 4),
    ("bf16 as i16", Dtype::Bf16, Compress::None, 4),
];

fn table() {
    let triad = triad();
    println!("vector unit: {}; stream triad: {:.2} GB/s", level().name(), triad / 1e9);
    println!("{:<26} {:<26} {:>7} {:>9} {:>9}", "words", "kernel", "GB/s", "of triad", "portable");
    for (name, dtype, compress, members) in FIELDS {
        let mut fields: Vec<Field> = (0..CHUNKS).map(|_| Field::new(dtype, compress, members, CHUNK)).collect();
        for (kernel, bytes, run) in KERNELS {
            let bytes = bytes(&fields[0]);
            let rate = fastest(&mut fields, bytes, |field| run(field, level()));
            let portable = fastest(&mut fields, bytes, |field| run(field, Level::PORTABLE));
            let (gigabytes, part) = (rate / 1e9, rate / triad);
            println!("{name:<26} {kernel:<26} {gigabytes:>7.2} {part:>9.2} {:>9.2}", portable / triad);
        }
    }
}

fn criterion(c: &mut Criterion) {
    for (name, dtype, compress, members) in FIELDS {
        let mut group = c.benchmark_group(name);
        let mut field = Field::new(dtype, compress, members, CHUNK);
        for (kernel, bytes, run) in KERNELS {
            group.throughput(Throughput::Bytes(bytes(&field) as u64));
            for level in Level::supported() {
                group.bench_function(BenchmarkId::new(kernel, level.name()), |b| b.iter(|| run(&mut field, level)));
            }
        }
        group.finish();
    }
    let inputs: Vec<Vec<u8>> = (0..4).map(|_| tensor(Dtype::F32, CHUNK)).collect();
    let inputs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
    let mut out = vec![0; inputs[0].len()];
    let mut group = c.benchmark_group("exact, 4 members, f32");
    group.throughput(Throughput::Bytes((5 * out.len()) as u64));
    for (name, op) in [("sum", ExactOp::Sum), ("mean", ExactOp::Mean), ("min", ExactOp::Min)] {
        group.bench_function(name, |b| b.iter(|| exact::reduce(op, Dtype::F32, &inputs, &mut out)));
    }
    group.finish();
}

fn main() {
    table();
    if std::env::args().any(|arg| arg == "--table") {
        return;
    }
    let mut criterion_config = Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .sample_size(20)
        .configure_from_args();
    criterion(&mut criterion_config);
    criterion_config.final_summary();
}
