//! Trains the classifier natively and writes `data/weights.bin`. Deterministic: the same bytes on every machine.
//!
//! `cargo run --release --example train` from this package's folder; `-- --check` compares instead of writing.

use std::process::ExitCode;
use sundara_guest_digits::{
    HIDDEN, PARAMETERS, PIXELS, Parameters, Record, TRAINED, classify, loss_gradient, test_records, train_records,
};

const EPOCHS: usize = 120;
const BATCH: usize = 32;
const MOMENTUM: f32 = 0.9;
const RATE_FIRST: f32 = 0.05;
const WEIGHT_DECAY: f32 = 1e-4;
const SEED: u64 = 1;

/// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// Uniform in [-1, 1), a multiple of 2^-23.
    fn signed_unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / 8_388_608.0 - 1.0
    }
}

fn initial(random: &mut Random) -> Result<Parameters, Box<dyn std::error::Error>> {
    let mut values = vec![0.0; PARAMETERS];
    let (hidden, rest) = values.split_at_mut(PIXELS * HIDDEN);
    hidden.fill_with(|| random.signed_unit() * 0.25);
    let outputs = rest.len() - sundara_guest_digits::CLASSES;
    rest[HIDDEN..outputs].fill_with(|| random.signed_unit() * 0.3);
    Ok(Parameters::new(values)?)
}

fn accuracy(parameters: &Parameters, records: &[Record<'_>]) -> f64 {
    let right = records.iter().filter(|record| classify(parameters, record.image).label == record.label).count();
    right as f64 / records.len() as f64
}

fn train() -> Result<Parameters, Box<dyn std::error::Error>> {
    let mut random = Random(SEED);
    let mut parameters = initial(&mut random)?;
    let mut velocity = vec![0.0_f32; PARAMETERS];
    let mut records = train_records();
    for epoch in 0..EPOCHS {
        for last in (1..records.len()).rev() {
            let other = (random.next() % (last as u64 + 1)) as usize;
            records.swap(last, other);
        }
        let rate = RATE_FIRST * (1.0 - epoch as f32 / EPOCHS as f32);
        let mut loss_sum = 0.0;
        for batch in records.chunks(BATCH) {
            let (loss, gradient) = loss_gradient(&parameters, batch);
            loss_sum += loss * batch.len() as f32;
            for ((value, speed), slope) in parameters.as_mut_slice().iter_mut().zip(&mut velocity).zip(&gradient) {
                *speed = MOMENTUM * *speed + slope + WEIGHT_DECAY * *value;
                *value -= rate * *speed;
            }
        }
        if epoch % 10 == 9 {
            println!("epoch {} loss {:.5}", epoch + 1, loss_sum / records.len() as f32);
        }
    }
    Ok(parameters)
}

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let parameters = train()?;
    println!("train accuracy {:.4}", accuracy(&parameters, &train_records()));
    println!("test accuracy {:.4}", accuracy(&parameters, &test_records()));
    let bytes = parameters.to_bytes();
    if std::env::args().any(|argument| argument == "--check") {
        let same = bytes == TRAINED;
        println!("{}", if same { "equal to data/weights.bin" } else { "differs from data/weights.bin" });
        return Ok(if same { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/data/weights.bin"), bytes)?;
    Ok(ExitCode::SUCCESS)
}
