//! The guests under examples/guests: that the committed module is what its source makes, that what they compute is
//! right, and that it is the same on both code generators.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::{comparable, run, wasm};
use sundara_examples::{GuestError, SENTENCE_MODEL_FILES, build_guest, guests};
use sundara_runtime::{Artifact, Execution, ExecutionRequest, ModuleSource, Outcome, Program, Setup, WasmTarget};

const IMAGE_LEN: usize = 64;
const RECORD_LEN: usize = IMAGE_LEN + 1;
/// Every fourth record was held out of training: 3, 7, 11 and so on, counted from 0.
const HELD_OUT_STRIDE: usize = 4;

/// Layers of the digits network.
const PIXELS: usize = 64;
const HIDDEN: usize = 32;
const CLASSES: usize = 10;
const PARAMETERS: usize = PIXELS * HIDDEN + HIDDEN + HIDDEN * CLASSES + CLASSES;

fn read(path: &str) -> Vec<u8> {
    std::fs::read(guests().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// A guest, built from its source; `None`, and why, where it cannot be.
fn built(guest: &str) -> Option<Vec<u8>> {
    match build_guest(guest, Path::new(env!("CARGO_TARGET_TMPDIR"))) {
        Ok(module) => Some(std::fs::read(module).unwrap()),
        Err(GuestError::NoTarget) => {
            println!("skipped: {}", GuestError::NoTarget);
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn program(wasm: impl Into<Bytes>) -> Arc<Setup> {
    Arc::new(Setup::new(Program::Wasm(ModuleSource::inline(wasm))))
}

async fn on(target: WasmTarget, request: &ExecutionRequest) -> (Execution, Bytes) {
    let (execution, output) = run(&wasm(target), request.clone()).await;
    assert_eq!(execution.outcome, Outcome::Completed, "{:?}", execution.stderr_tail);
    (execution, output)
}

fn images(records: &[&[u8]]) -> Vec<u8> {
    records.iter().flat_map(|record| &record[..IMAGE_LEN]).copied().collect()
}

/// The digit in a line `{"label":7,...}`.
fn label(line: &str) -> u8 {
    line.strip_prefix("{\"label\":").unwrap().as_bytes()[0] - b'0'
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect()
}

/// Parameters that still have a gradient: a third of the trained ones.
fn untrained() -> Vec<f32> {
    floats(&read("digits/data/weights.bin")).iter().map(|value| value / 3.0).collect()
}

fn gradient_request(setup: &Arc<Setup>, parameters: &[f32], batch: &[&[u8]]) -> ExecutionRequest {
    let mut input: Vec<u8> = parameters.iter().flat_map(|value| value.to_le_bytes()).collect();
    input.extend(batch.concat());
    ExecutionRequest { entry: "gradient".into(), ..ExecutionRequest::new(Arc::clone(setup), input) }
}

#[tokio::test]
async fn the_committed_digits_module_is_what_its_source_makes() {
    let Some(fresh) = built("digits") else { return };
    let data = read("digits/data/digits.bin");
    let records: Vec<&[u8]> = data.chunks_exact(RECORD_LEN).collect();
    let (committed, fresh) = (program(read("digits/digits.wasm")), program(fresh));
    for request in [
        ExecutionRequest::new(Arc::clone(&committed), images(&records)),
        gradient_request(&committed, &untrained(), &records[..100]),
    ] {
        let (kept, expected) = on(WasmTarget::Native, &request).await;
        let rebuilt = ExecutionRequest { setup: Arc::clone(&fresh), ..request };
        let (execution, output) = on(WasmTarget::Native, &rebuilt).await;
        assert!(output == expected, "entry {}: the rebuilt module answers otherwise", rebuilt.entry);
        assert_eq!(execution.output_digest, kept.output_digest);
    }
}

#[tokio::test]
async fn the_classifier_knows_digits_that_it_was_not_trained_on() {
    let data = read("digits/data/digits.bin");
    let held_out: Vec<&[u8]> =
        data.chunks_exact(RECORD_LEN).skip(HELD_OUT_STRIDE - 1).step_by(HELD_OUT_STRIDE).collect();
    let request = ExecutionRequest::new(program(read("digits/digits.wasm")), images(&held_out));
    let (native, output) = on(WasmTarget::Native, &request).await;
    let (pulley, _) = on(WasmTarget::Pulley, &request).await;
    assert_eq!(comparable(&native), comparable(&pulley));
    let lines: Vec<&str> = std::str::from_utf8(&output).unwrap().lines().collect();
    assert_eq!(lines.len(), held_out.len());
    let right = lines.iter().zip(&held_out).filter(|(line, record)| label(line) == record[IMAGE_LEN]).count();
    println!("right on {right} of {} ({:.1} %)", lines.len(), 100.0 * right as f64 / lines.len() as f64);
    // The same bits everywhere, so the figure that the documentation gives is exact.
    assert_eq!((right, lines.len()), (440, 449));
}

/// The mean loss of a batch, written from the network's definition, in f64 and with libm: shares nothing with the guest.
fn loss(parameters: &[f64], batch: &[&[u8]]) -> f64 {
    let (hidden_weights, rest) = parameters.split_at(PIXELS * HIDDEN);
    let (hidden_biases, rest) = rest.split_at(HIDDEN);
    let (output_weights, output_biases) = rest.split_at(HIDDEN * CLASSES);
    let losses = batch.iter().map(|record| {
        let mut hidden = hidden_biases.to_vec();
        for (pixel, row) in record[..PIXELS].iter().zip(hidden_weights.chunks_exact(HIDDEN)) {
            hidden.iter_mut().zip(row).for_each(|(sum, weight)| *sum += weight * f64::from(*pixel) / 16.0);
        }
        let mut logits = output_biases.to_vec();
        for (value, row) in hidden.iter().zip(output_weights.chunks_exact(CLASSES)) {
            logits.iter_mut().zip(row).for_each(|(sum, weight)| *sum += weight * value.max(0.0));
        }
        let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
        sum.ln() - logits[usize::from(record[PIXELS])]
    });
    losses.sum::<f64>() / batch.len() as f64
}

#[tokio::test]
async fn the_gradient_is_the_slope_of_the_loss() {
    let data = read("digits/data/digits.bin");
    let batch: Vec<&[u8]> = data.chunks_exact(RECORD_LEN).take(16).collect();
    let setup = program(read("digits/digits.wasm"));
    let parameters = untrained();
    let request = gradient_request(&setup, &parameters, &batch);
    let (native, output) = on(WasmTarget::Native, &request).await;
    let (pulley, _) = on(WasmTarget::Pulley, &request).await;
    assert_eq!(comparable(&native), comparable(&pulley));

    let answer = floats(&output);
    let (said, gradient) = (f64::from(answer[0]), &answer[1..]);
    assert_eq!(gradient.len(), PARAMETERS);
    let mut exact: Vec<f64> = parameters.iter().map(|value| f64::from(*value)).collect();
    let before = loss(&exact, &batch);
    assert!((said - before).abs() < 1e-5 * before, "loss {said}, by definition {before}");
    let largest = gradient.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
    assert!(largest > 0.01, "there is something to compare: {largest}");
    // Too small for a rectified unit to change sides, large enough for f64.
    let step = 1e-6;
    for index in (0..PARAMETERS).step_by(7) {
        let at = exact[index];
        exact[index] = at + step;
        let above = loss(&exact, &batch);
        exact[index] = at - step;
        let slope = (above - loss(&exact, &batch)) / (2.0 * step);
        exact[index] = at;
        let error = (slope - f64::from(gradient[index])).abs();
        assert!(error < 1e-4 * f64::from(largest), "parameter {index}: {slope} against {}", gradient[index]);
    }

    // A step downhill, through the guest alone.
    let moved: Vec<f32> = parameters.iter().zip(gradient).map(|(value, slope)| value - 0.1 * slope).collect();
    let (_, output) = on(WasmTarget::Native, &gradient_request(&setup, &moved, &batch)).await;
    assert!(f64::from(floats(&output)[0]) < before);
}

/// The sentence encoder with its model; `None`, and why, where the model is not at hand.
fn encoder() -> Option<Arc<Setup>> {
    let Some(model) = std::env::var_os("SUNDARA_MINILM_DIR").map(PathBuf::from) else {
        println!("skipped: SUNDARA_MINILM_DIR is not set (README.md, \"Full tests\")");
        return None;
    };
    let mut setup = Setup::new(Program::Wasm(ModuleSource::inline(built("embed")?)));
    setup.init = Some("wizer-initialize".into());
    for name in SENTENCE_MODEL_FILES {
        let path = model.join(name);
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        setup.artifacts.push(Artifact { name: name.into(), digest: *blake3::hash(&bytes).as_bytes(), path });
    }
    Some(Arc::new(setup))
}

fn embed_request(setup: &Arc<Setup>, sentences: &[&str]) -> ExecutionRequest {
    let mut request = ExecutionRequest::new(Arc::clone(setup), sentences.join("\n") + "\n");
    // The limits of embed/model.toml.
    request.limits.fuel = 20_000_000_000;
    request.limits.memory_bytes = 256 << 20;
    // An unoptimised interpreter on a busy machine.
    request.limits.wall = Duration::from_secs(1_200);
    request
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[derive(serde::Deserialize)]
struct Reference {
    vectors: Vec<Sentence>,
}

#[derive(serde::Deserialize)]
struct Sentence {
    sentence: String,
    vector: Vec<f64>,
}

#[tokio::test]
async fn sentences_embed_as_sentence_transformers_does_it() {
    let Some(setup) = encoder() else { return };
    // Made by sentence-transformers on PyTorch: embed/reference.py.
    let reference: Reference = serde_json::from_slice(&read("embed/vectors.json")).unwrap();
    let sentences: Vec<&str> = reference.vectors.iter().map(|entry| entry.sentence.as_str()).collect();
    let native = wasm(WasmTarget::Native);
    let (execution, output) = run(&native, embed_request(&setup, &sentences)).await;
    assert_eq!(execution.outcome, Outcome::Completed, "{:?}", execution.stderr_tail);
    let vectors: Vec<Vec<f64>> =
        std::str::from_utf8(&output).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(vectors.len(), reference.vectors.len());
    let mut least = 1.0_f64;
    for (vector, expected) in vectors.iter().zip(&reference.vectors) {
        assert_eq!(vector.len(), 384);
        let cosine = cosine(vector, &expected.vector);
        assert!(cosine >= 0.9999, "{:?}: cosine {cosine}", expected.sentence);
        least = least.min(cosine);
    }
    println!("least cosine of {} sentences: 1 - {:.1e}", vectors.len(), 1.0 - least);

    // Interpreted, long sentences take minutes; the short ones run the same code.
    let short: Vec<&str> = sentences.iter().filter(|sentence| sentence.len() < 100).copied().collect();
    assert!(short.len() >= 4);
    let request = embed_request(&setup, &short);
    let (compiled, _) = run(&native, request.clone()).await;
    let (interpreted, _) = run(&wasm(WasmTarget::Pulley), request).await;
    assert_eq!(interpreted.outcome, Outcome::Completed, "{:?}", interpreted.stderr_tail);
    assert_eq!(comparable(&compiled), comparable(&interpreted));
}
