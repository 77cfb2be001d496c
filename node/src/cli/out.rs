//! What a command prints: people's text or JSON on standard output, everything about progress on standard error.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::Value;

/// Standard output in the form that was asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Out {
    /// Whether `--json` was given.
    pub(super) json: bool,
}

impl Out {
    /// Prints `value` as JSON, or what `text` makes of it.
    pub(super) fn show<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> io::Result<()> {
        if self.json {
            return self.line(&serde_json::to_string_pretty(value)?);
        }
        self.line(text(value).trim_end_matches('\n'))
    }

    /// One line; nothing for an empty text.
    pub(super) fn line(&self, text: &str) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.write_all(b"\n")?;
        out.flush()
    }

    /// Bytes as they are.
    pub(super) fn bytes(&self, bytes: &[u8]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(bytes)?;
        out.flush()
    }
}

/// A word about progress, on standard error.
pub(super) fn note(text: &str) {
    // Nobody to tell is no reason to fail.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Progress of something that has no known length, where standard error is a terminal.
pub(super) fn spinner(message: String) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner().with_message(message);
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

const BYTES: &str = "{msg} [{bar:32}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";

/// Makes a spinner a bar, once the length is known.
pub(super) fn measure(bar: &ProgressBar, done: u64, len: u64) {
    if bar.length() != Some(len) {
        bar.set_style(ProgressStyle::with_template(BYTES).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_length(len);
    }
    bar.set_position(done);
}

/// Progress through `len` bytes, where standard error is a terminal.
pub(super) fn bytes_bar(message: String, len: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(BYTES).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(len).with_message(message).with_style(style)
}

/// Progress through `len` steps, where standard error is a terminal.
pub(super) fn count_bar(message: String, len: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} [{bar:32}] {pos}/{len} {elapsed}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(len).with_message(message).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// Columns of equal width, with a heading; empty without rows.
pub(super) fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let mut widths: Vec<usize> = heading.iter().map(|text| text.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let heading: Vec<String> = heading.iter().map(|text| text.to_uppercase()).collect();
    let line = |cells: &Vec<String>| {
        let padded: Vec<String> = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell}{}", " ".repeat(width - cell.chars().count())))
            .collect();
        padded.join("  ").trim_end().to_owned()
    };
    std::iter::once(&heading).chain(rows).map(line).collect::<Vec<_>>().join("\n")
}

/// A list of objects as a table; columns are their fields as they first occur.
pub(super) fn columns(items: &[Value]) -> String {
    let mut heading: Vec<&str> = Vec::new();
    for object in items.iter().filter_map(Value::as_object) {
        for name in object.keys() {
            if !heading.contains(&name.as_str()) {
                heading.push(name);
            }
        }
    }
    let row = |item: &Value| heading.iter().map(|name| cell(item.get(name).unwrap_or(&Value::Null))).collect();
    table(&heading, &items.iter().map(row).collect::<Vec<_>>())
}

/// An object as lines of name and value; nested ones by dotted names.
pub(super) fn fields(value: &Value) -> String {
    let mut lines = Vec::new();
    flatten("", value, &mut lines);
    let width = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or_default();
    let line = |(name, text): &(String, String)| format!("{name:<width$}  {text}").trim_end().to_owned();
    lines.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn flatten(name: &str, value: &Value, lines: &mut Vec<(String, String)>) {
    let inner = |part: &str| if name.is_empty() { part.to_owned() } else { format!("{name}.{part}") };
    match value {
        Value::Object(object) => object.iter().for_each(|(part, value)| flatten(&inner(part), value, lines)),
        Value::Array(items) if items.iter().any(|item| item.is_object() || item.is_array()) => {
            items.iter().enumerate().for_each(|(i, item)| flatten(&inner(&i.to_string()), item, lines));
        }
        // A list of plain values has a line each, its name once.
        Value::Array(items) if items.len() > 1 => {
            let label = |i| if i == 0 { name.to_owned() } else { String::new() };
            lines.extend(items.iter().enumerate().map(|(i, item)| (label(i), cell(item))));
        }
        plain => lines.push((name.to_owned(), cell(plain))),
    }
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.is_empty() => "-".to_owned(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align() {
        let rows = [vec!["a".to_owned(), "bb".to_owned()], vec!["ccc".to_owned(), "ü".to_owned()]];
        assert_eq!(table(&["x", "y"], &rows), "X    Y\na    bb\nccc  ü");
        assert_eq!(table(&["x"], &[]), "");
        let items = [serde_json::json!({"a": 1, "b": null}), serde_json::json!({"a": [2, 3], "c": "x"})];
        assert_eq!(columns(&items), "A     B  C\n1     -  -\n2, 3  -  x");
    }

    #[test]
    fn objects_are_lines() {
        let value = serde_json::json!({"a": {"b": 1, "cc": [true]}, "list": ["x", "y"], "of": [{"n": 1}]});
        assert_eq!(fields(&value), "a.b     1\na.cc    true\nlist    x\ny\nof.0.n  1".replace("\ny", "\n        y"));
    }
}
