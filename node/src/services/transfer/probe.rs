//! Learning the length of a blob from peers that may lie about it: the last group proves it.

use sundara_proto::blob::{BlobHeader, BlobRequest, GroupRanges, group_count};
use sundara_proto::id::{BlobId, NodeId};
use sundara_proto::units::ByteCount;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::Shared;
use super::stream::{frame, read_all, read_message, write_all};
use super::worker::OPEN_TIMEOUT;
use crate::blobs::{encoded_len, proves};

/// What one peer said.
pub(crate) enum Probed {
    /// Proven.
    Len(ByteCount),
    /// Claimed and above the limit; not proven.
    TooLong(ByteCount),
    /// In words, nothing.
    Nothing(String),
    /// Its last group does not match.
    Lied(String),
}

/// Asks one peer for the length of `blob`.
pub(crate) async fn length(shared: &Shared, node: NodeId, blob: BlobId, max: ByteCount) -> Probed {
    match ask(shared, node, blob, max).await {
        Ok(probed) => probed,
        Err(reason) => Probed::Nothing(reason),
    }
}

async fn ask(shared: &Shared, node: NodeId, blob: BlobId, max: ByteCount) -> Result<Probed, String> {
    let patience = shared.progress_timeout();
    let opened = timeout(OPEN_TIMEOUT, shared.net.open(node)).await.map_err(|_| "did not answer".to_owned())?;
    let mut stream = opened.map_err(|e| format!("could not be reached: {e}"))?;
    let mut exchange = async |groups: GroupRanges| {
        let request = frame(&BlobRequest { blob, groups }).map_err(|e| e.to_string())?;
        write_all(&mut stream, &request, patience).await.map_err(|e| e.to_string())?;
        stream.flush().await.map_err(|e| e.to_string())?;
        let header = read_message::<BlobHeader>(&mut stream, patience).await.map_err(|e| e.to_string())?;
        let (len, groups) = match header {
            Some(BlobHeader::Found { len, groups }) => (len, groups),
            Some(BlobHeader::NotFound) => return Err("does not have it".to_owned()),
            Some(BlobHeader::Busy) => return Err("is busy".to_owned()),
            None => return Err("closed the stream".to_owned()),
        };
        Ok::<_, String>((len, groups))
    };
    let (len, held) = exchange(GroupRanges::empty()).await?;
    if len > max {
        return Ok(Probed::TooLong(len));
    }
    let last = GroupRanges::of(group_count(len) - 1..group_count(len));
    if !held.contains(group_count(len) - 1) {
        return Err("does not have the last group".to_owned());
    }
    let (again, groups) = exchange(last.clone()).await?;
    if again != len || groups != last {
        return Err("changed its mind about the length".to_owned());
    }
    let mut body = vec![0; usize::try_from(encoded_len(blob, len, &last)).map_err(|e| e.to_string())?];
    read_all(&mut stream, &mut body, patience, |n| shared.stats.add_received(n)).await.map_err(|e| e.to_string())?;
    if proves(blob, len, &last, &body) {
        Ok(Probed::Len(len))
    } else {
        Ok(Probed::Lied(format!("claims that blob {blob} is {len} long, which its last group disproves")))
    }
}
