//! What is known of every miner, and the index to choose from.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use sundara_proto::id::{EngineId, Hotkey, JobId, ModelId, NodeId};
use sundara_proto::units::UnixMillis;

use super::pool::{EnginePools, Rank};
use super::{Candidate, ClassView, MinerProfile, MinerView, Seat, Want, solve};
use crate::domain::Owner;

/// Classes remembered of one miner: an advert that invents more has them ignored.
const CLASSES_MAX: usize = 16;
/// Slots believed of one class: an advert that claims more is served as if it claimed this.
const SLOTS_MAX: u32 = 1_024;
/// Entries of a pool looked at for one pick, so that one owner with very many miners cannot make picks slow.
const SCAN_MAX: usize = 256;
/// Candidates beyond those needed among which model and price decide.
const WINDOW: usize = 8;
/// A miner is asked for a model that it lacks within this many rounds of offers, one round being as many as there are
/// miners: at most every sixteenth offer or so is of that kind.
const LACKING_ROUNDS: u64 = 32;

#[derive(Debug)]
struct Class {
    name: String,
    slots: u32,
    in_flight: u32,
    price: u64,
    /// Places in `Fleet::engines`.
    engines: Vec<usize>,
    /// What stands in the pools now.
    rank: Option<Rank>,
    counted: bool,
    /// Once so many offers were made in all, a model that it lacks is not held against it. Drawn anew with each offer to it.
    due: Option<u64>,
}

#[derive(Debug)]
struct Miner {
    profile: MinerProfile,
    classes: Vec<Class>,
    /// The advert has not lapsed.
    present: bool,
    connected: bool,
    /// Not asked before, on the monotonic clock.
    off_until: Duration,
    /// Off for so long that nobody should wait for it.
    off_long: bool,
    running: HashSet<JobId>,
    /// Offers made to it.
    offers: u64,
}

/// All miners. See the module.
#[derive(Debug)]
pub struct Fleet {
    miners: HashMap<Hotkey, Miner>,
    nodes: HashMap<NodeId, Hotkey>,
    engines: Vec<EngineId>,
    pools: Vec<EnginePools>,
    /// Draws so far.
    drawn: u64,
    /// Offers made.
    offers: u64,
    rng: ChaCha8Rng,
    miners_max: usize,
}

impl Fleet {
    /// None yet; at most `miners_max` at once.
    pub fn new(miners_max: usize, seed: [u8; 32]) -> Self {
        Self {
            drawn: 0,
            offers: 0,
            miners: HashMap::new(),
            nodes: HashMap::new(),
            engines: Vec::new(),
            pools: Vec::new(),
            rng: ChaCha8Rng::from_seed(seed),
            miners_max,
        }
    }

    /// Miners known.
    pub fn len(&self) -> usize {
        self.miners.len()
    }

    /// Whether none is known.
    pub fn is_empty(&self) -> bool {
        self.miners.is_empty()
    }

    /// Engines that are indexed.
    pub fn engines(&self) -> &[EngineId] {
        &self.engines
    }

    /// Whether the miner is known, lapsed or not.
    pub fn contains(&self, miner: &Hotkey) -> bool {
        self.miners.contains_key(miner)
    }

    /// Indexes other engines. Walks over all miners; engines change when an executor attaches.
    pub fn set_engines(&mut self, engines: Vec<EngineId>, now: Duration) {
        self.engines = engines;
        self.pools = self.engines.iter().map(|_| EnginePools::default()).collect();
        let mut hotkeys: Vec<Hotkey> = self.miners.keys().copied().collect();
        hotkeys.sort_unstable();
        for hotkey in hotkeys {
            if let Some(miner) = self.miners.get_mut(&hotkey) {
                for class in &mut miner.classes {
                    (class.rank, class.counted) = (None, false);
                }
                let profile = miner.profile.clone();
                Self::apply_classes(&self.engines, miner, &profile);
            }
            self.refresh(&hotkey, now);
        }
    }

