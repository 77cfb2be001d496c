//! Who is served the input and the output of a job: its requester, its owner, the miners that were chosen; nobody else.

use std::time::Duration;

use futures::StreamExt as _;
use prost::Message as _;
use sundara_proto::id::BlobId;
use sundara_proto::pb;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::Testnet;
use crate::api::{JobEvent, JobOrder, Node};

/// Long enough for a debug build on a busy machine; a test that reaches it hangs.
const PATIENCE: Duration = Duration::from_secs(180);

/// Whether `owner` tells `asker` that it has a blob.
async fn served(asker: &Node, owner: &Node, blob: BlobId) -> bool {
    let mut stream = asker.parts.net.open_blob(owner.node_id()).await.unwrap();
    let request = pb::BlobRequest { blob: blob.into(), groups: Vec::new() }.encode_to_vec();
    stream.write_all(&u32::try_from(request.len()).unwrap().to_le_bytes()).await.unwrap();
    stream.write_all(&request).await.unwrap();
    stream.flush().await.unwrap();
    let len = stream.read_u32_le().await.unwrap();
    let mut header = vec![0; len as usize];
    stream.read_exact(&mut header).await.unwrap();
    let header = pb::BlobHeader::decode(&header[..]).unwrap();
    match header.status() {
        pb::blob_header::Status::Found => true,
        pb::blob_header::Status::NotFound => false,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn inputs_and_outputs_are_served_to_those_of_the_job_and_to_nobody_else() {
    tokio::time::timeout(PATIENCE, ask_around()).await.expect("the test made no progress");
}

async fn ask_around() {
    let testnet = Testnet::builder().miners(3).start().await.unwrap();
    let validator = testnet.validators()[0].node().unwrap();
    let miners: Vec<&Node> = testnet.miners().iter().map(|member| member.node().unwrap()).collect();
    let client = testnet.client();
    let stranger = Node::builder().network(testnet.network()).bootstrap(testnet.bootstrap());
    let stranger = stranger.loopback().start().await.unwrap();

    // An input too large for a message, of a job that runs until it is stopped.
    let input = vec![7_u8; 300_000];
    let job = client.jobs().submit(JobOrder::builtin("sleep").input(input.clone())).await.unwrap();
    let mut events = job.events();
    while !matches!(events.next().await.unwrap(), JobEvent::Started { .. }) {}
    let blob = BlobId::of(&input);
    assert!(served(validator, client, blob).await, "its owner fetches it");
    let mut chosen = 0;
    for miner in &miners {
        chosen += usize::from(served(miner, validator, blob).await);
        assert!(!served(miner, client, blob).await, "the requester serves its validators");
    }
    assert_eq!(chosen, 1, "one replica, one miner");
    for owner in miners.iter().copied().chain([validator, client]) {
        assert!(!served(&stranger, owner, blob).await);
    }
    job.cancel().await;

    // An output too large for a message.
    let job = client.jobs().submit(JobOrder::builtin("random").params("300000")).await.unwrap();
    let result = job.result().await.unwrap();
    let (blob, len) = (result.verdict.output, result.verdict.output_len.0);
    assert_eq!(len, 300_000);
    assert!(served(client, validator, blob).await, "its requester fetches it");
    let mut holders = 0;
    for miner in &miners {
        holders += usize::from(served(validator, miner, blob).await);
        assert!(!served(client, miner, blob).await, "a miner serves its validator");
        assert!(!served(miner, validator, blob).await);
    }
    assert_eq!(holders, 1, "whoever made it");
    for owner in miners.iter().copied().chain([validator]) {
        assert!(!served(&stranger, owner, blob).await);
    }
    stranger.shutdown().await;
    testnet.shutdown().await;
}
