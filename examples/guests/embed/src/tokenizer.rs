//! Text to tokens of a BERT vocabulary.
//!
//! Owns which kinds of `tokenizer.json` are accepted: BERT's normaliser, pre-tokeniser and WordPiece, between `[CLS]`
//! and `[SEP]`. Using these parts of the library, instead of its tokenizer of any kind, keeps regular expressions out
//! of the module: they were a third of the code that every node has to compile.

use serde::Deserialize;
use std::error::Error;
use std::path::Path;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{Model, NormalizedString, Normalizer, OffsetType, PreTokenizedString, PreTokenizer};

/// The parts of `tokenizer.json` that are used; truncation and padding are the caller's.
#[derive(Deserialize)]
struct TokenizerFile {
    added_tokens: Vec<AddedToken>,
    normalizer: BertNormalizer,
    pre_tokenizer: BertPreTokenizer,
    model: WordPiece,
}

/// A token that is taken from the text as it stands, before normalisation.
#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
}

/// A BERT tokenizer that truncates and does not pad.
pub(crate) struct SentenceTokenizer {
    file: TokenizerFile,
    first: u32,
    last: u32,
    tokens_max: usize,
}

impl SentenceTokenizer {
    /// Reads `tokenizer.json`; sentences will have at most `tokens_max` tokens.
    pub(crate) fn load(path: &Path, tokens_max: usize) -> Result<Self, Box<dyn Error>> {
        let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let text = std::fs::read(path).map_err(|error| named(&error))?;
        Self::parse(&text, tokens_max).map_err(|error| named(&error).into())
    }

    fn parse(text: &[u8], tokens_max: usize) -> Result<Self, Box<dyn Error>> {
        let file: TokenizerFile =
            serde_json::from_slice(text).map_err(|error| format!("not a BERT WordPiece tokenizer: {error}"))?;
        let unusual = |token: &&AddedToken| {
            token.single_word || token.lstrip || token.rstrip || token.normalized || token.content.is_empty()
        };
        if let Some(token) = file.added_tokens.iter().find(unusual) {
            return Err(format!("added token {:?} is not taken as it stands", token.content).into());
        }
        let id = |token: &str| file.model.token_to_id(token).ok_or_else(|| format!("no token {token}"));
        let (first, last) = (id("[CLS]")?, id("[SEP]")?);
        if tokens_max < 2 {
            return Err("the model has no room for [CLS] and [SEP]".into());
        }
        Ok(Self { file, first, last, tokens_max })
    }

    /// The sentence's tokens between `[CLS]` and `[SEP]`, both included; never empty.
    pub(crate) fn tokens(&self, sentence: &str) -> Result<Vec<u32>, Box<dyn Error>> {
        let mut tokens = vec![self.first];
        let mut rest = sentence;
        while let Some((at, added)) = self.next_added(rest) {
            self.push_words(&rest[..at], &mut tokens)?;
            tokens.push(added.id);
            rest = &rest[at + added.content.len()..];
        }
        self.push_words(rest, &mut tokens)?;
        tokens.truncate(self.tokens_max - 1);
        tokens.push(self.last);
        Ok(tokens)
    }

    /// Where the first added token stands; the longest of those that begin there.
    fn next_added(&self, text: &str) -> Option<(usize, &AddedToken)> {
        let found = self.file.added_tokens.iter().filter_map(|token| Some((text.find(&token.content)?, token)));
        found.min_by_key(|(at, token)| (*at, std::cmp::Reverse(token.content.len())))
    }

    fn push_words(&self, text: &str, tokens: &mut Vec<u32>) -> Result<(), Box<dyn Error>> {
        let failed = |error: tokenizers::Error| error.to_string();
        let mut normalized = NormalizedString::from(text);
        self.file.normalizer.normalize(&mut normalized).map_err(failed)?;
        let mut words = PreTokenizedString::from(normalized);
        self.file.pre_tokenizer.pre_tokenize(&mut words).map_err(failed)?;
        words.tokenize(|word| self.file.model.tokenize(word.get())).map_err(failed)?;
        let encoding = words.into_encoding(None, 0, OffsetType::None).map_err(failed)?;
        tokens.extend(encoding.get_ids());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const FILE: &str = r###"{
        "added_tokens": [{"id": 1, "content": "[CLS]", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "cafe": 3, "##s": 4, "!": 5}}
    }"###;

    #[test]
    fn words_are_normalised_split_and_cut() {
        let tokenizer = SentenceTokenizer::parse(FILE.as_bytes(), 6).unwrap();
        assert_eq!(tokenizer.tokens("").unwrap(), [1, 2]);
        assert_eq!(tokenizer.tokens("Cafés!").unwrap(), [1, 3, 4, 5, 2]);
        assert_eq!(tokenizer.tokens("tea cafe").unwrap(), [1, 0, 3, 2]);
        assert_eq!(tokenizer.tokens("cafe[CLS]cafe").unwrap(), [1, 3, 1, 3, 2]);
        assert_eq!(tokenizer.tokens("! ! ! ! ! !").unwrap(), [1, 5, 5, 5, 5, 2]);
    }

    #[test]
    fn other_tokenizers_are_refused() {
        assert!(SentenceTokenizer::parse(FILE.as_bytes(), 1).is_err());
        assert!(SentenceTokenizer::parse(FILE.replace("\"lstrip\": false", "\"lstrip\": true").as_bytes(), 6).is_err());
        assert!(SentenceTokenizer::parse(FILE.replace("BertPreTokenizer", "ByteLevel").as_bytes(), 6).is_err());
        assert!(SentenceTokenizer::parse(FILE.replace("clean_text", "other").as_bytes(), 6).is_err());
    }
}
