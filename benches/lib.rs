//! Benches of sundara-node live beside this file.
