//! The closed list of keyspaces.

macro_rules! keyspaces {
    ($( $(#[$doc:meta])* $name:ident = $id:literal, $text:literal; )*) => {
        /// A named set of keys. Each has one owner among the services, which alone writes it.
        ///
        /// The number is part of the stored format: it is never changed and never given to another keyspace.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Keyspace {
            $( $(#[$doc])* $name = $id, )*
        }

        impl Keyspace {
            /// All keyspaces, by number.
            pub const ALL: &'static [Self] = &[$( Self::$name, )*];

            /// Its name in messages and metrics.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $( Self::$name => $text, )* }
            }

            /// The keyspace of a stored number.
            #[must_use]
            pub const fn from_id(id: u8) -> Option<Self> {
                match id { $( $id => Some(Self::$name), )* _ => None }
            }
        }
    };
}

keyspaces! {
    /// The store's own records (keys under `store/`) and small singletons of services (keys under `SERVICE/`).
    Meta = 0, "meta";
    /// JobId -> the owner's job record.
    Jobs = 1, "jobs";
    /// JobId ++ sequence -> an event of a job's history.
    JobEvents = 2, "job_events";
    /// Expiry time ++ JobId -> nothing: what retention may delete, oldest first.
    JobExpiry = 3, "job_expiry";
    /// Sequence -> a message persisted before it is sent, deleted once it is delivered.
    Outbox = 4, "outbox";
    /// Input digest -> where an input lies, whose it is, until when it is kept.
    Inputs = 5, "inputs";
    /// Output digest -> where an output lies, whose it is, until when it is kept.
    Outputs = 6, "outputs";
    /// JobId ++ attempt ++ hotkey -> an attestation.
    Attestations = 7, "attestations";
    /// JobId ++ kind ++ party -> a receipt.
    Receipts = 8, "receipts";
    /// JobId -> a signed verdict.
    Verdicts = 9, "verdicts";
    /// Epoch ++ sequence -> a signed batch root of this node.
    Batches = 10, "batches";
    /// Batch root -> the entries behind it, this node's or fetched.
    Pages = 11, "pages";
    /// Time ++ accused ++ job ++ accuser -> evidence of an offence; kept longest.
    Evidence = 12, "evidence";
    /// Publisher ++ name -> the winning model record.
    Models = 13, "models";
    /// ModelId -> an operator's pin or permission.
    ModelPins = 14, "model_pins";
    /// Blob digest -> index entry of a stored blob (size, ranges held, last use).
    Blobs = 15, "blobs";
    /// PeerId -> addresses and what is known of a peer.
    Peers = 16, "peers";
    /// Hotkey -> the latest advert.
    Adverts = 17, "adverts";
    /// PeerId or hotkey -> the certificate of the highest serial.
    Certs = 18, "certs";
    /// Time ++ JobId -> a miner's log of offered, declined and served jobs.
    MinerJobs = 19, "miner_jobs";
    /// Executor key -> an executor attached to this node, and its certificate.
    Executors = 20, "executors";
    /// Epoch -> this validator's audit secret, its commitment and what was revealed.
    Epochs = 21, "epochs";
    /// Id -> until when it counts as seen.
    SeenIds = 22, "seen_ids";
    /// Hotkey (++ env_id) -> a validator's running score and audit counters.
    Scores = 23, "scores";
    /// Hotkey -> limits of a client of this validator.
    Clients = 24, "clients";
    /// JobId -> a requester's own job, to await it again after a restart.
    Requests = 25, "requests";
    /// RoundId ++ ... -> state of map-reduce rounds.
    Rounds = 26, "rounds";
    /// Epoch ++ kind ++ author (++ sequence) -> a batch root or an audit commitment of another validator.
    Heard = 27, "heard";
    /// Epoch -> what it came to, once its pages were open.
    EpochScores = 28, "epoch_scores";
}

#[cfg(test)]
mod tests {
    use super::Keyspace;

    #[test]
    fn numbers_and_names_are_unique_and_round_trip() {
        let mut names = std::collections::BTreeSet::new();
        for &keyspace in Keyspace::ALL {
            assert_eq!(Keyspace::from_id(keyspace as u8), Some(keyspace));
            assert!(names.insert(keyspace.name()), "{} is used twice", keyspace.name());
        }
        assert_eq!(Keyspace::from_id(255), None);
    }
}
