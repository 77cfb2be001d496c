//! The one place with `unsafe`: mapping compiled code of our own making.
//!
//! wasmtime trusts a serialized module completely; a foreign or damaged one is arbitrary code. What keeps this sound
//! is its only caller, [`super::disk`]: the file was written by this node (a keyed hash over its whole content under a
//! key that never leaves the cache directory), the hash was checked over the same open file, and the directory is ours
//! alone. wasmtime itself then refuses files of another version or configuration.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;

use wasmtime::component::Component;
use wasmtime::{Engine, Module, Result};

/// Maps a module whose keyed hash has been checked over this very file.
pub(super) fn module(engine: &Engine, verified: File) -> Result<Module> {
    // SAFETY: see the module documentation; the caller has verified the content as ours.
    unsafe { Module::deserialize_open_file(engine, verified) }
}

/// Maps a component whose keyed hash has been checked in our own directory.
pub(super) fn component(engine: &Engine, verified: &Path) -> Result<Component> {
    // SAFETY: see the module documentation; the caller has verified the content as ours.
    unsafe { Component::deserialize_file(engine, verified) }
}
