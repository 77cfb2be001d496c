//! The catalogue and the list of installed models, in the store.

use prost::Message as _;
use serde::{Deserialize, Serialize};
use sundara_proto::crypto::{Network, Signed};
use sundara_proto::id::{BlobId, Hotkey, ModelId};
use sundara_proto::model::ModelRecord;
use sundara_proto::pb;
use sundara_proto::units::UnixMillis;
use sundara_proto::wire::{self, limit};

use super::{ALLOWED_ASKED_MAX, Inner, Listed, ModelRef, ROWS_MAX, RegistryError, local};
use crate::blobs::lock;
use crate::domain::catalog::{Catalog, Input, Kept, ModelName, Output, Unresolved};
use crate::store::{JsonTable, KeyRange, Keyspace, SharedStore, Table, WriteBatch};

/// Publisher ++ name -> what is known of the name.
const NAMES: JsonTable<NameRow> = Table::new(Keyspace::Models);
/// ModelId -> a model whose manifest is or was here.
const INSTALLED: JsonTable<InstalledRow> = Table::new(Keyspace::ModelPins);

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NameRow {
    floor: u64,
    /// Signed records, encoded, as hexadecimal text.
    records: Vec<String>,
}

/// A model whose manifest is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct InstalledRow {
    pub(crate) manifest: BlobId,
    pub(crate) pinned: bool,
}

fn name_key(name: &ModelName) -> Vec<u8> {
    [name.publisher.as_ref(), name.name.as_bytes()].concat()
}

fn split_key(key: &[u8]) -> Option<ModelName> {
    let (publisher, name) = key.split_first_chunk::<32>()?;
    Some(ModelName { publisher: Hotkey(*publisher), name: String::from_utf8(name.to_vec()).ok()? })
}

/// Reads the catalogue. Records were verified when they were written.
pub(crate) fn restore(store: &SharedStore, network: &Network, now: UnixMillis) -> Result<Catalog, RegistryError> {
    let mut catalog = Catalog::default();
    let mut range = Some(KeyRange::all());
    while let Some(current) = range.take() {
        let (rows, next) = NAMES.scan(store.as_ref(), &current, ROWS_MAX)?;
        for (key, row) in rows {
            let Some(name) = split_key(&key) else { continue };
            let mut records = Vec::new();
            for text in &row.records {
                let bytes = hex::decode(text).map_err(|_| wire::WireError::field("record"))?;
                let raw: pb::Signed = wire::decode_raw(bytes.into(), limit::DHT_RECORD)?;
                let record = Signed::<ModelRecord>::trusted(raw)?;
                if record.network == *network {
                    records.push(record);
                }
            }
            catalog.handle(Input::Restored(Kept { name, floor: row.floor, records }), now);
        }
        range = next;
    }
    Ok(catalog)
}

/// Takes note of a verified record; what changes is durable when this returns.
pub(crate) async fn hear(inner: &Inner, record: Signed<ModelRecord>) -> Result<(), RegistryError> {
    let outputs = lock(&inner.catalog).handle(Input::Heard(record), inner.now());
    for output in outputs {
        match output {
            Output::Persist(kept) => write(inner, &kept).await?,
            Output::Equivocation { name, version } => tracing::warn!(
                publisher = %name.publisher, name = name.name, version,
                "a publisher signed two models as one version: neither is used",
            ),
            Output::Ignored(reason) => tracing::debug!(?reason, "a model record does not count"),
        }
    }
    Ok(())
}

async fn write(inner: &Inner, kept: &Kept) -> Result<(), RegistryError> {
    let records = kept.records.iter().map(|r| hex::encode(r.to_wire().encode_to_vec())).collect();
    let mut batch = WriteBatch::new();
    NAMES.put(&mut batch, name_key(&kept.name), &NameRow { floor: kept.floor, records });
    inner.store.commit(batch).await?;
    Ok(())
}

/// Asks the DHT for a name and takes note of what it says. Records of others under the key are taken for what they are.
pub(crate) async fn look_up(inner: &Inner, name: &ModelName) -> Result<(), RegistryError> {
    let found = inner.net.get_records(inner.key(name)).await.map_err(RegistryError::Dht)?;
    for bytes in found {
        let raw = wire::decode_raw::<pb::Signed>(bytes.into(), limit::DHT_RECORD);
        let record = raw.ok().and_then(|raw| Signed::<ModelRecord>::verify(&inner.network, raw).ok());
        match record.filter(|r| r.network == inner.network) {
            Some(record) => hear(inner, record).await?,
            None => {
                tracing::debug!(publisher = %name.publisher, name = name.name, "the dht gave a record that does not verify")
            }
        }
    }
    Ok(())
}

