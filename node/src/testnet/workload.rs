//! The testnet's default job: a real classifier on real images, through wasm.
//!
//! The expected output of every job is computed here, outside the mesh, by the same module in a runtime of this process's
//! own; a verified result that differs from it counts as wrong.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use sundara_runtime::{ExecutionRequest, ModuleSource, Outcome, Program, Setup};

use crate::api::{JobOrder, Node};

/// The classifier, built from examples/guests/digits.
const MODULE: &[u8] = include_bytes!("../../../examples/guests/digits/digits.wasm");
/// UCI optical digits: 1,797 records of an 8x8 image and its label. Credited in examples/guests/digits/data.
const DATASET: &[u8] = include_bytes!("../../../examples/guests/digits/data/digits.bin");
/// Bytes of an image.
const IMAGE_LEN: usize = 64;
/// Every fourth record was held out of training: 3, 7, 11 and so on, counted from 0.
const HELD_OUT_STRIDE: usize = 4;

const MANIFEST: &str = r#"name = "digits"
version = 1
engine = "wasm"
program = "digits.wasm"
description = "Handwritten digits, 8x8 pixels: label and probabilities"
license = "MIT"

[determinism]
class = "exact"

[limits]
fuel = 1000000000
memory = 67108864
output = 1048576
wall_ms = 10000
"#;

/// Why the workload could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkloadError {
    /// Files of the model.
    #[error("model files: {0}")]
    Files(#[from] std::io::Error),
    /// Publishing.
    #[error("model not published: {0}")]
    Publish(String),
    /// The module did not run here.
    #[error("reference run: {0}")]
    Reference(String),
}

/// Image and label of a held-out record.
pub fn digit_images() -> Vec<(Bytes, u8)> {
    let records = DATASET.chunks_exact(IMAGE_LEN + 1).skip(HELD_OUT_STRIDE - 1).step_by(HELD_OUT_STRIDE);
    records.map(|r| (Bytes::from_static(&r[..IMAGE_LEN]), r[IMAGE_LEN])).collect()
}

/// The published model, the images, and what each must come to.
pub struct Workload {
    /// `PUBLISHER/NAME`.
    pub model: String,
    images: Vec<(Bytes, u8)>,
    expected: Vec<Bytes>,
}

impl Workload {
    /// Publishes the classifier from `publisher` and runs it here over the first `jobs` images.
    ///
    /// # Errors
    /// See [`WorkloadError`].
    pub async fn publish(publisher: &Node, dir: &Path, jobs: usize) -> Result<Self, WorkloadError> {
        let source = dir.join("digits-model");
        tokio::fs::create_dir_all(&source).await?;
        tokio::fs::write(source.join("digits.wasm"), MODULE).await?;
        tokio::fs::write(source.join("model.toml"), MANIFEST).await?;
        let model = format!("{}/digits", publisher.hotkey());
        // A resumed testnet finds its model where it left it.
        if publisher.models().resolve(&model).await.is_err() {
            publisher.models().publish(&source).await.map_err(|e| WorkloadError::Publish(e.to_string()))?;
        }
        let mut images = digit_images();
        images.truncate(jobs.max(1));
        let expected = reference(&images).await?;
        Ok(Self { model, images, expected })
    }

    /// Distinct jobs.
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    /// Job `i`; numbers beyond [`Self::len`] begin again.
    pub fn order(&self, i: usize, replicas: u8) -> JobOrder {
        let (image, _) = &self.images[i % self.images.len()];
        JobOrder::model(self.model.clone()).input(image.clone()).replicas(replicas)
    }

    /// Whether `output` is what job `i` comes to.
    pub fn is_right(&self, i: usize, output: &[u8]) -> bool {
        self.expected[i % self.expected.len()] == output
    }

    /// Share of the images that the classifier labels as people did.
    pub fn accuracy(&self) -> f64 {
        let right = self.images.iter().zip(&self.expected).filter(|((_, label), out)| label_of(out) == Some(*label));
        right.count() as f64 / self.images.len() as f64
    }
}

/// The label in a line `{"label":7,...}`.
fn label_of(output: &[u8]) -> Option<u8> {
    let digit = output.strip_prefix(b"{\"label\":")?.first()?;
    digit.is_ascii_digit().then(|| digit - b'0')
}

/// Outputs of the module over the images, each distinct image once.
async fn reference(images: &[(Bytes, u8)]) -> Result<Vec<Bytes>, WorkloadError> {
    let fail = |e: String| WorkloadError::Reference(e);
    let wasm =
        sundara_runtime::WasmRuntime::new(sundara_runtime::WasmConfig::default()).map_err(|e| fail(e.to_string()))?;
    let setup = Arc::new(Setup::new(Program::Wasm(ModuleSource::inline(MODULE))));
    let mut known: HashMap<Bytes, Bytes> = HashMap::new();
    for (image, _) in images {
        if known.contains_key(image) {
            continue;
        }
        let request = ExecutionRequest::new(setup.clone(), image.clone());
        let (execution, output) =
            sundara_runtime::collect(&wasm, request, Default::default()).await.map_err(|e| fail(e.to_string()))?;
        if execution.outcome != Outcome::Completed {
            return Err(fail(format!("{:?}", execution.outcome)));
        }
        known.insert(image.clone(), output);
    }
    Ok(images.iter().map(|(image, _)| known[image].clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_images_are_whole_and_labelled() {
        let images = digit_images();
        assert_eq!(images.len(), 449);
        assert!(images.iter().all(|(image, label)| image.len() == IMAGE_LEN && *label < 10));
    }

    #[test]
    fn a_label_is_read_from_the_output() {
        assert_eq!(label_of(b"{\"label\":7,\"scores\":[]}\n"), Some(7));
        assert_eq!(label_of(b"{\"lab"), None);
    }
}
