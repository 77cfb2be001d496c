//! Who lied, judged from signed messages alone.
