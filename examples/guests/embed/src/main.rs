//! The guest: sentences in, embeddings out.
//!
//! - `_start`: stdin is UTF-8 text, one sentence a line; stdout gets a JSON array of numbers for each, in order, and
//!   is flushed after every batch.
//! - `wizer-initialize`, the init export: loads the model into linear memory, so that a host that snapshots the
//!   instance starts every job with the model in place. `_start` works as well without it and then loads first.
//! - `/model`: `config.json` and `model.safetensors` of a BERT encoder, and its `tokenizer.json`.
//!
//! A failure ends the guest with one line on stderr: exit code 2 for bad input, 3 for a bad model.

mod dense;
mod fixed;
mod model;
mod tokenizer;
mod weights;

use model::Encoder;
use std::error::Error;
use std::io::{Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::OnceLock;
use tokenizer::SentenceTokenizer;

const EXIT_BAD_INPUT: u8 = 2;
const EXIT_BAD_MODEL: u8 = 3;
const MODEL_DIRECTORY: &str = "/model";

/// Sentences run together up to this many tokens, so that one pass over the weights serves them all. The vectors do
/// not depend on it; the memory for intermediate values does.
const BATCH_TOKENS_MAX: usize = 256;

/// What `wizer-initialize` leaves in memory.
static MODEL: OnceLock<Model> = OnceLock::new();

struct Model {
    tokenizer: SentenceTokenizer,
    encoder: Encoder,
}

impl Model {
    fn load(directory: &Path) -> Result<Self, Box<dyn Error>> {
        let encoder = Encoder::load(directory)?;
        let tokenizer = SentenceTokenizer::load(&directory.join("tokenizer.json"), encoder.tokens_max())?;
        Ok(Self { tokenizer, encoder })
    }
}

fn main() -> ExitCode {
    let model = match loaded() {
        Ok(model) => model,
        Err(error) => return fail(EXIT_BAD_MODEL, error.as_ref()),
    };
    match embed_lines(model) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(EXIT_BAD_INPUT, error.as_ref()),
    }
}

/// Loads the model; a host calls this once, before it snapshots the instance.
#[unsafe(export_name = "wizer-initialize")]
pub extern "C" fn initialize() {
    if let Err(error) = loaded() {
        fail(EXIT_BAD_MODEL, error.as_ref());
        std::process::exit(EXIT_BAD_MODEL.into());
    }
    forget_preopens();
}

fn fail(code: u8, error: &dyn Error) -> ExitCode {
    eprintln!("embed: {error}");
    ExitCode::from(code)
}

fn loaded() -> Result<&'static Model, Box<dyn Error>> {
    match MODEL.get() {
        Some(model) => Ok(model),
        None => {
            let model = Model::load(Path::new(MODEL_DIRECTORY))?;
            Ok(MODEL.get_or_init(|| model))
        }
    }
}

/// libc keeps a table of the directories that the host had opened when the first path was used. A snapshot would
/// freeze it, and the host of a job opens others than the host of the initialisation did.
#[cfg(target_os = "wasi")]
fn forget_preopens() {
    unsafe extern "C" {
        /// `wasi/libc.h`: drops the table; the next use of a path fills it again.
        fn __wasilibc_reset_preopens();
    }
    // SAFETY: takes no arguments, and no other thread and no open path lookup exists here.
    unsafe { __wasilibc_reset_preopens() }
}

#[cfg(not(target_os = "wasi"))]
fn forget_preopens() {}

fn embed_lines(model: &Model) -> Result<(), Box<dyn Error>> {
    let mut input = String::new();
    std::io::stdin().read_to_string(&mut input)?;
    let mut stdout = std::io::stdout();
    let (mut batch, mut batch_tokens) = (Vec::new(), 0);
    for line in input.lines() {
        let tokens = model.tokenizer.tokens(line)?;
        if batch_tokens + tokens.len() > BATCH_TOKENS_MAX && !batch.is_empty() {
            embed_batch(model, &batch, &mut stdout)?;
            batch.clear();
            batch_tokens = 0;
        }
        batch_tokens += tokens.len();
        batch.push(tokens);
    }
    if !batch.is_empty() {
        embed_batch(model, &batch, &mut stdout)?;
    }
    Ok(())
}

fn embed_batch(model: &Model, batch: &[Vec<u32>], stdout: &mut impl Write) -> Result<(), Box<dyn Error>> {
    let mut lines = Vec::new();
    for vector in model.encoder.embed(batch)? {
        serde_json::to_writer(&mut lines, &vector)?;
        lines.push(b'\n');
    }
    stdout.write_all(&lines)?;
    Ok(stdout.flush()?)
}
