//! The world: clock, network, store, requesters, and the validator under test.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use sundara_proto::id::{BlobId, Digest, EnvId, Hotkey, JobId};
use sundara_proto::units::UnixMillis;
use sundara_proto::verdict::{Standing, Verdict};

use super::miner::{Luck, Miner, right};
use super::{Behaviour, Setup};
use crate::domain::Now;
use crate::domain::audit::{EpochSecret, FLOOR, recheck};
use crate::domain::job::testing::{attestation, engine, env_id, hotkey, profile, spec, submission_of, unsigned};
use crate::domain::job::{
    AuditResult, CleanRecord, Input, JobMachine, JobRecord, MinerRecord, Offence, Output, Part, Submission,
};
use crate::domain::schedule::MinerProfile;

/// Jobs at once at one miner.
const SLOTS: u32 = 4;
/// Until when jobs may begin, from the start of the run.
const NOT_AFTER_MS: u64 = 3_000_000;
/// By then everything must have ended, whatever the miners do.
const END_US: u64 = 20_000_000_000;

/// What happens at a moment.
enum Event {
    /// A requester submits its n-th job (again).
    Submit(u64),
    /// A message reaches the validator, if it still is the process that it was meant for.
    ToValidator(u32, Box<Input>),
    /// A message reaches a miner.
    ToMiner(Box<Output>),
    /// The validator's timer, set by that process.
    Timer(u32),
    /// The validator starts again.
    Restart,
    Down(usize),
    Up(usize),
    /// The weather looks for someone to cut off.
    Churn,
    /// Adverts are sent anew.
    Adverts,
}

/// What survives a kill.
#[derive(Default)]
struct Disk {
    jobs: BTreeMap<JobId, Vec<u8>>,
    miners: BTreeMap<Hotkey, Vec<u8>>,
    clean: BTreeMap<(Hotkey, EnvId), u32>,
    verdicts: BTreeMap<JobId, Verdict>,
}

/// What a run came to.
#[derive(Default)]
pub(crate) struct Report {
    /// What requesters were told.
    pub(crate) verdicts: BTreeMap<JobId, Verdict>,
    /// Who was caught at what, after how many parts.
    pub(crate) offences: Vec<(usize, Offence, u32)>,
    /// Acts of the validator.
    pub(crate) acts: u64,
    /// Parts that each miner accepted.
    pub(crate) parts: Vec<u32>,
    pub(crate) refused: u64,
    pub(crate) audits: u64,
}

impl Report {
    /// Whether a miner was caught at least once.
    pub(crate) fn caught(&self, miner: usize) -> bool {
        self.offences.iter().any(|(who, ..)| *who == miner)
    }
    /// Jobs that ended with a result.
    pub(crate) fn verified(&self) -> usize {
        self.verdicts.values().filter(|verdict| verdict.kind.is_verified()).count()
    }
}

/// See the module.
pub(crate) struct World {
    setup: Setup,
    rng: ChaCha8Rng,
    clock_us: u64,
    sequence: u64,
    events: BTreeMap<(u64, u64), Event>,
    machine: JobMachine,
    /// Number of the validator's process.
    life: u32,
    alive: bool,
    /// Start of this process, in microseconds of the run: its monotonic clock begins there.
    born_us: u64,
    disk: Disk,
    miners: Vec<Miner>,
    acknowledged: BTreeSet<JobId>,
    submissions: BTreeMap<JobId, u64>,
    report: Report,
    over: bool,
}

/// Prints the setup of a run that fails.
struct OnPanic<'a>(&'a Setup);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the failing run: {:?}", self.0);
        }
    }
}

/// Runs a setup to its end and checks what must hold in every run.
pub(crate) fn run(setup: &Setup) -> Report {
    let _print = OnPanic(setup);
    let mut world = World::new(setup.clone());
    while !world.over
        && let Some(((at, _), event)) = world.events.pop_first()
    {
        if at > END_US {
            break;
        }
        world.clock_us = world.clock_us.max(at);
        world.happen(event);
    }
    world.finish()
}

