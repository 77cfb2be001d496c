//! Reads tensors from a safetensors file one at a time.
//!
//! Owns the file's layout: a u64 length, a JSON header, the data. Reading tensor by tensor keeps the file itself out
//! of memory: a snapshot of the memory then holds the weights once and no stale copy. Only f32 is read.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

/// Headers list tensors; one of a thousand tensors is 0.1 MiB.
const HEADER_BYTES_MAX: u64 = 4 << 20;

/// An open safetensors file.
pub(crate) struct Weights {
    file: File,
    entries: BTreeMap<String, Entry>,
    data_start: u64,
    prefix: &'static str,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl Weights {
    /// Reads the header.
    pub(crate) fn open(path: &Path) -> Result<Self, Box<dyn Error>> {
        let mut file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        if length > HEADER_BYTES_MAX {
            return Err(format!("{}: the header is longer than {HEADER_BYTES_MAX} bytes", path.display()).into());
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header)?;
        let mut header: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&header)?;
        header.remove("__metadata__");
        let entries = header
            .into_iter()
            .map(|(name, entry)| Ok((name, serde_json::from_value(entry)?)))
            .collect::<Result<BTreeMap<String, Entry>, serde_json::Error>>()?;
        // Files saved from a model with a head carry the encoder under this name.
        let prefix = if entries.keys().any(|name| name.starts_with("bert.")) { "bert." } else { "" };
        Ok(Self { file, entries, data_start: 8 + length, prefix })
    }

    /// Reads the tensor `name`, which must have this shape, into `values`, replacing what is there.
    pub(crate) fn read_into(
        &mut self,
        name: &str,
        shape: &[usize],
        values: &mut Vec<f32>,
    ) -> Result<(), Box<dyn Error>> {
        let name = format!("{}{name}", self.prefix);
        let entry = self.entries.get(&name).ok_or_else(|| format!("model.safetensors has no tensor {name}"))?;
        let elements: usize = shape.iter().product();
        let (start, end) = entry.data_offsets;
        if entry.dtype != "F32" || entry.shape != shape || end.checked_sub(start) != Some(4 * elements as u64) {
            let (dtype, found) = (&entry.dtype, &entry.shape);
            return Err(format!("tensor {name} is {dtype} {found:?}, expected F32 {shape:?}").into());
        }
        let position = self.data_start.checked_add(start).ok_or("a tensor's offset is out of range")?;
        values.clear();
        values.resize(elements, 0.0);
        self.file.seek(SeekFrom::Start(position))?;
        self.file.read_exact(bytemuck::cast_slice_mut(values))?;
        Ok(())
    }

    /// Reads the tensor `name`, which must have this shape.
    pub(crate) fn read(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Box<dyn Error>> {
        let mut values = Vec::new();
        self.read_into(name, shape, &mut values)?;
        Ok(values)
    }
}
