//! The encoder: tokens to one unit vector a sentence.
//!
//! Owns BERT's graph (Devlin et al. 2018, post-norm), its configuration, mean pooling and normalisation. The dense
//! layers are `dense`'s. Invariant: a sentence's vector does not depend on the sentences that it runs with.

use crate::dense::{Activation, Dense};
use crate::weights::Weights;
use candle_core::{D, Device, Result, Tensor};
use candle_nn::ops::{layer_norm, softmax_last_dim};
use serde::Deserialize;
use std::error::Error;
use std::path::Path;

/// Sentences are cut here, as the model's own `sentence_bert_config.json` says; longer ones were never trained.
const TOKENS_MAX: usize = 256;

/// The fields of `config.json` that the graph depends on.
#[derive(Deserialize)]
struct Config {
    hidden_size: usize,
    intermediate_size: usize,
    num_attention_heads: usize,
    num_hidden_layers: usize,
    max_position_embeddings: usize,
    vocab_size: usize,
    type_vocab_size: usize,
    layer_norm_eps: f64,
    hidden_act: String,
    #[serde(default)]
    position_embedding_type: Option<String>,
}

impl Config {
    fn read(path: &Path) -> std::result::Result<Self, Box<dyn Error>> {
        let text = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let config: Self = serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        if config.hidden_act != "gelu" {
            return Err(format!("config.json: hidden_act is {}, only gelu is known", config.hidden_act).into());
        }
        if config.position_embedding_type.as_deref().is_some_and(|kind| kind != "absolute") {
            return Err("config.json: position_embedding_type must be absolute".into());
        }
        if config.num_attention_heads == 0 || !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            return Err("config.json: hidden_size must be a multiple of num_attention_heads".into());
        }
        Ok(config)
    }
}

/// A loaded encoder.
pub(crate) struct Encoder {
    words: Tensor,
    /// Position embeddings with the embedding of token type 0 added: every token here has that type.
    positions: Tensor,
    norm: Norm,
    layers: Vec<Layer>,
}

struct Norm {
    weight: Tensor,
    bias: Tensor,
    epsilon: f32,
}

struct Layer {
    heads: usize,
    /// Query, key and value side by side; the query is already divided by the square root of a head's size.
    query_key_value: Dense,
    attention_output: Dense,
    attention_norm: Norm,
    widen: Dense,
    narrow: Dense,
    output_norm: Norm,
}

impl Encoder {
    /// Reads `config.json` and `model.safetensors`.
    pub(crate) fn load(directory: &Path) -> std::result::Result<Self, Box<dyn Error>> {
        let config = Config::read(&directory.join("config.json"))?;
        let weights = Weights::open(&directory.join("model.safetensors"))?;
        let mut loader = Loader { weights, config, scratch: Vec::new() };
        let (hidden, vocabulary) = (loader.config.hidden_size, loader.config.vocab_size);
        let words = loader.tensor("embeddings.word_embeddings.weight", &[vocabulary, hidden])?;
        let shape = [loader.config.max_position_embeddings, hidden];
        let positions = loader.tensor("embeddings.position_embeddings.weight", &shape)?;
        let types =
            loader.tensor("embeddings.token_type_embeddings.weight", &[loader.config.type_vocab_size, hidden])?;
        let positions = positions.narrow(0, 0, positions.dim(0)?.min(TOKENS_MAX))?.broadcast_add(&types.get(0)?)?;
        let norm = loader.norm("embeddings.LayerNorm")?;
        let layers = (0..loader.config.num_hidden_layers)
            .map(|index| loader.layer(index))
            .collect::<std::result::Result<_, _>>()?;
        Ok(Self { words, positions, norm, layers })
    }

    /// The most tokens that one sentence may have.
    pub(crate) fn tokens_max(&self) -> usize {
        self.positions.dims()[0]
    }

    /// The unit vectors of several sentences; none of them may be empty.
    pub(crate) fn embed(&self, sentences: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        let tokens = Tensor::new(sentences.concat(), &Device::Cpu)?;
        let places: Vec<u32> = sentences.iter().flat_map(|sentence| 0..sentence.len() as u32).collect();
        let places = Tensor::new(places, &Device::Cpu)?;
        let words = self.words.index_select(&tokens, 0)?;
        let mut rows = self.norm.apply(&(words + self.positions.index_select(&places, 0)?)?)?;
        for layer in &self.layers {
            rows = layer.apply(&rows, sentences)?;
        }
        spans(sentences).map(|(start, length)| pool(&rows.narrow(0, start, length)?)).collect()
    }
}

