//! Who may read a blob.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use sundara_proto::id::{Hotkey, NodeId};

/// Most readers of one private blob: requester, owner, 16 replicas, their executors and auditors, and spares. A longer
/// list means that something adds without end.
pub const MAX_READERS: usize = 256;

/// Someone who may read a private blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reader {
    /// Every node that this hotkey answers for.
    Hotkey(Hotkey),
    /// One node: an executor has no hotkey of its own.
    Node(NodeId),
}

/// Who may read a blob through the network. Local code reads everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Anyone. Announced in the DHT; evicted when the disk cap is reached, unless pinned.
    Public,
    /// Those named, nobody else. Never evicted, only removed.
    Only(BTreeSet<Reader>),
}

/// A peer that asks, as its certified connection proved it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    /// Its node key.
    pub node: NodeId,
    /// Who answers for it, where its certificate says so.
    pub hotkey: Option<Hotkey>,
}

impl Access {
    /// Nobody but this node itself.
    pub const fn local() -> Self {
        Self::Only(BTreeSet::new())
    }

    /// Those named.
    pub fn only(readers: impl IntoIterator<Item = Reader>) -> Self {
        Self::Only(readers.into_iter().collect())
    }

    /// Whether anyone may read.
    pub const fn is_public(&self) -> bool {
        matches!(self, Self::Public)
    }

    /// Whether `asker` may read.
    pub fn allows(&self, asker: &Asker) -> bool {
        match self {
            Self::Public => true,
            Self::Only(readers) => {
                readers.contains(&Reader::Node(asker.node))
                    || asker.hotkey.is_some_and(|hotkey| readers.contains(&Reader::Hotkey(hotkey)))
            }
        }
    }

    /// Adds whom `other` lets in. Returns whether anything changed. Beyond [`MAX_READERS`] nobody is added.
    pub fn widen(&mut self, other: &Self) -> bool {
        match (&mut *self, other) {
            (Self::Public, _) => false,
            (Self::Only(_), Self::Public) => {
                *self = Self::Public;
                true
            }
            (Self::Only(ours), Self::Only(theirs)) => {
                let before = ours.len();
                for reader in theirs {
                    if ours.len() >= MAX_READERS {
                        break;
                    }
                    ours.insert(*reader);
                }
                ours.len() != before
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn asker(node: u8, hotkey: Option<u8>) -> Asker {
        Asker { node: NodeId([node; 32]), hotkey: hotkey.map(|h| Hotkey([h; 32])) }
    }

    #[test]
    fn only_the_named_may_read() {
        let access = Access::only([Reader::Hotkey(Hotkey([1; 32])), Reader::Node(NodeId([2; 32]))]);
        assert!(access.allows(&asker(9, Some(1))));
        assert!(access.allows(&asker(2, None)));
        assert!(!access.allows(&asker(1, None)), "a node key is not a hotkey");
        assert!(!access.allows(&asker(9, Some(2))));
        assert!(!Access::local().allows(&asker(1, Some(1))));
        assert!(Access::Public.allows(&asker(7, None)));
    }

    #[test]
    fn access_only_widens_and_is_bounded() {
        let mut access = Access::local();
        assert!(access.widen(&Access::only([Reader::Node(NodeId([1; 32]))])));
        assert!(!access.widen(&Access::only([Reader::Node(NodeId([1; 32]))])));
        let crowd = (0..1000_u16).map(|i| {
            let mut id = [0; 32];
            id[..2].copy_from_slice(&i.to_le_bytes());
            Reader::Hotkey(Hotkey(id))
        });
        access.widen(&Access::only(crowd));
        assert!(matches!(&access, Access::Only(readers) if readers.len() == MAX_READERS));
        assert!(access.widen(&Access::Public));
        assert!(!access.widen(&Access::local()) && access.is_public(), "public stays public");
    }

    #[test]
    fn access_is_stored_as_text() {
        let access = Access::only([Reader::Node(NodeId([2; 32]))]);
        let text = serde_json::to_string(&access).unwrap();
        assert_eq!(serde_json::from_str::<Access>(&text).unwrap(), access);
    }
}