    /// Takes a new or replaced profile. `false` when there is no room for another miner.
    pub fn upsert(&mut self, profile: MinerProfile, now: Duration) -> bool {
        let hotkey = profile.hotkey;
        if !self.miners.contains_key(&hotkey) && self.miners.len() >= self.miners_max {
            return false;
        }
        self.unindex(&hotkey);
        let miner = self.miners.entry(hotkey).or_insert_with(|| Miner {
            profile: profile.clone(),
            classes: Vec::new(),
            present: true,
            connected: true,
            off_until: Duration::ZERO,
            off_long: false,
            running: HashSet::new(),
            offers: 0,
        });
        if miner.profile.node != profile.node {
            self.nodes.remove(&miner.profile.node);
        }
        self.nodes.insert(profile.node, hotkey);
        // A fresh advert says that the miner lives, whether this node is connected to it or has to dial.
        (miner.present, miner.connected) = (true, true);
        Self::apply_classes(&self.engines, miner, &profile);
        miner.profile = profile;
        miner.profile.models.sort_unstable();
        self.refresh(&hotkey, now);
        true
    }

    /// Classes keep their places over adverts: parts in flight name them by number.
    fn apply_classes(engines: &[EngineId], miner: &mut Miner, profile: &MinerProfile) {
        for class in &mut miner.classes {
            class.slots = 0;
        }
        for offered in &profile.classes {
            let place = miner.classes.iter().position(|class| class.name == offered.hardware_class);
            let place = match place {
                Some(place) => place,
                None if miner.classes.len() < CLASSES_MAX => {
                    miner.classes.push(Class {
                        name: offered.hardware_class.clone(),
                        slots: 0,
                        in_flight: 0,
                        price: 0,
                        engines: Vec::new(),
                        rank: None,
                        counted: false,
                        due: None,
                    });
                    miner.classes.len() - 1
                }
                None => continue,
            };
            let class = &mut miner.classes[place];
            class.slots = offered.slots.min(SLOTS_MAX);
            class.price = offered.price;
            class.engines = (0..engines.len()).filter(|i| offered.engines.contains(&engines[*i])).collect();
        }
    }

    /// Forgets a miner whose advert lapsed at or before `now_wall`; returns when to look again otherwise.
    pub fn expire(&mut self, hotkey: &Hotkey, now_wall: UnixMillis, now: Duration) -> Option<UnixMillis> {
        let miner = self.miners.get_mut(hotkey)?;
        if miner.profile.expires_at > now_wall {
            return Some(miner.profile.expires_at);
        }
        miner.present = false;
        if miner.running.is_empty() {
            self.remove(hotkey);
        } else {
            self.refresh(hotkey, now);
        }
        None
    }

    fn remove(&mut self, hotkey: &Hotkey) {
        self.unindex(hotkey);
        if let Some(miner) = self.miners.remove(hotkey)
            && self.nodes.get(&miner.profile.node) == Some(hotkey)
        {
            self.nodes.remove(&miner.profile.node);
        }
    }

    /// A node came or went. Returns the miner behind it and, when it went, the jobs that it had parts of, in order.
    pub fn set_connected(&mut self, node: &NodeId, connected: bool, now: Duration) -> Option<(Hotkey, Vec<JobId>)> {
        let hotkey = *self.nodes.get(node)?;
        let miner = self.miners.get_mut(&hotkey)?;
        miner.connected = connected;
        let mut lost: Vec<JobId> = if connected { Vec::new() } else { miner.running.iter().copied().collect() };
        lost.sort_unstable();
        self.refresh(&hotkey, now);
        Some((hotkey, lost))
    }

    /// Does not ask a miner before `until`. `long`: so long that no job should wait for it.
    pub fn set_off(&mut self, hotkey: &Hotkey, until: Duration, long: bool, now: Duration) {
        if let Some(miner) = self.miners.get_mut(hotkey) {
            if until >= miner.off_until {
                (miner.off_until, miner.off_long) = (until, long);
            }
            self.refresh(hotkey, now);
        }
    }

    /// Looks at a miner again whose time off may be over; returns its end if not.
    pub fn wake(&mut self, hotkey: &Hotkey, now: Duration) -> Option<Duration> {
        let miner = self.miners.get_mut(hotkey)?;
        if miner.off_until > now {
            return Some(miner.off_until);
        }
        miner.off_long = false;
        self.refresh(hotkey, now);
        None
    }

