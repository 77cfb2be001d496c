//! Lanes: the three streams between a member and a reducer, shared by all their rounds.
//!
//! One stream carries messages, one the words of inputs, one those of sums, so that a nonce never waits behind megabytes
//! and neither direction waits for the other's lock; the network spreads them over two connections. All are opened by the
//! member, and begin with a hello that says to which lane they belong.
//!
//! ```text
//! frame: u32 length of the rest | u8 kind | u64 round | body          little endian
//! kind 0  hello    body: 16 bytes that name the lane, u8 what it carries; round 0
//! kind 1  message  body: pb::RoundFrame
//! kind 2  words    body: u32 attempt | u32 chunk | u32 offset | words
//! ```
//!
//! Invariants: words go into a buffer that was made for them beforehand or are passed over, so a peer cannot make this
//! node hold more than it was granted; a frame's length is checked before its body is read; writers hold a bounded number
//! of frames, and a peer that lets them run over loses its lane.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{BufMut as _, Bytes, BytesMut};
use prost::Message as _;
use sundara_proto::id::NodeId;
use sundara_proto::pb;
use sundara_proto::pb::round_frame::Kind as Frame;
use sundara_proto::rules::round::tree::ChunkHasher;
use sundara_proto::wire::{self, limit};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::domain::round::At;
use crate::net::{BulkStream, NetHandle, PeerIdentity};
use crate::service::Tasks;
use crate::services::directory::Directory;

/// First eight bytes of a round's digest: its name on lanes.
pub(super) type RoundKey = u64;

const HEADER: usize = 4 + 1 + 8;
const DATA_HEADER: usize = 12;
const HELLO: u8 = 0;
const MESSAGE: u8 = 1;
const WORDS: u8 = 2;
/// Words of one frame: large enough that the frame's header costs nothing, small enough to let another chunk in between.
const WORDS_MAX: usize = 1 << 20;
/// Words are read, and hashed while they are in the cache, in pieces of this size.
const PIECE: usize = 256 << 10;
/// Messages that wait for a peer: a window of chunks with a handful each.
const MESSAGES_QUEUED_MAX: usize = 1_024;
/// Chunks that wait for a peer: more than any window.
const CHUNKS_QUEUED_MAX: usize = 256;
/// Time for the directory to hear of a connection.
const KNOWN_WITHIN: std::time::Duration = std::time::Duration::from_secs(2);
/// What waits for one round.
pub(super) const EVENTS_QUEUED_MAX: usize = 4_096;

/// What comes over lanes, for a round.
#[derive(Debug)]
pub(super) enum Event {
    /// A message.
    Frame { peer: PeerIdentity, frame: Frame },
    /// All words of a chunk.
    Words { peer: PeerIdentity, at: At, words: Vec<u8>, root: [u8; 32] },
    /// Some words of a chunk.
    Moved { chunk: u32 },
    /// All words of a chunk were handed to the network.
    Sent { at: At },
    /// The lane is gone.
    Gone { peer: PeerIdentity, reason: String },
}

/// A message for a round that the lane knows nothing of.
#[derive(Debug)]
pub(super) struct Stray {
    pub(super) lane: Lane,
    pub(super) round: RoundKey,
    pub(super) frame: Frame,
}

/// Where the words of one chunk go.
struct Sink {
    at: At,
    words: Vec<u8>,
    got: usize,
    /// `None` where roots are not asked for.
    hasher: Option<ChunkHasher>,
}

/// Words on their way out.
struct Outgoing {
    round: RoundKey,
    at: At,
    words: Arc<Vec<u8>>,
}

#[derive(Default)]
struct Routes {
    rounds: HashMap<RoundKey, mpsc::Sender<Event>>,
    sinks: HashMap<(RoundKey, u32), Sink>,
    gone: Option<String>,
}

struct Shared {
    peer: PeerIdentity,
    routes: Mutex<Routes>,
    messages: mpsc::Sender<Bytes>,
    chunks: mpsc::Sender<Outgoing>,
    /// Takes messages of rounds without a route; `None` on the side that dials, which knows its rounds.
    strays: Option<mpsc::Sender<Stray>>,
    over: CancellationToken,
}

/// One lane. Clones share it.
#[derive(Clone)]
pub(super) struct Lane {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane").field("peer", &self.shared.peer.node).finish_non_exhaustive()
    }
}

/// What a stream of a lane carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carries {
    /// Messages, both ways.
    Messages,
    /// Words, to the side that accepted.
    Up,
    /// Words, to the side that opened.
    Down,
}

