#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use sundara_proto::blob::{BlobHeader, BlobRequest, GROUP_LEN, GroupRanges, group_count};
use sundara_proto::id::Hotkey;
use sundara_proto::wire::WireMessage;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use super::testing::{Fault, Mesh, TestNode};
use super::*;
use crate::blobs::{BlobReader, BlobsConfig, ENCODER_BUFFER_MIN, Opened, Partial, Reader};

fn content(len: usize, seed: u8) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut out);
    out
}

const MIB: usize = 1 << 20;

fn quick() -> TransferConfig {
    TransferConfig { progress_timeout_s: 5, ..TransferConfig::default() }
}

async fn put(node: &TestNode, bytes: &[u8]) -> BlobId {
    node.blobs.put(bytes.to_vec().into(), Access::Public).await.unwrap()
}

async fn assert_has(node: &TestNode, blob: BlobId, bytes: &[u8]) {
    let got = node.blobs.get(blob, ByteCount(1 << 30)).await;
    assert_eq!(got.unwrap_or_else(|e| panic!("node {}: {e}", node.id.0[0])), bytes);
}

fn exact(bytes: &[u8]) -> ByteCount {
    ByteCount(bytes.len() as u64)
}

#[tokio::test(start_paused = true)]
async fn several_providers_share_one_blob() {
    let dir = tempfile::tempdir().unwrap();
    let mesh = Mesh::new();
    let bytes = content(8 * MIB + 12_345, 1);
    let mut nodes = Vec::new();
    for n in 0..4 {
        nodes.push(mesh.node(n, dir.path(), quick()).await);
    }
    let blob = put(&nodes[1], &bytes).await;
    for node in &nodes[2..] {
        put(node, &bytes).await;
    }
    let sources = Sources::peers(nodes[1..].iter().map(|n| n.id));
    nodes[0].transfer.fetch(blob, exact(&bytes), sources, Access::Public).await.unwrap();
    assert_has(&nodes[0], blob, &bytes).await;
    for node in &nodes[1..] {
        assert!(node.stats.figures().sent_bytes_total > 0, "every provider gave a part");
    }
    assert!(lock(&mesh.providers)[&blob].contains(&nodes[0].id), "whoever fetched provides in turn");
}