    /// Takes a slot.
    pub fn occupy(&mut self, seat: &Seat, job: JobId, now: Duration) {
        if let Some(miner) = self.miners.get_mut(&seat.miner) {
            miner.running.insert(job);
            miner.offers += 1;
            self.offers += 1;
            if let Some(class) = miner.classes.get_mut(usize::from(seat.class)) {
                class.in_flight += 1;
                class.due = None;
            }
            self.refresh_class(&seat.miner, seat.class, now);
        }
    }

    /// Gives a slot back.
    pub fn release(&mut self, seat: &Seat, job: &JobId, now: Duration) {
        let Some(miner) = self.miners.get_mut(&seat.miner) else { return };
        if !miner.running.remove(job) {
            return;
        }
        if let Some(class) = miner.classes.get_mut(usize::from(seat.class)) {
            class.in_flight = class.in_flight.saturating_sub(1);
        }
        if !miner.present && miner.running.is_empty() {
            self.remove(&seat.miner);
        } else {
            self.refresh_class(&seat.miner, seat.class, now);
        }
    }

    /// Name of a seat's class.
    pub fn class_name(&self, seat: &Seat) -> Option<&str> {
        let miner = self.miners.get(&seat.miner)?;
        Some(&miner.classes.get(usize::from(seat.class))?.name)
    }

    /// Names of a miner's classes.
    pub fn class_names(&self, hotkey: &Hotkey) -> Vec<String> {
        self.miners.get(hotkey).map_or_else(Vec::new, |m| m.classes.iter().map(|class| class.name.clone()).collect())
    }

    /// Most distinct owners, busy or free, that one engine of this class has.
    pub fn owners(&self, class: &str) -> usize {
        self.pools.iter().filter_map(|pools| pools.pool(class)).map(super::pool::Pool::owners).max().unwrap_or(0)
    }

    /// What is known of a miner, for people.
    pub fn view(&self, hotkey: &Hotkey, now: Duration) -> Option<MinerView> {
        let miner = self.miners.get(hotkey)?;
        let class = |class: &Class| ClassView {
            name: class.name.clone(),
            slots: class.slots,
            in_flight: class.in_flight,
            price: class.price,
            engines: class.engines.len(),
            free: class.rank.is_some(),
        };
        Some(MinerView {
            present: miner.present,
            connected: miner.connected,
            off_for_ms: u64::try_from(miner.off_until.saturating_sub(now).as_millis()).unwrap_or(u64::MAX),
            running: miner.running.len(),
            offers: miner.offers,
            offers_to_all: self.offers,
            models: miner.profile.models.clone(),
            classes: miner.classes.iter().map(class).collect(),
        })
    }

    /// Free slots at miners of distinct owners on one engine, or `None`.
    pub fn pick(&self, want: &Want<'_>) -> Option<(EngineId, Vec<Seat>)> {
        let places = self.engines.iter().enumerate().filter(|(_, e)| want.engine.is_none_or(|wanted| wanted == **e));
        for (place, engine) in places {
            if let Some(seats) = self.pick_on(place, want) {
                return Some((*engine, seats));
            }
        }
        None
    }

    fn pick_on(&self, place: usize, want: &Want<'_>) -> Option<Vec<Seat>> {
        let pool = self.pools.get(place)?.pool(want.class)?;
        let mut candidates: Vec<Candidate> = Vec::with_capacity(want.count + WINDOW);
        // Apart, so that they do not take the window from those that go before them, and no more than could be needed.
        let mut held_back: Vec<Candidate> = Vec::new();
        for rank in pool.free.iter().take(SCAN_MAX) {
            if candidates.len() == want.count + WINDOW {
                break;
            }
            let Some(miner) = self.miners.get(&rank.miner) else { continue };
            let owner = miner.profile.owner;
            if want.owners.contains(&owner) || want.exclude.contains(&rank.miner) {
                continue;
            }
            let has_model = want.model.is_none_or(|model| has(&miner.profile.models, &model));
            // Whoever has the model goes first, but not always: a miner that nobody asks never fetches it, is never audited
            // and earns nothing, however long it stands there.
            let due = miner.classes.get(usize::from(rank.class)).and_then(|class| class.due);
            let waits = !has_model && due.is_none_or(|due| due > self.offers);
            let (list, room) =
                if waits { (&mut held_back, want.count) } else { (&mut candidates, want.count + WINDOW) };
            if list.len() == room || list.iter().any(|c| c.seat.owner == owner) {
                continue;
            }
            let seat = Seat {
                miner: rank.miner,
                owner,
                node: miner.profile.node,
                class: rank.class,
                price: rank.price,
                has_model,
            };
            list.push(Candidate { seat, held_back: waits, load: rank.load, tie: rank.tie });
        }
        candidates.append(&mut held_back);
        solve(&mut candidates, want.count)
    }