impl Carries {
    /// Every kind, in the order in which they are opened.
    pub(super) const ALL: [Self; 3] = [Self::Messages, Self::Up, Self::Down];
}

/// First frame of a stream that a peer opened: which lane it belongs to, and what it carries.
pub(super) async fn accept(stream: &mut BulkStream) -> io::Result<([u8; 16], Carries)> {
    let (kind, round, len) = read_header(stream).await?;
    if kind != HELLO || round != 0 || len != 17 {
        return Err(broken("a lane that does not begin with its name"));
    }
    let mut name = [0; 16];
    stream.read_exact(&mut name).await?;
    let carries = stream.read_u8().await?;
    let carries = Carries::ALL.get(usize::from(carries)).ok_or_else(|| broken("a stream of an unknown kind"))?;
    Ok((name, *carries))
}

/// Names a stream that this side opened.
pub(super) async fn introduce(stream: &mut BulkStream, name: [u8; 16], carries: Carries) -> io::Result<()> {
    let mut frame = header(HELLO, 0, 17);
    frame.put_slice(&name);
    frame.put_u8(carries as u8);
    stream.write_all(&frame).await?;
    stream.flush().await
}

impl Lane {
    /// Runs a lane over its streams, messages, words in and words out, until any of them ends.
    pub(super) fn start(
        peer: PeerIdentity,
        [messages_both, words_in, words_out]: [BulkStream; 3],
        strays: Option<mpsc::Sender<Stray>>,
        tasks: &Tasks,
    ) -> Self {
        let (messages, messages_rx) = mpsc::channel(MESSAGES_QUEUED_MAX);
        let (chunks, chunks_rx) = mpsc::channel(CHUNKS_QUEUED_MAX);
        let over = tasks.token().child_token();
        let shared = Shared { peer, routes: Mutex::default(), messages, chunks, strays, over };
        let lane = Self { shared: Arc::new(shared) };
        let (control_in, control_out) = tokio::io::split(messages_both);
        let run = |name: &str, future: std::pin::Pin<Box<dyn Future<Output = io::Result<()>> + Send>>| {
            let lane = lane.clone();
            tasks.spawn(name, async move {
                let over = lane.shared.over.clone();
                let ended = tokio::select! {
                    ended = future => ended,
                    () = over.cancelled() => Ok(()),
                };
                lane.close(ended.err().map_or_else(|| "closed".to_owned(), |e| e.to_string())).await;
            });
        };
        run("lane messages in", Box::pin(read(lane.clone(), control_in)));
        run("lane words in", Box::pin(read(lane.clone(), words_in)));
        run("lane messages out", Box::pin(write_messages(messages_rx, control_out)));
        run("lane words out", Box::pin(write_words(lane.clone(), chunks_rx, words_out)));
        lane
    }

    /// Who is at the other end.
    pub(super) fn peer(&self) -> PeerIdentity {
        self.shared.peer
    }

    /// Whether it has ended.
    pub(super) fn is_over(&self) -> bool {
        self.shared.over.is_cancelled()
    }

    /// Ends it.
    pub(super) async fn close(&self, reason: String) {
        self.shared.over.cancel();
        let rounds: Vec<_> = {
            let mut routes = self.routes();
            routes.gone.get_or_insert_with(|| reason.clone());
            routes.sinks.clear();
            routes.rounds.drain().collect()
        };
        for (_, events) in rounds {
            // A round that is over does not need to know.
            drop(events.send(Event::Gone { peer: self.shared.peer, reason: reason.clone() }).await);
        }
    }

    /// Everything of this round goes there from now on. `false`: the lane has ended.
    pub(super) fn route(&self, round: RoundKey, events: mpsc::Sender<Event>) -> bool {
        let mut routes = self.routes();
        if routes.gone.is_none() {
            routes.rounds.insert(round, events);
        }
        routes.gone.is_none()
    }

    /// Nothing of this round is wanted any more.
    pub(super) fn forget(&self, round: RoundKey) {
        let mut routes = self.routes();
        routes.rounds.remove(&round);
        routes.sinks.retain(|(r, _), _| *r != round);
    }

    /// Takes the words of a chunk into `words`, which has their length. A former buffer of the chunk is dropped.
    pub(super) fn expect(&self, round: RoundKey, at: At, words: Vec<u8>, hash: bool) {
        let sink = Sink { at, words, got: 0, hasher: hash.then(ChunkHasher::new) };
        self.routes().sinks.insert((round, at.chunk), sink);
    }