#[tokio::test(start_paused = true)]
async fn small_and_odd_lengths_arrive() {
    let dir = tempfile::tempdir().unwrap();
    let mesh = Mesh::new();
    let (a, b) = (mesh.node(1, dir.path(), quick()).await, mesh.node(2, dir.path(), quick()).await);
    for (seed, len) in [0, 1, 1024, 16_383, 16_384, 16_385, 262_144, 262_145, 999_999].into_iter().enumerate() {
        let bytes = content(len, seed as u8);
        let blob = put(&a, &bytes).await;
        b.transfer.fetch(blob, exact(&bytes), Sources::peers([a.id]), Access::Public).await.unwrap();
        assert_has(&b, blob, &bytes).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_lying_provider_is_dropped_and_the_blob_is_right() {
    // In a pair, in a group's bytes, in a header, and late.
    for place in [40_u64, 30_000, 3, 700_000] {
        let dir = tempfile::tempdir().unwrap();
        let mesh = Mesh::new();
        let me = mesh.node(0, dir.path(), quick()).await;
        let (liar, honest) = (mesh.node(1, dir.path(), quick()).await, mesh.node(2, dir.path(), quick()).await);
        let bytes = content(4 * MIB, 2);
        let blob = put(&liar, &bytes).await;
        put(&honest, &bytes).await;
        mesh.fault(liar.id, Fault::Flip(place));
        let sources = Sources::peers([liar.id, honest.id]);
        me.transfer.fetch(blob, exact(&bytes), sources, Access::Public).await.unwrap();
        assert_has(&me, blob, &bytes).await;
        assert!(lock(&mesh.reports).contains(&liar.id) || place == 3, "named, at {place}");
        assert!(!lock(&mesh.reports).contains(&honest.id));
    }
}

#[tokio::test(start_paused = true)]
async fn a_liar_alone_yields_nothing_and_is_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let mesh = Mesh::new();
    let (me, liar) = (mesh.node(0, dir.path(), quick()).await, mesh.node(1, dir.path(), quick()).await);
    let bytes = content(MIB, 3);
    let blob = put(&liar, &bytes).await;
    mesh.fault(liar.id, Fault::Flip(20_000));
    let fetch = || me.transfer.fetch(blob, exact(&bytes), Sources::peers([liar.id]), Access::Public);
    let failed = fetch().await.unwrap_err();
    assert!(failed.to_string().contains("do not match its hash"), "{failed}");
    assert!(!me.blobs.has(&blob));
    mesh.fault(liar.id, Fault::None);
    let failed = fetch().await.unwrap_err();
    assert!(failed.to_string().contains("wrong bytes before"), "{failed}");
    tokio::time::advance(BAN).await;
    fetch().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_stalls_closes_or_drips_holds_nothing_up() {
    for fault in [Fault::Stall(300_000), Fault::Stall(0), Fault::Close(500_000), Fault::Close(0), Fault::Drip] {
        let dir = tempfile::tempdir().unwrap();
        let mesh = Mesh::new();
        let me = mesh.node(0, dir.path(), quick()).await;
        let (bad, good) = (mesh.node(1, dir.path(), quick()).await, mesh.node(2, dir.path(), quick()).await);
        let bytes = content(6 * MIB, 4);
        let blob = put(&bad, &bytes).await;
        put(&good, &bytes).await;
        mesh.fault(bad.id, fault);
        let began = Instant::now();
        let sources = Sources::peers([bad.id, good.id]);
        me.transfer.fetch(blob, exact(&bytes), sources, Access::Public).await.unwrap();
        assert_has(&me, blob, &bytes).await;
        assert!(began.elapsed() < Duration::from_secs(10), "{fault:?} took {:?}", began.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_fetch_without_progress_ends_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let mesh = Mesh::new();
    let (me, bad) = (mesh.node(0, dir.path(), quick()).await, mesh.node(1, dir.path(), quick()).await);
    let bytes = content(MIB, 5);
    let blob = put(&bad, &bytes).await;
    mesh.fault(bad.id, Fault::Stall(100_000));
    let failed = me.transfer.fetch(blob, exact(&bytes), Sources::peers([bad.id]), Access::Public).await.unwrap_err();
    assert!(failed.is_retryable() && failed.to_string().contains(&bad.id.to_string()), "{failed}");
    let nobody = me.transfer.fetch(blob, exact(&bytes), Sources::dht([]), Access::Public).await;
    // The holder provides by now; without it the DHT is asked in vain.
    drop(nobody);
    let unknown = BlobId([7; 32]);
    let failed = me.transfer.fetch(unknown, ByteCount(10), Sources::dht([]), Access::Public).await.unwrap_err();
    assert!(failed.to_string().contains("none is known"), "{failed}");
}

#[tokio::test(start_paused = true)]
async fn a_dropped_fetch_is_resumed_also_by_another_process() {
    let dir = tempfile::tempdir().unwrap();
    let mesh = Mesh::new();
    let bytes = content(8 * MIB, 6);
    let source = mesh.node(1, dir.path(), quick()).await;
    let blob = put(&source, &bytes).await;
    let held = {
        let me = mesh.node(0, dir.path(), quick()).await;
        mesh.fault(source.id, Fault::Stall(3_000_000));
        let fetch = me.transfer.start(blob, exact(&bytes), Sources::peers([source.id]), Access::Public).await.unwrap();
        let mut progress = fetch.progress();
        progress.wait_for(|(held, _)| held.0 >= 2 * MIB as u64).await.unwrap();
        drop(fetch);
        me.tasks.shutdown().await;
        me.blobs.held(&blob).count() * GROUP_LEN
    };
    assert!(held >= 2 * MIB as u64);
    mesh.fault(source.id, Fault::None);
    let before = source.stats.figures().sent_bytes_total;
    let me = mesh.node(0, dir.path(), quick()).await;
    me.transfer.fetch(blob, exact(&bytes), Sources::peers([source.id]), Access::Public).await.unwrap();
    assert_has(&me, blob, &bytes).await;
    let sent = source.stats.figures().sent_bytes_total - before;
    assert!(sent <= bytes.len() as u64 - held + 200_000, "{sent} bytes for the rest after {held}");
}

/// Stores `groups` of a blob that `source` has.
async fn give(node: &TestNode, source: &TestNode, blob: BlobId, len: ByteCount, groups: &GroupRanges) -> Partial {
    let asker = Asker { node: node.id, hotkey: None };
    let reader: BlobReader = source.blobs.reader(&blob, &asker).unwrap();
    let mut encoder = reader.encode(groups).unwrap();
    let (mut encoded, mut buffer) = (Vec::new(), vec![0; ENCODER_BUFFER_MIN]);
    while let n @ 1.. = encoder.fill(&mut buffer).unwrap() {
        encoded.extend_from_slice(&buffer[..n]);
    }
    let Opened::Partial(partial) = node.blobs.partial(blob, len, Access::Public).await.unwrap() else { panic!() };
    partial.store(groups, &encoded).unwrap();
    partial
}

#[tokio::test(start_paused = true)]
async fn providers_of_parts_make_a_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mesh = Mesh::new();
    let me = mesh.node(0, dir.path(), quick()).await;
    let (a, b) = (mesh.node(1, dir.path(), quick()).await, mesh.node(2, dir.path(), quick()).await);
    let hidden = mesh.node(3, dir.path(), quick()).await;
    let bytes = content(5 * MIB + 77, 7);
    let blob = put(&hidden, &bytes).await;
    let all = group_count(exact(&bytes));
    let mut odd = GroupRanges::of(0..100);
    odd.insert(200..all);
    let _a = give(&a, &hidden, blob, exact(&bytes), &odd).await;
    let _b = give(&b, &hidden, blob, exact(&bytes), &GroupRanges::of(90..205)).await;
    me.transfer.fetch(blob, exact(&bytes), Sources::peers([a.id, b.id]), Access::Public).await.unwrap();
    assert_has(&me, blob, &bytes).await;
}

#[tokio::test(start_paused = true)]
async fn private_blobs_go_only_to_those_named() {
    let dir = tempfile::tempdir().unwrap();
    let mesh = Mesh::new();
    let owner = mesh.node(1, dir.path(), quick()).await;
    let (friend, stranger) = (mesh.node(2, dir.path(), quick()).await, mesh.node(3, dir.path(), quick()).await);
    let bytes = content(300_000, 8);
    let named = Access::only([Reader::Hotkey(Hotkey([2; 32]))]);
    let blob = owner.blobs.put(bytes.clone().into(), named).await.unwrap();
    let sources = || Sources::peers([owner.id]);
    friend.transfer.fetch(blob, exact(&bytes), sources(), Access::local()).await.unwrap();
    assert_has(&friend, blob, &bytes).await;
    let refused = stranger.transfer.fetch(blob, exact(&bytes), sources(), Access::local()).await.unwrap_err();
    let nothing = BlobId([0xee; 32]);
    let unknown = stranger.transfer.fetch(nothing, exact(&bytes), sources(), Access::local()).await.unwrap_err();
    let words = |e: TransferError, blob: BlobId| e.to_string().replace(&blob.to_string(), "");
    assert_eq!(words(refused, blob), words(unknown, nothing), "existence is not told");
    let from_friend = stranger.transfer.fetch(blob, exact(&bytes), Sources::peers([friend.id]), Access::local()).await;
    assert!(from_friend.is_err(), "whoever fetched it keeps it to itself");
    assert!(!lock(&mesh.providers).contains_key(&blob));
    assert!(friend.blobs.remove(blob).await.unwrap(), "one fetch is one use");
}

#[tokio::test(start_paused = true)]
async fn many_callers_cause_one_fetch() {
    let dir = tempfile::tempdir().unwrap();
    let mesh = Mesh::new();
    let (me, source) = (mesh.node(0, dir.path(), quick()).await, mesh.node(1, dir.path(), quick()).await);
    let bytes = content(2 * MIB, 9);
    let blob = put(&source, &bytes).await;
    let callers: Vec<_> = (0..50)
        .map(|_| {
            let (transfer, source, len) = (me.transfer.clone(), source.id, exact(&bytes));
            tokio::spawn(async move { transfer.fetch(blob, len, Sources::peers([source]), Access::Public).await })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap().unwrap();
    }
    let sent = source.stats.figures().sent_bytes_total;
    assert!(sent < bytes.len() as u64 * 11 / 10, "{sent}");
    assert_eq!(me.stats.figures().fetched_total, 1);
}

#[tokio::test(start_paused = true)]
async fn a_busy_provider_is_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let mesh = Mesh::new();
    let none = TransferConfig { serve_streams_max: 1, ..quick() };
    let (me, source) = (mesh.node(0, dir.path(), quick()).await, mesh.node(1, dir.path(), none).await);
    let other = mesh.node(2, dir.path(), quick()).await;
    let (bytes, long) = (content(MIB, 10), content(3 * MIB, 11));
    let (blob, long_blob) = (put(&source, &bytes).await, put(&source, &long).await);
    let both = tokio::join!(
        me.transfer.fetch(blob, exact(&bytes), Sources::peers([source.id]), Access::Public),
        other.transfer.fetch(long_blob, exact(&long), Sources::peers([source.id]), Access::Public),
    );
    assert!(both.0.is_ok() && both.1.is_ok(), "{both:?}");
}

/// Seconds that a fetch of 8 MiB takes from providers that send 1 MiB/s each.
async fn paced(providers: u8) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let mesh = Mesh::new();
    let me = mesh.node(0, dir.path(), quick()).await;
    let slow = TransferConfig { max_upload_bytes_per_s: ByteCount(MIB as u64), ..quick() };
    let bytes = content(8 * MIB, 12);
    let mut sources = Vec::new();
    let mut blob = BlobId([0; 32]);
    for n in 1..=providers {
        let node = mesh.node(n, dir.path(), slow.clone()).await;
        blob = put(&node, &bytes).await;
        sources.push(node);
    }
    let began = Instant::now();
    let hints = Sources::peers(sources.iter().map(|n| n.id));
    me.transfer.fetch(blob, exact(&bytes), hints, Access::Public).await.unwrap();
    began.elapsed().as_secs_f64()
}

#[tokio::test(start_paused = true)]
async fn two_capped_providers_are_nearly_twice_as_fast_as_one() {
    let (one, two) = (paced(1).await, paced(2).await);
    assert!((7.8..8.4).contains(&one), "the cap holds: {one} s");
    assert!(one / two >= 1.8, "one {one} s, two {two} s");
}

#[tokio::test(start_paused = true)]
async fn the_download_cap_holds() {
    let dir = tempfile::tempdir().unwrap();
    let mesh = Mesh::new();
    let capped = TransferConfig { max_download_bytes_per_s: ByteCount(MIB as u64), ..quick() };
    let (me, source) = (mesh.node(0, dir.path(), capped).await, mesh.node(1, dir.path(), quick()).await);
    let bytes = content(4 * MIB, 13);
    let blob = put(&source, &bytes).await;
    let began = Instant::now();
    me.transfer.fetch(blob, exact(&bytes), Sources::peers([source.id]), Access::Public).await.unwrap();
    let took = began.elapsed().as_secs_f64();
    assert!((3.0..5.0).contains(&took), "{took} s");
}

#[tokio::test(start_paused = true)]
async fn an_unknown_length_is_proven() {
    let dir = tempfile::tempdir().unwrap();
    let mesh = Mesh::new();
    let (me, source) = (mesh.node(0, dir.path(), quick()).await, mesh.node(1, dir.path(), quick()).await);
    for (seed, len) in [0, 5, 16_384, 700_001].into_iter().enumerate() {
        let bytes = content(len, 20 + seed as u8);
        let blob = put(&source, &bytes).await;
        let max = BlobLen::AtMost(ByteCount(700_001));
        me.transfer.fetch(blob, max, Sources::peers([source.id]), Access::Public).await.unwrap();
        assert_has(&me, blob, &bytes).await;
    }
    let bytes = content(50_000, 30);
    let blob = put(&source, &bytes).await;
    let short = BlobLen::AtMost(ByteCount(40_000));
    let failed = me.transfer.fetch(blob, short, Sources::peers([source.id]), Access::Public).await.unwrap_err();
    assert!(matches!(failed, TransferError::TooLarge { .. }), "{failed}");
    let wrong = me.transfer.fetch(blob, ByteCount(49_999), Sources::peers([source.id]), Access::Public).await;
    assert!(wrong.unwrap_err().to_string().contains("long"), "whose length is wrong is said");
}

#[tokio::test(start_paused = true)]
async fn a_damaged_blob_is_refetched_and_never_served_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let mesh = Mesh::new();
    let (me, hurt) = (mesh.node(0, dir.path(), quick()).await, mesh.node(1, dir.path(), quick()).await);
    let healthy = mesh.node(2, dir.path(), quick()).await;
    let bytes = content(2 * MIB, 14);
    let blob = put(&hurt, &bytes).await;
    put(&healthy, &bytes).await;
    lock(&mesh.providers).entry(blob).or_default().insert(healthy.id);
    let path = hurt.blobs.path(blob).await.unwrap().path().to_owned();
    let mut changed = bytes.clone();
    changed[1_000_000] ^= 1;
    std::fs::write(&path, changed).unwrap();
    let file = std::fs::File::options().append(true).open(&path).unwrap();
    file.set_modified(std::time::SystemTime::now() + Duration::from_secs(9)).unwrap();
    // Asked alone it notices, breaks off, mends itself from the other, and serves the rest.
    me.transfer.fetch(blob, exact(&bytes), Sources::peers([hurt.id]), Access::Public).await.unwrap();
    assert_has(&me, blob, &bytes).await;
    assert!(lock(&mesh.reports).is_empty(), "nothing wrong was served");
    assert!(healthy.stats.figures().sent_bytes_total > 0);
    assert_has(&hurt, blob, &bytes).await;
}

#[tokio::test(start_paused = true)]
async fn what_does_not_fit_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let mesh = Mesh::new();
    let small = BlobsConfig { max_bytes: ByteCount(100_000), ..BlobsConfig::default() };
    let me = mesh.node_with(0, dir.path(), quick(), small).await;
    let source = mesh.node(1, dir.path(), quick()).await;
    let bytes = content(200_000, 15);
    let blob = put(&source, &bytes).await;
    let failed = me.transfer.fetch(blob, exact(&bytes), Sources::peers([source.id]), Access::Public).await.unwrap_err();
    assert!(failed.to_string().contains("blobs.max_bytes") && !failed.is_retryable(), "{failed}");
}

