//! Whose jobs are taken, and how many.
//!
//! **Owns** the list of clients and each one's limits of rate and concurrency. **Does not own** what a job may ask for
//! (limits, dates, environments): intake and the job machine check those.
//!
//! **Invariants**: a job counts once however often it is submitted; it counts until [`Admission::release`]; what is
//! remembered is bounded by [`AdmissionConfig`].

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sundara_proto::crypto::Signed;
use sundara_proto::id::{Hotkey, JobId};
use sundara_proto::job::JobSpec;

use super::Now;

/// What one requester may do.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientLimits {
    /// Jobs a second over time; 0 admits none.
    pub jobs_per_s: u32,
    /// Jobs at once after a pause, on top of the rate.
    pub burst: u32,
    /// Jobs without a verdict.
    pub concurrent: u32,
}

/// Who may submit: section `intake.admission` of the configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdmissionConfig {
    /// Limits of each requester that is not listed; absent turns them away.
    pub anyone: Option<ClientLimits>,
    /// Limits by hotkey.
    pub clients: BTreeMap<Hotkey, ClientLimits>,
    /// Requesters remembered at once, about 100 bytes each.
    pub requesters_max: usize,
    /// Jobs without a verdict, of all requesters together.
    pub concurrent_max: usize,
}

impl Default for AdmissionConfig {
    /// Anyone, each with up to half of the jobs that a validator holds (`dispatch.live_max`).
    fn default() -> Self {
        Self {
            anyone: Some(ClientLimits { jobs_per_s: 5_000, burst: 5_000, concurrent: 5_000 }),
            clients: BTreeMap::new(),
            requesters_max: 65_536,
            concurrent_max: 20_000,
        }
    }
}

/// The answer to a submission.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// Taken; release the job when it has its verdict or is refused later.
    Admitted,
    /// Taken before, and still counted: not to be released for this submission.
    Known,
    /// Not taken.
    Refused {
        /// Names the setting to change.
        reason: String,
        /// Later, or at another validator, it may be.
        retryable: bool,
    },
}

#[derive(Clone, Copy, Debug, Default)]
struct Requester {
    /// When the next job would be due if jobs came evenly (the generic cell rate algorithm): the whole state of a rate
    /// limit in one number.
    due: Duration,
    running: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Admission {
    config: AdmissionConfig,
    requesters: HashMap<Hotkey, Requester>,
    jobs: HashMap<JobId, Hotkey>,
}

impl Admission {
    /// Nobody has submitted anything.
    pub fn new(config: AdmissionConfig) -> Self {
        Self { config, requesters: HashMap::new(), jobs: HashMap::new() }
    }

    /// Jobs that count now.
    pub fn running(&self) -> usize {
        self.jobs.len()
    }

    /// Admits a job whose signature was verified, or says why not.
    pub fn admit(&mut self, spec: &Signed<JobSpec>, job: JobId, now: Now) -> Verdict {
        self.admit_from(spec.requester(), job, now)
    }

    fn admit_from(&mut self, hotkey: Hotkey, job: JobId, now: Now) -> Verdict {
        let refused = |reason| Verdict::Refused { reason, retryable: true };
        if self.jobs.contains_key(&job) {
            return Verdict::Known;
        }
        let listed = self.config.clients.get(&hotkey).copied();
        let setting = if listed.is_some() { "intake.admission.clients" } else { "intake.admission.anyone" };
        let Some(limits) = listed.or(self.config.anyone) else {
            return refused(format!("{hotkey} is no client of this validator: intake.admission.clients, or .anyone"));
        };
        if self.jobs.len() >= self.config.concurrent_max {
            let max = self.config.concurrent_max;
            return refused(format!("{max} jobs are running for all requesters: intake.admission.concurrent_max"));
        }
        if !self.make_room(&hotkey, now.mono) {
            let max = self.config.requesters_max;
            return refused(format!("{max} requesters are active: intake.admission.requesters_max"));
        }
        let requester = self.requesters.entry(hotkey).or_default();
        if requester.running >= limits.concurrent {
            return refused(format!("{} of your jobs are running: {setting}.concurrent", requester.running));
        }
        let Some(interval) = Duration::from_secs(1).checked_div(limits.jobs_per_s) else {
            return refused(format!("no jobs are taken from you: {setting}.jobs_per_s is 0"));
        };
        let ahead = requester.due.saturating_sub(now.mono);
        let allowed = interval.saturating_mul(limits.burst.saturating_sub(1));
        if ahead > allowed {
            let wait_ms = (ahead - allowed).as_millis() + 1;
            return refused(format!(
                "more than {} jobs a second: {setting}.jobs_per_s; again in {wait_ms} ms",
                limits.jobs_per_s
            ));
        }
        requester.due = requester.due.max(now.mono) + interval;
        requester.running += 1;
        self.jobs.insert(job, hotkey);
        Verdict::Admitted
    }

    /// A job has its verdict, or was not taken after all. Does nothing for a job that does not count.
    pub fn release(&mut self, job: &JobId) {
        let Some(hotkey) = self.jobs.remove(job) else { return };
        if let Some(requester) = self.requesters.get_mut(&hotkey) {
            requester.running = requester.running.saturating_sub(1);
        }
    }

