//! Which offers are taken. Pure: facts in, a decision out; every refusal names the setting that made it.

use std::time::Duration;

use sundara_proto::cert::Roles;
use sundara_proto::crypto::Network;
use sundara_proto::job::{JobSpec, Limits, Program};
use sundara_proto::pb::{self, declined::Reason};
use sundara_proto::units::UnixMillis;
use sundara_proto::wire::limit;

use super::MinerConfig;
use crate::net::PeerIdentity;

/// Why an offer is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Decline {
    pub(super) reason: Reason,
    /// For the validator's operator and this one's.
    pub(super) detail: String,
}

impl Decline {
    fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }

    /// The offer is none.
    pub(super) fn malformed(what: &str) -> Self {
        Self::new(Reason::Malformed, what)
    }
}

/// Whether a model's publisher may use this miner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PublisherAllowed {
    /// Yes, or nobody is asked.
    Yes,
    /// No.
    No,
    /// Not known yet; it is being found out.
    Unknown,
}

/// What is known of an offer and of this node.
pub(super) struct Facts<'a> {
    pub(super) now: UnixMillis,
    pub(super) network: Network,
    pub(super) peer: PeerIdentity,
    pub(super) offer: &'a pb::Offer,
    pub(super) spec: &'a JobSpec,
    /// Most that a job may ask for.
    pub(super) limits: &'a Limits,
    /// Attempt of this job and validator that was taken before.
    pub(super) known_attempt: Option<u32>,
    pub(super) shutting_down: bool,
    pub(super) disk_low: bool,
    pub(super) reveals_full: bool,
    pub(super) publisher_allowed: PublisherAllowed,
}

/// Takes an offer or says why not. Room at the executors is looked at afterwards.
pub(super) fn decide(config: &MinerConfig, facts: &Facts<'_>) -> Result<(), Decline> {
    admitted(config, facts)?;
    well_formed(facts)?;
    if facts.shutting_down {
        return Err(Decline::new(Reason::ShuttingDown, "this miner finishes its jobs and stops"));
    }
    if facts.known_attempt.is_some_and(|known| known >= facts.offer.attempt) {
        return Err(Decline::new(Reason::Duplicate, "this attempt, or a later one, was offered before"));
    }
    in_time(facts)?;
    within_limits(config, facts)?;
    wanted(config, facts)?;
    if facts.disk_low {
        let text = format!("less than miner.free_disk_min = {} is free on disk", config.free_disk_min);
        return Err(Decline::new(Reason::DiskFull, text));
    }
    if facts.offer.commit_reveal && facts.reveals_full {
        return Err(Decline::new(Reason::Busy, "too many results wait for their reveal"));
    }
    Ok(())
}

fn admitted(config: &MinerConfig, facts: &Facts<'_>) -> Result<(), Decline> {
    let peer = &facts.peer;
    let refuse = |text: &str| Err(Decline::new(Reason::NotAdmitted, text));
    if !peer.roles.contains(Roles::VALIDATOR) {
        return refuse("the sender's certificate does not name it a validator");
    }
    if config.deny_validators.contains(&peer.hotkey) {
        return refuse("the validator is in miner.deny_validators");
    }
    if !config.validators.is_empty() && !config.validators.contains(&peer.hotkey) {
        return refuse("the validator is not in miner.validators");
    }
    Ok(())
}

fn well_formed(facts: &Facts<'_>) -> Result<(), Decline> {
    let offer = facts.offer;
    if offer.validator.as_ref() != facts.peer.hotkey.as_ref() {
        return Err(Decline::malformed("the offer names another validator than its sender"));
    }
    if facts.spec.network != facts.network {
        return Err(Decline::malformed("the job is of another mesh"));
    }
    let inline = offer.inline_input.as_ref();
    if inline.is_some_and(|input| input.len() > limit::INLINE || input.len() as u64 != facts.spec.input_len.0) {
        return Err(Decline::malformed("the inline input has not the length that the job names, or is too long"));
    }
    Ok(())
}

fn in_time(facts: &Facts<'_>) -> Result<(), Decline> {
    let late = facts.spec.not_after.plus(UnixMillis::SKEW_MAX) < facts.now;
    if late {
        return Err(Decline::new(Reason::Expired, "the job's not_after has passed; if not, compare the clocks"));
    }
    if Duration::from_millis(facts.offer.deadline_ms).is_zero() {
        return Err(Decline::new(Reason::Expired, "the offer leaves no time"));
    }
    Ok(())
}

fn within_limits(config: &MinerConfig, facts: &Facts<'_>) -> Result<(), Decline> {
    let (asked, allowed) = (&facts.spec.limits, facts.limits);
    // Wall time is no part of a result: a job that wants more gets what there is.
    for (what, asked, allowed) in [
        ("fuel", asked.fuel, allowed.fuel),
        ("memory", asked.memory.0, allowed.memory.0),
        ("output", asked.output.0, allowed.output.0),
    ] {
        if asked > allowed {
            let text = format!("{what} limit {asked} is above executor.limits.{what} = {allowed}");
            return Err(Decline::new(Reason::LimitsTooHigh, text));
        }
    }
    if facts.spec.input_len > config.input_max {
        let text = format!("input of {} is above miner.input_max = {}", facts.spec.input_len, config.input_max);
        return Err(Decline::new(Reason::LimitsTooHigh, text));
    }
    Ok(())
}

fn wanted(config: &MinerConfig, facts: &Facts<'_>) -> Result<(), Decline> {
    if matches!(facts.spec.program, Program::Builtin { .. }) && !config.builtin_jobs {
        return Err(Decline::new(Reason::Unsupported, "miner.builtin_jobs is false"));
    }
    match facts.publisher_allowed {
        PublisherAllowed::Yes => Ok(()),
        PublisherAllowed::No => {
            Err(Decline::new(Reason::PublisherNotAllowed, "the model's publisher is not in miner.publishers"))
        }
        PublisherAllowed::Unknown => {
            let text = "it is not known yet whether one of miner.publishers published the model: offer it again";
            Err(Decline::new(Reason::PublisherNotAllowed, text))
        }
    }
}
