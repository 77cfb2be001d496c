//! Map-reduce through real nodes on loopback: members, reducers, and what happens when some of them die, stall or lie.

#![allow(clippy::unwrap_used)]

#[path = "reduce/kit.rs"]
mod kit;

use kit::{Mesh, random, within};
use sundara_node::rounds::{Compress, Group, GroupSpec, JoinError, Lie, Mode, Op, Pass, Reducers, Topology};

/// The sum of the members' tensors, added in f64.
fn sum(tensors: &[Vec<f32>]) -> Vec<f64> {
    (0..tensors[0].len()).map(|i| tensors.iter().map(|t| f64::from(t[i])).sum()).collect()
}

/// Largest difference relative to the sum of the members' norms.
fn error(got: &[f32], wanted: &[f64], tensors: &[Vec<f32>]) -> f64 {
    let norm = |t: &[f32]| t.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let all: f64 = tensors.iter().map(|t| norm(t)).sum();
    let difference: f64 = got.iter().zip(wanted).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt();
    difference / all
}

#[tokio::test(flavor = "multi_thread")]
async fn members_get_the_verified_sum_through_reducers() {
    within(async {
        let mesh = Mesh::start(4, 4).await;
        let groups = mesh.group("sum", |_| {}).await;
        for (round, len) in [300_001, 1, 4_096, 70_000].into_iter().enumerate() {
            let tensors: Vec<Vec<f32>> = (0..4).map(|m| random(round as u64 * 10 + m, len)).collect();
            let calls = groups.iter().zip(&tensors).map(|(g, t)| g.all_reduce(t.clone(), Op::Sum));
            let results = futures::future::try_join_all(calls).await.unwrap();
            let results: Vec<Vec<f32>> = results.into_iter().map(|t| t.into_f32().unwrap()).collect();
            assert!(results.iter().all(|r| *r == results[0]), "members differ");
            let error = error(&results[0], &sum(&tensors), &tensors);
            assert!(error <= 6e-7, "{error}");
        }
        mesh.shutdown().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_mode_operation_and_type_comes_out_right() {
    within(async {
        let mesh = Mesh::start(3, 2).await;
        let exact = mesh.group("exact", |spec| spec.settings.mode = Mode::Exact).await;
        let off = mesh.group("off", |spec| spec.settings.mode = Mode::Off).await;
        let butterfly = mesh.group("butterfly", |spec| spec.settings.topology = Topology::Butterfly).await;
        let tensors: Vec<Vec<f32>> = (0..3).map(|m| random(m, 9_001)).collect();
        // In rank order, in the type of the elements: bit by bit.
        let in_order: Vec<f32> = (0..9_001).map(|i| tensors[0][i] + tensors[1][i] + tensors[2][i]).collect();
        let least: Vec<f32> = (0..9_001).map(|i| tensors[0][i].min(tensors[1][i]).min(tensors[2][i])).collect();
        for groups in [&exact, &off] {
            assert_eq!(all_reduce(groups, &tensors, Op::Sum).await, in_order);
            assert_eq!(all_reduce(groups, &tensors, Op::Min).await, least);
        }
        assert_eq!(all_reduce(&butterfly, &tensors, Op::Min).await, least, "exact where tags cannot help");
        let got = all_reduce(&butterfly, &tensors, Op::Sum).await;
        assert!(error(&got, &sum(&tensors), &tensors) <= 6e-7);
        let ints: Vec<Vec<i64>> = (0..3).map(|m| (0..500).map(|i| i * (m - 1)).collect()).collect();
        let calls = exact.iter().zip(&ints).map(|(g, t)| g.all_reduce(t.clone(), Op::Max));
        for result in futures::future::try_join_all(calls).await.unwrap() {
            assert_eq!(result.into_i64().unwrap(), (0..500).collect::<Vec<i64>>());
        }
        let medians = all_reduce(&exact, &tensors, Op::Median).await;
        assert!((0..9_001).all(|i| tensors.iter().filter(|t| t[i] <= medians[i]).count() == 2));
        mesh.shutdown().await;
    })
    .await;
}

async fn all_reduce(groups: &[sundara_node::rounds::Group], tensors: &[Vec<f32>], op: Op) -> Vec<f32> {
    let calls = groups.iter().zip(tensors).map(|(g, t)| g.all_reduce(t.clone(), op));
    let results = futures::future::try_join_all(calls).await.unwrap();
    let results: Vec<Vec<f32>> = results.into_iter().map(|t| t.into_f32().unwrap()).collect();
    assert!(results.iter().all(|r| *r == results[0]), "members differ");
    results.into_iter().next().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn tensors_are_broadcast_reduced_gathered_and_waited_for() {
    within(async {
        let mesh = Mesh::start(3, 2).await;
        let groups = mesh.group("all", |_| {}).await;
        let wanted = random(7, 30_000);
        let copies = groups.iter().map(|g| {
            let own = if g.rank() == 1 { wanted.clone() } else { vec![0.0; 30_000] };
            g.broadcast(own, 1)
        });
        for copy in futures::future::try_join_all(copies).await.unwrap() {
            assert_eq!(copy.into_f32().unwrap(), wanted);
        }
        let sums = groups.iter().map(|g| g.reduce(vec![i32::from(g.rank()) + 1; 10], 2));
        let sums = futures::future::try_join_all(sums).await.unwrap();
        assert_eq!(sums.iter().map(Option::is_some).collect::<Vec<_>>(), [false, false, true]);
        assert_eq!(sums[2].clone().unwrap().into_i32().unwrap(), vec![6; 10]);
        let all = groups.iter().map(|g| g.all_gather(vec![f64::from(g.rank()); 5]));
        for gathered in futures::future::try_join_all(all).await.unwrap() {
            let gathered: Vec<Vec<f64>> = gathered.into_iter().map(|t| t.into_f64().unwrap()).collect();
            assert_eq!(gathered, [vec![0.0; 5], vec![1.0; 5], vec![2.0; 5]]);
        }
        futures::future::try_join_all(groups.iter().map(|g| g.barrier())).await.unwrap();
        let several = groups.iter().map(|g| {
            let tensors = vec![vec![1_i32; 3].into(), Vec::<i32>::new().into(), vec![2_i32; 5_000].into()];
            g.all_reduce_many(tensors, Op::Sum)
        });
        for outcome in futures::future::try_join_all(several).await.unwrap() {
            let tensors: Vec<Vec<i32>> = outcome.tensors.into_iter().map(|t| t.into_i32().unwrap()).collect();
            assert_eq!(tensors, [vec![3; 3], vec![], vec![6; 5_000]]);
        }
        let path = mesh.file(&[9; 1_001]);
        let files = groups.iter().map(|g| {
            let path = if g.rank() == 0 { path.clone() } else { path.with_extension(g.rank().to_string()) };
            async move { (g.broadcast_file(&path, 0).await.unwrap(), std::fs::read(&path).unwrap()) }
        });
        for (len, bytes) in futures::future::join_all(files).await {
            assert_eq!((len.0, bytes), (1_001, vec![9; 1_001]));
        }
        mesh.shutdown().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_sums_are_close_and_error_feedback_makes_up_for_the_rest() {
    within(async {
        let mesh = Mesh::start(4, 2).await;
        let tensors: Vec<Vec<f32>> = (0..4).map(|m| random(m, 20_000)).collect();
        for (compress, limit) in [(Compress::Bf16, 2e-3), (Compress::Int8, 2e-2)] {
            let name = format!("{compress:?}");
            let groups = mesh.group(&name, |spec| spec.settings.compress = compress).await;
            let wanted = sum(&tensors);
            let mut total = vec![0.0_f64; 20_000];
            let rounds = 6;
            let mut first = 0.0;
            for round in 0..rounds {
                let got = all_reduce(&groups, &tensors, Op::Sum).await;
                let off = error(&got, &wanted, &tensors);
                assert!(off <= limit, "{compress:?}: {off}");
                if round == 0 {
                    first = off;
                }
                total.iter_mut().zip(&got).for_each(|(t, g)| *t += f64::from(*g) / f64::from(rounds));
            }
            let mean: Vec<f32> = total.iter().map(|t| *t as f32).collect();
            let off = error(&mean, &wanted, &tensors);
            assert!(off < first / 2.0, "{compress:?}: the mean of {rounds} rounds is off by {off}, one by {first}");
        }
        mesh.shutdown().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tensor_that_is_no_number_fails_the_round_and_names_its_member() {
    within(async {
        let mesh = Mesh::start(3, 1).await;
        let groups = mesh.group("nan", |_| {}).await;
        let calls = groups.iter().map(|g| {
            let bad = if g.rank() == 2 { f32::NAN } else { 1.0 };
            g.all_reduce(vec![1.0, bad, 2.0], Op::Sum)
        });
        for result in futures::future::join_all(calls).await {
            let failure = result.unwrap_err();
            assert_eq!(failure.ranks, [2], "{failure}");
            assert!(failure.reason.contains("element 1 is not a number"), "{failure}");
        }
        // The next round is none the worse.
        let results = groups.iter().map(|g| g.all_reduce(vec![1.0_f32; 3], Op::Sum));
        for result in futures::future::try_join_all(results).await.unwrap() {
            assert_eq!(result.into_f32().unwrap(), [3.0; 3]);
        }
        mesh.shutdown().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reducer_that_lies_is_blamed_replaced_and_the_sum_is_right() {
    for lie in [Lie::Flip, Lie::Drop, Lie::Double, Lie::Negate, Lie::TwoSums, Lie::Stall] {
        within(async {
            let mesh = Mesh::start_with(3, 3, |_| Lie::None, |r| if r == 1 { lie } else { Lie::None }).await;
            let mut blamed: Vec<_> = mesh.members.iter().map(|m| m.rounds().blamed()).collect();
            let groups = mesh.group("liar", |_| {}).await;
            let tensors: Vec<Vec<f32>> = (0..3).map(|m| random(m, 120_000)).collect();
            let got = all_reduce(&groups, &tensors, Op::Sum).await;
            let off = error(&got, &sum(&tensors), &tensors);
            assert!(off <= 6e-7, "{lie:?}: {off}");
            let named: Vec<_> = blamed.iter_mut().filter_map(|b| b.try_recv().ok()).map(|b| b.hotkey).collect();
            let provable = lie != Lie::Stall;
            assert_eq!(named.is_empty(), !provable, "{lie:?}: {named:?}");
            assert!(named.iter().all(|h| *h == mesh.reducers[1].hotkey()), "{lie:?} blamed {named:?}");
            mesh.shutdown().await;
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_lies_in_its_tags_is_blamed_and_left_out() {
    within(async {
        let mesh = Mesh::start_with(3, 2, |m| if m == 2 { Lie::Tags } else { Lie::None }, |_| Lie::None).await;
        let mut blamed = mesh.members[0].rounds().blamed();
        let groups = mesh.group("liar", |_| {}).await;
        let tensors: Vec<Vec<f32>> = (0..3).map(|m| random(m, 50_000)).collect();
        let calls = groups.iter().zip(&tensors).map(|(g, t)| g.all_reduce(t.clone(), Op::Sum));
        let results = futures::future::join_all(calls).await;
        let honest: Vec<Vec<f32>> = results[..2].iter().map(|r| r.clone().unwrap().into_f32().unwrap()).collect();
        assert_eq!(honest[0], honest[1]);
        assert!(error(&honest[0], &sum(&tensors[..2]), &tensors[..2]) <= 6e-7);
        assert!(results[2].is_err());
        assert_eq!(blamed.recv().await.unwrap().hotkey, mesh.members[2].hotkey());
        mesh.shutdown().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reducer_that_dies_is_replaced_and_a_member_that_dies_is_left_out() {
    within(async {
        let mesh = Mesh::start(4, 3).await;
        let groups = mesh.group("deaths", |_| {}).await;
        let tensors: Vec<Vec<f32>> = (0..4).map(|m| random(m, 2_000_000)).collect();
        let calls = groups.iter().zip(&tensors).map(|(g, t)| g.all_reduce_many(vec![t.clone().into()], Op::Mean));
        let calls = futures::future::join_all(calls);
        let (results, ()) = tokio::join!(calls, mesh.reducers[0].shutdown());
        let results: Vec<Vec<f32>> =
            results.into_iter().map(|r| r.unwrap().tensors.remove(0).into_f32().unwrap()).collect();
        assert!(results.iter().all(|r| *r == results[0]));
        let mean = |t: &[Vec<f32>]| -> Vec<f64> { sum(t).iter().map(|s| s / t.len() as f64).collect() };
        assert!(error(&results[0], &mean(&tensors), &tensors) <= 6e-7);
        // A member, the leader itself.
        let calls =
            groups[1..].iter().zip(&tensors[1..]).map(|(g, t)| g.all_reduce_many(vec![t.clone().into()], Op::Mean));
        let calls = futures::future::join_all(calls);
        let (results, ()) = tokio::join!(calls, mesh.members[0].shutdown());
        for outcome in &results {
            let outcome = outcome.as_ref().unwrap();
            assert!(outcome.participants.iter().all(|p| *p == 3), "{:?}", outcome.participants);
        }
        let results: Vec<Vec<f32>> =
            results.into_iter().map(|r| r.unwrap().tensors.remove(0).into_f32().unwrap()).collect();
        assert!(results.iter().all(|r| *r == results[0]));
        assert!(error(&results[0], &mean(&tensors[1..]), &tensors[1..]) <= 6e-7);
        mesh.shutdown().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_rounds_of_several_groups_share_the_reducers() {
    within(async {
        let mesh = Mesh::start(3, 2).await;
        let (one, two) = (mesh.group("one", |_| {}).await, mesh.group("two", |_| {}).await);
        let round = |groups: &'_ [Group], factor: i32| {
            let calls: Vec<_> = groups
                .iter()
                .cloned()
                .map(|g| async move {
                    g.all_reduce(vec![factor * (i32::from(g.rank()) + 1); 20_000], Op::Sum)
                        .await
                        .unwrap()
                        .into_i32()
                        .unwrap()
                })
                .collect();
            async move {
                for result in futures::future::join_all(calls).await {
                    assert_eq!(result, vec![6 * factor; 20_000]);
                }
            }
        };
        // The calls of each member are made in one order; their rounds run side by side.
        futures::future::join_all((1..4).flat_map(|factor| [round(&one, factor), round(&two, 10 * factor)])).await;
        mesh.shutdown().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_call_harms_neither_its_round_nor_the_next() {
    within(async {
        let mesh = Mesh::start(3, 2).await;
        let groups = mesh.group("dropped", |_| {}).await;
        let tensor = random(3, 300_000);
        for round in 0..6 {
            let calls = groups.iter().enumerate().map(|(i, g)| {
                let call = g.all_reduce(tensor.clone(), Op::Mean);
                async move {
                    if i == round % 3 {
                        // Begun, and given up at some point of it.
                        let patience = std::time::Duration::from_millis(round as u64 * 7);
                        drop(tokio::time::timeout(patience, call).await);
                        return;
                    }
                    let got = call.await.unwrap().into_f32().unwrap();
                    assert!(got.iter().zip(&random(3, 300_000)).all(|(a, b)| (a - b).abs() < 1e-5));
                }
            });
            futures::future::join_all(calls).await;
        }
        mesh.shutdown().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_latecomer_is_in_the_next_round_and_fetches_the_groups_state() {
    within(async {
        let mesh = Mesh::start(3, 1).await;
        let creator = (mesh.members[0].node_id(), mesh.members[0].hotkey());
        let mut spec = GroupSpec::new("open", 2);
        spec.reducers = Reducers::Nodes(vec![mesh.reducers[0].node_id()]);
        let (host, second, late) = (mesh.members[0].rounds(), mesh.members[1].rounds(), mesh.members[2].rounds());
        let pass = host.invite("open", std::time::Duration::from_secs(60));
        let pass = Pass::from_text(&pass.to_text()).unwrap();
        let (host, second) = tokio::join!(host.create(spec.clone()), second.join(creator, "open", Some(&pass), &spec));
        let (host, second) = (host.unwrap(), second.unwrap());
        let state = vec![7_u8; 300_000];
        let sum = |a: &Group, b: &Group| {
            let (a, b) = (a.clone(), b.clone());
            async move { tokio::join!(a.all_reduce(vec![1_i32; 10], Op::Sum), b.all_reduce(vec![1_i32; 10], Op::Sum)) }
        };
        let (a, b) = sum(&host, &second).await;
        assert_eq!((a.unwrap().into_i32().unwrap()[0], b.unwrap().into_i32().unwrap()[0]), (2, 2));
        tokio::try_join!(host.share_state(state.clone()), second.share_state(state.clone())).unwrap();
        // What members say of their states travels with the next round.
        drop(sum(&host, &second).await);
        let refused = late.join(creator, "open", None, &spec).await;
        assert!(matches!(refused, Err(JoinError::Refused { .. })), "without a pass");
        let third = late.join(creator, "open", Some(&pass), &spec).await.unwrap();
        assert_eq!(third.rank(), 2);
        assert_eq!(third.fetch_state().await.unwrap().unwrap(), state);
        let (ab, c) = tokio::join!(sum(&host, &second), third.all_reduce(vec![1_i32; 10], Op::Sum));
        for result in [ab.0, ab.1, c] {
            assert_eq!(result.unwrap().into_i32().unwrap(), vec![3; 10]);
        }
        mesh.shutdown().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_rounds_under_churn_are_all_right() {
    within(async {
        let liars = |r: usize| if r == 3 { Lie::Flip } else { Lie::None };
        let mesh = Mesh::start_with(4, 4, |_| Lie::None, liars).await;
        let groups = mesh.group("churn", |_| {}).await;
        let mut live: Vec<Group> = groups.clone();
        for round in 0..50 {
            let tensors: Vec<Vec<f32>> =
                live.iter().map(|g| random(round * 10 + u64::from(g.rank()), 20_000)).collect();
            let calls = live.iter().zip(&tensors).map(|(g, t)| g.all_reduce(t.clone(), Op::Sum));
            let calls = futures::future::join_all(calls);
            let results = match round {
                // A reducer goes in mid-round.
                15 => tokio::join!(calls, mesh.reducers[0].shutdown()).0,
                _ => calls.await,
            };
            let results: Vec<Vec<f32>> = results.into_iter().map(|r| r.unwrap().into_f32().unwrap()).collect();
            assert!(results.iter().all(|r| *r == results[0]), "round {round}");
            let off = error(&results[0], &sum(&tensors), &tensors);
            assert!(off <= 6e-7, "round {round}: {off}");
            if round == 30 {
                // A member leaves between two rounds.
                mesh.members[3].shutdown().await;
                live.pop();
            }
        }
        mesh.shutdown().await;
    })
    .await;
}

/// Not a test: prints how long rounds take. `cargo test --release --test reduce -- --ignored --nocapture pace`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "prints figures"]
async fn pace_of_rounds() {
    let number = |name: &str, default: usize| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let (members, reducers, mib) = (number("MEMBERS", 4), number("REDUCERS", 4), number("MIB", 100));
    let mesh = Mesh::start(members, reducers).await;
    let groups = mesh
        .group("pace", |spec| {
            if std::env::var_os("BUTTERFLY").is_some() {
                spec.settings.topology = Topology::Butterfly;
            }
            match std::env::var("COMPRESS").as_deref() {
                Ok("bf16") => spec.settings.compress = Compress::Bf16,
                Ok("int8") => spec.settings.compress = Compress::Int8,
                _ => {}
            }
        })
        .await;
    let tensor = random(1, mib << 18);
    for round in 0..number("ROUNDS", 6) {
        let tensors: Vec<Vec<f32>> = groups.iter().map(|_| tensor.clone()).collect();
        let began = std::time::Instant::now();
        let calls = groups.iter().zip(tensors).map(|(g, t)| g.all_reduce(t, Op::Sum));
        futures::future::try_join_all(calls).await.unwrap();
        println!("round {round}: {:.3} s", began.elapsed().as_secs_f64());
    }
    mesh.shutdown().await;
}
