//! The other hosts as the controller named them last, with the public keys that may speak for each. Whoever is not named, or shows another key,
//! is turned away by carry, however well signed its certificate is: that is how a host's removal reaches the other hosts.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use godwit_link::v1::Member;
use godwit_model::{ErrorCode, Name, Refusal, Retry};

/// Who is of the cluster. Not kept on disk: a move begins by command of a controller, which has named everybody before.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    keys: Mutex<BTreeMap<String, Vec<String>>>,
}

impl Peers {
    /// The controller names everybody.
    pub(crate) fn set(&self, members: &[Member]) {
        let named = members.iter().map(|member| (member.host.clone(), member.keys.clone())).collect();
        *self.keys.lock().unwrap_or_else(PoisonError::into_inner) = named;
    }

    /// The keys (their hashes) that may speak for `host`.
    pub(crate) fn keys_of(&self, host: &Name) -> Result<Vec<String>, Refusal> {
        let known = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let keys = known.get(host.as_str()).filter(|keys| !keys.is_empty()).cloned();
        keys.ok_or_else(|| {
            Refusal::new(ErrorCode::CertificateRefused, format!("{host} is not, or no longer, a host of this cluster"))
                .hint("look at `godwit host list`; a host that was removed joins again first")
                .retry(Retry::Safe)
        })
    }

    /// Whether a key speaks for `host`. An agent that was just started, and has heard of nobody yet, must go by the certificate alone.
    pub(crate) fn may_speak(&self, host: &Name, key: &str) -> Result<(), Refusal> {
        let nobody = self.keys.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        if nobody || self.keys_of(host)?.iter().any(|known| known == key) {
            return Ok(());
        }
        Err(Refusal::new(ErrorCode::CertificateRefused, format!("a key that may not, or no longer, speak for {host} was shown"))
            .retry(Retry::Safe))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_is_no_longer_named_has_no_keys() {
        let peers = Peers::default();
        let h1 = Name::new("h1").expect("name");
        let named = |keys: &[&str]| Member {
            host: "h1".into(),
            address: "10.0.0.1".into(),
            keys: keys.iter().map(|key| (*key).to_owned()).collect(),
            migration_bandwidth: 0,
        };
        assert_eq!(peers.keys_of(&h1).expect_err("nobody was named").code, ErrorCode::CertificateRefused);
        peers.set(&[named(&["a", "b"])]);
        assert_eq!(peers.keys_of(&h1), Ok(vec!["a".into(), "b".into()]));
        peers.set(&[named(&[])]);
        assert!(peers.keys_of(&h1).is_err(), "a host without a key");
        peers.set(&[]);
        assert!(peers.keys_of(&h1).is_err(), "a host that was removed");
    }
}
