//! Rust sources, as far as walls need them: code without comments, texts and tests, and the paths that it names.

use std::collections::BTreeSet;

/// A source file under its path from the repository root, with `/` between parts.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) path: String,
    pub(crate) text: String,
}

impl Source {
    pub(crate) fn new(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned() }
    }

    /// Code alone: comments and literals are blanked, inline test modules too. Lines stay where they are.
    pub(crate) fn code(&self) -> String {
        without_tests(&blank(&self.text))
    }

    /// Path of the module inside its crate: `node/src/a/b.rs` is `["a", "b"]`, lib.rs and main.rs are the root.
    pub(crate) fn module(&self) -> Vec<String> {
        let inside = self.path.split_once("/src/").map_or(self.path.as_str(), |(_, inside)| inside);
        let inside = inside.strip_suffix(".rs").unwrap_or(inside);
        let inside = inside.strip_suffix("/mod").unwrap_or(inside);
        inside.split('/').filter(|part| !matches!(*part, "lib" | "main")).map(str::to_owned).collect()
    }
}

/// Replaces comments, strings and characters by spaces.
pub(crate) fn blank(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    while i < chars.len() {
        let end = literal_end(&chars, i);
        if end > i {
            out.extend(chars[i..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            i = end;
        } else {
            out.push(chars[i]);
            i += 1;
        }
    }
    out
}

/// End of the comment or literal that begins at `i`; `i` where none does.
fn literal_end(chars: &[char], i: usize) -> usize {
    let at = |n: usize| chars.get(n).copied().unwrap_or('\0');
    match (at(i), at(i + 1)) {
        ('/', '/') => (i..chars.len()).find(|n| at(*n) == '\n').unwrap_or(chars.len()),
        ('/', '*') => {
            let (mut depth, mut n) = (1, i + 2);
            while n < chars.len() && depth > 0 {
                match (at(n), at(n + 1)) {
                    ('/', '*') => (depth, n) = (depth + 1, n + 2),
                    ('*', '/') => (depth, n) = (depth - 1, n + 2),
                    _ => n += 1,
                }
            }
            n
        }
        ('"', _) => quoted_end(chars, i + 1, '"'),
        ('r', '"' | '#') if i == 0 || !is_ident(at(i - 1)) || at(i - 1) == 'b' => raw_end(chars, i),
        // A lifetime has no closing quote: 'a, but not 'a' or '\n'.
        ('\'', '\\') => quoted_end(chars, i + 1, '\''),
        ('\'', _) if at(i + 2) == '\'' => i + 3,
        _ => i,
    }
}

fn quoted_end(chars: &[char], mut n: usize, quote: char) -> usize {
    while n < chars.len() && chars[n] != quote {
        n += if chars[n] == '\\' { 2 } else { 1 };
    }
    (n + 1).min(chars.len())
}

/// End of `r"..."` or `r#"..."#`; `i` for a raw identifier.
fn raw_end(chars: &[char], i: usize) -> usize {
    let hashes = chars[i + 1..].iter().take_while(|c| **c == '#').count();
    if chars.get(i + 1 + hashes) != Some(&'"') {
        return i;
    }
    let mut n = i + 2 + hashes;
    while n < chars.len() {
        if chars[n] == '"' && chars[n + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes {
            return n + 1 + hashes;
        }
        n += 1;
    }
    chars.len()
}

fn is_ident(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Blanks every item behind `#[cfg(test)]`.
fn without_tests(code: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut out = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(at) = rest.find(MARK) {
        out.push_str(&rest[..at]);
        let item = &rest[at..];
        let end = item_end(item, MARK.len());
        out.extend(item[..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        rest = &item[end..];
    }
    out.push_str(rest);
    out
}

/// End of the item that begins at `from`: its semicolon, or the brace that closes its body.
fn item_end(item: &str, from: usize) -> usize {
    let mut depth = 0_usize;
    for (n, c) in item.char_indices().skip_while(|(n, _)| *n < from) {
        match c {
            ';' if depth == 0 => return n + 1,
            '{' => depth += 1,
            '}' if depth <= 1 => return n + 1,
            '}' => depth -= 1,
            _ => {}
        }
    }
    item.len()
}

/// Files of the modules that are declared behind `#[cfg(test)]` or `#[cfg(all(test, ...))]`: they and everything below
/// them is test code.
pub(crate) fn test_files(sources: &[Source]) -> BTreeSet<String> {
    let mut files = BTreeSet::new();
    for source in sources {
        let code = blank(&source.text);
        for mark in ["#[cfg(test)]", "#[cfg(all(test,"] {
            for (at, _) in code.match_indices(mark) {
                if let Some(name) = declared_module(&code[at..]) {
                    files.insert(format!("{}/{name}", directory(&source.path)));
                }
            }
        }
    }
    files
}

/// Name of the module that `mod name;` declares behind attributes.
fn declared_module(mut item: &str) -> Option<&str> {
    while item.starts_with('#') {
        item = item[item.find(']')? + 1..].trim_start();
    }
    for visibility in ["pub(crate)", "pub(super)", "pub"] {
        item = item.strip_prefix(visibility).unwrap_or(item).trim_start();
    }
    let (name, _) = item.strip_prefix("mod ")?.split_once(';')?;
    name.chars().all(is_ident).then_some(name)
}

/// Whether a file belongs to a module of [`test_files`], or says by its name that it is tests alone.
pub(crate) fn is_test(path: &str, tests: &BTreeSet<String>) -> bool {
    let stem = path.strip_suffix(".rs").unwrap_or(path);
    if stem.ends_with("/tests") || stem.ends_with("_tests") || stem.contains("/tests/") {
        return true;
    }
    tests.iter().any(|test| stem == test || stem.strip_prefix(test.as_str()).is_some_and(|rest| rest.starts_with('/')))
}

/// Directory of a module's children.
fn directory(path: &str) -> String {
    let stem = path.strip_suffix(".rs").unwrap_or(path);
    match stem.rsplit_once('/') {
        Some((parent, "lib" | "main" | "mod")) => parent.to_owned(),
        _ => stem.to_owned(),
    }
}

/// A path that code names, from the crate's root, and the line on which it does.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Named {
    pub(crate) line: usize,
    pub(crate) path: Vec<String>,
}

/// Every path that begins with `crate::`, `super::`, or the name of `krate`, written from the crate's root; groups in
/// braces are taken apart.
pub(crate) fn named_paths(source: &Source, krate: &str) -> Vec<Named> {
    let code = source.code();
    let module = source.module();
    let mut all = Vec::new();
    let (mut before, mut line) = (' ', 1);
    for (n, c) in code.char_indices() {
        let start = !is_ident(before) && before != ':' && is_ident(c);
        let root = start.then(|| root_of(&code[n..], krate, &module)).flatten();
        if let Some((root, len)) = root {
            for path in tree(&code[n + len..], &root) {
                all.push(Named { line, path });
            }
        }
        line += usize::from(c == '\n');
        before = c;
    }
    all
}

/// The module that a path starts from, and the length of its first words.
fn root_of(rest: &str, krate: &str, module: &[String]) -> Option<(Vec<String>, usize)> {
    for word in ["crate", krate] {
        if rest.strip_prefix(word).is_some_and(|rest| rest.starts_with("::")) {
            return Some((Vec::new(), word.len() + 2));
        }
    }
    let mut up = 0;
    while rest[up * 7..].starts_with("super::") {
        up += 1;
    }
    (up > 0).then(|| (module[..module.len().saturating_sub(up)].to_vec(), up * 7))
}

/// Paths of a use tree: `a::{b, c::d}` below `root`.
fn tree(text: &str, root: &[String]) -> Vec<Vec<String>> {
    let mut path = root.to_vec();
    let mut rest = text.trim_start();
    loop {
        if let Some(group) = rest.strip_prefix('{') {
            return group_parts(group).iter().flat_map(|part| tree(part, &path)).collect();
        }
        let word: String = rest.chars().take_while(|c| is_ident(*c)).collect();
        if word.is_empty() {
            return vec![path];
        }
        rest = rest[word.len()..].trim_start();
        if word != "self" {
            path.push(word);
        }
        match rest.strip_prefix("::") {
            Some(more) => rest = more.trim_start(),
            None => return vec![path],
        }
    }
}

/// Parts of a group up to its closing brace.
fn group_parts(text: &str) -> Vec<String> {
    let (mut depth, mut part, mut parts) = (0, String::new(), Vec::new());
    for c in text.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => parts.push(std::mem::take(&mut part)),
            _ => {
                depth += i32::from(c == '{') - i32::from(c == '}');
                part.push(c);
            }
        }
    }
    parts.push(part);
    parts.retain(|part| !part.trim().is_empty());
    parts
}

/// Lines on which a word (or a path of words) stands by itself.
pub(crate) fn lines_with(code: &str, word: &str) -> Vec<usize> {
    let mut lines = Vec::new();
    for (n, line) in code.lines().enumerate() {
        let hit = line.match_indices(word).any(|(at, _)| {
            let before = line[..at].chars().next_back().unwrap_or(' ');
            let after = line[at + word.len()..].chars().next().unwrap_or(' ');
            !is_ident(before) && !is_ident(after)
        });
        if hit {
            lines.push(n + 1);
        }
    }
    lines
}
