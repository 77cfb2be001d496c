//! Plans, and the pace that deadlines follow.

use std::time::Duration;

use proptest::prelude::*;

use super::plan::{Candidate, Pace, STALL_MIN, STALL_UNKNOWN, chunk_groups, plan};

const GROUP: u64 = 16 << 10;

fn candidates(bandwidths: &[Option<u64>]) -> Vec<Candidate> {
    let one = |(node, bandwidth): (usize, &Option<u64>)| Candidate { node, memory: u64::MAX, bandwidth: *bandwidth };
    bandwidths.iter().enumerate().map(one).collect()
}

proptest! {
    #[test]
    fn every_group_has_one_reducer_and_every_part_its_spares(
        groups in 0_u64..100_000, members in 1_u64..64, known in prop::collection::vec(prop::option::of(1_u64..1 << 30), 1..12),
    ) {
        let candidates = candidates(&known);
        let Some(plan) = plan(groups, GROUP, members, &candidates) else { return Err(TestCaseError::fail("no plan")) };
        prop_assert_eq!(plan.parts.iter().map(|p| p.groups).sum::<u64>(), groups);
        for part in &plan.parts {
            prop_assert!(part.groups > 0);
            prop_assert_eq!(part.spare.len(), candidates.len() - 1);
            prop_assert!(!part.spare.contains(&part.reducer));
        }
        prop_assert!(plan.chunk_groups.is_power_of_two() && plan.chunk_groups <= 256);
    }

    #[test]
    fn shares_follow_bandwidth(fast in 1_u64..50, slow in 1_u64..50) {
        let candidates = candidates(&[Some(fast << 20), Some(slow << 20)]);
        let Some(plan) = plan(10_000, GROUP, 4, &candidates) else { return Err(TestCaseError::fail("no plan")) };
        let share = |node: usize| plan.parts.iter().find(|p| p.reducer == node).map_or(0, |p| p.groups);
        let wanted = 10_000 * fast / (fast + slow);
        prop_assert!(share(0).abs_diff(wanted) <= 1);
    }
}

#[test]
fn a_reducer_without_memory_gets_nothing_while_others_have_some() {
    let mut candidates = candidates(&[None, None]);
    candidates[0].memory = 1;
    let parts = plan(100, GROUP, 4, &candidates).map(|p| p.parts).unwrap_or_default();
    assert_eq!(parts.iter().map(|p| p.reducer).collect::<Vec<_>>(), [1]);
    assert_eq!(plan(100, GROUP, 4, &[]), None);
}

#[test]
fn three_chunks_fit_a_reducers_memory_whatever_the_group() {
    for members in 1..=256 {
        let groups = u64::from(chunk_groups(100_000, GROUP, members));
        let budget = super::plan::REDUCER_BYTES + members * super::plan::REDUCER_BYTES_A_MEMBER;
        assert!(3 * groups * GROUP * (members + 1) <= budget, "{members}");
    }
}

#[test]
fn deadlines_follow_the_pace() {
    let mut pace = Pace::default();
    assert_eq!(pace.stall(1 << 20), STALL_UNKNOWN);
    pace.record(100 << 20, Duration::from_secs(8));
    assert_eq!(pace.stall(100 << 20), Duration::from_secs(2));
    assert_eq!(pace.stall(1 << 20), STALL_MIN);
    for _ in 0..30 {
        pace.record(100 << 20, Duration::from_secs(80));
    }
    assert!(pace.stall(100 << 20) > Duration::from_secs(18));
}
