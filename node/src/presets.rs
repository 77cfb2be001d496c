//! Roles are bundles of services, and this is the only file that names them together.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sundara_proto::cert::Roles;

/// What an operator asks a node to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Submits jobs, publishes and fetches models.
    Light,
    /// Runs jobs for one owner, a miner or a validator.
    Executor,
    /// Takes offers and runs them on its executors.
    Miner,
    /// Takes jobs in, schedules them on miners, verifies what they say, and rules.
    Validator,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 4] = [Self::Light, Self::Executor, Self::Miner, Self::Validator];

    fn bits(self) -> Roles {
        match self {
            Self::Light => Roles::LIGHT,
            Self::Executor => Roles::EXECUTOR,
            Self::Miner => Roles::MINER,
            Self::Validator => Roles::VALIDATOR,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.bits(), f)
    }
}

/// A word that is no role.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a role: use light, executor, miner or validator, several with commas")]
pub struct UnknownRole(String);

impl FromStr for Role {
    type Err = UnknownRole;
    fn from_str(text: &str) -> Result<Self, UnknownRole> {
        Self::ALL.into_iter().find(|role| role.to_string() == text).ok_or_else(|| UnknownRole(text.to_owned()))
    }
}

/// Services of a node beyond those that every node has (network, store, blobs, transfer, registry, jobs client).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bundle {
    /// Offers and executors.
    pub(crate) miner: bool,
    /// Sums in rounds of others.
    pub(crate) reducer: bool,
    /// Serves one owner's offers.
    pub(crate) executor: bool,
    /// Intake, dispatch and audit.
    pub(crate) validator: bool,
    /// Signed pages of evidence.
    pub(crate) batches: bool,
    /// Tells the mesh what it offers.
    pub(crate) adverts: bool,
}

/// The services of a set of roles.
pub(crate) fn bundle(roles: &[Role]) -> Bundle {
    let mut bundle = Bundle::default();
    for role in roles {
        match role {
            Role::Light => {}
            Role::Executor => bundle.executor = true,
            Role::Miner => {
                bundle.miner = true;
                bundle.reducer = true;
                bundle.batches = true;
                bundle.adverts = true;
            }
            Role::Validator => {
                bundle.validator = true;
                bundle.batches = true;
                bundle.adverts = true;
            }
        }
    }
    bundle
}

/// The roles of a node of which nothing was said.
pub(crate) fn or_default(roles: Vec<Role>) -> Vec<Role> {
    if roles.is_empty() { vec![Role::Light] } else { roles }
}

/// Whether the node works for others, who have to reach it.
pub(crate) fn serves(roles: &[Role]) -> bool {
    roles.iter().any(|role| *role != Role::Light)
}

/// Why roles do not go together, if they do not.
pub(crate) fn conflict(roles: &[Role]) -> Option<&'static str> {
    let owns = roles.iter().any(|role| matches!(role, Role::Miner | Role::Validator));
    (owns && roles.contains(&Role::Executor))
        .then_some("an executor works for another node; miners and validators have one of their own")
}

/// What the certificate says. Every node is a light node too.
pub(crate) fn certified(roles: &[Role]) -> Roles {
    roles.iter().fold(Roles::LIGHT, |bits, role| bits.with(role.bits()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn roles_read_as_they_are_written() {
        for role in Role::ALL {
            assert_eq!(role.to_string().parse::<Role>().unwrap(), role);
        }
        assert!("minor".parse::<Role>().unwrap_err().to_string().contains("miner"));
    }

    #[test]
    fn roles_combine() {
        let both = bundle(&[Role::Validator, Role::Miner]);
        assert!(both.validator && both.miner && both.batches && both.adverts && !both.executor);
        assert_eq!(bundle(&[Role::Light]), Bundle::default());
    }
}
