//! What the benches of sundara-node share: arguments, child processes, what a process uses, medians, and the report.
//!
//! Each bench is one program beside this file, started by `cargo bench`. A bench that needs several processes starts
//! itself again in another part ([`Child`]), so that nothing but the bench has to be built. `README.md` says how to run
//! them and what they showed.

mod process;
pub mod raw;
mod report;

pub use process::{Child, Parent, Usage};
pub use report::{Report, Target};

use clap::Parser as _;

// The allocator of the node's binary, so that what is measured here is what users get; see `node/src/main.rs` for why.
#[cfg(not(any(feature = "glibc", feature = "jemalloc")))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Name of the allocator that this program was built with.
pub const ALLOCATOR_NAME: &str = if cfg!(feature = "jemalloc") {
    "jemalloc"
} else if cfg!(feature = "glibc") {
    "glibc"
} else {
    "mimalloc"
};

/// Arguments of every bench.
#[derive(Clone, Debug, clap::Parser)]
#[command(about = "One bench of sundara-node; benches/README.md says what it measures.")]
pub struct Args {
    /// Prints one JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
    /// How often each thing is measured; medians are reported.
    #[arg(long)]
    pub runs: Option<usize>,
    /// Directory for the files of the bench, on the disk to be measured. Default: the system's temporary directory.
    #[arg(long)]
    pub dir: Option<std::path::PathBuf>,
    /// Set by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    /// The arguments of this program; ends it when they are wrong.
    pub fn of_program() -> Self {
        Self::parse()
    }

    /// Times to measure; `default` unless the user says otherwise. At least one.
    pub fn runs(&self, default: usize) -> usize {
        self.runs.unwrap_or(default).max(1)
    }

    /// An empty directory that is removed with the answer.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn temp_dir(&self) -> std::io::Result<tempfile::TempDir> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("sundara-bench-");
        match &self.dir {
            Some(dir) => builder.tempdir_in(dir),
            None => builder.tempdir(),
        }
    }
}

/// The middle of the samples; the mean of the middle two where their number is even. NaN of none.
pub fn median(samples: &[f64]) -> f64 {
    quantile(samples, 0.5)
}

/// The value below which the share `q` (0 to 1) of the samples lies, between the nearest two. NaN of none.
pub fn quantile(samples: &[f64], q: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let place = q.clamp(0.0, 1.0) * sorted.len().saturating_sub(1) as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    match (sorted.get(low), sorted.get(high)) {
        (Some(low), Some(high)) => low + (high - low) * place.fract(),
        _ => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_quantiles() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(quantile(&[0.0, 10.0], 0.99), 9.9);
        assert_eq!((quantile(&[5.0], 0.0), quantile(&[5.0], 1.0)), (5.0, 5.0));
        assert!(median(&[]).is_nan());
    }
}
