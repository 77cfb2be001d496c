#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use proptest::prelude::*;
use sundara_proto::wire;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::Instant;
use tokio_util::compat::TokioAsyncReadCompatExt as _;

use super::client::ClientLink;
use super::frame::{FRAME_TIMEOUT, LinkError, WRITE_TIMEOUT};
use super::server::{ServerDriver, Services};
use super::*;
use crate::net::metrics::NetMetrics;

fn peer() -> PeerIdentity {
    PeerIdentity { node: NodeId([1; 32]), hotkey: Hotkey([2; 32]), roles: Roles::LIGHT }
}

fn watch(number: u8) -> pb::request::Kind {
    pb::request::Kind::Watch(pb::WatchJob { job: Bytes::copy_from_slice(&[number; 32]) })
}

fn done() -> pb::response::Kind {
    pb::response::Kind::Done(pb::Done {})
}

fn frame(frame: &pb::Frame) -> Bytes {
    wire::encode_frame(frame, 1 << 20).unwrap()
}

fn body(id: u64, body: pb::frame::Body) -> Bytes {
    frame(&pb::Frame { id, last: false, body: Some(body) })
}

fn ask(id: u64, kind: pb::request::Kind) -> Bytes {
    body(id, pb::frame::Body::Request(pb::Request { kind: Some(kind) }))
}

/// A serving side, the other end of its stream, and what its service gets.
fn server(queue: usize) -> (impl Future<Output = Result<(), LinkError>>, DuplexStream, mpsc::Receiver<Inbound>) {
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let services = Arc::new(Services::new(NetMetrics::default()));
    let (sender, requests) = mpsc::channel(queue);
    services.set(&[RequestKind::Watch], &sender);
    (ServerDriver::new(ours.compat(), peer(), services, Arc::default()), theirs, requests)
}