    /// Passes over the words of an attempt.
    pub(super) fn unexpect(&self, round: RoundKey, at: At) {
        let mut routes = self.routes();
        if routes.sinks.get(&(round, at.chunk)).is_some_and(|sink| sink.at == at) {
            routes.sinks.remove(&(round, at.chunk));
        }
    }

    /// Sends a message. `false`: the peer takes too few, or is gone.
    pub(super) fn send(&self, round: RoundKey, frame: Frame) -> bool {
        let frame = pb::RoundFrame { kind: Some(frame) };
        let len = frame.encoded_len();
        let mut bytes = header(MESSAGE, round, len);
        if frame.encode(&mut bytes).is_err() {
            return false;
        }
        self.shared.messages.try_send(bytes.freeze()).is_ok()
    }

    /// Sends the words of a chunk; [`Event::Sent`] follows.
    pub(super) fn send_words(&self, round: RoundKey, at: At, words: Arc<Vec<u8>>) -> bool {
        self.shared.chunks.try_send(Outgoing { round, at, words }).is_ok()
    }

    fn routes(&self) -> std::sync::MutexGuard<'_, Routes> {
        self.shared.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn events(&self, round: RoundKey) -> Option<mpsc::Sender<Event>> {
        self.routes().rounds.get(&round).cloned()
    }

    async fn tell(&self, round: RoundKey, event: Event) {
        if let Some(events) = self.events(round) {
            // A round that is over does not need it.
            drop(events.send(event).await);
        }
    }

    async fn message(&self, round: RoundKey, frame: Frame) -> io::Result<()> {
        if let Some(events) = self.events(round) {
            drop(events.send(Event::Frame { peer: self.shared.peer, frame }).await);
        } else if let Some(strays) = &self.shared.strays {
            let stray = Stray { lane: self.clone(), round, frame };
            return strays.send(stray).await.map_err(|_| broken("the node is shutting down"));
        }
        Ok(())
    }
}

fn header(kind: u8, round: RoundKey, body: usize) -> BytesMut {
    let mut bytes = BytesMut::with_capacity(HEADER + body.min(64 << 10));
    bytes.put_u32_le(u32::try_from(body + HEADER - 4).unwrap_or(u32::MAX));
    bytes.put_u8(kind);
    bytes.put_u64_le(round);
    bytes
}

