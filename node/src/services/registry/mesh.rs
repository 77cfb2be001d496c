//! The registry's view of the mesh.

use async_trait::async_trait;
use sundara_proto::id::Digest;

use super::RecordNet;
use crate::net::NetHandle;

#[async_trait]
impl RecordNet for NetHandle {
    async fn put_record(&self, key: Digest, value: Vec<u8>) -> Result<(), String> {
        Self::put_record(self, key, value).await.map_err(|e| e.to_string())
    }

    async fn get_records(&self, key: Digest) -> Result<Vec<Vec<u8>>, String> {
        Self::get_records(self, key).await.map_err(|e| e.to_string())
    }
}