#[tokio::test(start_paused = true)]
async fn provided_is_what_is_here_and_public() {
    let dir = tempfile::tempdir().unwrap();
    let mesh = Mesh::new();
    let node = mesh.node(1, dir.path(), quick()).await;
    let public = put(&node, &content(1000, 16)).await;
    let private = node.blobs.put(content(1000, 17).into(), Access::local()).await.unwrap();
    tokio::time::sleep(RECONCILE_EVERY * 2).await;
    assert!(lock(&mesh.providers).get(&public).is_some_and(|p| p.contains(&node.id)));
    assert!(!lock(&mesh.providers).contains_key(&private));
    node.blobs.delete(public).await.unwrap();
    tokio::time::sleep(RECONCILE_EVERY * 2).await;
    assert!(lock(&mesh.providers)[&public].is_empty());
}

fn shared(blobs: Blobs) -> Arc<Shared> {
    struct Nowhere;
    #[async_trait]
    impl BlobNet for Nowhere {
        fn local(&self) -> NodeId {
            NodeId([0; 32])
        }
        async fn open(&self, _: NodeId) -> io::Result<Box<dyn BlobIo>> {
            Err(io::ErrorKind::NotConnected.into())
        }
        async fn find_providers(&self, _: BlobId) -> Vec<NodeId> {
            Vec::new()
        }
        async fn provide(&self, _: BlobId) {}
        async fn stop_providing(&self, _: BlobId) {}
        async fn report(&self, _: NodeId, _: String) {}
    }
    let (_, requests) = crate::blobs::transfer_channel();
    Transfer::new(blobs, Arc::new(Nowhere), quick(), requests, Tasks::new()).shared
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_never_reads_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(dir.path(), BlobsConfig::default()).await.unwrap();
    let blob = blobs.put(content(4 * MIB, 18).into(), Access::Public).await.unwrap();
    let (mut near, far) = duplex(8 << 10);
    let request = BlobRequest { blob, groups: GroupRanges::of(0..256) };
    near.write_all(&stream::frame(&request).unwrap()).await.unwrap();
    let asker = Asker { node: NodeId([1; 32]), hotkey: None };
    let ended = serve::serve(&shared(blobs), asker, far).await;
    assert!(matches!(ended, Err(stream::StreamError::Stalled(_))), "{ended:?}");
}