impl Layer {
    fn apply(&self, rows: &Tensor, sentences: &[Vec<u32>]) -> Result<Tensor> {
        let mixed = rows.apply_op1_no_bwd(&self.query_key_value)?;
        let attended = spans(sentences)
            .map(|(start, length)| self.attend(&mixed.narrow(0, start, length)?))
            .collect::<Result<Vec<_>>>()?;
        let attended = Tensor::cat(&attended, 0)?.apply_op1_no_bwd(&self.attention_output)?;
        let rows = self.attention_norm.apply(&(rows + attended)?)?;
        let wide = rows.apply_op1_no_bwd(&self.widen)?;
        self.output_norm.apply(&(rows + wide.apply_op1_no_bwd(&self.narrow)?)?)
    }

    /// Attention within one sentence: a row of query, key and value for each token.
    fn attend(&self, mixed: &Tensor) -> Result<Tensor> {
        let (tokens, width) = mixed.dims2()?;
        let mixed = mixed.reshape((tokens, 3, self.heads, ()))?.permute((1, 2, 0, 3))?.contiguous()?;
        let scores = mixed.get(0)?.matmul(&mixed.get(1)?.transpose(D::Minus1, D::Minus2)?)?;
        let values = softmax_last_dim(&scores)?.matmul(&mixed.get(2)?)?;
        values.transpose(0, 1)?.reshape((tokens, width / 3))
    }
}

impl Norm {
    fn apply(&self, rows: &Tensor) -> Result<Tensor> {
        layer_norm(rows, &self.weight, &self.bias, self.epsilon)
    }
}

/// Where each sentence's rows begin, and how many they are.
fn spans(sentences: &[Vec<u32>]) -> impl Iterator<Item = (usize, usize)> {
    sentences.iter().scan(0, |next, sentence| {
        let start = *next;
        *next += sentence.len();
        Some((start, sentence.len()))
    })
}

/// The mean of the rows, divided by its length.
fn pool(rows: &Tensor) -> Result<Vec<f32>> {
    let mean = rows.mean(0)?;
    let length = mean.sqr()?.sum_all()?.sqrt()?;
    mean.broadcast_div(&length)?.to_vec1()
}

struct Loader {
    weights: Weights,
    config: Config,
    /// Weights on their way into packed form.
    scratch: Vec<f32>,
}

type LoadResult<T> = std::result::Result<T, Box<dyn Error>>;

impl Loader {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> LoadResult<Tensor> {
        Ok(Tensor::from_vec(self.weights.read(name, shape)?, shape, &Device::Cpu)?)
    }

    fn norm(&mut self, name: &str) -> LoadResult<Norm> {
        let shape = [self.config.hidden_size];
        let weight = self.tensor(&format!("{name}.weight"), &shape)?;
        let bias = self.tensor(&format!("{name}.bias"), &shape)?;
        Ok(Norm { weight, bias, epsilon: self.config.layer_norm_eps as f32 })
    }

    fn append(&mut self, layer: &mut Dense, name: &str, shape: [usize; 2], scale: f32) -> LoadResult<()> {
        self.weights.read_into(&format!("{name}.weight"), &shape, &mut self.scratch)?;
        let bias = self.weights.read(&format!("{name}.bias"), &shape[..1])?;
        Ok(layer.append(&self.scratch, &bias, scale)?)
    }

    fn dense(&mut self, name: &str, inputs: usize, outputs: usize, activation: Activation) -> LoadResult<Dense> {
        let mut layer = Dense::new(inputs, activation)?;
        self.append(&mut layer, name, [outputs, inputs], 1.0)?;
        Ok(layer)
    }

    fn layer(&mut self, index: usize) -> LoadResult<Layer> {
        let (hidden, wide) = (self.config.hidden_size, self.config.intermediate_size);
        let heads = self.config.num_attention_heads;
        let name = format!("encoder.layer.{index}");
        let mut query_key_value = Dense::new(hidden, Activation::None)?;
        let scale = 1.0 / ((hidden / heads) as f32).sqrt();
        for (part, scale) in [("query", scale), ("key", 1.0), ("value", 1.0)] {
            let part = format!("{name}.attention.self.{part}");
            self.append(&mut query_key_value, &part, [hidden, hidden], scale)?;
        }
        Ok(Layer {
            heads,
            query_key_value,
            attention_output: self.dense(
                &format!("{name}.attention.output.dense"),
                hidden,
                hidden,
                Activation::None,
            )?,
            attention_norm: self.norm(&format!("{name}.attention.output.LayerNorm"))?,
            widen: self.dense(&format!("{name}.intermediate.dense"), hidden, wide, Activation::Gelu)?,
            narrow: self.dense(&format!("{name}.output.dense"), wide, hidden, Activation::None)?,
            output_norm: self.norm(&format!("{name}.output.LayerNorm"))?,
        })
    }
}
