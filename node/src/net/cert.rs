//! The handshake on /cert: both sides show who vouches for them, before any other protocol of ours.
//!
//! ```text
//! dialler                                   listener
//! Hello{certificate, versions, clock} ----> verify, ask the loop: may it speak?
//!   <---- Hello{certificate, ...}  or  Hello{refusal}, end
//! verify, ask the loop
//! end of stream  or  Hello{refusal}   ----> the dialler agrees: it may be spoken to
//! ```
//!
//! Owns the exchange and the checks that need nothing but the two Hellos. Does not own who is let in (allow lists, slots,
//! revocation: the event loop, asked in the middle through [`Event::Verified`]).
//!
//! Invariants: the listener lets the dialler speak before it shows its own Hello, the dialler lets the listener speak
//! before it ends the stream; so no first request ever meets a gate that is still shut. Every refusal says why, to the
//! peer as well. A peer that says nothing costs one stream for [`TIMEOUT`].

use std::ops::RangeInclusive;
use std::time::Duration;

use futures::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use libp2p::swarm::ConnectionId;
use sundara_proto::cert::Certificate;
use sundara_proto::crypto::{Network, Signed};
use sundara_proto::id::NodeId;
use sundara_proto::names;
use sundara_proto::pb;
use sundara_proto::units::UnixMillis;
use sundara_proto::wire::{self, PREFIX_LEN, limit};
use tokio::sync::{mpsc, oneshot};

use super::dht::wall_clock;

/// A handshake takes two round trips; a peer that needs longer is cut.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);
const TIMEOUT_MS: u64 = TIMEOUT.as_millis() as u64;

/// What this node shows.
#[derive(Clone, Debug)]
pub(super) struct Ours {
    pub(super) network: Network,
    pub(super) certificate: Signed<Certificate>,
    pub(super) versions: RangeInclusive<u32>,
    /// Drawn when the process starts.
    pub(super) instance: [u8; 16],
}

/// A peer whose Hello holds.
#[derive(Clone, Debug)]
pub(super) struct Verified {
    pub(super) node: NodeId,
    pub(super) certificate: Signed<Certificate>,
    /// Highest version that both speak.
    pub(super) version: u32,
    pub(super) agent: String,
    pub(super) instance: [u8; 16],
    /// By how much its clock is certainly ahead of ours; below 0, behind. What the way of its message explains is not
    /// counted: on a wire that loses packets that is seconds.
    pub(super) skew_ms: i64,
}

/// What a handshake tells the loop.
#[derive(Debug)]
pub(super) enum Event {
    /// The peer's Hello holds. The answer decides whether it is let in, and why not.
    Verified { connection: ConnectionId, peer: Box<Verified>, answer: oneshot::Sender<Result<(), String>> },
    /// Both sides agree.
    Agreed { connection: ConnectionId },
    /// One side said no.
    Refused { connection: ConnectionId, reason: String, by_peer: bool },
    /// It broke or took too long.
    Broken { connection: ConnectionId, reason: String },
}

/// Which side of the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Dialler,
    Listener,
}

enum End {
    Refused { reason: String, by_peer: bool },
    Broken(String),
}

impl From<std::io::Error> for End {
    fn from(error: std::io::Error) -> Self {
        Self::Broken(format!("certificate stream: {error}"))
    }
}

/// Runs one handshake and reports exactly one end.
pub(super) async fn run<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    side: Side,
    ours: Ours,
    node: NodeId,
    connection: ConnectionId,
    events: mpsc::Sender<Event>,
) {
    let exchange = exchange(&mut stream, side, &ours, node, connection, &events);
    let end = match tokio::time::timeout(TIMEOUT, exchange).await {
        Ok(Ok(())) => Event::Agreed { connection },
        Ok(Err(End::Refused { reason, by_peer })) => Event::Refused { connection, reason, by_peer },
        Ok(Err(End::Broken(reason))) => Event::Broken { connection, reason },
        Err(_) => Event::Broken { connection, reason: format!("no certificate within {} s", TIMEOUT.as_secs()) },
    };
    // The loop is gone only when the node shuts down.
    drop(events.send(end).await);
}

async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    side: Side,
    ours: &Ours,
    node: NodeId,
    connection: ConnectionId,
    events: &mpsc::Sender<Event>,
) -> Result<(), End> {
    // The listener's clock is read after it has our Hello. The dialler's was read before it sent anything: how long
    // before, the listener does not know, but a handshake does not live for longer than this.
    let earliest = match side {
        Side::Dialler => wall_clock(),
        Side::Listener => UnixMillis(wall_clock().0.saturating_sub(TIMEOUT_MS)),
    };
    if side == Side::Dialler {
        write(stream, &hello(ours)).await?;
    }
    let theirs = read(stream).await?.ok_or_else(|| End::Broken("the peer closed the certificate stream".into()))?;
    if !theirs.refusal.is_empty() {
        return Err(End::Refused { reason: clean(&theirs.refusal, limit::TEXT), by_peer: true });
    }
    let admitted = match verify(ours, node, theirs, earliest..=wall_clock()) {
        Ok(peer) => {
            let (answer, admitted) = oneshot::channel();
            let event = Event::Verified { connection, peer: Box::new(peer), answer };
            events.send(event).await.map_err(|_| shut_down())?;
            admitted.await.map_err(|_| shut_down())?
        }
        Err(reason) => Err(reason),
    };
    if let Err(reason) = admitted {
        let refusal = pb::Hello { refusal: reason.clone(), agent: names::AGENT.to_owned(), ..Default::default() };
        // The peer may be gone already; then it does not need the reason.
        if write(stream, &refusal).await.is_ok() {
            drop(stream.close().await);
            // Waits until the peer has read it, since closing the connection would discard it.
            drop(read(stream).await);
        }
        return Err(End::Refused { reason, by_peer: false });
    }
    match side {
        Side::Dialler => stream.close().await.map_err(End::from),
        Side::Listener => {
            write(stream, &hello(ours)).await?;
            match read(stream).await? {
                None => {
                    drop(stream.close().await);
                    Ok(())
                }
                Some(last) => Err(End::Refused { reason: clean(&last.refusal, limit::TEXT), by_peer: true }),
            }
        }
    }
}