    fn refresh(&mut self, hotkey: &Hotkey, now: Duration) {
        let classes = self.miners.get(hotkey).map_or(0, |miner| miner.classes.len());
        for class in 0..classes {
            self.refresh_class(hotkey, u8::try_from(class).unwrap_or(u8::MAX), now);
        }
    }

    /// Puts one class where it belongs in the pools.
    fn refresh_class(&mut self, hotkey: &Hotkey, number: u8, now: Duration) {
        // A draw that moves on: who is not picked falls behind those that are, and so comes to its turn; a plain draw would
        // leave whoever drew high for good.
        self.drawn += 1;
        let round = self.miners.len().max(1) as u64;
        let Some(miner) = self.miners.get_mut(hotkey) else { return };
        let usable = miner.present && miner.connected;
        let owner: Owner = miner.profile.owner;
        let Some(class) = miner.classes.get_mut(usize::from(number)) else { return };
        if class.due.is_none() {
            class.due = Some(self.offers + u64::from(self.rng.next_u32()) % (LACKING_ROUNDS * round));
        }
        let counted = usable && !miner.off_long && class.slots > 0;
        let free = usable && miner.off_until <= now && class.in_flight < class.slots;
        let rank = free.then(|| Rank {
            price: class.price,
            load: class.in_flight * 1_024 / class.slots,
            tie: self.drawn + u64::from(self.rng.next_u32()) % (2 * round),
            miner: *hotkey,
            class: number,
        });
        let (old, was_counted) = (class.rank, class.counted);
        (class.rank, class.counted) = (rank, counted);
        for place in &class.engines {
            let Some(pools) = self.pools.get_mut(*place) else { continue };
            pools.update(&class.name, |pool| {
                if let Some(old) = &old {
                    pool.free.remove(old);
                }
                if let Some(rank) = rank {
                    pool.free.insert(rank);
                }
                match (was_counted, counted) {
                    (false, true) => pool.count_owner(owner),
                    (true, false) => pool.uncount_owner(owner),
                    _ => {}
                }
            });
        }
    }

    /// Takes a miner out of all pools, with the engines, price and owner under which it stands there.
    fn unindex(&mut self, hotkey: &Hotkey) {
        let Some(miner) = self.miners.get_mut(hotkey) else { return };
        let owner = miner.profile.owner;
        for class in &mut miner.classes {
            let (rank, counted) = (class.rank.take(), std::mem::take(&mut class.counted));
            for place in &class.engines {
                let Some(pools) = self.pools.get_mut(*place) else { continue };
                pools.update(&class.name, |pool| {
                    if let Some(rank) = &rank {
                        pool.free.remove(rank);
                    }
                    if counted {
                        pool.uncount_owner(owner);
                    }
                });
            }
        }
    }
}

fn has(sorted: &[ModelId], model: &ModelId) -> bool {
    sorted.binary_search(model).is_ok()
}

#[cfg(test)]
impl Fleet {
    /// Slots in use at a miner, for postconditions.
    pub(crate) fn in_flight(&self, hotkey: &Hotkey) -> u32 {
        self.miners.get(hotkey).map_or(0, |miner| miner.classes.iter().map(|class| class.in_flight).sum())
    }

    /// Slots in use at all miners.
    pub(crate) fn all_in_flight(&self) -> u32 {
        self.miners.keys().map(|hotkey| self.in_flight(hotkey)).sum()
    }
}
