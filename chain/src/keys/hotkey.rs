//! Hotkey files in btwallet's JSON layout.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sp_core::{Pair as _, sr25519};
use sundara_proto::crypto::HotkeyPair;
use sundara_proto::id::Hotkey;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::{KeyError, private};

/// What a hotkey file says about itself in public.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HotkeyFile {
    /// The public key; written as ss58, format 42.
    pub hotkey: Hotkey,
    /// Whether the file holds the words from which the key can be restored elsewhere.
    pub has_phrase: bool,
}

/// btwallet's fields, all optional. Names and order as it writes them.
#[derive(Default, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(rename_all = "camelCase")]
struct Fields {
    #[serde(skip_serializing_if = "Option::is_none")]
    account_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    public_key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    private_key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    secret_phrase: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    secret_seed: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ss58_address: Option<String>,
}

impl fmt::Debug for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fields({:?})", self.ss58_address)
    }
}

/// Makes a new hotkey from a new BIP39 phrase of 12 words and writes it to `path`, which must not exist. The phrase
/// is in the file and nowhere else.
pub fn create_hotkey(path: &Path) -> Result<HotkeyPair, KeyError> {
    let (pair, phrase, seed) = sr25519::Pair::generate_with_phrase(None);
    write(path, pair, Some(&Zeroizing::new(phrase)), &Zeroizing::new(seed))
}

/// Writes the hotkey of an existing BIP39 phrase to `path`, which must not exist.
pub fn import_hotkey(path: &Path, phrase: &str) -> Result<HotkeyPair, KeyError> {
    let words = phrase.split_whitespace().collect::<Vec<_>>();
    let phrase = Zeroizing::new(words.join(" "));
    let (pair, seed) = sr25519::Pair::from_phrase(&phrase, None).map_err(|_| KeyError::Phrase)?;
    write(path, pair, Some(&phrase), &Zeroizing::new(seed))
}

/// Writes the hotkey of a seed to `path`, which must not exist. The file holds no phrase.
pub fn write_hotkey_seed(path: &Path, seed: &[u8; 32]) -> Result<HotkeyPair, KeyError> {
    write(path, sr25519::Pair::from_seed(seed), None, seed)
}

/// Reads the secret: from the phrase, else the seed, else the expanded private key. The file's own address must agree.
pub fn load_hotkey(path: &Path) -> Result<HotkeyPair, KeyError> {
    let fields = read(path)?;
    let pair = secret(path, &fields)?.ok_or_else(|| KeyError::PublicOnly { path: path.to_path_buf() })?;
    let pair = HotkeyPair::from(pair);
    match address(path, &fields)? {
        Some(claimed) if claimed != pair.hotkey() => {
            Err(KeyError::malformed(path, format!("its address says {claimed} but its secret makes {}", pair.hotkey())))
        }
        _ => Ok(pair),
    }
}

/// [`load_hotkey`], after [`create_hotkey`] where there is no file yet. Two processes that race make one key.
pub fn load_or_create_hotkey(path: &Path) -> Result<HotkeyPair, KeyError> {
    match load_hotkey(path) {
        Err(KeyError::Missing { .. }) => match create_hotkey(path) {
            Err(KeyError::Exists { .. }) => load_hotkey(path),
            made => made,
        },
        other => other,
    }
}

/// The public part of a hotkey file, one that holds no secret included.
pub fn show_hotkey(path: &Path) -> Result<HotkeyFile, KeyError> {
    let fields = read(path)?;
    let has_phrase = fields.secret_phrase.is_some();
    if secret(path, &fields)?.is_some() {
        return Ok(HotkeyFile { hotkey: load_hotkey(path)?.hotkey(), has_phrase });
    }
    match address(path, &fields)? {
        Some(hotkey) => Ok(HotkeyFile { hotkey, has_phrase }),
        None => Err(KeyError::malformed(path, "it names neither a secret nor an address")),
    }
}

fn write(path: &Path, pair: sr25519::Pair, phrase: Option<&str>, seed: &[u8; 32]) -> Result<HotkeyPair, KeyError> {
    let pair = HotkeyPair::from(pair);
    let hotkey = pair.hotkey();
    let public = format!("0x{}", hex::encode(hotkey.0));
    let fields = Fields {
        account_id: Some(public.clone()),
        public_key: Some(public),
        private_key: None,
        secret_phrase: phrase.map(str::to_owned),
        secret_seed: Some(format!("0x{}", *Zeroizing::new(hex::encode(seed)))),
        ss58_address: Some(hotkey.to_string()),
    };
    // Room for the whole at once: a buffer that grows leaves copies of the secret behind.
    let mut json = Zeroizing::new(Vec::with_capacity(4096));
    serde_json::to_writer(&mut *json, &fields).map_err(|e| KeyError::malformed(path, e.to_string()))?;
    private::create(path, &json)?;
    Ok(pair)
}

fn read(path: &Path) -> Result<Fields, KeyError> {
    let content = private::read(path)?;
    for (magic, scheme) in
        [(&b"$NACL"[..], "$NACL"), (b"$ANSIBLE_VAULT", "$ANSIBLE_VAULT"), (b"gAAAAA", "legacy Fernet")]
    {
        if content.starts_with(magic) {
            return Err(KeyError::Encrypted { path: path.to_path_buf(), scheme });
        }
    }
    // serde's message may quote the text it stumbled over, and that may be the secret.
    serde_json::from_slice(&content).map_err(|e| {
        KeyError::malformed(path, format!("not btwallet's JSON (line {}, column {})", e.line(), e.column()))
    })
}

fn secret(path: &Path, fields: &Fields) -> Result<Option<sr25519::Pair>, KeyError> {
    if let Some(phrase) = &fields.secret_phrase {
        let (pair, mut seed) = sr25519::Pair::from_phrase(phrase, None)
            .map_err(|_| KeyError::malformed(path, "its secretPhrase is no BIP39 phrase"))?;
        seed.zeroize();
        return Ok(Some(pair));
    }
    for (text, what, len) in [(&fields.secret_seed, "secretSeed", 32), (&fields.private_key, "privateKey", 64)] {
        let Some(text) = text else { continue };
        let wrong = || KeyError::malformed(path, format!("its {what} is not 0x and {} hexadecimal digits", 2 * len));
        let bytes = Zeroizing::new(hex::decode(text.strip_prefix("0x").unwrap_or(text)).map_err(|_| wrong())?);
        if bytes.len() != len {
            return Err(wrong());
        }
        return sr25519::Pair::from_seed_slice(&bytes).map(Some).map_err(|_| wrong());
    }
    Ok(None)
}

fn address(path: &Path, fields: &Fields) -> Result<Option<Hotkey>, KeyError> {
    let parse =
        |text: &String| text.parse().map_err(|_| KeyError::malformed(path, "its ss58Address is not one of format 42"));
    fields.ss58_address.as_ref().map(parse).transpose()
}
