//! Who fetches which groups of one blob. Pure: the workers ask, and say what became of it.
//!
//! Workers pull, so a fast provider gets more than a slow one without anyone measuring. When nothing is left to hand out, an
//! idle worker takes over what another has had for too long; whoever is first wins, and the loser's bytes are dropped.
//!
//! **Invariants**: `open` = `unassigned` + what is assigned and not yet done; a group that is given back or done leaves no
//! trace; at most [`COPIES_MAX`] workers are on one group.

use std::time::Duration;

use sundara_proto::blob::GroupRanges;

/// Workers on one group at once. Two bridge one stalled provider; more would only multiply traffic.
const COPIES_MAX: usize = 2;
/// Age at which another provider's assignment may be taken over.
const STEAL_OTHER_AFTER: Duration = Duration::from_millis(300);
/// Age at which the same provider's may be: its streams share one fate, so rarely of use.
const STEAL_SAME_AFTER: Duration = Duration::from_secs(5);

/// A stream of a provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WorkerId {
    pub(crate) provider: usize,
    pub(crate) stream: usize,
}

/// What a worker asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish<'a> {
    /// What its provider holds; `None`: everything, as far as is known.
    pub(crate) holds: Option<&'a GroupRanges>,
    /// Units wanted at once.
    pub(crate) units: u64,
    /// Whether it has nothing else to do, and may take over from others.
    pub(crate) may_steal: bool,
}

#[derive(Debug)]
struct Assigned {
    worker: WorkerId,
    groups: GroupRanges,
    since: Duration,
}

/// The groups that are still to come.
#[derive(Debug)]
pub(crate) struct Plan {
    unit: u64,
    unassigned: GroupRanges,
    open: GroupRanges,
    assigned: Vec<Assigned>,
}

impl Plan {
    /// Hands `missing` out in aligned pieces of `unit` groups.
    pub(crate) fn new(missing: GroupRanges, unit: u64) -> Self {
        Self { unit: unit.max(1), unassigned: missing.clone(), open: missing, assigned: Vec::new() }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.open.is_empty()
    }

    /// Pieces that nobody works on, rounded up.
    pub(crate) fn units_left(&self) -> u64 {
        self.unassigned.count().div_ceil(self.unit)
    }

    /// The next piece for `worker`: of at most `units` units, for a fast one. `now` is any monotonic clock.
    pub(crate) fn take(&mut self, worker: WorkerId, wish: Wish<'_>, now: Duration) -> Option<GroupRanges> {
        let groups = match self.first_units(wish) {
            Some(groups) => groups,
            None if wish.may_steal => self.steal(worker, wish.holds, now)?,
            None => return None,
        };
        self.unassigned.subtract(&groups);
        self.assigned.push(Assigned { worker, groups: groups.clone(), since: now });
        Some(groups)
    }

    /// Groups of the first aligned units in which something unassigned is held.
    fn first_units(&self, Wish { holds, units, .. }: Wish<'_>) -> Option<GroupRanges> {
        let (from, mut here) = (&self.unassigned, None);
        for range in from.iter() {
            let part = GroupRanges::of(range);
            let part = holds.map_or(part.clone(), |h| part.intersect(h));
            here = part.iter().next().map(|r| r.start);
            if here.is_some() {
                break;
            }
        }
        let start = here? / self.unit * self.unit;
        let unit = GroupRanges::of(start..start + self.unit * units.max(1)).intersect(from);
        Some(holds.map_or(unit.clone(), |h| unit.intersect(h)))
    }

    fn steal(&self, worker: WorkerId, holds: Option<&GroupRanges>, now: Duration) -> Option<GroupRanges> {
        // The last piece handed to a worker is the one it reaches last.
        self.assigned.iter().rev().find_map(|a| {
            let age = now.saturating_sub(a.since);
            let ripe = if a.worker.provider == worker.provider { STEAL_SAME_AFTER } else { STEAL_OTHER_AFTER };
            if a.worker == worker || age < ripe {
                return None;
            }
            let groups = self.open.intersect(&a.groups);
            let groups = holds.map_or(groups.clone(), |h| groups.intersect(h));
            let copies: Vec<_> = self.assigned.iter().filter(|o| !o.groups.intersect(&groups).is_empty()).collect();
            let mine = copies.iter().any(|o| o.worker == worker);
            let free = !groups.is_empty() && !mine && copies.len() < COPIES_MAX;
            free.then_some(groups)
        })
    }

    /// `groups` arrived from `worker` and are stored.
    pub(crate) fn done(&mut self, worker: WorkerId, groups: &GroupRanges) {
        self.open.subtract(groups);
        self.unassigned.subtract(groups);
        self.drop_assigned(worker, Some(groups));
    }

    /// Which of `groups` nobody has delivered yet.
    pub(crate) fn still_open(&self, groups: &GroupRanges) -> GroupRanges {
        self.open.intersect(groups)
    }

    /// `worker` will not deliver `groups`; without any, nothing of what it had.
    pub(crate) fn give_back(&mut self, worker: WorkerId, groups: Option<&GroupRanges>) {
        let freed = self.drop_assigned(worker, groups);
        let mut freed = self.open.intersect(&freed);
        for other in &self.assigned {
            freed.subtract(&other.groups);
        }
        self.unassigned.extend(&freed);
    }

