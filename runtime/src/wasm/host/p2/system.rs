//! `wasi:cli`, `wasi:clocks`, `wasi:random`.

use wasmtime::Result;
use wasmtime::component::{Linker, Resource};

use super::types::{Datetime, NOW};
use super::{CHUNK_BYTES_MAX, Call, Pollable, Reader, TerminalInput, TerminalOutput, Writer, interface};
use crate::wasm::host::{ARGUMENTS, Ended, Fault, Host, TICK_NS};

pub(super) fn link(linker: &mut Linker<Host>) -> Result<()> {
    cli(linker)?;
    clocks(linker)?;
    randomness(linker)
}

fn cli(linker: &mut Linker<Host>) -> Result<()> {
    let mut environment = interface(linker, "cli/environment")?;
    environment.plain("get-environment", |_, (): ()| Ok(Vec::<(String, String)>::new()))?;
    environment.plain("get-arguments", |_, (): ()| Ok(ARGUMENTS.map(String::from).to_vec()))?;
    environment.plain("initial-cwd", |_, (): ()| Ok(None::<String>))?;

    let mut exit = interface(linker, "cli/exit")?;
    exit.unit("exit", |_, (status,): (std::result::Result<(), ()>,)| {
        Err(Ended::Exit(i32::from(status.is_err())).into())
    })?;
    exit.unit("exit-with-code", |_, (code,): (u8,)| Err(Ended::Exit(i32::from(code)).into()))?;

    let mut stdin = interface(linker, "cli/stdin")?;
    stdin.resource::<Reader>("input-stream")?;
    stdin.plain("get-stdin", |call, (): ()| call.push(Reader::Stdin))?;
    for (name, writer) in [("stdout", Writer::Stdout), ("stderr", Writer::Stderr)] {
        let mut stream = interface(linker, &format!("cli/{name}"))?;
        stream.resource::<Writer>("output-stream")?;
        stream.plain(&format!("get-{name}"), move |call, (): ()| call.push(writer))?;
        let mut terminal = interface(linker, &format!("cli/terminal-{name}"))?;
        terminal.resource::<TerminalOutput>("terminal-output")?;
        terminal.plain(&format!("get-terminal-{name}"), |_, (): ()| Ok(None::<Resource<TerminalOutput>>))?;
    }
    interface(linker, "cli/terminal-output")?.resource::<TerminalOutput>("terminal-output")?;
    interface(linker, "cli/terminal-input")?.resource::<TerminalInput>("terminal-input")?;
    let mut terminal = interface(linker, "cli/terminal-stdin")?;
    terminal.resource::<TerminalInput>("terminal-input")?;
    terminal.plain("get-terminal-stdin", |_, (): ()| Ok(None::<Resource<TerminalInput>>))?;
    Ok(())
}

fn clocks(linker: &mut Linker<Host>) -> Result<()> {
    let mut monotonic = interface(linker, "clocks/monotonic-clock")?;
    monotonic.resource::<Pollable>("pollable")?;
    monotonic.plain("now", |call, (): ()| Ok(call.host.clock.now()))?;
    monotonic.plain("resolution", |_, (): ()| Ok(TICK_NS))?;
    monotonic.plain("subscribe-instant", |call, (moment,): (u64,)| call.push(Pollable::Until(moment)))?;
    monotonic.plain("subscribe-duration", |call, (duration,): (u64,)| {
        let moment = call.host.clock.peek().saturating_add(duration);
        call.push(Pollable::Until(moment))
    })?;

    let mut wall = interface(linker, "clocks/wall-clock")?;
    wall.plain("now", |_, (): ()| Ok(NOW))?;
    wall.plain("resolution", |_, (): ()| Ok(Datetime { seconds: 0, nanoseconds: TICK_NS as u32 }))
}

fn randomness(linker: &mut Linker<Host>) -> Result<()> {
    let mut random = interface(linker, "random/random")?;
    random.plain("get-random-bytes", |call, (count,): (u64,)| bytes(call, count))?;
    random.plain("get-random-u64", |call, (): ()| number(call))?;
    let mut insecure = interface(linker, "random/insecure")?;
    insecure.plain("get-insecure-random-bytes", |call, (count,): (u64,)| bytes(call, count))?;
    insecure.plain("get-insecure-random-u64", |call, (): ()| number(call))?;
    interface(linker, "random/insecure-seed")?
        .plain("insecure-seed", |call, (): ()| Ok(call.host.randomness.insecure_seed()))
}

fn bytes(call: &mut Call<'_>, count: u64) -> Result<Vec<u8>, Fault> {
    if count > CHUNK_BYTES_MAX {
        return Err(Ended::Misuse.into());
    }
    call.charge_bytes(count)?;
    let mut buffer = vec![0; usize::try_from(count).unwrap_or(0)];
    call.host.randomness.fill(&mut buffer);
    Ok(buffer)
}

fn number(call: &mut Call<'_>) -> Result<u64, Fault> {
    let mut buffer = [0; 8];
    call.charge_bytes(8)?;
    call.host.randomness.fill(&mut buffer);
    Ok(u64::from_le_bytes(buffer))
}
