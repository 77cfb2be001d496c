//! Tables, and postconditions over random fleets.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;
use sundara_proto::advert::ExecutorClass;
use sundara_proto::id::{EngineId, Hotkey, JobId, ModelId};

use super::*;
use crate::domain::job::testing::{at, hotkey, key, profile};

const NOW: Duration = Duration::ZERO;

fn engine(n: u8) -> EngineId {
    EngineId([n; 32])
}

fn class(name: &str, slots: u32, engines: &[u8], price: u64) -> ExecutorClass {
    let engines = engines.iter().map(|n| engine(*n)).collect();
    ExecutorClass { hardware_class: name.to_owned(), slots, engines, price }
}

fn miner(n: u32, owner: u32, classes: &[ExecutorClass], models: &[u8]) -> MinerProfile {
    MinerProfile {
        owner: Owner(key(2, owner)),
        classes: classes.to_vec(),
        models: models.iter().map(|m| ModelId([*m; 32])).collect(),
        ..profile(n, 0)
    }
}

fn fleet(engines: &[u8], miners: &[MinerProfile]) -> Fleet {
    let mut fleet = Fleet::new(1_000, [7; 32]);
    fleet.set_engines(engines.iter().map(|n| engine(*n)).collect(), NOW);
    for miner in miners {
        assert!(fleet.upsert(miner.clone(), NOW));
    }
    fleet
}

fn want(class: &str, count: usize) -> Want<'_> {
    Want { class, engine: None, model: None, count, owners: &[], exclude: &[] }
}

fn picked(fleet: &Fleet, want: &Want<'_>) -> Option<BTreeSet<Hotkey>> {
    Some(fleet.pick(want)?.1.iter().map(|seat| seat.miner).collect())
}

fn set(miners: &[u32]) -> Option<BTreeSet<Hotkey>> {
    Some(miners.iter().map(|n| hotkey(*n)).collect())
}

#[test]
fn one_engine_and_distinct_owners() {
    let cpu = |engines: &[u8]| vec![class("cpu", 1, engines, 0)];
    // 1 and 2 have one owner; 3 has another engine than both.
    let fleet =
        fleet(&[1, 2], &[miner(1, 1, &cpu(&[1]), &[]), miner(2, 1, &cpu(&[1]), &[]), miner(3, 3, &cpu(&[2]), &[])]);
    assert_eq!(picked(&fleet, &want("", 2)), None);
    assert_eq!((fleet.owners(""), fleet.owners("cpu"), fleet.owners("gpu")), (1, 1, 0));
    let mut fleet = fleet;
    fleet.upsert(miner(4, 4, &cpu(&[2]), &[]), NOW);
    assert_eq!(picked(&fleet, &want("cpu", 2)), set(&[3, 4]));
    assert_eq!(picked(&fleet, &Want { engine: Some(engine(1)), ..want("", 2) }), None);
    assert_eq!(picked(&fleet, &Want { exclude: &[hotkey(3)], ..want("", 2) }), None);
    assert_eq!(
        picked(&fleet, &Want { owners: &[Owner(key(2, 4))], engine: Some(engine(2)), ..want("", 1) }),
        set(&[3])
    );
}

#[test]
fn model_then_price_then_load() {
    let one = |price| vec![class("cpu", 4, &[1], price)];
    let mut fleet = fleet(&[1], &[miner(1, 1, &one(5), &[9]), miner(2, 2, &one(1), &[]), miner(3, 3, &one(1), &[])]);
    let with_model = Want { model: Some(ModelId([9; 32])), ..want("", 1) };
    assert_eq!(picked(&fleet, &with_model), set(&[1]), "fetching a model costs more than a slot");
    let (_, seats) = fleet.pick(&Want { exclude: &[hotkey(3)], ..want("", 1) }).unwrap();
    assert_eq!(seats[0].miner, hotkey(2), "the cheapest");
    fleet.occupy(&seats[0], JobId([1; 32]), NOW);
    assert_eq!(picked(&fleet, &want("", 1)), set(&[3]), "the least loaded of the cheapest");
    fleet.release(&seats[0], &JobId([1; 32]), NOW);
    let choices: BTreeSet<Hotkey> = (0..64)
        .map(|n| {
            let (_, seats) = fleet.pick(&want("", 1)).unwrap();
            // A release draws anew.
            fleet.occupy(&seats[0], JobId([n; 32]), NOW);
            fleet.release(&seats[0], &JobId([n; 32]), NOW);
            seats[0].miner
        })
        .collect();
    assert_eq!(choices.len(), 2, "ties are broken by a draw");
}

