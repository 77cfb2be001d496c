//! `wasi:io`: errors (none arise), polling, streams.

use wasmtime::Result;
use wasmtime::component::{Linker, Resource};

use super::{CHUNK_BYTES_MAX, Call, IoError, Pollable, Reader, Writer, interface};
use crate::wasm::host::{Ended, Errno, Fault, Host};

/// Fuel of one subscription in a poll, as in preview 1: the bytes of its record.
const POLL_BYTES: u64 = 80;

pub(super) fn link(linker: &mut Linker<Host>) -> Result<()> {
    let mut error = interface(linker, "io/error")?;
    error.resource::<IoError>("error")?;
    error.plain("[method]error.to-debug-string", |_, (_,): (Resource<IoError>,)| Ok(String::new()))?;

    let mut poll = interface(linker, "io/poll")?;
    poll.resource::<Pollable>("pollable")?;
    poll.plain("[method]pollable.ready", |call, (one,): (Resource<Pollable>,)| match *call.get(&one)? {
        Pollable::Ready => Ok(true),
        Pollable::Until(moment) => Ok(call.host.clock.now() >= moment),
    })?;
    poll.unit("[method]pollable.block", |call, (one,): (Resource<Pollable>,)| {
        if let Pollable::Until(moment) = *call.get(&one)? {
            call.host.clock.sleep_until(moment);
        }
        Ok(())
    })?;
    poll.plain("poll", |call, (list,): (Vec<Resource<Pollable>>,)| poll_list(call, &list))?;

    let mut streams = interface(linker, "io/streams")?;
    streams.resource::<IoError>("error")?;
    streams.resource::<Pollable>("pollable")?;
    streams.resource::<Reader>("input-stream")?;
    streams.resource::<Writer>("output-stream")?;
    for name in ["read", "blocking-read"] {
        let name = format!("[method]input-stream.{name}");
        streams.stream(&name, |call, (stream, most): (Resource<Reader>, u64)| read(call, &stream, most))?;
    }
    for name in ["skip", "blocking-skip"] {
        let name = format!("[method]input-stream.{name}");
        streams.stream(&name, |call, (stream, most): (Resource<Reader>, u64)| {
            Ok(read(call, &stream, most)?.len() as u64)
        })?;
    }
    streams.plain("[method]input-stream.subscribe", |call, (_,): (Resource<Reader>,)| call.push(Pollable::Ready))?;
    streams.stream("[method]output-stream.check-write", |_, (_,): (Resource<Writer>,)| Ok(CHUNK_BYTES_MAX))?;
    for name in ["write", "blocking-write-and-flush"] {
        let name = format!("[method]output-stream.{name}");
        streams.stream(&name, |call, (stream, bytes): (Resource<Writer>, Vec<u8>)| write(call, &stream, &bytes))?;
    }
    for name in ["flush", "blocking-flush"] {
        streams.stream(&format!("[method]output-stream.{name}"), |_, (_,): (Resource<Writer>,)| Ok(()))?;
    }
    streams.plain("[method]output-stream.subscribe", |call, (_,): (Resource<Writer>,)| call.push(Pollable::Ready))?;
    for name in ["write-zeroes", "blocking-write-zeroes-and-flush"] {
        let name = format!("[method]output-stream.{name}");
        streams.stream(&name, |call, (stream, count): (Resource<Writer>, u64)| {
            if count > CHUNK_BYTES_MAX {
                return Err(Ended::Misuse.into());
            }
            write(call, &stream, &vec![0; usize::try_from(count).unwrap_or(0)])
        })?;
    }
    for name in ["splice", "blocking-splice"] {
        let name = format!("[method]output-stream.{name}");
        streams.stream(&name, |call, (to, from, most): (Resource<Writer>, Resource<Reader>, u64)| {
            let bytes = read(call, &from, most)?;
            write(call, &to, &bytes)?;
            Ok(bytes.len() as u64)
        })?;
    }
    Ok(())
}

/// What is ready now; when nothing is, time passes up to the earliest moment.
fn poll_list(call: &mut Call<'_>, list: &[Resource<Pollable>]) -> Result<Vec<u32>, Fault> {
    if list.is_empty() {
        return Err(Ended::Misuse.into());
    }
    call.charge_bytes(POLL_BYTES * list.len() as u64)?;
    let mut moments = Vec::with_capacity(list.len());
    for one in list {
        moments.push(match *call.get(one)? {
            Pollable::Ready => 0,
            Pollable::Until(moment) => moment,
        });
    }
    call.host.clock.sleep_until(moments.iter().copied().min().unwrap_or(0));
    let now = call.host.clock.peek();
    Ok((0_u32..).zip(moments).filter(|(_, moment)| *moment <= now).map(|(index, _)| index).collect())
}

/// The next bytes; an error at the end of the stream, which the caller turns into `closed`.
fn read(call: &mut Call<'_>, stream: &Resource<Reader>, most: u64) -> Result<Vec<u8>, Fault> {
    let reader = *call.get(stream)?;
    let left = match reader {
        Reader::Stdin => call.host.stdin.left() as u64,
        Reader::File { node, offset } => call.host.files.left(node, offset)?,
    };
    if most == 0 {
        return Ok(Vec::new());
    }
    if left == 0 {
        return Err(Errno::NoEntry.into());
    }
    let count = most.min(left).min(CHUNK_BYTES_MAX);
    call.charge_bytes(count)?;
    let count = usize::try_from(count).unwrap_or(0);
    match reader {
        Reader::Stdin => Ok(call.host.stdin.take(count).to_vec()),
        Reader::File { node, offset } => {
            let mut buffer = vec![0; count];
            let read = call.host.files.read_at(node, &mut buffer, offset)?;
            buffer.truncate(read);
            *call.get(stream)? = Reader::File { node, offset: offset.saturating_add(read as u64) };
            Ok(buffer)
        }
    }
}

fn write(call: &mut Call<'_>, stream: &Resource<Writer>, bytes: &[u8]) -> Result<(), Fault> {
    if bytes.len() as u64 > CHUNK_BYTES_MAX {
        return Err(Ended::Misuse.into());
    }
    call.charge_bytes(bytes.len() as u64)?;
    match *call.get(stream)? {
        Writer::Stdout => call.host.write_stdout(bytes),
        Writer::Stderr => {
            call.host.stderr.push(bytes);
            Ok(())
        }
    }
}