fn shut_down() -> End {
    End::Broken("this node is shutting down".to_owned())
}

fn hello(ours: &Ours) -> pb::Hello {
    pb::Hello {
        certificate: Some(ours.certificate.to_wire()),
        version_min: *ours.versions.start(),
        version_max: *ours.versions.end(),
        agent: names::AGENT.to_owned(),
        now_ms: wall_clock().0,
        refusal: String::new(),
        instance: bytes::Bytes::copy_from_slice(&ours.instance),
    }
}

/// Everything that the two Hellos decide by themselves. `sent` is when theirs was made, by our clock, and ends now. The
/// error is for the peer's operator to read.
pub(super) fn verify(
    ours: &Ours,
    node: NodeId,
    theirs: pb::Hello,
    sent: RangeInclusive<UnixMillis>,
) -> Result<Verified, String> {
    let agent = clean(&theirs.agent, limit::NAME);
    let version = common_version(&ours.versions, theirs.version_min..=theirs.version_max, &agent)?;
    let raw = theirs.certificate.ok_or("no certificate was shown")?;
    let certificate = Certificate::verify(&ours.network, node, *sent.end(), raw).map_err(|error| error.to_string())?;
    let instance = wire::array(&theirs.instance, "instance").map_err(|error| error.to_string())?;
    let skew_ms = skew(theirs.now_ms, &sent);
    Ok(Verified { node, certificate, version, agent, instance, skew_ms })
}

/// How far `theirs` lies outside of `sent`.
fn skew(theirs: u64, sent: &RangeInclusive<UnixMillis>) -> i64 {
    let signed = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX);
    let ahead = signed(theirs.saturating_sub(sent.end().0));
    let behind = signed(sent.start().0.saturating_sub(theirs));
    if ahead > 0 { ahead } else { -behind }
}

fn common_version(ours: &RangeInclusive<u32>, theirs: RangeInclusive<u32>, agent: &str) -> Result<u32, String> {
    let highest = *ours.end().min(theirs.end());
    if ours.contains(&highest) && theirs.contains(&highest) {
        return Ok(highest);
    }
    let older = if theirs.end() < ours.start() { agent } else { names::AGENT };
    Err(format!(
        "no common protocol version: {agent} speaks {} to {}, {} speaks {} to {}; update {older}",
        theirs.start(),
        theirs.end(),
        names::AGENT,
        ours.start(),
        ours.end(),
    ))
}

/// What to say of a clock that is off; `None` while it is not.
pub(super) fn skew_in_words(skew_ms: i64) -> Option<String> {
    let limit = i64::try_from(UnixMillis::SKEW_MAX.as_millis()).unwrap_or(i64::MAX);
    let way = if skew_ms > 0 { "ahead of" } else { "behind" };
    (skew_ms.abs() > limit).then(|| {
        format!(
            "its clock is {:.1} s {way} ours, 2 s are allowed: check time synchronisation",
            skew_ms.abs() as f64 / 1e3
        )
    })
}

/// A peer's text without control characters, cut to `max` bytes.
pub(super) fn clean(text: &str, max: usize) -> String {
    let mut out = String::new();
    for c in text.chars().filter(|c| !c.is_control()) {
        if out.len() + c.len_utf8() > max {
            break;
        }
        out.push(c);
    }
    out
}

async fn write<S: AsyncWrite + Unpin>(stream: &mut S, hello: &pb::Hello) -> Result<(), End> {
    let frame = wire::encode_frame(hello, limit::HELLO).map_err(|error| End::Broken(error.to_string()))?;
    stream.write_all(&frame).await?;
    Ok(stream.flush().await?)
}

/// The next Hello; `None` at the end of the stream.
async fn read<S: AsyncRead + Unpin>(stream: &mut S) -> Result<Option<pb::Hello>, End> {
    let mut prefix = [0; PREFIX_LEN];
    let mut have = 0;
    while have < PREFIX_LEN {
        match stream.read(&mut prefix[have..]).await? {
            0 if have == 0 => return Ok(None),
            0 => return Err(End::Broken("the certificate stream ended in the middle of a frame".into())),
            n => have += n,
        }
    }
    let malformed = |error: wire::WireError| End::Broken(format!("malformed frame on /cert: {error}"));
    let len = wire::frame_len(prefix, limit::HELLO).map_err(malformed)?;
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await?;
    wire::decode_raw(body.into(), limit::HELLO).map(Some).map_err(malformed)
}

#[cfg(test)]
mod tests;