#[test]
fn absent_lapsed_and_resting_miners_are_not_asked() {
    let one = vec![class("cpu", 1, &[1], 0)];
    let mut fleet = fleet(&[1], &[miner(1, 1, &one, &[])]);
    let node = profile(1, 0).node;
    assert_eq!(fleet.set_connected(&node, false, NOW), Some((hotkey(1), vec![])));
    assert_eq!((picked(&fleet, &want("", 1)), fleet.owners("")), (None, 0));
    fleet.set_connected(&node, true, NOW);
    fleet.set_off(&hotkey(1), Duration::from_secs(5), false, NOW);
    assert_eq!((picked(&fleet, &want("", 1)), fleet.owners("")), (None, 1), "worth waiting for");
    assert_eq!(fleet.wake(&hotkey(1), Duration::from_secs(4)), Some(Duration::from_secs(5)));
    assert_eq!(fleet.wake(&hotkey(1), Duration::from_secs(5)), None);
    assert_eq!(picked(&fleet, &want("", 1)), set(&[1]));
    fleet.set_off(&hotkey(1), Duration::from_secs(9_999), true, Duration::from_secs(5));
    assert_eq!(fleet.owners(""), 0, "not worth waiting for");
    let end = profile(1, 0).expires_at;
    assert_eq!(fleet.expire(&hotkey(1), at(0).wall, NOW), Some(end));
    assert_eq!(fleet.expire(&hotkey(1), end, NOW), None);
    assert!(fleet.is_empty());
}

#[test]
fn an_owner_with_very_many_miners_takes_one_place_and_little_time() {
    let one = vec![class("cpu", 1, &[1], 0)];
    let mut miners: Vec<MinerProfile> = (0..200).map(|n| miner(n, 1, &one, &[])).collect();
    miners.push(miner(900, 2, &one, &[]));
    let fleet = fleet(&[1], &miners);
    assert!(picked(&fleet, &want("", 2)).unwrap().contains(&hotkey(900)));
    assert_eq!(picked(&fleet, &want("", 3)), None);
}

/// Gives `jobs` jobs, one after another, to miners of which the first `having` have the model and the others never get it.
/// Returns the offers made to each.
fn offers_by_miner(miners: u32, having: u32, replicas: usize, jobs: u32) -> Vec<u64> {
    let one = vec![class("cpu", 1, &[1], 0)];
    let profiles: Vec<MinerProfile> =
        (0..miners).map(|n| miner(n, n, &one, if n < having { &[9] } else { &[] })).collect();
    let mut fleet = fleet(&[1], &profiles);
    for n in 0..jobs {
        let want = Want { model: Some(ModelId([9; 32])), ..want("", replicas) };
        let (_, seats) = fleet.pick(&want).unwrap();
        for seat in &seats {
            fleet.occupy(seat, JobId(key(9, n)), NOW);
        }
        for seat in &seats {
            fleet.release(seat, &JobId(key(9, n)), NOW);
        }
        // Adverts come all the time, and change nobody's turn.
        fleet.upsert(profiles[(n % miners) as usize].clone(), NOW);
    }
    (0..miners).map(|n| fleet.view(&hotkey(n), NOW).unwrap().offers).collect()
}

#[test]
fn a_miner_without_the_model_comes_to_its_turn() {
    // The mesh of the liars' test: three honest miners that have the model are always free.
    let offers = offers_by_miner(4, 3, 2, 1_000);
    assert!(offers[3] > 0, "never asked: {offers:?}");
    let offers = offers_by_miner(40, 30, 2, 10_000);
    assert!(offers.iter().all(|n| *n > 0), "never asked: {offers:?}");
}

#[test]
fn miners_with_the_model_are_asked_first() {
    for (miners, having) in [(4, 3), (9, 2), (40, 30), (40, 4)] {
        let offers = offers_by_miner(miners, having, 1, 10_000);
        let lacking: u64 = offers[having as usize..].iter().sum();
        assert!(lacking < 10_000 / 10, "{lacking} offers to those that have to fetch it: {offers:?}");
    }
}

/// Something that happens to a fleet.
#[derive(Clone, Debug)]
enum Op {
    Advert { miner: u32, owner: u32, slots: u32, price: u64, engines: u8, class: bool },
    Pick { class: bool, count: usize, engine: Option<u8> },
    Release(usize),
    Connected(u32, bool),
    Off(u32, u64),
    Wake(u32, u64),
    Engines(u8),
    Expire(u32),
}

fn op() -> impl Strategy<Value = Op> {
    let miner = 0..12_u32;
    prop_oneof![
        4 => (miner.clone(), 0..6_u32, 0..4_u32, 0..3_u64, 0..4_u8, any::<bool>())
            .prop_map(|(miner, owner, slots, price, engines, class)| Op::Advert { miner, owner, slots, price, engines, class }),
        8 => (any::<bool>(), 1..5_usize, proptest::option::of(1..3_u8))
            .prop_map(|(class, count, engine)| Op::Pick { class, count, engine }),
        6 => (0..64_usize).prop_map(Op::Release),
        1 => (miner.clone(), any::<bool>()).prop_map(|(m, c)| Op::Connected(m, c)),
        1 => (miner.clone(), 0..20_u64).prop_map(|(m, s)| Op::Off(m, s)),
        1 => (miner.clone(), 0..20_u64).prop_map(|(m, s)| Op::Wake(m, s)),
        1 => (0..4_u8).prop_map(Op::Engines),
        1 => miner.prop_map(Op::Expire),
    ]
}

