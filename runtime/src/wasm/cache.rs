//! Loaded programs in memory: each is loaded once however many ask, and the least recently used goes first.
//!
//! Owns the map and its bound. Loading runs on the compile pool to its end whoever stops waiting. A fault is handed to
//! those that waited and forgotten; whatever is a property of the program is kept.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::program::Loaded;
use crate::RuntimeError;
use crate::pool::Pool;

type Name = [u8; 32];
type Answer = Result<Arc<Loaded>, Arc<RuntimeError>>;

/// The map.
pub(crate) struct ProgramCache {
    state: Arc<Mutex<State>>,
    programs_max: usize,
}

#[derive(Default)]
struct State {
    programs: HashMap<Name, Entry>,
    uses: u64,
}

struct Entry {
    answer: watch::Receiver<Option<Answer>>,
    last_use: u64,
}

enum Claim {
    Mine(watch::Sender<Option<Answer>>, watch::Receiver<Option<Answer>>),
    Begun(watch::Receiver<Option<Answer>>),
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ProgramCache {
    pub(crate) fn new(programs_max: usize) -> Self {
        Self { state: Arc::default(), programs_max: programs_max.max(1) }
    }

    /// The program, from memory or by `load`. Cancel safe.
    pub(crate) async fn get(
        &self,
        name: Name,
        compilers: &Pool,
        load: impl FnOnce() -> Result<Loaded, RuntimeError> + Send + 'static,
    ) -> Result<Arc<Loaded>, RuntimeError> {
        if let Some(answer) = self.known(&name) {
            return wait(answer).await;
        }
        let slot = compilers.slot().await?;
        let (sender, answer) = match self.claim(name) {
            Claim::Mine(sender, answer) => (sender, answer),
            Claim::Begun(answer) => return wait(answer).await,
        };
        let shared = Arc::clone(&self.state);
        slot.spawn(move || {
            let work = std::panic::AssertUnwindSafe(load);
            let loaded = std::panic::catch_unwind(work).unwrap_or_else(|panic| {
                let text = crate::pool::panic_text(&*panic);
                Err(RuntimeError::Engine(format!("loading a program panicked: {text}")))
            });
            let answer = loaded.map(Arc::new).map_err(Arc::new);
            if answer.is_err() {
                lock(&shared).programs.remove(&name);
            }
            sender.send_replace(Some(answer));
        });
        wait(answer).await
    }

    fn known(&self, name: &Name) -> Option<watch::Receiver<Option<Answer>>> {
        let mut state = lock(&self.state);
        state.uses += 1;
        let uses = state.uses;
        let entry = state.programs.get_mut(name)?;
        entry.last_use = uses;
        Some(entry.answer.clone())
    }

    /// Takes the loading of a program, unless another caller has meanwhile.
    fn claim(&self, name: Name) -> Claim {
        let mut state = lock(&self.state);
        state.uses += 1;
        let last_use = state.uses;
        if let Some(entry) = state.programs.get(&name) {
            return Claim::Begun(entry.answer.clone());
        }
        let (sender, answer) = watch::channel(None);
        state.programs.insert(name, Entry { answer: answer.clone(), last_use });
        self.shrink(&mut state);
        Claim::Mine(sender, answer)
    }

    /// Drops what was unused longest; what is still loading stays.
    fn shrink(&self, state: &mut State) {
        while state.programs.len() > self.programs_max {
            let idle = state.programs.iter().filter(|(_, entry)| entry.answer.borrow().is_some());
            let Some(name) = idle.min_by_key(|(_, entry)| entry.last_use).map(|(name, _)| *name) else { return };
            state.programs.remove(&name);
        }
    }
}

async fn wait(mut answer: watch::Receiver<Option<Answer>>) -> Result<Arc<Loaded>, RuntimeError> {
    match &*answer.wait_for(Option::is_some).await.map_err(|_| RuntimeError::Closed)? {
        Some(Ok(loaded)) => Ok(Arc::clone(loaded)),
        Some(Err(fault)) => Err(RuntimeError::Loading(Arc::clone(fault))),
        None => Err(RuntimeError::Closed),
    }
}