    fn drop_assigned(&mut self, worker: WorkerId, groups: Option<&GroupRanges>) -> GroupRanges {
        let mut freed = GroupRanges::empty();
        for a in self.assigned.iter_mut().filter(|a| a.worker == worker) {
            let part = groups.map_or_else(|| a.groups.clone(), |g| a.groups.intersect(g));
            a.groups.subtract(&part);
            freed.extend(&part);
        }
        self.assigned.retain(|a| !a.groups.is_empty());
        freed
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: WorkerId = WorkerId { provider: 0, stream: 0 };
    const B: WorkerId = WorkerId { provider: 1, stream: 0 };

    fn wish(holds: Option<&GroupRanges>, may_steal: bool) -> Wish<'_> {
        Wish { holds, units: 1, may_steal }
    }

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn pieces_are_aligned_and_disjoint() {
        let mut plan = Plan::new(GroupRanges::of(3..20), 8);
        let pieces: Vec<_> = (0..3).map(|_| plan.take(A, wish(None, false), at(0)).unwrap()).collect();
        assert_eq!(pieces, [GroupRanges::of(3..8), GroupRanges::of(8..16), GroupRanges::of(16..20)]);
        assert_eq!(plan.take(B, wish(None, false), at(0)), None);
        pieces.iter().for_each(|p| plan.done(A, p));
        assert!(plan.is_done());
    }

    #[test]
    fn a_fast_worker_gets_several_units_at_once() {
        let mut plan = Plan::new(GroupRanges::of(3..40), 8);
        let wish = Wish { holds: None, units: 4, may_steal: false };
        assert_eq!(plan.take(A, wish, at(0)), Some(GroupRanges::of(3..32)));
        assert_eq!(plan.take(A, wish, at(0)), Some(GroupRanges::of(32..40)));
    }

    #[test]
    fn a_partial_provider_gets_what_it_holds() {
        let mut plan = Plan::new(GroupRanges::of(0..32), 8);
        let holds = GroupRanges::of(10..13);
        assert_eq!(plan.take(A, wish(Some(&holds), true), at(0)), Some(holds.clone()));
        assert_eq!(plan.take(A, wish(Some(&holds), true), at(9999)), None, "its own piece is not stolen");
        assert_eq!(plan.take(B, wish(None, true), at(0)), Some(GroupRanges::of(0..8)));
    }

    #[test]
    fn a_stalled_piece_is_taken_over_once() {
        let mut plan = Plan::new(GroupRanges::of(0..8), 8);
        let piece = plan.take(A, wish(None, true), at(0)).unwrap();
        assert_eq!(plan.take(B, wish(None, true), at(100)), None, "too young");
        assert_eq!(plan.take(B, wish(None, true), at(400)), Some(piece.clone()));
        let third = WorkerId { provider: 2, stream: 0 };
        assert_eq!(plan.take(third, wish(None, true), at(9000)), None, "two are enough");
        plan.done(B, &piece);
        assert!(plan.is_done() && plan.still_open(&piece).is_empty());
        plan.give_back(A, None);
        assert!(plan.is_done(), "what is done does not come back");
    }

    #[test]
    fn what_is_given_back_goes_to_another() {
        let mut plan = Plan::new(GroupRanges::of(0..16), 8);
        let piece = plan.take(A, wish(None, true), at(0)).unwrap();
        plan.give_back(A, None);
        assert_eq!(plan.take(B, wish(None, true), at(0)), Some(piece));
    }

    proptest! {
        #[test]
        fn whatever_workers_do_every_group_is_delivered(
            total in 1_u64..120, unit in 1_u64..20,
            moves in prop::collection::vec((0_usize..3, 0_u8..4, 0_u64..900), 0..120),
        ) {
            let mut plan = Plan::new(GroupRanges::of(0..total), unit);
            let mut queues: [Vec<GroupRanges>; 3] = Default::default();
            let mut delivered = GroupRanges::empty();
            let mut now = 0;
            let worker = |i| WorkerId { provider: i, stream: 0 };
            for (i, what, wait) in moves {
                now += wait;
                match what {
                    0 | 1 => queues[i].extend(plan.take(worker(i), wish(None, queues[i].is_empty()), at(now))),
                    2 if !queues[i].is_empty() => {
                        let piece = queues[i].remove(0);
                        plan.done(worker(i), &piece);
                        delivered.extend(&piece);
                    }
                    _ => {
                        queues[i].clear();
                        plan.give_back(worker(i), None);
                    }
                }
            }
            // All but one fail; the one that stays gets the whole rest.
            for i in 1..3 {
                plan.give_back(worker(i), None);
            }
            for piece in queues[0].drain(..) {
                plan.done(worker(0), &piece);
                delivered.extend(&piece);
            }
            while let Some(piece) = plan.take(worker(0), wish(None, true), at(now)) {
                plan.done(worker(0), &piece);
                delivered.extend(&piece);
            }
            prop_assert!(plan.is_done());
            prop_assert_eq!(delivered, GroupRanges::of(0..total));
        }
    }
}