impl World {
    fn new(setup: Setup) -> Self {
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&setup.seed.to_le_bytes());
        let mut world = Self {
            rng: ChaCha8Rng::from_seed(seed),
            clock_us: 0,
            sequence: 0,
            events: BTreeMap::new(),
            machine: Self::machine(&setup, 0),
            life: 0,
            alive: true,
            born_us: 0,
            disk: Disk::default(),
            miners: setup.miners.iter().map(|behaviour| Miner::new(*behaviour)).collect(),
            acknowledged: BTreeSet::new(),
            submissions: BTreeMap::new(),
            report: Report::default(),
            over: false,
            setup,
        };
        if let Some(clean) = world.setup.trusted {
            for n in 0..world.miners.len() {
                world.disk.clean.insert((hotkey(index(n)), env_id()), clean);
            }
        }
        world.start();
        for n in 0..world.setup.jobs {
            world.after(1_000 + n * world.setup.interval_us, Event::Submit(n));
        }
        world.after(60_000_000, Event::Adverts);
        if world.setup.weather.churn > 0 {
            world.after(1_000_000, Event::Churn);
        }
        world
    }

    fn secret(setup: &Setup) -> EpochSecret {
        let mut secret = [11; 32];
        secret[..8].copy_from_slice(&setup.seed.to_le_bytes());
        EpochSecret { epoch: 0, secret }
    }

    fn machine(setup: &Setup, life: u32) -> JobMachine {
        let mut seed = [13; 32];
        seed[..4].copy_from_slice(&life.to_le_bytes());
        seed[4..12].copy_from_slice(&setup.seed.to_le_bytes());
        JobMachine::new(setup.config.clone(), Digest([6; 32]), Self::secret(setup), seed)
    }

    fn now(&self) -> Now {
        Now {
            mono: Duration::from_micros(self.clock_us - self.born_us),
            wall: UnixMillis(1_700_000_000_000 + self.clock_us / 1_000),
        }
    }

    fn after(&mut self, delay_us: u64, event: Event) {
        self.sequence += 1;
        self.events.insert((self.clock_us + delay_us, self.sequence), event);
    }

    fn chance(&mut self, permille: u32) -> bool {
        permille > 0 && self.rng.next_u32() % 1_000 < permille
    }

    fn delay(&mut self) -> u64 {
        50 + self.rng.next_u64() % self.setup.weather.delay_us.max(1)
    }

    /// Puts a message on the network, which may lose or double it.
    fn send(&mut self, extra_us: u64, event: impl Fn() -> Event) {
        if self.chance(self.setup.weather.lost) {
            return;
        }
        let delay = extra_us + self.delay();
        self.after(delay, event());
        if self.chance(self.setup.weather.doubled) {
            let delay = extra_us + self.delay();
            self.after(delay, event());
        }
    }

    fn start(&mut self) {
        let mut inputs = Vec::new();
        for (job, record) in &self.disk.jobs {
            let record = Box::new(JobRecord::decode(&record[..]).unwrap());
            inputs.push(Input::Restored { job: *job, record });
        }
        for record in self.disk.miners.values() {
            inputs.push(Input::RestoredMiner(Box::new(MinerRecord::decode(&record[..]).unwrap())));
        }
        for ((miner, env_id), clean) in &self.disk.clean {
            inputs.push(Input::RestoredClean(CleanRecord { miner: *miner, env_id: *env_id, clean: *clean }));
        }
        inputs.push(Input::Auditor { engines: vec![engine()] });
        for input in inputs {
            self.tell(input);
        }
        self.adverts();
    }

    fn adverts(&mut self) {
        for n in 0..self.miners.len() {
            if self.miners[n].up && self.alive {
                let expires_at = self.now().wall.plus(Duration::from_secs(300));
                let profile = MinerProfile { expires_at, ..profile(index(n), SLOTS) };
                self.tell(Input::Miner(Box::new(profile)));
            }
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Submit(n) => self.submit(n),
            Event::ToValidator(life, input) if life == self.life => self.tell(*input),
            Event::Timer(life) if life == self.life => self.tell(Input::TimerFired),
            Event::ToValidator(..) | Event::Timer(_) => {}
            Event::ToMiner(output) => self.reach_miner(*output),
            Event::Restart => self.restart(),
            Event::Down(n) => {
                self.miners[n].fall();
                let node = profile(index(n), SLOTS).node;
                self.tell(Input::PeerGone(node));
            }
            Event::Up(n) => {
                self.miners[n].up = true;
                let node = profile(index(n), SLOTS).node;
                self.tell(Input::PeerHere(node));
            }
            Event::Churn => self.churn(),
            Event::Adverts => {
                self.adverts();
                if self.clock_us < NOT_AFTER_MS * 1_000 {
                    self.after(60_000_000, Event::Adverts);
                }
            }
        }
    }

    fn churn(&mut self) {
        for n in 0..self.miners.len() {
            if self.miners[n].up && self.chance(self.setup.weather.churn) {
                let delay = self.delay();
                self.after(delay, Event::Down(n));
                self.after(delay + 1_500_000, Event::Up(n));
            }
        }
        if self.clock_us < self.setup.jobs * self.setup.interval_us {
            self.after(1_000_000, Event::Churn);
        }
    }

    fn submission(&self, n: u64) -> Submission {
        let start = UnixMillis(1_700_000_000_000);
        let mut spec = spec(n, self.setup.replicas);
        spec.not_after = start.plus(Duration::from_millis(NOT_AFTER_MS));
        submission_of(&spec)
    }

    /// A requester goes on asking until it has a verdict: that is how it learns of one that it missed.
    fn submit(&mut self, n: u64) {
        let submission = self.submission(n);
        let job = submission.job;
        if self.report.verdicts.contains_key(&job) || self.clock_us > NOT_AFTER_MS * 1_000 {
            return;
        }
        self.submissions.insert(job, n);
        self.after(15_000_000, Event::Submit(n));
        self.tell(Input::Submitted(Box::new(submission)));
    }

    /// Gives the machine an input and performs what it says.
    fn tell(&mut self, input: Input) {
        if !self.alive {
            return;
        }
        let now = self.now();
        let mut outputs = self.machine.handle(input, now);
        if self.rng.next_u32().is_multiple_of(2) {
            // What needs no durable record may be done before it.
            outputs.sort_by_key(|output| {
                matches!(output, Output::Persist { .. } | Output::Finish(_)) || output.needs_persist()
            });
        }
        for output in outputs {
            if self.setup.kill_at == Some(self.report.acts) {
                self.kill();
                return;
            }
            self.report.acts += 1;
            self.perform(output);
        }
    }

    fn kill(&mut self) {
        self.report.acts += 1;
        self.alive = false;
        self.life += 1;
        self.after(300_000, Event::Restart);
    }

    fn restart(&mut self) {
        self.alive = true;
        self.born_us = self.clock_us;
        self.machine = Self::machine(&self.setup, self.life);
        self.start();
        let waiting: Vec<u64> = self.submissions.values().copied().collect();
        for n in waiting {
            self.after(1_000, Event::Submit(n));
        }
    }

    fn perform(&mut self, output: Output) {
        let life = self.life;
        match output {
            Output::Persist { job, record } => {
                self.disk.jobs.insert(job, record.encode_to_vec());
            }
            Output::PersistMiner(record) => {
                self.disk.miners.insert(record.hotkey().unwrap(), record.encode_to_vec());
            }
            Output::PersistClean(clean) => {
                self.disk.clean.insert((clean.miner, clean.env_id), clean.clean);
            }
            Output::Acknowledge { job, .. } => {
                assert!(self.disk.jobs.contains_key(&job), "acknowledged before it was persisted");
                self.acknowledged.insert(job);
            }
            Output::Attach { job, .. } => assert!(self.disk.jobs.contains_key(&job)),
            Output::Replay { job } => {
                let verdict = self.disk.verdicts.get(&job).cloned().expect("a replayed verdict is on disk");
                self.told(verdict);
            }
            Output::Refuse { retryable, .. } => {
                assert!(retryable);
                self.report.refused += 1;
            }
            Output::Finish(ruling) => {
                let job = ruling.verdict.job;
                self.disk.jobs.insert(job, ruling.record.encode_to_vec());
                let twice = self.disk.verdicts.insert(job, ruling.verdict.clone());
                assert!(twice.is_none(), "a second verdict on one job");
                self.told(ruling.verdict);
            }
            Output::RequestAudit { job, attempt, .. } => {
                self.report.audits += 1;
                let part = Part { job, attempt, miner: hotkey(9_999) };
                let reference = unsigned([8; 32], &attestation(&part, &right(&job), self.now()));
                let result = AuditResult::Attested(Arc::new(reference));
                // The executor is the validator's own: no network lies between.
                self.after(3_000, Event::ToValidator(life, Box::new(Input::Audited { job, attempt, result })));
            }
            Output::RecordEvidence(evidence) => {
                let n = self.number(&evidence.part.miner);
                let behaviour = self.setup.miners[n];
                // A reveal that the network lost looks like one withheld.
                let weather = evidence.offence == Offence::Withheld && self.stormy();
                assert!(behaviour.lies() || weather, "{behaviour:?} accused of {:?}", evidence.offence);
                self.report.offences.push((n, evidence.offence, self.miners[n].parts));
                self.over |= self.setup.stop_at_offence;
            }
            Output::SetTimer { at } => {
                let at_us = self.born_us + u64::try_from(at.as_micros()).unwrap();
                let delay = at_us.saturating_sub(self.clock_us);
                self.after(delay, Event::Timer(life));
            }
            Output::Forget { job } => {
                self.disk.jobs.remove(&job);
            }
            message @ (Output::SendOffer { .. } | Output::SendReveal { .. } | Output::SendAbandon { .. }) => {
                self.send(0, || Event::ToMiner(Box::new(message.clone())));
            }
            Output::DropMiner { .. }
            | Output::AbandonAudit { .. }
            | Output::Started { .. }
            | Output::ForwardOutput { .. } => {}
        }
    }

    fn stormy(&self) -> bool {
        let weather = &self.setup.weather;
        weather.lost > 0 || weather.churn > 0 || weather.doubled > 0
    }

    fn number(&self, miner: &Hotkey) -> usize {
        (0..self.miners.len()).find(|n| hotkey(index(*n)) == *miner).expect("a known miner")
    }

    fn reach_miner(&mut self, output: Output) {
        let (Output::SendOffer { part, .. } | Output::SendReveal { part, .. } | Output::SendAbandon { part, .. }) =
            &output
        else {
            return;
        };
        let part = *part;
        let n = self.number(&part.miner);
        if !self.miners[n].up {
            return;
        }
        let mut bytes = [0; 32];
        self.rng.fill_bytes(&mut bytes);
        let luck = Luck { permille: self.rng.next_u32() % 1_000, bytes };
        let now = self.now();
        let answers = match output {
            Output::SendOffer { commit_reveal, .. } => self.miners[n].offered(part, commit_reveal, &luck, now),
            Output::SendReveal { .. } => self.miners[n].asked(part).map(|input| (0, input)).into_iter().collect(),
            _ => {
                self.miners[n].abandoned(&part);
                Vec::new()
            }
        };
        let life = self.life;
        for (delay, input) in answers {
            self.send(delay, || Event::ToValidator(life, Box::new(input.clone())));
        }
    }

    /// A requester learns a verdict.
    fn told(&mut self, verdict: Verdict) {
        if let Some(before) = self.report.verdicts.get(&verdict.job) {
            assert_eq!(*before, verdict, "a requester sees one result");
            return;
        }
        if verdict.kind.is_verified() && verdict.output != BlobId::of(&right(&verdict.job)) {
            let agreed = verdict.replicas.iter().filter(|replica| replica.standing == Standing::Agreed);
            for replica in agreed {
                let behaviour = self.setup.miners[self.number(&replica.miner)];
                assert!(behaviour.lies(), "{behaviour:?} agreed with a wrong result");
            }
            let audited = verdict.kind == sundara_proto::verdict::VerdictKind::Audited;
            assert!(!audited, "a wrong result passed an audit");
        }
        self.report.verdicts.insert(verdict.job, verdict);
    }

    /// Checks what must hold at the end of every run.
    fn finish(mut self) -> Report {
        self.report.parts = self.miners.iter().map(|miner| miner.parts).collect();
        if self.over {
            return self.report;
        }
        for job in &self.acknowledged {
            assert!(self.report.verdicts.contains_key(job), "{job:?} was acknowledged and never ended");
        }
        // Anyone draws the audits again once the secret is out, and finds none neglected.
        let secret = Self::secret(&self.setup);
        for verdict in self.report.verdicts.values() {
            assert_eq!(recheck(&secret, verdict, FLOOR), [], "a draw was neglected");
        }
        assert_eq!(self.machine.live(), 0, "jobs that never end");
        self.machine.assert_idle();
        self.report
    }
}

fn index(n: usize) -> u32 {
    u32::try_from(n).unwrap()
}

/// Places of those that lie.
pub(crate) fn liars(miners: &[Behaviour]) -> Vec<usize> {
    (0..miners.len()).filter(|n| miners[*n].lies()).collect()
}
