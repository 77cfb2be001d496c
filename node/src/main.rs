//! The binary: arguments in, exit code out. Everything between is in the library.

use std::process::ExitCode;

// Noise frames of 64 KiB and many small messages: glibc's allocator returns and maps their memory over and over. Built
// without transparent huge pages: with them an idle light node holds 78 MiB, 2 MiB of it for every corner touched; without
// 27 MiB.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    sundara_node::cli::run(std::env::args_os()).into()
}
