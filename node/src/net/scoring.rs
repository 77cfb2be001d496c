//! How gossip peers are scored. Every number is from verification.md, "Peers and trust".
//!
//! rust-libp2p's defaults reach +1,800 after 3.6 s in the mesh, so that bad messages hardly count; here all that a peer
//! can earn is about 60, and one invalid message costs 150.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use libp2p::gossipsub::{PeerScoreParams, PeerScoreThresholds, TopicHash, TopicScoreParams, score_parameter_decay};

use super::Standing;

/// Application score of a peer without a valid certificate: below the graylist threshold by itself.
pub(super) const UNCERTIFIED: f64 = -100.0;
/// Below it a peer is not listened to.
pub(super) const GRAYLIST: f64 = -80.0;

/// Thresholds: gossip, publish, graylist.
pub(super) fn thresholds() -> PeerScoreThresholds {
    PeerScoreThresholds {
        gossip_threshold: -10.0,
        publish_threshold: -50.0,
        graylist_threshold: GRAYLIST,
        ..PeerScoreThresholds::default()
    }
}

/// Parameters for all topics.
pub(super) fn parameters(topics: impl Iterator<Item = TopicHash>) -> PeerScoreParams {
    PeerScoreParams {
        topics: topics.map(|topic| (topic, topic_parameters())).collect::<HashMap<_, _>>(),
        topic_score_cap: 20.0,
        // P5: the score that this node sets itself, see `standing`.
        app_specific_weight: 1.0,
        // P6. Loopback is left out: 50 nodes on one address would score -11,045.
        ip_colocation_factor_weight: -5.0,
        ip_colocation_factor_threshold: 3.0,
        ip_colocation_factor_whitelist: HashSet::from([
            IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(Ipv6Addr::LOCALHOST),
        ]),
        // P7.
        behaviour_penalty_weight: -10.0,
        behaviour_penalty_threshold: 0.0,
        behaviour_penalty_decay: 0.2,
        decay_interval: Duration::from_secs(1),
        decay_to_zero: 0.1,
        retain_score: Duration::from_secs(3600),
        ..PeerScoreParams::default()
    }
}

fn topic_parameters() -> TopicScoreParams {
    TopicScoreParams {
        topic_weight: 0.5,
        // P1: time in mesh.
        time_in_mesh_weight: 0.03,
        time_in_mesh_quantum: Duration::from_secs(12),
        time_in_mesh_cap: 300.0,
        // P2: first deliveries.
        first_message_deliveries_weight: 1.0,
        first_message_deliveries_decay: score_parameter_decay(Duration::from_secs(5 * 60)),
        first_message_deliveries_cap: 30.0,
        // P3 and P3b: off, since topics of few messages would punish honest silence.
        mesh_message_deliveries_weight: 0.0,
        mesh_failure_penalty_weight: 0.0,
        // P4: invalid messages.
        invalid_message_deliveries_weight: -300.0,
        invalid_message_deliveries_decay: score_parameter_decay(Duration::from_secs(3600)),
        ..TopicScoreParams::default()
    }
}

/// P5 of a certified peer: stake and trust count where the ledger knows its hotkey; others are neutral.
pub(super) fn standing(standing: Option<&Standing>) -> f64 {
    standing.map_or(0.0, |s| {
        let stake = (10.0 * (1.0 + s.stake.max(0.0)).log10()).min(30.0);
        stake + 20.0 * (s.trust.clamp(0.0, 1.0) - 0.5)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn libp2p_takes_the_parameters() {
        let topic = TopicHash::from_raw("t");
        parameters(std::iter::once(topic)).validate().unwrap();
        thresholds().validate().unwrap();
    }

    #[test]
    fn one_invalid_message_outweighs_all_that_a_peer_can_earn() {
        let topic = topic_parameters();
        let earned = topic.time_in_mesh_weight * topic.time_in_mesh_cap
            + topic.first_message_deliveries_weight * topic.first_message_deliveries_cap;
        let best = (topic.topic_weight * earned).min(20.0);
        let stake = standing(Some(&Standing { stake: 1e12, trust: 1.0, owner: None }));
        assert_eq!(stake, 40.0);
        assert!(best + stake + topic.topic_weight * topic.invalid_message_deliveries_weight < GRAYLIST);
        assert_eq!(standing(None), 0.0);
    }
}
