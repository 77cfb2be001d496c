//! The ledger side of the mesh. Here now: the files in which a node's two keys live.
//!
//! It owns how a hotkey and a node key are created, kept and read ([`keys`]). It does not own what is signed with them
//! (`sundara_proto::crypto`) nor where the files lie (the node's configuration).

pub mod keys;