#[tokio::test(start_paused = true)]
async fn an_idle_stream_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(dir.path(), BlobsConfig::default()).await.unwrap();
    let (mut near, far) = duplex(1024);
    near.write_all(&[1]).await.unwrap();
    let asker = Asker { node: NodeId([1; 32]), hotkey: None };
    let ended = serve::serve(&shared(blobs), asker, far).await;
    assert!(matches!(ended, Err(stream::StreamError::Stalled(_))), "{ended:?}");
}

#[tokio::test(start_paused = true)]
async fn a_header_says_what_is_held_and_the_body_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(dir.path(), BlobsConfig::default()).await.unwrap();
    let bytes = content(100 * GROUP_LEN as usize, 19);
    let blob = blobs.put(bytes.clone().into(), Access::Public).await.unwrap();
    let (mut near, far) = duplex(1 << 16);
    let asker = Asker { node: NodeId([1; 32]), hotkey: None };
    let served = tokio::spawn({
        let shared = shared(blobs);
        async move { serve::serve(&shared, asker, far).await }
    });
    let patience = Duration::from_secs(1);
    for (ask, wanted) in [
        (GroupRanges::empty(), GroupRanges::of(0..100)),
        (GroupRanges::of(90..4000), GroupRanges::of(90..100)),
        (GroupRanges::of(u64::MAX - 5..u64::MAX), GroupRanges::empty()),
    ] {
        near.write_all(&stream::frame(&BlobRequest { blob, groups: ask.clone() }).unwrap()).await.unwrap();
        let header: BlobHeader = stream::read_message(&mut near, patience).await.unwrap().unwrap();
        assert_eq!(header, BlobHeader::Found { len: exact(&bytes), groups: wanted.clone() });
        if !ask.is_empty() {
            let mut body = vec![0; crate::blobs::encoded_len(blob, exact(&bytes), &wanted) as usize];
            near.read_exact(&mut body).await.unwrap();
            assert!(crate::blobs::proves(blob, exact(&bytes), &wanted, &body));
        }
    }
    near.write_all(&stream::frame(&BlobRequest { blob: BlobId([3; 32]), groups: GroupRanges::of(0..9) }).unwrap())
        .await
        .unwrap();
    let header: BlobHeader = stream::read_message(&mut near, patience).await.unwrap().unwrap();
    assert_eq!(header, BlobHeader::NotFound);
    drop(near);
    served.await.unwrap().unwrap();
}

