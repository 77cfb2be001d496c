//! Which record a model's name stands for.
//!
//! **Owns** the rule and what it needs to remember: for each publisher and name the highest version ever heard of, and the
//! records of the latest versions. **Does not own** signatures (a [`Signed`] value is verified before it gets here), the DHT,
//! or the blobs behind a record.
//!
//! **The rule**
//! - A name belongs to its publisher: a record counts under the key that signed it, whatever key it was found under.
//! - An expired record never wins, nor one dated in the future.
//! - The highest version ever heard of is the name's version, also after its record has expired: an older record that is
//!   still valid, replayed or left over, does not bring an old version back. It can be asked for by its number.
//! - Of two signatures of one version the later wins. Two digests of one version are equivocation: neither wins, until the
//!   publisher goes up a version.
//!
//! **Invariant**: what a name resolves to depends on the set of records heard, not on their order.

use std::collections::BTreeMap;

use sundara_proto::crypto::Signed;
use sundara_proto::id::Hotkey;
use sundara_proto::model::ModelRecord;
use sundara_proto::units::UnixMillis;

/// Versions remembered of one name, the latest. Older ones can be fetched by digest.
pub const VERSIONS_MAX: usize = 16;
/// Names remembered: about 1 KiB a version keeps the catalogue below 64 MiB.
pub const NAMES_MAX: usize = 4096;

/// A publisher's name for its models.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelName {
    /// Whose name it is.
    pub publisher: Hotkey,
    /// The name.
    pub name: String,
}

/// What happens to the catalogue.
#[derive(Clone, Debug)]
pub enum Input {
    /// A verified record turned up.
    Heard(Signed<ModelRecord>),
    /// What an earlier process had persisted; expired records count for the version's height.
    Restored(Kept),
}

/// What is persisted of one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The name.
    pub name: ModelName,
    /// Highest version ever heard of.
    pub floor: u64,
    /// Records of the latest versions; two of one version are evidence of equivocation.
    pub records: Vec<Signed<ModelRecord>>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// The name changed: write it down.
    Persist(Kept),
    /// The publisher signed two digests for one version. Said once.
    Equivocation {
        /// The name.
        name: ModelName,
        /// The version.
        version: u64,
    },
    /// The record does not count.
    Ignored(Reason),
}

/// Why a record does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// Its time is over.
    Expired,
    /// Dated ahead of this node's clock.
    FromTheFuture,
    /// Nothing new.
    Known,
    /// A version below those that are remembered.
    TooOld,
    /// Too many names.
    Full,
}

/// Why a name stands for nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unresolved {
    /// Never heard of.
    #[error("no record of `{name}` by {publisher} is known")]
    Unknown {
        /// The publisher.
        publisher: Hotkey,
        /// The name.
        name: String,
    },
    /// Heard of, but without this version.
    #[error("`{name}` by {publisher} has no version {version} that is known here; the latest is {latest}")]
    NoVersion {
        /// The publisher.
        publisher: Hotkey,
        /// The name.
        name: String,
        /// The version asked for.
        version: u64,
        /// The latest.
        latest: u64,
    },
    /// The publisher let it lapse.
    #[error("the record of `{name}` version {version} by {publisher} has expired: its publisher must publish it again")]
    Expired {
        /// The publisher.
        publisher: Hotkey,
        /// The name.
        name: String,
        /// The version.
        version: u64,
    },
    /// Two digests for one version.
    #[error(
        "{publisher} signed two different models as `{name}` version {version}: neither is used until a higher version is \
         published"
    )]
    Equivocation {
        /// The publisher.
        publisher: Hotkey,
        /// The name.
        name: String,
        /// The version.
        version: u64,
    },
}

#[derive(Clone, Debug, Default)]
struct Name {
    floor: u64,
    /// One record a version; two where the publisher equivocated.
    versions: BTreeMap<u64, Vec<Signed<ModelRecord>>>,
}

/// The names that this node has heard of.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    names: BTreeMap<ModelName, Name>,
}

/// What is known of one version.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The record, the one signed last.
    pub record: &'a Signed<ModelRecord>,
    /// Whether the publisher signed another digest for the version.
    pub equivocal: bool,
    /// Whether it is the name's version.
    pub latest: bool,
}

impl Catalog {
    /// Takes note.
    pub fn handle(&mut self, input: Input, now: UnixMillis) -> Vec<Output> {
        match input {
            Input::Heard(record) => {
                if record.expires_at < now {
                    return vec![Output::Ignored(Reason::Expired)];
                }
                if record.issued_at > now.plus(UnixMillis::SKEW_MAX) {
                    return vec![Output::Ignored(Reason::FromTheFuture)];
                }
                self.insert(record, now)
            }
            Input::Restored(kept) => {
                if self.names.len() < NAMES_MAX {
                    let name = self.names.entry(kept.name.clone()).or_default();
                    name.floor = name.floor.max(kept.floor);
                    let of_name = kept.records.into_iter().filter(|r| name_of(r) == kept.name);
                    of_name.for_each(|record| {
                        name.add(record);
                    });
                }
                Vec::new()
            }
        }
    }

