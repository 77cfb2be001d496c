//! What a bench prints: one row a figure, medians with their spread, and whether a target is met.

use std::fmt::Write as _;

use serde::Serialize;

use crate::{ALLOCATOR_NAME, Args, median};

/// What a figure should be.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// This or more.
    AtLeast(f64),
    /// This or less.
    AtMost(f64),
}

impl Target {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }
}

#[derive(Clone, Debug, Serialize)]
struct Figure {
    name: String,
    unit: &'static str,
    median: f64,
    min: f64,
    max: f64,
    runs: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<Target>,
    #[serde(skip_serializing_if = "Option::is_none")]
    met: Option<bool>,
}

/// The figures of one bench.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    bench: &'static str,
    machine: String,
    allocator: &'static str,
    figures: Vec<Figure>,
}

impl Report {
    /// An empty report.
    pub fn new(bench: &'static str) -> Self {
        Self { bench, machine: machine(), allocator: ALLOCATOR_NAME, figures: Vec::new() }
    }

    /// Adds the samples of one figure. `unit` may be empty, for ratios.
    pub fn add(&mut self, name: impl Into<String>, unit: &'static str, samples: &[f64]) {
        self.push(name.into(), unit, samples, None);
    }

    /// The same for a figure whose median should reach a target.
    pub fn add_with_target(&mut self, name: impl Into<String>, unit: &'static str, samples: &[f64], target: Target) {
        self.push(name.into(), unit, samples, Some(target));
    }

    fn push(&mut self, name: String, unit: &'static str, samples: &[f64], target: Option<Target>) {
        let median = median(samples);
        self.figures.push(Figure {
            name,
            unit,
            median,
            min: samples.iter().copied().fold(f64::INFINITY, f64::min),
            max: samples.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            runs: samples.len(),
            target,
            met: target.map(|target| target.is_met(median)),
        });
    }

    /// Prints the report on standard output, as the user wants it.
    ///
    /// # Errors
    /// When a figure cannot be written as JSON.
    pub fn print(&self, args: &Args) -> anyhow::Result<()> {
        let text = if args.json { serde_json::to_string(self)? } else { self.table() };
        println!("{text}");
        Ok(())
    }

    fn table(&self) -> String {
        let mut out = format!("{}: {}, {}\n", self.bench, self.machine, self.allocator);
        let width = self.figures.iter().map(|f| f.name.chars().count()).max().unwrap_or(0);
        for f in &self.figures {
            let spread = if f.runs > 1 {
                format!("({} - {}, {} runs)", number(f.min), number(f.max), f.runs)
            } else {
                String::new()
            };
            let target = match (f.target, f.met) {
                (Some(target), Some(met)) => {
                    let (sign, bound) = match target {
                        Target::AtLeast(bound) => (">=", bound),
                        Target::AtMost(bound) => ("<=", bound),
                    };
                    format!("  target {sign} {}: {}", number(bound), if met { "met" } else { "MISSED" })
                }
                _ => String::new(),
            };
            let padding = " ".repeat(width - f.name.chars().count());
            // Writing to a string does not fail.
            let _ = writeln!(out, "  {}{padding}  {:>9} {:<5} {spread}{target}", f.name, number(f.median), f.unit);
        }
        out.truncate(out.trim_end().len());
        out
    }
}

/// Four significant digits.
fn number(value: f64) -> String {
    let digits =
        if value == 0.0 || !value.is_finite() { 0 } else { (3 - value.abs().log10().floor() as i32).clamp(0, 6) };
    format!("{value:.*}", digits as usize)
}

/// Processor, cores and memory, as Linux tells them.
fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or(std::env::consts::ARCH, |(_, name)| name.trim());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory =
        memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<u64>().ok());
    let memory = memory.map_or(String::new(), |kib| format!(", {} GiB", (kib + (1 << 19)) >> 20));
    format!("{cores} x {model}{memory}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_says_what_is_met() {
        let mut report = Report::new("x");
        report.add_with_target("fast", "GB/s", &[1.0, 3.0, 2.0], Target::AtLeast(1.5));
        report.add_with_target("small", "MiB", &[70.0], Target::AtMost(64.0));
        let table = report.table();
        assert!(table.contains("2.000 GB/s  (1.000 - 3.000, 3 runs)  target >= 1.500: met"), "{table}");
        assert!(table.contains("70.00 MiB") && table.contains("target <= 64.00: MISSED"), "{table}");
    }

    #[test]
    fn numbers_have_four_digits() {
        assert_eq!([0.0, 0.012345, 1.23456, 123.456, 98765.0].map(number), ["0", "0.01235", "1.235", "123.5", "98765"]);
    }
}