/// Bytes that a hostile peer may send: junk, frames of absurd length, valid messages in odd places.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let request = prop::collection::vec(any::<u64>(), 0..6).prop_map(|mut bounds| {
        bounds.sort_unstable();
        bounds.dedup();
        bounds.truncate(bounds.len() / 2 * 2);
        let groups = GroupRanges::from_pairs(&bounds, 64).unwrap();
        let mut frame = stream::frame(&BlobRequest { blob: BlobId([5; 32]), groups: groups.clone() }).unwrap().to_vec();
        let header = BlobHeader::Found { len: ByteCount(bounds.len() as u64 * 1_000_000), groups: groups.first(1) };
        let raw = header.encode();
        frame.extend_from_slice(&(raw.len() as u32).to_le_bytes());
        frame.extend_from_slice(&raw);
        frame
    });
    let junk = prop::collection::vec(any::<u8>(), 0..300);
    let oversized = (any::<u32>(), prop::collection::vec(any::<u8>(), 0..50))
        .prop_map(|(len, rest)| [&len.to_le_bytes()[..], &rest].concat());
    prop::collection::vec(prop_oneof![junk, oversized, request], 0..5).prop_map(|parts| parts.concat())
}

fn paused() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_provider_survives_anything(bytes in hostile()) {
        paused().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let blobs = Blobs::open(dir.path(), BlobsConfig::default()).await.unwrap();
            let (mut near, far) = duplex(1 << 16);
            near.write_all(&bytes).await.unwrap();
            let asker = Asker { node: NodeId([1; 32]), hotkey: None };
            let shared = shared(blobs);
            let drain = async {
                near.shutdown().await.unwrap();
                let mut sink = Vec::new();
                let _ = near.read_to_end(&mut sink).await;
                sink.len()
            };
            let (_, answered) = tokio::join!(serve::serve(&shared, asker, far), drain);
            assert!(answered <= 4096, "{answered} bytes for nothing");
        });
    }

    #[test]
    fn a_fetcher_survives_anything(bytes in hostile(), known in any::<bool>()) {
        paused().block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let mesh = Mesh::new();
            let me = mesh.node(0, dir.path(), quick()).await;
            let villain = NodeId([9; 32]);
            mesh.scripted(villain, bytes);
            let len = if known { BlobLen::Exact(ByteCount(1_000_000)) } else { BlobLen::AtMost(ByteCount(1 << 40)) };
            let fetched = me.transfer.fetch(BlobId([5; 32]), len, Sources::peers([villain]), Access::Public).await;
            assert!(fetched.is_err());
            assert!(!me.blobs.has(&BlobId([5; 32])));
        });
    }
}
