//! Reading blobs for others: encodings whose every byte was compared with the tree.
//!
//! **Invariant:** a group leaves through [`Encoder`] only if this process has hashed it since the file last changed, or
//! hashes it now. What fails is marked bad and never served; parents are always compared, they cost 1/256 of the bytes.

use std::fs::File;
use std::io;
use std::sync::Arc;

use bao_tree::io::sync::ReadAt;
use sundara_proto::blob::{GROUP_LEN, GroupRanges};
use sundara_proto::id::BlobId;
use sundara_proto::units::ByteCount;

use super::Blobs;
use super::error::BlobError;
use super::layout::Stamp;
use super::tree::{Expected, PAIR_LEN, Pair, Shape, Step, Walk};

/// Parents of at most so many groups are read by the window: 63 pairs, side by side in post order.
const NEAR_SPAN: u64 = 64;
/// Bytes of outboard read at once.
const WINDOW: u64 = 8 << 10;

/// Smallest buffer that [`Encoder::fill`] takes: one group.
pub const ENCODER_BUFFER_MIN: usize = GROUP_LEN as usize;

/// Pairs of an outboard, read a stretch at a time.
pub(crate) struct OutboardReader {
    file: Option<Arc<File>>,
    start: u64,
    window: Vec<u8>,
}

impl OutboardReader {
    pub(crate) fn new(file: Option<Arc<File>>) -> Self {
        Self { file, start: 0, window: Vec::new() }
    }

    pub(crate) fn pair(&mut self, at: u64, span: (u64, u64)) -> io::Result<Pair> {
        let file = self.file.as_ref().ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut pair = [0; PAIR_LEN];
        if span.1 - span.0 > NEAR_SPAN {
            file.read_exact_at(at, &mut pair)?;
            return Ok(pair);
        }
        let end = at + PAIR_LEN as u64;
        if at < self.start || end > self.start + self.window.len() as u64 {
            // In post order what is below a parent lies before it, and is wanted next.
            let start = end.saturating_sub(WINDOW);
            self.window.resize((end - start) as usize, 0);
            self.start = start;
            if let Err(e) = file.read_exact_at(start, &mut self.window) {
                self.window.clear();
                return Err(e);
            }
        }
        let from = (at - self.start) as usize;
        pair.copy_from_slice(&self.window[from..from + PAIR_LEN]);
        Ok(pair)
    }
}

/// An open blob. Keeps working when the blob is evicted or removed meanwhile.
#[derive(Debug)]
pub struct BlobReader {
    pub(crate) blobs: Blobs,
    pub(crate) shape: Shape,
    pub(crate) data: Arc<File>,
    pub(crate) outboard: Option<Arc<File>>,
}

impl BlobReader {
    /// Which blob.
    pub fn id(&self) -> BlobId {
        self.shape.id()
    }

    /// Its length.
    pub fn len(&self) -> ByteCount {
        self.shape.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len().0 == 0
    }

    /// Groups held now; a blob being fetched gains some.
    pub fn held(&self) -> GroupRanges {
        self.blobs.held(&self.id())
    }

    /// Starts the encoding of `groups`, which must be held.
    ///
    /// # Errors
    /// When the file cannot be looked at.
    pub fn encode(&self, groups: &GroupRanges) -> Result<Encoder, BlobError> {
        let stamp = Stamp::of(&self.data).map_err(BlobError::io("look at", &self.blobs.layout().data(&self.id())))?;
        Ok(Encoder {
            blobs: self.blobs.clone(),
            shape: self.shape,
            data: self.data.clone(),
            outboard: OutboardReader::new(self.outboard.clone()),
            walk: self.shape.walk(groups),
            next: None,
            expected: Expected::from_root(&self.shape),
            trusted: self.blobs.trusted(&self.id(), &stamp),
            stamp,
        })
    }
}

/// An encoding being read.
pub struct Encoder {
    blobs: Blobs,
    shape: Shape,
    data: Arc<File>,
    outboard: OutboardReader,
    walk: Walk,
    next: Option<Step>,
    expected: Expected,
    trusted: GroupRanges,
    stamp: Stamp,
}