async fn read_header(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<(u8, RoundKey, usize)> {
    let mut bytes = [0; HEADER];
    stream.read_exact(&mut bytes).await?;
    let len = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
    let round = u64::from_le_bytes([bytes[5], bytes[6], bytes[7], bytes[8], bytes[9], bytes[10], bytes[11], bytes[12]]);
    let body = len.checked_sub(HEADER - 4).ok_or_else(|| broken("a frame shorter than its header"))?;
    Ok((bytes[4], round, body))
}

async fn read(lane: Lane, mut stream: impl AsyncRead + Unpin) -> io::Result<()> {
    let mut waste = Vec::new();
    loop {
        let (kind, round, len) = read_header(&mut stream).await?;
        match kind {
            MESSAGE => {
                if len > limit::ROUND_FRAME {
                    return Err(broken("a message above the limit"));
                }
                let mut body = BytesMut::zeroed(len);
                stream.read_exact(&mut body).await?;
                let frame: pb::RoundFrame =
                    wire::decode_raw(body.freeze(), limit::ROUND_FRAME).map_err(|e| broken(&e.to_string()))?;
                // A message of a newer release is passed over.
                if let Some(frame) = frame.kind {
                    lane.message(round, frame).await?;
                }
            }
            WORDS => {
                if !(DATA_HEADER..=DATA_HEADER + WORDS_MAX).contains(&len) {
                    return Err(broken("words above the limit"));
                }
                read_words(&lane, &mut stream, round, len - DATA_HEADER, &mut waste).await?;
            }
            _ => return Err(broken("a frame of an unknown kind")),
        }
    }
}

async fn read_words(
    lane: &Lane,
    stream: &mut (impl AsyncRead + Unpin),
    round: RoundKey,
    len: usize,
    waste: &mut Vec<u8>,
) -> io::Result<()> {
    let attempt = stream.read_u32_le().await?;
    let chunk = stream.read_u32_le().await?;
    let offset = stream.read_u32_le().await? as usize;
    let at = At { chunk, attempt };
    let taken = {
        let mut routes = lane.routes();
        let fits = |sink: &Sink| sink.at == at && sink.got == offset && len <= sink.words.len() - sink.got;
        if routes.sinks.get(&(round, chunk)).is_some_and(fits) { routes.sinks.remove(&(round, chunk)) } else { None }
    };
    let Some(mut sink) = taken else {
        // Of an attempt that is over, or not asked for.
        waste.resize(PIECE, 0);
        let mut left = len;
        while left > 0 {
            let n = left.min(PIECE);
            stream.read_exact(&mut waste[..n]).await?;
            left -= n;
        }
        return Ok(());
    };
    let end = sink.got + len;
    while sink.got < end {
        let next = end.min(sink.got + PIECE);
        let piece = &mut sink.words[sink.got..next];
        stream.read_exact(piece).await?;
        if let Some(hasher) = &mut sink.hasher {
            hasher.update(piece);
        }
        sink.got = next;
    }
    let peer = lane.shared.peer;
    if sink.got == sink.words.len() {
        let root = sink.hasher.take().map_or([0; 32], |hasher| hasher.finish().root().0);
        lane.tell(round, Event::Words { peer, at, words: sink.words, root }).await;
    } else {
        {
            let mut routes = lane.routes();
            // The round may have ended, or reset the chunk, while the words came.
            if routes.rounds.contains_key(&round) {
                routes.sinks.entry((round, chunk)).or_insert(sink);
            }
        }
        lane.tell(round, Event::Moved { chunk }).await;
    }
    Ok(())
}

async fn write_messages(
    mut queue: mpsc::Receiver<Bytes>,
    mut stream: tokio::io::WriteHalf<BulkStream>,
) -> io::Result<()> {
    while let Some(bytes) = queue.recv().await {
        stream.write_all(&bytes).await?;
        if queue.is_empty() {
            stream.flush().await?;
        }
    }
    Ok(())
}

async fn write_words(
    lane: Lane,
    mut queue: mpsc::Receiver<Outgoing>,
    mut stream: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    while let Some(Outgoing { round, at, words }) = queue.recv().await {
        let mut offset = 0;
        while offset < words.len() {
            let next = words.len().min(offset + WORDS_MAX);
            let mut head = header(WORDS, round, DATA_HEADER + next - offset);
            head.put_u32_le(at.attempt);
            head.put_u32_le(at.chunk);
            head.put_u32_le(u32::try_from(offset).map_err(|_| broken("a chunk above 4 GiB"))?);
            stream.write_all(&head).await?;
            stream.write_all(&words[offset..next]).await?;
            offset = next;
            if offset < words.len() {
                lane.tell(round, Event::Moved { chunk: at.chunk }).await;
            }
        }
        if queue.is_empty() {
            stream.flush().await?;
        }
        drop(words);
        lane.tell(round, Event::Sent { at }).await;
    }
    Ok(())
}

fn broken(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.to_owned())
}

/// Opens a lane to a node.
///
/// # Errors
/// In words.
pub(super) async fn open(net: &NetHandle, directory: &Directory, node: NodeId, tasks: &Tasks) -> Result<Lane, String> {
    let name: [u8; 16] = rand::random();
    let mut streams = Vec::with_capacity(Carries::ALL.len());
    for carries in Carries::ALL {
        let mut stream = net.open_round(node).await.map_err(|e| e.to_string())?;
        introduce(&mut stream, name, carries).await.map_err(|e| e.to_string())?;
        streams.push(stream);
    }
    let [messages, up, down] = <[BulkStream; 3]>::try_from(streams).map_err(|_| "a stream is missing".to_owned())?;
    // The directory hears of a connection a moment after it is made.
    let here = directory.wait_for(|view| view.peers.contains_key(&node));
    drop(tokio::time::timeout(KNOWN_WITHIN, here).await);
    let known = directory.snapshot().peers.get(&node).copied();
    let known = known.ok_or_else(|| "the node is not connected any more".to_owned())?;
    Ok(Lane::start(known, [messages, down, up], None, tasks))
}

/// The streams of a lane as the accepting side uses them: messages, words in, words out.
pub(super) fn sorted(mut streams: Vec<(Carries, BulkStream)>) -> Option<[BulkStream; 3]> {
    streams.sort_by_key(|(carries, _)| *carries as u8);
    let kinds: Vec<Carries> = streams.iter().map(|(carries, _)| *carries).collect();
    let streams: Vec<BulkStream> = streams.into_iter().map(|(_, stream)| stream).collect();
    (kinds == Carries::ALL).then(|| streams.try_into().ok()).flatten()
}