async fn next_frame(stream: &mut DuplexStream) -> pb::Frame {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await.unwrap();
    let mut body = vec![0; u32::from_le_bytes(prefix) as usize];
    stream.read_exact(&mut body).await.unwrap();
    prost::Message::decode(Bytes::from(body)).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_frame_that_does_not_end_is_cut_and_silence_between_frames_is_not() {
    let (driver, mut stream, _requests) = server(8);
    let began = Instant::now();
    let driver = tokio::spawn(driver);
    tokio::time::sleep(FRAME_TIMEOUT * 10).await;
    assert!(!driver.is_finished(), "an idle stream lives");
    // One byte, and one more now and then, as slow-loris peers do.
    let dribble = async {
        for byte in std::iter::once(200).chain(std::iter::repeat(0)) {
            if stream.write_all(&[byte]).await.is_err() {
                // The driver has ended; its own word for it is what counts.
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(FRAME_TIMEOUT / 4).await;
        }
    };
    let error = tokio::select! {
        error = driver => error.unwrap().unwrap_err(),
        () = dribble => unreachable!("it dribbles for ever"),
    };
    assert!(matches!(error, LinkError::Stalled(_)), "{error}");
    assert!(began.elapsed() < FRAME_TIMEOUT * 12);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_read_is_cut() {
    let (driver, mut stream, mut requests) = server(8);
    let driver = tokio::spawn(driver);
    stream.write_all(&ask(1, watch(1))).await.unwrap();
    let (_, _, mut reply) = requests.recv().await.unwrap().into_parts();
    let output = pb::Output { attempt: 1, offset: 0, data: Bytes::from(vec![0; 60 << 10]) };
    let event = pb::JobEvent { kind: Some(pb::job_event::Kind::Output(output)) };
    let began = Instant::now();
    while reply.send(pb::response::Kind::Job(event.clone())).await.is_ok() {}
    let error = driver.await.unwrap().unwrap_err();
    assert!(matches!(error, LinkError::Stalled(_)), "{error}");
    assert!(began.elapsed() >= WRITE_TIMEOUT && began.elapsed() < WRITE_TIMEOUT * 2);
    reply.closed().await;
}

#[tokio::test]
async fn a_full_service_says_busy_and_an_unread_queue_is_bounded() {
    let (driver, mut stream, mut requests) = server(2);
    let driver = tokio::spawn(driver);
    for id in 1..=3 {
        stream.write_all(&ask(id, watch(1))).await.unwrap();
    }
    let answer = next_frame(&mut stream).await;
    assert_eq!((answer.id, answer.last), (3, true));
    assert!(matches!(answer.body, Some(pb::frame::Body::Failure(f)) if f.code() == FailureCode::Busy));
    // Credit beyond all measure gives no more than the constant.
    let (_, _, mut reply) = requests.recv().await.unwrap().into_parts();
    for _ in 0..10 {
        stream.write_all(&body(1, pb::frame::Body::Credit(u32::MAX))).await.unwrap();
    }
    for _ in 0..CREDIT {
        reply.send(done()).await.unwrap();
    }
    driver.abort();
}

#[tokio::test]
async fn more_answers_than_asked_for_end_the_stream() {
    let (ours, mut theirs) = tokio::io::duplex(64 << 10);
    let (link, driver) = ClientLink::new(ours.compat());
    let driver = tokio::spawn(driver);
    let mut responses = link.open(watch(1)).await.unwrap().unwrap();
    let asked = next_frame(&mut theirs).await;
    for _ in 0..=CREDIT {
        let answer = pb::frame::Body::Response(pb::Response { kind: Some(done()) });
        theirs.write_all(&body(asked.id, answer)).await.unwrap();
    }
    let error = driver.await.unwrap().unwrap_err();
    assert!(matches!(error, LinkError::Protocol(_)), "{error}");
    for _ in 0..CREDIT {
        assert_eq!(responses.next().await.unwrap().unwrap(), done());
    }
    assert!(matches!(responses.next().await, Some(Err(RpcError::Disconnected { .. }))));
    assert!(responses.next().await.is_none());
    assert!(link.open(watch(2)).await.is_err(), "a link that has ended gives the request back");
}

#[tokio::test]
async fn a_request_that_is_too_large_is_not_sent() {
    let (ours, _theirs) = tokio::io::duplex(64 << 10);
    let (link, driver) = ClientLink::new(ours.compat());
    let driver = tokio::spawn(driver);
    let huge = pb::request::Kind::Watch(pb::WatchJob { job: Bytes::from(vec![0; 300 << 10]) });
    assert!(matches!(link.open(huge).await.unwrap().unwrap_err(), RpcError::TooLarge(_)));
    driver.abort();
}

#[test]
fn bytes_that_wait_are_bounded_for_each_peer_and_given_back() {
    let (peer, all) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let half = QueuedBytes::take(QUEUED_BYTES_PEER / 2, &peer, &all).unwrap();
    let rest = QueuedBytes::take(QUEUED_BYTES_PEER / 2, &peer, &all).unwrap();
    assert!(QueuedBytes::take(1, &peer, &all).is_none());
    drop(half);
    assert!(QueuedBytes::take(1, &peer, &all).is_some());
    drop(rest);
    assert_eq!((peer.load(Ordering::Relaxed), all.load(Ordering::Relaxed)), (0, 0));
}

proptest! {
    #[test]
    fn nothing_that_a_peer_sends_breaks_either_side(
        random in proptest::collection::vec(any::<u8>(), 0..300),
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        mutate in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async move {
            let honest = [
                ask(1, watch(1)),
                body(1, pb::frame::Body::Credit(3)),
                body(1, pb::frame::Body::Cancel(true)),
                body(1, pb::frame::Body::Response(pb::Response { kind: Some(done()) })),
            ];
            let mut bytes = if mutate { honest.concat() } else { random };
            for (index, flip) in flips {
                if !bytes.is_empty() {
                    let at = index.index(bytes.len());
                    bytes[at] ^= flip;
                }
            }
            let (driver, mut stream, _requests) = server(8);
            stream.write_all(&bytes).await.unwrap();
            stream.shutdown().await.unwrap();
            drop(driver.await);
            let (ours, mut theirs) = tokio::io::duplex(64 << 10);
            let (link, driver) = ClientLink::new(ours.compat());
            let driver = tokio::spawn(driver);
            let mut responses = link.open(watch(1)).await.unwrap().unwrap();
            theirs.write_all(&bytes).await.unwrap();
            theirs.shutdown().await.unwrap();
            // Whatever came, the caller is told an end.
            while responses.next().await.is_some() {}
            drop(driver.await.unwrap());
        });
    }
}
