//! Examples of sundara-node live beside this file.
