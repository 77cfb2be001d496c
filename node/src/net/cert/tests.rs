#![allow(clippy::unwrap_used)]

use futures::AsyncWriteExt as _;
use proptest::prelude::*;
use sundara_proto::cert::Roles;
use sundara_proto::crypto::{HotkeyPair, NodeKeyPair};
use tokio_util::compat::TokioAsyncReadCompatExt as _;

use super::*;

const NOW: UnixMillis = UnixMillis(1_000_000_000_000);

fn network() -> Network {
    Network::named("cert tests", 1)
}

fn node(number: u8) -> NodeId {
    NodeKeyPair::from_seed(&[number; 32]).node_id()
}

fn certificate(number: u8) -> Certificate {
    Certificate {
        node: node(number),
        network: network(),
        roles: Roles::LIGHT,
        issued_at: NOW,
        expires_at: NOW.plus(Duration::from_secs(3600)),
        serial: 1,
    }
}

fn ours(number: u8, versions: RangeInclusive<u32>) -> Ours {
    signed(number, certificate(number), versions)
}

fn signed(signer: u8, certificate: Certificate, versions: RangeInclusive<u32>) -> Ours {
    let network = certificate.network;
    let certificate = Signed::sign(&network, &HotkeyPair::from_seed(&[signer; 32]), certificate);
    Ours { network, certificate, versions, instance: [signer; 16] }
}

fn shown(ours: &Ours) -> pb::Hello {
    pb::Hello { now_ms: NOW.0, ..hello(ours) }
}

fn refusal(hello: pb::Hello) -> String {
    verify(&ours(1, 1..=1), node(2), hello, NOW..=NOW).unwrap_err()
}

#[test]
fn an_honest_hello_holds() {
    let peer = verify(&ours(1, 1..=3), node(2), shown(&ours(2, 2..=5)), NOW..=NOW).unwrap();
    assert_eq!((peer.version, peer.skew_ms, peer.instance), (3, 0, [2; 16]));
    assert_eq!(peer.certificate.hotkey(), HotkeyPair::from_seed(&[2; 32]).hotkey());
}

#[test]
fn every_certificate_that_does_not_hold_is_refused_in_words() {
    let expired = Certificate { expires_at: UnixMillis(NOW.0 - 1), ..certificate(2) };
    assert!(refusal(shown(&signed(2, expired, 1..=1))).contains("expired"));
    let ahead = Certificate { issued_at: NOW.plus(Duration::from_secs(60)), ..certificate(2) };
    assert!(refusal(shown(&signed(2, ahead, 1..=1))).contains("ahead"));
    let foreign = Certificate { network: Network::named("another", 1), ..certificate(2) };
    assert!(refusal(shown(&signed(2, foreign, 1..=1))).contains("mesh"));
    // Replayed by a peer for whom it was not made.
    assert!(refusal(shown(&ours(3, 1..=1))).contains("another node"));
    assert!(refusal(pb::Hello { certificate: None, ..shown(&ours(2, 1..=1)) }).contains("no certificate"));
    // Signed by one hotkey, said to be of another.
    let mut stolen = shown(&ours(2, 1..=1));
    stolen.certificate.as_mut().unwrap().signer =
        bytes::Bytes::copy_from_slice(HotkeyPair::from_seed(&[9; 32]).hotkey().as_ref());
    assert!(refusal(stolen).contains("signature"));
}

#[test]
fn version_skew_is_said_in_words_to_both() {
    let words = refusal(shown(&ours(2, 2..=3)));
    assert!(words.contains("speaks 2 to 3") && words.contains("speaks 1 to 1") && words.contains("update"), "{words}");
    // A range that makes no sense is no version.
    assert!(refusal(pb::Hello { version_min: 5, version_max: 0, ..shown(&ours(2, 1..=1)) }).contains("no common"));
}

#[test]
fn clocks_may_differ_by_two_seconds() {
    assert_eq!(skew_in_words(2000), None);
    assert_eq!(skew_in_words(-1999), None);
    assert!(skew_in_words(2001).unwrap().contains("ahead of"));
    assert!(skew_in_words(-60_000).unwrap().contains("60.0 s behind"));
    assert!(skew_in_words(i64::MIN + 1).is_some());
}

