//! Typed views of a keyspace.

use std::marker::PhantomData;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{KeyRange, Keyspace, Store, StoreError, WriteBatch};

/// How values of one type become bytes.
pub trait Codec<V> {
    /// The bytes of `value`.
    fn encode(value: &V) -> Bytes;

    /// The value of `bytes`.
    ///
    /// # Errors
    /// The decoder's complaint.
    fn decode(bytes: &[u8]) -> Result<V, String>;
}

/// Values as protobuf messages: for whatever also travels on the wire, and for hot records.
#[derive(Debug)]
pub enum ProtoCodec {}

impl<V: prost::Message + Default> Codec<V> for ProtoCodec {
    fn encode(value: &V) -> Bytes {
        value.encode_to_vec().into()
    }

    fn decode(bytes: &[u8]) -> Result<V, String> {
        V::decode(bytes).map_err(|err| err.to_string())
    }
}

/// Values as JSON: for small, rarely written records of a node's own.
#[derive(Debug)]
pub enum JsonCodec {}

impl<V: Serialize + DeserializeOwned> Codec<V> for JsonCodec {
    fn encode(value: &V) -> Bytes {
        // Plain data with string keys always encode; what does not decodes as an error, never as another value.
        serde_json::to_vec(value).unwrap_or_default().into()
    }

    fn decode(bytes: &[u8]) -> Result<V, String> {
        serde_json::from_slice(bytes).map_err(|err| err.to_string())
    }
}

/// A keyspace whose values are all of type `V`.
///
/// ```
/// # use sundara_node::store::{JsonTable, Keyspace, MemoryStore, Store, Table, WriteBatch};
/// const PEERS: JsonTable<Vec<String>> = Table::new(Keyspace::Peers);
/// # fn main() -> Result<(), sundara_node::store::StoreError> {
/// let store = MemoryStore::new();
/// let mut batch = WriteBatch::new();
/// PEERS.put(&mut batch, b"peer".to_vec(), &vec!["/ip4/10.0.0.1/tcp/4101".to_owned()]);
/// store.commit(batch).wait()?;
/// assert_eq!(PEERS.get(&store, b"peer")?.map(|addresses| addresses.len()), Some(1));
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Table<V, C> {
    keyspace: Keyspace,
    types: PhantomData<fn() -> (V, C)>,
}

/// A table of protobuf messages.
pub type ProtoTable<V> = Table<V, ProtoCodec>;

/// A table of JSON values.
pub type JsonTable<V> = Table<V, JsonCodec>;

/// Decoded records of one scan.
pub type Rows<V> = (Vec<(Bytes, V)>, Option<KeyRange>);

impl<V, C: Codec<V>> Table<V, C> {
    /// The table over `keyspace`.
    #[must_use]
    pub const fn new(keyspace: Keyspace) -> Self {
        Self { keyspace, types: PhantomData }
    }

    /// The keyspace below.
    #[must_use]
    pub const fn keyspace(&self) -> Keyspace {
        self.keyspace
    }

    /// The value under `key`, or `None`.
    ///
    /// # Errors
    /// As [`Store::get`], and [`StoreError::Codec`].
    pub fn get(&self, store: &dyn Store, key: &[u8]) -> Result<Option<V>, StoreError> {
        store.get(self.keyspace, key)?.map(|bytes| self.decode(&bytes)).transpose()
    }

    /// Values of `range` as [`Store::scan`] pages them, and the range that remains.
    ///
    /// # Errors
    /// As [`Store::scan`], and [`StoreError::Codec`].
    pub fn scan(&self, store: &dyn Store, range: &KeyRange, limit: usize) -> Result<Rows<V>, StoreError> {
        let page = store.scan(self.keyspace, range, limit)?;
        let rows = page.items.into_iter().map(|(key, bytes)| Ok((key, self.decode(&bytes)?)));
        Ok((rows.collect::<Result<_, StoreError>>()?, page.next))
    }

    /// Adds a put of `value` to `batch`.
    pub fn put(&self, batch: &mut WriteBatch, key: impl Into<Bytes>, value: &V) {
        batch.put(self.keyspace, key, C::encode(value));
    }

    /// Adds a deletion to `batch`.
    pub fn delete(&self, batch: &mut WriteBatch, key: impl Into<Bytes>) {
        batch.delete(self.keyspace, key);
    }

    fn decode(&self, bytes: &[u8]) -> Result<V, StoreError> {
        C::decode(bytes).map_err(|reason| StoreError::Codec { keyspace: self.keyspace.name(), reason })
    }
}
