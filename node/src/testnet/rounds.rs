//! Verified rounds on a testnet: light nodes of their own as members, the testnet's miners as reducers.
//!
//! What each round should come to is computed here, outside the mesh, in f64.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures::future::{join, join_all, try_join_all};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use sundara_proto::id::Hotkey;
use tokio::sync::broadcast;

use super::{ASSEMBLE_WITHIN, Running, Testnet};
use crate::api::rounds::Reducers;
use crate::api::rounds::{Admission, Blamed, Group, GroupSpec, Lie, Op, RoundFailure};
use crate::api::{Node, StartError};

/// Members of the group.
const MEMBERS: usize = 4;
/// Numbers of a tensor: 0.4 MB, and no multiple of anything.
const ELEMENTS: usize = 100_003;
/// What a verified sum of f32 promises, relative to the sum of the members' norms.
const ERROR_MAX: f64 = 6e-7;
/// How byzantine miners lie in rounds, in rotation: each of these is proven in the round itself.
pub(super) const LIES: [Lie; 4] = [Lie::Flip, Lie::Drop, Lie::Double, Lie::Negate];

/// What the rounds of a testnet came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ReduceReport {
    /// Rounds that ended, well or not.
    pub rounds: u64,
    /// Seconds that they took together.
    pub wall_s: f64,
    /// Whether each gave every member the right sum, the same for all.
    pub correct: bool,
    /// Who was proven to have lied.
    pub blamed: BTreeSet<Hotkey>,
}

impl Testnet {
    /// Runs so many verified all-reduce rounds, one after another, between light nodes that it starts for them; `seen` is
    /// told after each. A round that fails counts as a wrong one.
    ///
    /// # Errors
    /// When the members do not start or do not become a group.
    pub async fn reduce(&self, rounds: u64, mut seen: impl FnMut(&ReduceReport)) -> Result<ReduceReport, StartError> {
        let members = self.start_members().await?;
        let mut blamed: Vec<_> = members.iter().map(|member| member.rounds().blamed()).collect();
        let groups = self.group(&members).await?;
        let mut report = ReduceReport { correct: true, ..ReduceReport::default() };
        for round in 0..rounds {
            let tensors: Vec<Vec<f32>> = (0..MEMBERS as u64).map(|m| numbers(round * MEMBERS as u64 + m)).collect();
            let began = Instant::now();
            let calls = groups.iter().zip(&tensors).map(|(group, tensor)| sum(group, tensor.clone()));
            let results = try_join_all(calls).await;
            report.wall_s += began.elapsed().as_secs_f64();
            report.rounds += 1;
            report.correct &= match results {
                Ok(results) => are_right(&results, &tensors),
                Err(failure) => {
                    tracing::warn!(round, %failure, "a round of the testnet failed");
                    false
                }
            };
            report.blamed.extend(blamed.iter_mut().flat_map(heard));
            seen(&report);
        }
        join_all(members.iter().map(Node::shutdown)).await;
        Ok(report)
    }

    /// Light nodes that are connected to one another and to every miner.
    async fn start_members(&self) -> Result<Vec<Node>, StartError> {
        let mut known = self.bootstrap.clone();
        for miner in &self.miners {
            match &miner.running {
                Running::Here(node) => known.extend(node.addresses().await),
                Running::Child(child) => known.extend_from_slice(child.addresses()),
            }
        }
        let mut members: Vec<Node> = Vec::new();
        for _ in 0..MEMBERS {
            let node = Node::builder().network(self.network).bootstrap(&known).loopback().start().await?;
            known.extend(node.addresses().await);
            members.push(node);
        }
        let others = self.validators.len() + self.miners.len() + MEMBERS - 1;
        let met =
            tokio::time::timeout(ASSEMBLE_WITHIN, join_all(members.iter().map(|m| m.wait_for_peers(others)))).await;
        met.map(|_| members).map_err(|_| {
            let seconds = ASSEMBLE_WITHIN.as_secs();
            StartError::Config(format!("the members of the rounds did not find the others within {seconds} s"))
        })
    }

    /// One group of all members.
    async fn group(&self, members: &[Node]) -> Result<Vec<Group>, StartError> {
        const NAME: &str = "testnet";
        let mut spec = GroupSpec::new(NAME, members.len());
        spec.min_members = members.len();
        spec.form_within = ASSEMBLE_WITHIN;
        spec.reducers = Reducers::Any(self.miners.len());
        spec.admission = Admission::Hotkeys(members.iter().map(Node::hotkey).collect());
        // A busy machine is no reason to leave a member out.
        spec.times.answer = Duration::from_secs(10);
        let Some((first, others)) = members.split_first() else { return Ok(Vec::new()) };
        let (creator, creating) = ((first.node_id(), first.hotkey()), first.rounds());
        let joining = others.iter().map(|member| {
            let (rounds, spec) = (member.rounds(), spec.clone());
            async move { rounds.join(creator, NAME, None, &spec).await }
        });
        let (created, joined) = join(creating.create(spec.clone()), try_join_all(joining)).await;
        let failed = |e: crate::api::rounds::JoinError| StartError::Config(e.to_string());
        let mut groups = vec![created.map_err(failed)?];
        groups.extend(joined.map_err(failed)?);
        Ok(groups)
    }
}

async fn sum(group: &Group, tensor: Vec<f32>) -> Result<Vec<f32>, RoundFailure> {
    let result = group.all_reduce(tensor, Op::Sum).await?;
    Ok(result.into_f32().unwrap_or_default())
}

/// Whoever was blamed since it was asked last.
fn heard(blamed: &mut broadcast::Receiver<Blamed>) -> Vec<Hotkey> {
    std::iter::from_fn(|| blamed.try_recv().ok()).map(|proven| proven.hotkey).collect()
}

/// Numbers between -1 and 1.
fn numbers(seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..ELEMENTS).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Whether all are the same, and the sum.
fn are_right(results: &[Vec<f32>], tensors: &[Vec<f32>]) -> bool {
    let Some(first) = results.first().filter(|first| first.len() == ELEMENTS) else { return false };
    let off = |i: usize| f64::from(first[i]) - tensors.iter().map(|t| f64::from(t[i])).sum::<f64>();
    let off: f64 = (0..ELEMENTS).map(|i| off(i).powi(2)).sum::<f64>().sqrt();
    let norm = |tensor: &Vec<f32>| tensor.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    results.iter().all(|result| result == first) && off <= ERROR_MAX * tensors.iter().map(norm).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_is_right_only_where_all_have_it() {
        let tensors: Vec<Vec<f32>> = (0..3).map(numbers).collect();
        let sum: Vec<f32> = (0..ELEMENTS).map(|i| tensors.iter().map(|t| t[i]).sum()).collect();
        assert!(are_right(&[sum.clone(), sum.clone()], &tensors));
        let mut other = sum.clone();
        other[7] += 0.5;
        assert!(!are_right(&[sum.clone(), other.clone()], &tensors));
        assert!(!are_right(&[other.clone(), other], &tensors));
        assert!(!are_right(&[sum[1..].to_vec()], &tensors) && !are_right(&[], &tensors));
    }
}