#[test]
fn the_way_of_a_hello_is_no_skew() {
    let sent = UnixMillis(NOW.0 - 5_000)..=NOW;
    for (theirs, certain) in [(0, 0), (-5_000, 0), (-2_500, 0), (1, 1), (2_500, 2_500), (-5_001, -1), (-9_000, -4_000)]
    {
        assert_eq!(skew(NOW.0.saturating_add_signed(theirs), &sent), certain, "{theirs}");
    }
    assert_eq!(skew(u64::MAX, &(UnixMillis(0)..=UnixMillis(0))), i64::MAX);
    assert!(skew(0, &(UnixMillis(u64::MAX)..=UnixMillis(u64::MAX))) <= -i64::MAX);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_says_nothing_or_one_byte_is_cut() {
    for bytes in [&[][..], &[5], &[200, 0, 0, 0, 1, 2, 3]] {
        let (stream, mut peer) = tokio::io::duplex(1024);
        let (events, mut ends) = mpsc::channel(4);
        let began = tokio::time::Instant::now();
        tokio::io::AsyncWriteExt::write_all(&mut peer, bytes).await.unwrap();
        let id = ConnectionId::new_unchecked(1);
        run(stream.compat(), Side::Listener, ours(1, 1..=1), node(2), id, events).await;
        let Some(Event::Broken { reason, .. }) = ends.recv().await else { panic!("it was not cut") };
        assert!(reason.contains("no certificate within 10 s"), "{reason}");
        assert!(began.elapsed() >= TIMEOUT && began.elapsed() < TIMEOUT * 2);
    }
}

#[tokio::test]
async fn a_frame_above_the_limit_ends_the_handshake_before_it_is_read() {
    let (stream, mut peer) = tokio::io::duplex(1024);
    let (events, mut ends) = mpsc::channel(4);
    tokio::io::AsyncWriteExt::write_all(&mut peer, &u32::MAX.to_le_bytes()).await.unwrap();
    run(stream.compat(), Side::Listener, ours(1, 1..=1), node(2), ConnectionId::new_unchecked(1), events).await;
    let Some(Event::Broken { reason, .. }) = ends.recv().await else { panic!("it was not cut") };
    assert!(reason.contains("exceeds the limit"), "{reason}");
}

/// Answers what the loop is asked, and gives the end of the handshake.
async fn end(mut events: mpsc::Receiver<Event>, verdict: Result<(), String>) -> Event {
    while let Some(event) = events.recv().await {
        match event {
            Event::Verified { answer, .. } => answer.send(verdict.clone()).unwrap(),
            end => return end,
        }
    }
    panic!("a handshake has an end")
}

#[tokio::test]
async fn both_sides_hear_why_one_says_no() {
    // Certificates are checked against the real clock here.
    let now = wall_clock();
    let fresh = |number| {
        let life = Duration::from_secs(60);
        signed(number, Certificate { issued_at: now, expires_at: now.plus(life), ..certificate(number) }, 1..=1)
    };
    for (dialler_says, listener_says) in
        [(Ok(()), Ok(())), (Err("deny list".to_owned()), Ok(())), (Ok(()), Err("slots".to_owned()))]
    {
        let (a, b) = tokio::io::duplex(4096);
        let ((to_dialler, dialler), (to_listener, listener)) = (mpsc::channel(4), mpsc::channel(4));
        let id = ConnectionId::new_unchecked(1);
        let (_, _, dialler, listener) = tokio::join!(
            run(a.compat(), Side::Dialler, fresh(1), node(2), id, to_dialler),
            run(b.compat(), Side::Listener, fresh(2), node(1), id, to_listener),
            end(dialler, dialler_says.clone()),
            end(listener, listener_says.clone()),
        );
        let no = [dialler_says, listener_says].into_iter().find_map(Result::err);
        for end in [dialler, listener] {
            match (&end, &no) {
                (Event::Agreed { .. }, None) => {}
                (Event::Refused { reason, .. }, Some(words)) => assert_eq!(reason, words),
                _ => panic!("{end:?} where {no:?}"),
            }
        }
    }
}

proptest! {
    #[test]
    fn nothing_that_a_peer_sends_breaks_the_handshake(
        random in proptest::collection::vec(any::<u8>(), 0..600),
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        mutate in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async move {
            let bytes = if mutate {
                let mut frame = wire::encode_frame(&hello(&ours(2, 1..=1)), limit::HELLO).unwrap().to_vec();
                for (index, flip) in flips {
                    let at = index.index(frame.len());
                    frame[at] ^= flip;
                }
                frame
            } else {
                random
            };
            let (stream, peer) = tokio::io::duplex(8192);
            let mut peer = peer.compat();
            let (events, ends) = mpsc::channel(4);
            peer.write_all(&bytes).await.unwrap();
            peer.close().await.unwrap();
            let listener = run(stream.compat(), Side::Listener, ours(1, 1..=1), node(2), ConnectionId::new_unchecked(1), events);
            tokio::join!(listener, end(ends, Err("no".to_owned())));
        });
    }
}
