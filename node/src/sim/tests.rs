//! The attack table's rows on jobs, and what crashes and weather may not break.

use proptest::prelude::*;
use sundara_proto::verdict::VerdictKind;

use super::world::{liars, run};
use super::{Behaviour, Setup, Weather};
use crate::domain::job::Offence;

use Behaviour::{
    Colluder, Copier, Dead, Declining, Faulting, Honest, Replayer, Slow, TrustThenWrong, Withholder, Wrong,
};

#[test]
fn honest_miners_verify_every_job() {
    for seed in 0..20 {
        for replicas in 1..=3 {
            let report = run(&Setup::new(seed, &[Honest; 5], 100, replicas));
            assert_eq!((report.verified(), report.offences.len(), report.refused), (100, 0, 0));
        }
    }
}

#[test]
fn a_wrong_result_is_caught_whenever_it_is_audited() {
    for seed in 0..50 {
        // New miners are audited always: the first lie is the last.
        let setup = Setup::new(seed, &[Wrong(1_000), Honest, Honest, Wrong(1_000), Honest], 60, 1);
        let report = run(&setup);
        assert_eq!(report.verified(), 60);
        for liar in liars(&setup.miners) {
            assert_eq!(report.caught(liar), report.parts[liar] > 0, "seed {seed}");
            // At most what was in its slots when the first audit came back.
            assert!(report.parts[liar] <= 8, "{}", report.parts[liar]);
        }
        let wrong = report.verdicts.values().filter(|v| {
            v.kind.is_verified() && v.output != sundara_proto::id::BlobId::of(&super::miner::right(&v.job))
        });
        assert_eq!(wrong.count(), 0);
    }
}

#[test]
fn a_ten_percent_cheater_is_first_caught_within_1100_jobs_with_99_percent() {
    let seeds = 400;
    let mut missed = 0;
    for seed in 0..seeds {
        let mut setup = Setup::new(seed, &[Wrong(100)], 1_200, 1);
        // Past its first audits, at the floor of 4.2 %.
        setup.trusted = Some(1_000);
        setup.stop_at_offence = true;
        let report = run(&setup);
        let first = report.offences.first().map(|(_, offence, parts)| (*offence, *parts));
        missed += u32::from(!matches!(first, Some((Offence::WrongResult, 0..=1_100))));
    }
    // Binomial(400, 0.01): 4 expected; 14 or more has a chance below 1e-4.
    assert!(missed <= 13, "{missed} of {seeds} were not caught");
}

#[test]
fn trust_that_was_built_up_does_not_help_for_long() {
    let mut caught = 0;
    for seed in 0..20 {
        let mut setup = Setup::new(seed, &[TrustThenWrong(300)], 700, 1);
        setup.stop_at_offence = true;
        let report = run(&setup);
        caught += u32::from(report.caught(0));
        assert!(report.offences.iter().all(|(_, _, parts)| *parts > 300));
    }
    // Every lie is caught with at least 4.2 %: 400 of them escape together with 4e-8.
    assert_eq!(caught, 20);
}

#[test]
fn a_copied_result_is_caught_every_time() {
    for seed in 0..100 {
        for replicas in 2..=3 {
            let setup = Setup::new(seed, &[Copier, Honest, Honest, Honest], 40, replicas);
            let report = run(&setup);
            assert_eq!(report.verified(), 40, "seed {seed}");
            assert_eq!(report.caught(0), report.parts[0] > 0, "seed {seed}");
            assert!(report.offences.iter().all(|(n, offence, _)| (*n, *offence) == (0, Offence::BrokenCommitment)));
            assert!(report.parts[0] <= 8, "dropped at once: {}", report.parts[0]);
        }
    }
}

#[test]
fn withheld_replayed_and_colluding_results_are_caught() {
    for seed in 0..20 {
        for (bad, offence) in [(Withholder, Offence::Withheld), (Replayer, Offence::ForeignAttestation)] {
            let report = run(&Setup::new(seed, &[bad, Honest, Honest, Honest], 60, 2));
            assert_eq!(report.verified(), 60, "{bad:?} seed {seed}");
            assert!(report.caught(0), "{bad:?} seed {seed}");
            assert!(report.offences.iter().all(|(n, what, _)| (*n, *what) == (0, offence)));
        }
        // A majority that lies alike still loses to the validator's own executor.
        let setup = Setup::new(seed, &[Colluder, Colluder, Colluder, Honest, Honest, Honest], 60, 3);
        let report = run(&setup);
        let caught = (0..3).filter(|n| report.caught(*n)).count();
        assert_eq!(caught, 3, "seed {seed}");
        assert!(report.verified() >= 55, "{}", report.verified());
    }
}