    /// Whether another requester can be remembered. Idle ones are forgotten first: they are as good as new.
    fn make_room(&mut self, hotkey: &Hotkey, now: Duration) -> bool {
        if self.requesters.len() < self.config.requesters_max || self.requesters.contains_key(hotkey) {
            return true;
        }
        self.requesters.retain(|_, requester| requester.running > 0 || requester.due > now);
        self.requesters.len() < self.config.requesters_max
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use sundara_proto::units::UnixMillis;

    fn at(ms: u64) -> Now {
        Now { mono: Duration::from_millis(ms), wall: UnixMillis(ms) }
    }

    fn job(n: u64) -> JobId {
        let mut id = [0; 32];
        id[..8].copy_from_slice(&n.to_le_bytes());
        JobId(id)
    }

    fn config(jobs_per_s: u32, burst: u32, concurrent: u32) -> AdmissionConfig {
        AdmissionConfig { anyone: Some(ClientLimits { jobs_per_s, burst, concurrent }), ..Default::default() }
    }

    fn refusal(verdict: Verdict) -> Option<String> {
        match verdict {
            Verdict::Admitted | Verdict::Known => None,
            Verdict::Refused { reason, .. } => Some(reason),
        }
    }

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let mut admission = Admission::new(config(10, 5, 1_000));
        let client = Hotkey([1; 32]);
        let mut admitted = |from: u64, n: u64, ms: u64| {
            (from..from + n).filter(|i| admission.admit_from(client, job(*i), at(ms)) == Verdict::Admitted).count()
        };
        assert_eq!(admitted(0, 100, 1_000), 5);
        assert_eq!(admitted(100, 100, 1_100), 1);
        // Ten seconds in steps of 10 ms: ten a second and no more.
        let over_time: usize = (1..=1_000).map(|step| admitted(1_000 + step * 2, 2, 1_100 + step * 10)).sum();
        assert_eq!(over_time, 100);
        // A long pause saves up a burst, not more.
        assert_eq!(admitted(9_000, 100, 1_000_000), 5);
    }

    #[test]
    fn a_job_counts_once_until_it_is_released() {
        let mut admission = Admission::new(config(1_000, 1_000, 2));
        let client = Hotkey([1; 32]);
        assert_eq!(admission.admit_from(client, job(1), at(1)), Verdict::Admitted);
        for _ in 0..3 {
            assert_eq!(admission.admit_from(client, job(1), at(1)), Verdict::Known);
        }
        assert_eq!(admission.admit_from(client, job(2), at(1)), Verdict::Admitted);
        let why = refusal(admission.admit_from(client, job(3), at(1))).unwrap();
        assert!(why.contains("intake.admission.anyone.concurrent"), "{why}");
        assert_eq!(admission.admit_from(Hotkey([2; 32]), job(3), at(1)), Verdict::Admitted, "others have their own");
        admission.release(&job(1));
        admission.release(&job(1));
        assert_eq!(admission.admit_from(client, job(4), at(1)), Verdict::Admitted);
        assert!(refusal(admission.admit_from(client, job(5), at(1))).is_some());
        assert_eq!(admission.running(), 3);
    }

    #[test]
    fn a_list_turns_others_away_and_has_limits_of_its_own() {
        let friend = Hotkey([1; 32]);
        let clients = BTreeMap::from([(friend, ClientLimits { jobs_per_s: 1, burst: 1, concurrent: 9 })]);
        let mut admission = Admission::new(AdmissionConfig { anyone: None, clients, ..Default::default() });
        assert!(refusal(admission.admit_from(Hotkey([2; 32]), job(1), at(1))).unwrap().contains("no client"));
        assert_eq!(admission.admit_from(friend, job(2), at(1)), Verdict::Admitted);
        assert!(refusal(admission.admit_from(friend, job(3), at(1))).unwrap().contains("clients.jobs_per_s"));
        let mut none = Admission::new(config(0, 1, 1));
        assert!(refusal(none.admit_from(friend, job(1), at(1))).unwrap().contains("jobs_per_s is 0"));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let limits = AdmissionConfig { requesters_max: 10, concurrent_max: 12, ..config(1, 1, 9) };
        let mut admission = Admission::new(limits);
        for n in 0..10_u8 {
            assert_eq!(admission.admit_from(Hotkey([n; 32]), job(n.into()), at(1)), Verdict::Admitted);
        }
        assert!(refusal(admission.admit_from(Hotkey([99; 32]), job(99), at(1))).unwrap().contains("requesters_max"));
        admission.release(&job(0));
        // Its rate is not paid back yet, so it is remembered; a second later it is as good as new.
        assert!(refusal(admission.admit_from(Hotkey([99; 32]), job(99), at(2))).is_some());
        assert_eq!(admission.admit_from(Hotkey([99; 32]), job(99), at(5_000)), Verdict::Admitted);
        assert_eq!(admission.requesters.len(), 10);
    }
}
