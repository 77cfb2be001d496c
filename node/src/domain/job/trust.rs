//! What the machine knows of miners' honesty.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sundara_proto::id::{EnvId, Hotkey};
use sundara_proto::units::UnixMillis;

use super::io::Offence;
use super::record::{CleanRecord, MinerRecord};
use crate::domain::audit::{HeldPay, Observation, Suspicion};
use crate::domain::schedule::MinerView;

#[derive(Debug, Default)]
pub(super) struct Trust {
    pub(super) suspicion: Suspicion,
    pub(super) held: HeldPay,
    pub(super) dropped_until: UnixMillis,
    pub(super) reason: String,
    pub(super) offences: u32,
    /// Failures in a row that prove nothing.
    pub(super) strikes: u32,
}

/// What a validator knows of a miner, for people.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct KnownMiner {
    /// How scheduling sees it; `None` where its advert was never heard or has lapsed.
    pub view: Option<MinerView>,
    /// Logarithm of the likelihood ratio of cheat to honest.
    pub suspicion: f64,
    /// Failures in a row that prove nothing.
    pub strikes: u32,
    /// Offences recorded.
    pub offences: u32,
    /// Not scheduled before, for an offence; unix milliseconds.
    pub dropped_until_ms: u64,
    /// Why.
    pub reason: String,
}

impl KnownMiner {
    pub(super) fn of(view: Option<MinerView>, trust: Option<&Trust>) -> Option<Self> {
        let new = Trust::default();
        let trust = trust.or_else(|| view.is_some().then_some(&new))?;
        Some(Self {
            suspicion: trust.suspicion.value(),
            strikes: trust.strikes,
            offences: trust.offences,
            dropped_until_ms: trust.dropped_until.0,
            reason: trust.reason.clone(),
            view,
        })
    }
}

/// Trust in every miner that took part in a job, and clean audits of each in each environment.
#[derive(Debug)]
pub(super) struct TrustBook {
    miners: HashMap<Hotkey, Trust>,
    miners_max: usize,
    clean: HashMap<(Hotkey, EnvId), u32>,
    /// In order of first use.
    clean_order: VecDeque<(Hotkey, EnvId)>,
    clean_max: usize,
}

impl TrustBook {
    pub(super) fn new(miners_max: usize, clean_max: usize) -> Self {
        Self {
            miners: HashMap::new(),
            miners_max: miners_max.max(1),
            clean: HashMap::new(),
            clean_order: VecDeque::new(),
            clean_max: clean_max.max(1),
        }
    }

    pub(super) fn get(&self, miner: &Hotkey) -> Option<&Trust> {
        self.miners.get(miner)
    }

    /// The entry of a miner, made if need be. A full book forgets everyone that has nothing against it; where all have,
    /// the one whose time off ends first.
    pub(super) fn entry(&mut self, miner: Hotkey, now: UnixMillis) -> &mut Trust {
        if self.miners.len() >= self.miners_max && !self.miners.contains_key(&miner) {
            self.miners.retain(|_, trust| trust.dropped_until > now);
            let first = self.miners.iter().min_by_key(|(hotkey, trust)| (trust.dropped_until, **hotkey));
            if self.miners.len() >= self.miners_max
                && let Some(first) = first.map(|(hotkey, _)| *hotkey)
            {
                self.miners.remove(&first);
            }
        }
        self.miners.entry(miner).or_default()
    }

    pub(super) fn clean(&self, miner: &Hotkey, env_id: &EnvId) -> u32 {
        self.clean.get(&(*miner, *env_id)).copied().unwrap_or(0)
    }

    pub(super) fn set_clean(&mut self, record: CleanRecord) {
        let key = (record.miner, record.env_id);
        if self.clean.insert(key, record.clean).is_none() {
            self.clean_order.push_back(key);
            if self.clean_order.len() > self.clean_max
                && let Some(oldest) = self.clean_order.pop_front()
            {
                self.clean.remove(&oldest);
            }
        }
    }

    pub(super) fn restore(&mut self, record: &MinerRecord, now: UnixMillis) {
        let Some(miner) = record.hotkey() else { return };
        let trust = self.entry(miner, now);
        trust.suspicion = Suspicion::restored(record.suspicion);
        trust.dropped_until = UnixMillis(record.dropped_until_ms);
        trust.reason.clone_from(&record.reason);
        trust.offences = record.offences;
    }

    pub(super) fn record(&self, miner: &Hotkey) -> MinerRecord {
        let default = Trust::default();
        let trust = self.miners.get(miner).unwrap_or(&default);
        MinerRecord {
            miner: Bytes::copy_from_slice(miner.as_ref()),
            suspicion: trust.suspicion.value(),
            dropped_until_ms: trust.dropped_until.0,
            reason: trust.reason.clone(),
            offences: trust.offences,
        }
    }

    /// Notes a reveal that a broken connection cost; `true` when that was one too many.
    pub(super) fn withheld_by_loss(&mut self, miner: Hotkey, now: UnixMillis) -> bool {
        self.entry(miner, now).suspicion.observe(Observation::Withheld)
    }

    /// Notes an offence; returns until when the miner is off.
    pub(super) fn offend(
        &mut self,
        miner: Hotkey,
        offence: Offence,
        off: &TimeOff,
        reason: &str,
        now: UnixMillis,
    ) -> UnixMillis {
        let trust = self.entry(miner, now);
        let banned = trust.suspicion.observe(match offence {
            Offence::Withheld => Observation::Withheld,
            Offence::WrongResult | Offence::BrokenCommitment | Offence::ForeignAttestation => Observation::Proven,
        });
        trust.held.forfeit();
        trust.offences = trust.offences.saturating_add(1);
        let until = now.plus(if banned { off.ban } else { off.drop });
        trust.dropped_until = trust.dropped_until.max(until);
        reason.clone_into(&mut trust.reason);
        trust.dropped_until
    }
}

/// How long a miner is off after an offence.
#[derive(Clone, Copy, Debug)]
pub(super) struct TimeOff {
    pub(super) drop: Duration,
    pub(super) ban: Duration,
}