pub(crate) async fn resolve(inner: &Inner, model: &ModelRef) -> Result<Signed<ModelRecord>, RegistryError> {
    let known = |inner: &Inner| lock(&inner.catalog).resolve(&model.name, model.version, inner.now()).cloned();
    // A version by its number never changes; the latest may have.
    if model.version.is_some()
        && let Ok(record) = known(inner)
    {
        return Ok(record);
    }
    let asked = look_up(inner, &model.name).await;
    match (known(inner), asked) {
        (Ok(record), _) => Ok(record),
        (Err(Unresolved::Unknown { .. }), Err(e)) => Err(e),
        (Err(e), _) => Err(e.into()),
    }
}

pub(crate) async fn vouched_by(
    inner: &Inner,
    model: ModelId,
    name: &str,
    allowed: &[Hotkey],
) -> Result<Option<Hotkey>, RegistryError> {
    let vouches = |publisher: &Hotkey| {
        let catalog = lock(&inner.catalog);
        let now = inner.now();
        catalog.iter().any(|k| {
            let r = k.record;
            r.publisher() == *publisher && r.model == model && !k.equivocal && r.expires_at >= now
        })
    };
    if let Some(publisher) = allowed.iter().find(|p| vouches(p)) {
        return Ok(Some(*publisher));
    }
    let mut failed = None;
    for publisher in allowed.iter().take(ALLOWED_ASKED_MAX) {
        let name = ModelName { publisher: *publisher, name: name.to_owned() };
        match look_up(inner, &name).await {
            Ok(()) if vouches(publisher) => return Ok(Some(*publisher)),
            Ok(()) => {}
            Err(e) => failed = Some(e),
        }
    }
    failed.map_or(Ok(None), Err)
}

pub(crate) fn installed(inner: &Inner) -> Result<Vec<(ModelId, InstalledRow)>, RegistryError> {
    let mut out = Vec::new();
    let mut range = Some(KeyRange::all());
    while let Some(current) = range.take() {
        let (rows, next) = INSTALLED.scan(inner.store.as_ref(), &current, ROWS_MAX)?;
        out.extend(rows.into_iter().filter_map(|(key, row)| Some((ModelId(key.as_ref().try_into().ok()?), row))));
        range = next;
    }
    Ok(out)
}

pub(crate) fn installed_one(inner: &Inner, model: &ModelId) -> Result<Option<InstalledRow>, RegistryError> {
    Ok(INSTALLED.get(inner.store.as_ref(), model.as_ref())?)
}

pub(crate) async fn put_installed(inner: &Inner, model: &ModelId, row: InstalledRow) -> Result<(), RegistryError> {
    let mut batch = WriteBatch::new();
    INSTALLED.put(&mut batch, model.as_ref().to_vec(), &row);
    inner.store.commit(batch).await?;
    Ok(())
}

pub(crate) async fn drop_installed(inner: &Inner, models: &[ModelId]) -> Result<(), RegistryError> {
    let mut batch = WriteBatch::new();
    models.iter().for_each(|model| INSTALLED.delete(&mut batch, model.as_ref().to_vec()));
    inner.store.commit(batch).await?;
    Ok(())
}

pub(crate) async fn list(inner: &Inner) -> Result<Vec<Listed>, RegistryError> {
    let mut listed: Vec<Listed> = {
        let catalog = lock(&inner.catalog);
        let line = |k: crate::domain::catalog::Known<'_>| Listed {
            publisher: Some(k.record.publisher()),
            name: k.record.name.clone(),
            version: k.record.version,
            model: k.record.model,
            manifest: k.record.manifest,
            expires_at: Some(k.record.expires_at),
            local: false,
            pinned: false,
            equivocal: k.equivocal,
            latest: k.latest,
        };
        catalog.iter().map(line).collect()
    };
    for (model, row) in installed(inner)? {
        let Ok(manifest) = local::manifest_here(inner, model, row.manifest).await else { continue };
        let here = manifest.blobs().all(|a| inner.blobs.has(&a.blob));
        let mut named = false;
        for line in listed.iter_mut().filter(|l| l.model == model) {
            (line.local, line.pinned, named) = (here, row.pinned, true);
        }
        if !named {
            listed.push(Listed {
                publisher: None,
                name: manifest.name,
                version: manifest.version,
                model,
                manifest: row.manifest,
                expires_at: None,
                local: here,
                pinned: row.pinned,
                equivocal: false,
                latest: false,
            });
        }
    }
    Ok(listed)
}