impl Encoder {
    /// Fills `buffer` (at least [`ENCODER_BUFFER_MIN`]) with the next bytes; 0 at the end. Blocks on the disk.
    ///
    /// # Errors
    /// [`BlobError::Corrupt`]: what is on disk is not the blob; nothing that was returned before is affected.
    pub fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, BlobError> {
        let mut filled = 0;
        let mut fresh = GroupRanges::empty();
        let failed = loop {
            let Some(step) = self.next.take().or_else(|| self.walk.next()) else { break None };
            let (want, group) = match step {
                Step::Parent { span, .. } => (PAIR_LEN, span.0),
                Step::Leaf { len, group, .. } => (len, group),
            };
            let Some(out) = buffer.get_mut(filled..filled + want) else {
                self.next = Some(step);
                break None;
            };
            match self.step(step, out, &mut fresh) {
                Ok(true) => filled += want,
                Ok(false) => break Some(self.spoiled(step, None)),
                Err(e) => break Some(self.spoiled(step, Some((group, e)))),
            }
        };
        self.blobs.add_trusted(&self.shape.id(), &self.stamp, &fresh);
        failed.map_or(Ok(filled), Err)
    }

    /// Whether every byte was returned.
    pub fn is_done(&mut self) -> bool {
        self.next = self.next.take().or_else(|| self.walk.next());
        self.next.is_none()
    }

    /// Whether the step's bytes are what the tree says.
    fn step(&mut self, step: Step, out: &mut [u8], fresh: &mut GroupRanges) -> io::Result<bool> {
        match step {
            Step::Parent { at, span, is_root, left, right } => {
                let pair = self.outboard.pair(at, span)?;
                out.copy_from_slice(&pair);
                Ok(self.expected.parent(&pair, is_root, left, right))
            }
            Step::Leaf { group, is_root, .. } => {
                self.data.read_exact_at(group * GROUP_LEN, out)?;
                if self.trusted.contains(group) {
                    self.expected.skip();
                    return Ok(true);
                }
                fresh.insert(group..group + 1);
                Ok(self.expected.leaf(group, out, is_root))
            }
        }
    }

    /// A mismatch or a file that is too short is damage; any other failure of the disk says nothing about the content.
    fn spoiled(&self, step: Step, failure: Option<(u64, io::Error)>) -> BlobError {
        let range = match step {
            Step::Parent { span, .. } => span.0..span.1.min(self.shape.groups()),
            Step::Leaf { group, .. } => group..group + 1,
        };
        match failure {
            Some((_, e)) if e.kind() != io::ErrorKind::UnexpectedEof => {
                BlobError::io("read", &self.blobs.layout().data(&self.shape.id()))(e)
            }
            _ => {
                let group = range.start;
                self.blobs.mark_bad(&self.shape.id(), range);
                BlobError::Corrupt { blob: self.shape.id(), group }
            }
        }
    }
}

/// Groups of the files that are right, found by hashing. Reads only what lies below parents that match.
pub(crate) fn scan(shape: &Shape, data: &File, outboard: Option<Arc<File>>) -> io::Result<GroupRanges> {
    let mut outboard = OutboardReader::new(outboard);
    let mut expected = Expected::from_root(shape);
    let mut good = GroupRanges::empty();
    let mut buffer = vec![0; ENCODER_BUFFER_MIN];
    let mut skip_until = 0;
    let short = |e: io::Error| if e.kind() == io::ErrorKind::UnexpectedEof { Ok(false) } else { Err(e) };
    for step in shape.walk(&GroupRanges::all(shape.len())) {
        match step {
            Step::Parent { span, left, right, .. } if span.0 < skip_until => expected.poison(left, right),
            Step::Parent { at, span, is_root, left, right } => {
                let matches = match outboard.pair(at, span) {
                    Ok(pair) => expected.parent(&pair, is_root, left, right),
                    Err(e) => {
                        expected.poison(left, right);
                        short(e)?
                    }
                };
                if !matches {
                    skip_until = span.1;
                }
            }
            Step::Leaf { group, .. } if group < skip_until => expected.skip(),
            Step::Leaf { group, len, is_root } => {
                let bytes = &mut buffer[..len];
                let read = data.read_exact_at(group * GROUP_LEN, bytes).map(|()| true).or_else(short)?;
                if expected.leaf(group, bytes, is_root) && read {
                    good.insert(group..group + 1);
                }
            }
        }
    }
    Ok(good)
}
