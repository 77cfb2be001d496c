//! WASI preview 2 (`wasi:cli/command`, 0.2), over the same deterministic host as preview 1.
//!
//! Owns the resources a component can hold and the definitions of its interfaces: io (error, poll, streams), cli,
//! clocks, filesystem, random. Deliberately absent: sockets and everything else. An absent import does not keep a
//! component from starting (language runtimes import what they never call); calling it traps, on every machine.
//!
//! Interfaces are defined once at the newest 0.2 version; the linker serves every 0.2 version from it.

use wasmtime::component::{
    ComponentNamedList, Lift, Linker, LinkerInstance, Lower, Resource, ResourceTable, ResourceType,
};
use wasmtime::{AsContextMut, Result, StoreContextMut};

use super::files::NodeId;
use super::{BYTE_FUEL, CALL_FUEL, Ended, Errno, Fault, Host};

mod filesystem;
mod io;
mod system;
mod types;

use types::{ErrorCode, StreamError};

/// Most resources alive at once: bounds our side of what a guest can hold.
const RESOURCES_MAX: usize = 4_096;
/// Most bytes that one call reads or may write.
const CHUNK_BYTES_MAX: u64 = 1 << 20;

/// Something to wait for.
#[derive(Clone, Copy, Debug)]
enum Pollable {
    Ready,
    /// A moment of the monotonic clock.
    Until(u64),
}

/// An input stream.
#[derive(Clone, Copy, Debug)]
enum Reader {
    Stdin,
    File { node: NodeId, offset: u64 },
}

/// An output stream.
#[derive(Clone, Copy, Debug)]
enum Writer {
    Stdout,
    Stderr,
}

/// An open file or directory.
#[derive(Clone, Copy, Debug)]
struct Opened {
    node: NodeId,
}

/// A directory being listed.
#[derive(Debug)]
struct Listing {
    entries: std::vec::IntoIter<(String, NodeId)>,
}

/// Resources that exist as types only.
#[derive(Debug)]
enum IoError {}
#[derive(Debug)]
enum TerminalInput {}
#[derive(Debug)]
enum TerminalOutput {}

/// The table behind a store.
pub(crate) fn resource_table() -> ResourceTable {
    let mut table = ResourceTable::new();
    table.set_max_capacity(RESOURCES_MAX);
    table
}

/// One host call in progress.
struct Call<'a> {
    host: &'a mut Host,
    fuel: u64,
}

impl Call<'_> {
    fn charge(&mut self, units: u64) -> Result<(), Fault> {
        match self.fuel.checked_sub(units) {
            Some(left) => {
                self.fuel = left;
                Ok(())
            }
            None => {
                self.fuel = 0;
                Err(Ended::OutOfFuel.into())
            }
        }
    }

    fn charge_bytes(&mut self, bytes: u64) -> Result<(), Fault> {
        self.charge(bytes.saturating_mul(BYTE_FUEL))
    }

    fn push<T: Send + 'static>(&mut self, value: T) -> Result<Resource<T>, Fault> {
        self.host.resources.push(value).map_err(|_| Ended::Misuse.into())
    }

    fn get<T: 'static>(&mut self, resource: &Resource<T>) -> Result<&mut T, Fault> {
        self.host.resources.get_mut(resource).map_err(|_| Ended::Misuse.into())
    }
}

/// Runs the body of a host call; the inner error is for the guest.
fn call<R>(
    mut store: StoreContextMut<'_, Host>,
    body: impl FnOnce(&mut Call<'_>) -> Result<R, Fault>,
) -> Result<Result<R, Errno>> {
    let fuel = store.get_fuel()?;
    let mut call = Call { host: store.data_mut(), fuel };
    let result = call.charge(CALL_FUEL).and_then(|()| body(&mut call));
    let left = call.fuel;
    store.set_fuel(left)?;
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(Fault::Errno(errno)) => Ok(Err(errno)),
        Err(Fault::End(ended)) => Err(store.data_mut().end(ended)),
    }
}

/// One interface while it is being defined.
struct Interface<'a>(LinkerInstance<'a, Host>);

impl Interface<'_> {
    /// A resource type, also where an interface uses one of another: the linker asks for it under each name.
    fn resource<T: 'static>(&mut self, name: &str) -> Result<()> {
        self.0.resource(name, ResourceType::host::<T>(), |mut store, rep| {
            match store.data_mut().resources.delete(Resource::<T>::new_own(rep)) {
                Ok(_) => Ok(()),
                Err(_) => Err(store.data_mut().end(Ended::Misuse)),
            }
        })
    }

    /// A function that returns a value and cannot fail towards the guest.
    fn plain<P, R>(
        &mut self,
        name: &str,
        body: impl Fn(&mut Call<'_>, P) -> Result<R, Fault> + Send + Sync + 'static,
    ) -> Result<()>
    where
        P: ComponentNamedList + Lift + 'static,
        R: Lower + 'static,
        (R,): ComponentNamedList + Lower,
    {
        self.0.func_wrap(name, move |mut store, params: P| {
            match call(store.as_context_mut(), |call| body(call, params))? {
                Ok(value) => Ok((value,)),
                Err(_) => Err(store.data_mut().end(Ended::Misuse)),
            }
        })
    }

    /// A function without a result.
    fn unit<P>(
        &mut self,
        name: &str,
        body: impl Fn(&mut Call<'_>, P) -> Result<(), Fault> + Send + Sync + 'static,
    ) -> Result<()>
    where
        P: ComponentNamedList + Lift + 'static,
    {
        self.0.func_wrap(name, move |mut store, params: P| {
            match call(store.as_context_mut(), |call| body(call, params))? {
                Ok(()) => Ok(()),
                Err(_) => Err(store.data_mut().end(Ended::Misuse)),
            }
        })
    }

    /// A function of streams: what fails is closed.
    fn stream<P, R>(
        &mut self,
        name: &str,
        body: impl Fn(&mut Call<'_>, P) -> Result<R, Fault> + Send + Sync + 'static,
    ) -> Result<()>
    where
        P: ComponentNamedList + Lift + 'static,
        R: Lower + 'static,
        (std::result::Result<R, StreamError>,): ComponentNamedList + Lower,
    {
        self.0.func_wrap(name, move |store, params: P| {
            Ok((call(store, |call| body(call, params))?.map_err(|_| StreamError::Closed),))
        })
    }

    /// A function of the file system.
    fn file<P, R>(
        &mut self,
        name: &str,
        body: impl Fn(&mut Call<'_>, P) -> Result<R, Fault> + Send + Sync + 'static,
    ) -> Result<()>
    where
        P: ComponentNamedList + Lift + 'static,
        R: Lower + 'static,
        (std::result::Result<R, ErrorCode>,): ComponentNamedList + Lower,
    {
        self.0.func_wrap(name, move |store, params: P| {
            Ok((call(store, |call| body(call, params))?.map_err(ErrorCode::from),))
        })
    }
}

/// Adds the world to a linker.
pub(crate) fn link(linker: &mut Linker<Host>) -> Result<()> {
    io::link(linker)?;
    system::link(linker)?;
    filesystem::link(linker)
}

/// Begins the definition of an interface.
fn interface<'a>(linker: &'a mut Linker<Host>, name: &str) -> Result<Interface<'a>> {
    Ok(Interface(linker.instance(&format!("wasi:{name}@0.2.12"))?))
}