#[test]
fn dead_slow_and_broken_miners_cost_time_and_not_results() {
    for seed in 0..10 {
        for replicas in 1..=2 {
            let miners = [Dead, Slow, Faulting, Declining, Honest, Honest, Honest, Honest];
            let report = run(&Setup::new(seed, &miners, 60, replicas));
            assert_eq!(report.offences.len(), 0);
            assert!(report.verified() >= 55, "seed {seed}: {} of 60", report.verified());
        }
    }
}

#[test]
fn a_job_that_nobody_can_finish_ends_with_a_reason() {
    for bad in [Dead, Slow, Faulting, Declining, Withholder] {
        for replicas in 1..=2 {
            let report = run(&Setup::new(1, &[bad; 3], 5, replicas));
            for verdict in report.verdicts.values() {
                assert!(!verdict.kind.is_verified() || bad == Withholder, "{bad:?} {verdict:?}");
                if let VerdictKind::Failed(reason) = &verdict.kind {
                    assert!(!reason.is_empty());
                }
            }
        }
    }
}

#[test]
fn a_kill_at_any_act_loses_no_acknowledged_job_and_gives_no_second_verdict() {
    for replicas in 1..=2 {
        let setup = Setup::new(7, &[Honest, Honest, Wrong(1_000), Honest], 8, replicas);
        let acts = run(&setup).acts;
        assert!(acts > 50);
        for kill_at in 0..acts {
            let report = run(&Setup { kill_at: Some(kill_at), ..setup.clone() });
            assert_eq!(report.verified(), 8, "killed at {kill_at}");
        }
    }
}

#[test]
fn lost_doubled_and_overtaking_messages_break_no_promise() {
    for seed in 0..60 {
        let mut setup = Setup::new(seed, &[Honest, Honest, Wrong(300), Copier, Honest, Slow], 40, 1 + (seed % 3) as u8);
        setup.weather = Weather { lost: 100, doubled: 200, delay_us: 30_000, churn: 100 };
        setup.kill_at = (seed % 2 == 0).then_some(seed * 9);
        let report = run(&setup);
        assert!(!report.verdicts.is_empty());
    }
}

#[test]
fn equal_setups_give_equal_runs() {
    let mut setup = Setup::new(3, &[Honest, Wrong(200), Colluder, Colluder, Slow, Honest], 50, 2);
    setup.weather = Weather { lost: 50, doubled: 50, delay_us: 10_000, churn: 50 };
    let (one, two) = (run(&setup), run(&setup));
    assert_eq!(one.verdicts, two.verdicts);
    assert_eq!((one.acts, one.parts, one.offences), (two.acts, two.parts, two.offences));
}

fn behaviour() -> impl Strategy<Value = Behaviour> {
    prop_oneof![
        4 => Just(Honest),
        1 => (0..=1_000_u32).prop_map(Wrong),
        1 => (0..20_u32).prop_map(TrustThenWrong),
        1 => Just(Copier),
        1 => Just(Withholder),
        1 => Just(Colluder),
        1 => Just(Dead),
        1 => Just(Slow),
        1 => Just(Faulting),
        1 => Just(Declining),
        1 => Just(Replayer),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// The invariants of the module, in any company and weather.
    #[test]
    fn every_job_ends_in_any_company(
        seed in any::<u64>(),
        miners in proptest::collection::vec(behaviour(), 1..8),
        replicas in 1..=4_u8,
        jobs in 1..30_u64,
        lost in 0..300_u32,
        doubled in 0..300_u32,
        churn in 0..300_u32,
        delay_us in 100..100_000_u64,
        kill_at in proptest::option::of(0..500_u64),
    ) {
        let mut setup = Setup::new(seed, &miners, jobs, replicas);
        setup.weather = Weather { lost, doubled, delay_us, churn };
        setup.kill_at = kill_at;
        run(&setup);
    }
}
