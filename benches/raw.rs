//! Raw streams: what TCP, noise and yamux of libp2p carry between two processes when nothing is added to them.
//!
//! The ceiling of everything that moves bytes between nodes. No swarm, no protocol negotiation, no hashes: the receiver
//! opens connections and on each of them one stream, says which bytes it wants, and gets them.
//!
//! ```text
//! bench --"carry"--> receiver --offset, length (16 bytes), a stream a connection--> sender: memory or a file
//!       <--seconds--          <--------------------- bytes ----------------------
//! ```

use std::fs::File;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use futures::future::poll_fn;
use futures::io::BufReader;
use futures::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use libp2p::core::upgrade::{InboundConnectionUpgrade as _, OutboundConnectionUpgrade as _};
use libp2p::{identity, noise};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinSet, spawn_blocking};
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt as _};

use crate::{Child, Parent};

const SENDER: &str = "raw-sender";
const RECEIVER: &str = "raw-receiver";
/// Windows and streams of a connection: as the node has them.
const WINDOW: usize = 64 << 20;
const STREAMS: usize = 128;

/// How the streams are set up.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// Largest yamux frame, bytes.
    pub split: usize,
    /// Bytes read from the socket at once, under noise; 0: as libp2p does it, 8 KiB.
    pub read_ahead: usize,
    /// TCP connections, one stream on each.
    pub connections: usize,
    /// tokio workers of each process.
    pub workers: usize,
    /// Bytes that sender and receiver move at once.
    pub piece: usize,
    /// Files are read and written on other threads, a piece ahead or behind; otherwise between two awaits.
    pub pooled: bool,
}