    fn insert(&mut self, record: Signed<ModelRecord>, now: UnixMillis) -> Vec<Output> {
        let (key, version) = (name_of(&record), record.version);
        if !self.names.contains_key(&key) && self.names.len() >= NAMES_MAX {
            // Names of which nothing is valid any more make room.
            self.names.retain(|_, name| name.versions.values().flatten().any(|r| r.expires_at >= now));
            if self.names.len() >= NAMES_MAX {
                return vec![Output::Ignored(Reason::Full)];
            }
        }
        let name = self.names.entry(key.clone()).or_default();
        match name.add(record) {
            Added::No(reason) => vec![Output::Ignored(reason)],
            Added::Yes { equivocation } => {
                let mut outputs = vec![Output::Persist(name.kept(&key))];
                if equivocation {
                    outputs.push(Output::Equivocation { name: key, version });
                }
                outputs
            }
        }
    }

    /// The record that `name` stands for: its latest version, or the one asked for.
    ///
    /// # Errors
    /// Why there is none.
    pub fn resolve(
        &self,
        name: &ModelName,
        version: Option<u64>,
        now: UnixMillis,
    ) -> Result<&Signed<ModelRecord>, Unresolved> {
        let (publisher, text) = (name.publisher, name.name.clone());
        let known = self.names.get(name).ok_or(Unresolved::Unknown { publisher, name: text.clone() })?;
        let wanted = version.unwrap_or(known.floor);
        match known.versions.get(&wanted).map(Vec::as_slice) {
            Some([record]) if record.expires_at >= now => Ok(record),
            Some([_, _, ..]) => Err(Unresolved::Equivocation { publisher, name: text, version: wanted }),
            Some(_) => Err(Unresolved::Expired { publisher, name: text, version: wanted }),
            None if wanted == known.floor => Err(Unresolved::Expired { publisher, name: text, version: wanted }),
            None => Err(Unresolved::NoVersion { publisher, name: text, version: wanted, latest: known.floor }),
        }
    }

    /// Highest version of `name` ever heard of.
    pub fn floor(&self, name: &ModelName) -> Option<u64> {
        self.names.get(name).map(|n| n.floor)
    }

    /// Every record remembered, by publisher, name and version.
    pub fn iter(&self) -> impl Iterator<Item = Known<'_>> {
        self.names.values().flat_map(|name| {
            name.versions.iter().filter_map(|(version, records)| {
                let record = records.iter().max_by_key(|r| (r.issued_at, r.expires_at))?;
                Some(Known { record, equivocal: records.len() > 1, latest: *version == name.floor })
            })
        })
    }

    /// Forgets one version, as its operator wishes. Its height stays remembered.
    pub fn forget(&mut self, name: &ModelName, version: u64) -> Option<Kept> {
        let known = self.names.get_mut(name)?;
        known.versions.remove(&version)?;
        Some(known.kept(name))
    }
}

/// Whose record it is and what it names.
pub fn name_of(record: &Signed<ModelRecord>) -> ModelName {
    ModelName { publisher: record.publisher(), name: record.name.clone() }
}

enum Added {
    Yes { equivocation: bool },
    No(Reason),
}

impl Name {
    fn add(&mut self, record: Signed<ModelRecord>) -> Added {
        let version = record.version;
        let oldest = self.versions.keys().next().copied().unwrap_or(0);
        if self.versions.len() >= VERSIONS_MAX && version < oldest {
            return Added::No(Reason::TooOld);
        }
        self.floor = self.floor.max(version);
        let records = self.versions.entry(version).or_default();
        let what = |r: &Signed<ModelRecord>| (r.model, r.manifest);
        let several = records.len() > 1;
        let added = match records.iter_mut().find(|old| what(old) == what(&record)) {
            Some(old) if (old.issued_at, old.expires_at) < (record.issued_at, record.expires_at) => {
                *old = record;
                Added::Yes { equivocation: false }
            }
            Some(_) => Added::No(Reason::Known),
            // Two prove it; a third adds nothing.
            None if several => Added::No(Reason::Known),
            None => {
                records.push(record);
                Added::Yes { equivocation: records.len() > 1 }
            }
        };
        while self.versions.len() > VERSIONS_MAX {
            self.versions.pop_first();
        }
        added
    }

    fn kept(&self, name: &ModelName) -> Kept {
        Kept { name: name.clone(), floor: self.floor, records: self.versions.values().flatten().cloned().collect() }
    }
}

#[cfg(test)]
#[path = "catalog_tests.rs"]
mod tests;
