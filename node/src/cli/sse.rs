//! Server-sent events, as the API's job routes send them.

/// Most bytes of one event: a chunk of output is 64 KiB, base64 and text of it together below 200 KiB.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// One event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Event {
    /// Its kind; empty when it names none.
    pub(super) name: String,
    /// Its data; several lines joined by line feeds.
    pub(super) data: String,
}

/// Cuts a stream of bytes into events. Bytes may come in pieces of any size.
#[derive(Debug, Default)]
pub(super) struct Parser {
    line: Vec<u8>,
    event: Event,
    has_data: bool,
}

/// An event beyond its limit, or one that is not UTF-8.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the event stream is malformed")]
pub(super) struct Malformed;

impl Parser {
    /// Takes the next bytes; returns the events that they complete.
    ///
    /// # Errors
    /// When an event is too large or no text. Nothing can be read after that.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<Vec<Event>, Malformed> {
        let mut events = Vec::new();
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            self.line.extend_from_slice(&rest[..end]);
            rest = &rest[end + 1..];
            let line = std::mem::take(&mut self.line);
            events.extend(self.line(&line)?);
        }
        self.line.extend_from_slice(rest);
        if self.line.len() + self.event.data.len() > EVENT_BYTES_MAX { Err(Malformed) } else { Ok(events) }
    }

    fn line(&mut self, line: &[u8]) -> Result<Option<Event>, Malformed> {
        let line = std::str::from_utf8(line.strip_suffix(b"\r").unwrap_or(line)).map_err(|_| Malformed)?;
        if line.is_empty() {
            let event = std::mem::take(&mut self.event);
            return Ok(std::mem::take(&mut self.has_data).then_some(event));
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.event.name),
            "data" => {
                if self.has_data {
                    self.event.data.push('\n');
                }
                self.event.data.push_str(value);
                self.has_data = true;
                if self.event.data.len() > EVENT_BYTES_MAX {
                    return Err(Malformed);
                }
            }
            // Comments (empty field), ids, retries and what is new.
            _ => {}
        }
        Ok(None)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn event(name: &str, data: &str) -> Event {
        Event { name: name.into(), data: data.into() }
    }

    #[test]
    fn events_come_out_however_the_bytes_come_in() {
        let stream = b": hello\n\nevent: a\ndata: {\"x\":1}\n\nevent:b\r\ndata: one\r\ndata:two\r\n\r\nid: 7\n\nevent: none\n\ndata\n\n";
        let expected = [event("a", "{\"x\":1}"), event("b", "one\ntwo"), event("", "")];
        for size in [1, 2, 3, 7, stream.len()] {
            let mut parser = Parser::default();
            let events: Vec<Event> = stream.chunks(size).flat_map(|chunk| parser.push(chunk).unwrap()).collect();
            assert_eq!(events, expected, "in pieces of {size}");
        }
    }

    #[test]
    fn endless_events_are_cut_off() {
        let mut parser = Parser::default();
        assert_eq!(parser.push(&vec![b'x'; EVENT_BYTES_MAX + 1]), Err(Malformed));
        let mut parser = Parser::default();
        let lines = b"data: xxxxxxxxxxxxxxx\n".repeat(EVENT_BYTES_MAX / 15);
        assert_eq!(parser.push(&lines), Err(Malformed));
        assert_eq!(Parser::default().push(b"data: \xff\n"), Err(Malformed));
    }
}