impl Default for Settings {
    /// The best that was found: see README.md.
    fn default() -> Self {
        Self { split: 256 << 10, read_ahead: 256 << 10, connections: 2, workers: 1, piece: 256 << 10, pooled: false }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct SenderOrder {
    settings: Settings,
    /// Memory where there is none.
    source: Option<PathBuf>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct ReceiverOrder {
    settings: Settings,
    sender: SocketAddr,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Carry {
    len: u64,
    /// Dropped where there is none.
    sink: Option<PathBuf>,
}

/// What one transfer took.
#[derive(Clone, Copy, Debug)]
pub struct Carried {
    /// From the first stream's opening to the last byte in its place, seconds.
    pub seconds: f64,
    /// Processor time of the sending process.
    pub sender_cpu: Duration,
    /// Processor time of the receiving one.
    pub receiver_cpu: Duration,
}

/// A sending and a receiving process, connected.
#[derive(Debug)]
pub struct Pair {
    sender: Child,
    receiver: Child,
}

impl Pair {
    /// Starts both. The sender gives what is in `source`, or memory.
    ///
    /// # Errors
    /// When one does not start or they do not connect.
    pub fn start(settings: &Settings, source: Option<PathBuf>) -> Result<Self> {
        let mut sender = Child::start(SENDER, &SenderOrder { settings: settings.clone(), source })?;
        let address = sender.hear()?;
        let mut receiver = Child::start(RECEIVER, &ReceiverOrder { settings: settings.clone(), sender: address })?;
        receiver.hear::<()>()?;
        Ok(Self { sender, receiver })
    }

    /// Moves `len` bytes into `sink`, a file that does not exist yet, or nowhere.
    ///
    /// # Errors
    /// When a process fails.
    pub fn carry(&mut self, len: u64, sink: Option<PathBuf>) -> Result<Carried> {
        let before = (self.sender.usage()?, self.receiver.usage()?);
        self.receiver.tell(&Carry { len, sink })?;
        let seconds = self.receiver.hear()?;
        let after = (self.sender.usage()?, self.receiver.usage()?);
        Ok(Carried {
            seconds,
            sender_cpu: after.0.cpu.saturating_sub(before.0.cpu),
            receiver_cpu: after.1.cpu.saturating_sub(before.1.cpu),
        })
    }
}

/// Writes `len` bytes that nothing compresses, and waits until they are on the disk.
///
/// # Errors
/// When the file cannot be written.
pub fn write_source(path: &Path, len: u64) -> io::Result<()> {
    let mut out = io::BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..len / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.write_all(&state.to_le_bytes())?;
    }
    out.write_all(&vec![0; (len % 8) as usize])?;
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

/// Runs this process as a part of a [`Pair`], if it is one; false otherwise.
///
/// # Errors
/// When the part fails.
pub fn run_part(parent: &Parent) -> Result<bool> {
    match parent.part.as_str() {
        SENDER => {
            let order: SenderOrder = parent.order()?;
            parent.run(Some(order.settings.workers), send(parent, order))?;
        }
        RECEIVER => {
            let order: ReceiverOrder = parent.order()?;
            parent.run(Some(order.settings.workers), async {
                let connections = connect(&order).await?;
                parent.tell(&())?;
                while let Some(carry) = parent.hear::<Carry>().await? {
                    let receiving = receive(order.settings.clone(), connections.clone(), carry);
                    parent.tell(&tokio::spawn(receiving).await??)?;
                }
                Ok(())
            })?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}
type Secured = noise::Output<Box<dyn Io>>;
type Opener = tokio::sync::mpsc::Sender<tokio::sync::oneshot::Sender<yamux::Stream>>;

/// A socket as noise gets it.
fn under_noise(socket: TcpStream, settings: &Settings) -> io::Result<Box<dyn Io>> {
    socket.set_nodelay(true)?;
    let socket: Compat<TcpStream> = socket.compat();
    Ok(match settings.read_ahead {
        0 => Box::new(socket),
        bytes => Box::new(BufReader::with_capacity(bytes, socket)),
    })
}

fn security() -> Result<noise::Config> {
    noise::Config::new(&identity::Keypair::generate_ed25519()).map_err(|e| anyhow!("noise: {e}"))
}

fn multiplexed(socket: Secured, settings: &Settings, mode: yamux::Mode) -> yamux::Connection<Secured> {
    let mut config = yamux::Config::default();
    config.set_max_num_streams(STREAMS);
    config.set_max_connection_receive_window(Some(WINDOW)).set_split_send_size(settings.split);
    yamux::Connection::new(socket, config, mode)
}

async fn send(parent: &Parent, order: SenderOrder) -> Result<()> {
    let source = order.source.map(File::open).transpose()?.map(Arc::new);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    parent.tell(&listener.local_addr()?)?;
    let serve = async {
        loop {
            let (socket, _) = listener.accept().await?;
            let (settings, source) = (order.settings.clone(), source.clone());
            let socket = under_noise(socket, &settings)?;
            tokio::spawn(async move {
                let (_, socket) = security()?.upgrade_inbound(socket, "/noise").await?;
                let mut connection = multiplexed(socket, &settings, yamux::Mode::Server);
                while let Some(stream) = poll_fn(|cx| connection.poll_next_inbound(cx)).await {
                    tokio::spawn(give(stream?, settings.clone(), source.clone()));
                }
                anyhow::Ok(())
            });
        }
    };
    tokio::select! {
        failed = serve => failed,
        () = parent.ended() => Ok(()),
    }
}

/// Answers one request of a stream after the other.
async fn give(mut stream: yamux::Stream, settings: Settings, source: Option<Arc<File>>) -> Result<()> {
    let mut range = [0; 16];
    while stream.read_exact(&mut range).await.is_ok() {
        let (offset, len) = range.split_at(8);
        let mut offset = u64::from_le_bytes(offset.try_into()?);
        let end = offset + u64::from_le_bytes(len.try_into()?);
        let mut buffer = vec![0x5a; settings.piece];
        let mut next = read_piece(&source, &settings, Vec::with_capacity(settings.piece), offset, end);
        while offset < end {
            let len = settings.piece.min(usize::try_from(end - offset)?);
            offset += len as u64;
            match &source {
                None => stream.write_all(&buffer[..len]).await?,
                Some(_) => {
                    let piece = next.await?;
                    next = read_piece(&source, &settings, std::mem::take(&mut buffer), offset, end);
                    stream.write_all(&piece[..len]).await?;
                    buffer = piece;
                }
            }
        }
        stream.flush().await?;
    }
    Ok(())
}

type Reading = std::pin::Pin<Box<dyn Future<Output = Result<Vec<u8>>> + Send>>;

/// Begins to read the piece at `offset`, if there is one.
fn read_piece(source: &Option<Arc<File>>, settings: &Settings, mut buffer: Vec<u8>, offset: u64, end: u64) -> Reading {
    let Some(file) = source.clone().filter(|_| offset < end) else {
        return Box::pin(std::future::ready(Ok(buffer)));
    };
    buffer.resize(settings.piece, 0);
    let read = move || {
        let len = buffer.len().min((end - offset) as usize);
        file.read_exact_at(&mut buffer[..len], offset)?;
        Ok(buffer)
    };
    if settings.pooled {
        let reading = spawn_blocking(read);
        Box::pin(async { reading.await? })
    } else {
        Box::pin(async move { read() })
    }
}

async fn connect(order: &ReceiverOrder) -> Result<Vec<Opener>> {
    let mut openers = Vec::new();
    for _ in 0..order.settings.connections {
        let socket = under_noise(TcpStream::connect(order.sender).await?, &order.settings)?;
        let (_, socket) = security()?.upgrade_outbound(socket, "/noise").await?;
        let connection = multiplexed(socket, &order.settings, yamux::Mode::Client);
        let (opener, wanted) = tokio::sync::mpsc::channel(1);
        tokio::spawn(drive(connection, wanted));
        openers.push(opener);
    }
    Ok(openers)
}

/// Moves a connection, and opens streams on it for those who ask.
async fn drive(
    mut connection: yamux::Connection<Secured>,
    mut wanted: tokio::sync::mpsc::Receiver<tokio::sync::oneshot::Sender<yamux::Stream>>,
) {
    let mut asking: Option<tokio::sync::oneshot::Sender<yamux::Stream>> = None;
    poll_fn(|cx| {
        loop {
            if asking.is_none()
                && let std::task::Poll::Ready(Some(ask)) = wanted.poll_recv(cx)
            {
                asking = Some(ask);
            }
            if asking.is_some()
                && let std::task::Poll::Ready(opened) = connection.poll_new_outbound(cx)
                && let (Ok(stream), Some(ask)) = (opened, asking.take())
            {
                // Whoever asked and left needs no stream.
                let _ = ask.send(stream);
                continue;
            }
            if let Some(Ok(_)) = std::task::ready!(connection.poll_next_inbound(cx)) {
                continue;
            }
            return std::task::Poll::Ready(());
        }
    })
    .await;
}

/// Seconds.
async fn receive(settings: Settings, connections: Vec<Opener>, carry: Carry) -> Result<f64> {
    let began = Instant::now();
    let create = |path| File::options().write(true).create_new(true).open(path);
    let sink = carry.sink.map(create).transpose().context("the sink must be a fresh file")?.map(Arc::new);
    let share = carry.len.div_ceil(connections.len() as u64);
    let mut streams = JoinSet::new();
    for (i, opener) in connections.iter().enumerate() {
        let offset = (share * i as u64).min(carry.len);
        let end = (offset + share).min(carry.len);
        streams.spawn(take(opener.clone(), settings.clone(), sink.clone(), offset, end));
    }
    while let Some(ended) = streams.join_next().await {
        ended??;
    }
    drop(sink);
    Ok(began.elapsed().as_secs_f64())
}

async fn take(opener: Opener, settings: Settings, sink: Option<Arc<File>>, mut offset: u64, end: u64) -> Result<()> {
    let (ask, answer) = tokio::sync::oneshot::channel();
    opener.send(ask).await.map_err(|_| anyhow!("the connection ended"))?;
    let mut stream = answer.await?;
    stream.write_all(&[offset.to_le_bytes(), (end - offset).to_le_bytes()].concat()).await?;
    stream.flush().await?;
    let (mut buffer, mut spare) = (vec![0; settings.piece], vec![0; settings.piece]);
    let mut writing = None;
    while offset < end {
        let len = settings.piece.min(usize::try_from(end - offset)?);
        stream.read_exact(&mut buffer[..len]).await?;
        if let Some(file) = &sink {
            if settings.pooled {
                if let Some(written) = writing.take() {
                    let written: tokio::task::JoinHandle<io::Result<Vec<u8>>> = written;
                    spare = written.await??;
                }
                let full = std::mem::replace(&mut buffer, std::mem::take(&mut spare));
                let file = file.clone();
                writing = Some(spawn_blocking(move || file.write_all_at(&full[..len], offset).map(|()| full)));
            } else {
                file.write_all_at(&buffer[..len], offset)?;
            }
        }
        offset += len as u64;
    }
    if let Some(written) = writing {
        written.await??;
    }
    Ok(())
}