/// Engines by bit set.
fn engines(bits: u8) -> Vec<u8> {
    (1..=2).filter(|n| bits & (1 << (n - 1)) != 0).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens to the fleet, a pick has distinct owners, fits what is wanted, and takes no slot twice; and what
    /// the index offers is what a walk over a plain model would find.
    #[test]
    fn picks_hold_their_promises(ops in proptest::collection::vec(op(), 1..80)) {
        let mut fleet = fleet(&[1], &[]);
        let mut adverts: BTreeMap<u32, MinerProfile> = BTreeMap::new();
        let mut taken: Vec<(Seat, JobId)> = Vec::new();
        let mut now = NOW;
        for (n, op) in ops.into_iter().enumerate() {
            let job = JobId(key(9, u32::try_from(n).unwrap()));
            match op {
                Op::Advert { miner: m, owner, slots, price, engines: bits, class: gpu } => {
                    let name = if gpu { "gpu" } else { "cpu" };
                    let advert = miner(m, owner, &[class(name, slots, &engines(bits), price)], &[]);
                    prop_assert!(fleet.upsert(advert.clone(), now));
                    adverts.insert(m, advert);
                }
                Op::Pick { class: gpu, count, engine: wanted } => {
                    let want = Want { engine: wanted.map(engine), ..want(if gpu { "gpu" } else { "" }, count) };
                    let Some((on, seats)) = fleet.pick(&want) else { continue };
                    prop_assert_eq!(seats.len(), count);
                    prop_assert!(want.engine.is_none_or(|wanted| wanted == on));
                    prop_assert!(fleet.engines().contains(&on));
                    let owners: BTreeSet<Owner> = seats.iter().map(|seat| seat.owner).collect();
                    prop_assert_eq!(owners.len(), count, "distinct owners");
                    for seat in seats {
                        let (_, advert) = adverts.iter().find(|(m, _)| hotkey(**m) == seat.miner).unwrap();
                        let offered = &advert.classes[0];
                        prop_assert!(offered.engines.contains(&on));
                        prop_assert!(!gpu || offered.hardware_class == "gpu");
                        prop_assert_eq!((seat.owner, seat.price), (advert.owner, offered.price));
                        let busy = taken.iter().filter(|(t, _)| (t.miner, t.class) == (seat.miner, seat.class)).count();
                        prop_assert!(u32::try_from(busy).unwrap() < offered.slots, "a free slot");
                        fleet.occupy(&seat, job, now);
                        taken.push((seat, job));
                    }
                }
                Op::Release(at) if at < taken.len() => {
                    let (seat, job) = taken.swap_remove(at);
                    fleet.release(&seat, &job, now);
                }
                Op::Release(_) => {}
                Op::Connected(m, up) => {
                    fleet.set_connected(&profile(m, 0).node, up, now);
                }
                Op::Off(m, seconds) => fleet.set_off(&hotkey(m), now + Duration::from_secs(seconds), false, now),
                Op::Wake(m, seconds) => {
                    now += Duration::from_secs(seconds);
                    fleet.wake(&hotkey(m), now);
                }
                Op::Engines(bits) => fleet.set_engines(engines(bits).into_iter().map(engine).collect(), now),
                Op::Expire(m) => {
                    fleet.expire(&hotkey(m), profile(m, 0).expires_at, now);
                }
            }
        }
        for (seat, job) in taken.drain(..) {
            fleet.release(&seat, &job, now);
        }
        prop_assert_eq!(fleet.all_in_flight(), 0);
        // All awake, connected and known again: every slot of an indexed engine is on offer.
        now += Duration::from_secs(1_000);
        fleet.set_engines(vec![engine(1)], now);
        for (m, advert) in &adverts {
            fleet.upsert(advert.clone(), now);
            fleet.wake(&hotkey(*m), now);
        }
        let owners: BTreeSet<Owner> = adverts
            .values()
            .filter(|advert| advert.classes[0].slots > 0 && advert.classes[0].engines.contains(&engine(1)))
            .map(|advert| advert.owner)
            .collect();
        prop_assert_eq!(fleet.owners(""), owners.len());
        if !owners.is_empty() {
            prop_assert!(fleet.pick(&want("", owners.len())).is_some());
        }
        prop_assert!(fleet.pick(&want("", owners.len() + 1)).is_none());
    }
}
