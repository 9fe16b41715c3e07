//! What the two agents of a move tell each other. Each word is signed by the host that says it and names the grant of the move: whoever passes
//! it on, carry or the controller, can keep it back but neither make nor change one. A destination therefore runs a VM on the source's own
//! word alone, and a source runs it on again on the destination's.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use godwit_link::certificate::host_dns_name;
use godwit_link::statement::{self, Purpose, StatementError, Validity};
use godwit_link::v1::Signed;
use godwit_migration::Peer;
use godwit_model::{Name, Refusal, UnixMillis};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use crate::peers::Peers;
use crate::tls::{Material, TlsError};

/// What an agent says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Said {
    /// The host whose agent says it.
    pub(crate) from: Name,
    /// What stands for the grant of the move, see [`statement::grant_digest`].
    pub(crate) grant: String,
    /// What it says.
    pub(crate) peer: Peer,
}

/// As it travels, JSON on one line.
#[derive(Serialize, Deserialize)]
struct Envelope {
    statement: String,
    /// Base64, as all that is not text.
    signature: String,
    chain: Vec<String>,
}

/// Why a word does not count, or could not be said.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FactError {
    #[error("it is malformed")]
    Malformed(#[from] serde_json::Error),
    #[error("it is not base64")]
    Base64(#[from] base64::DecodeError),
    #[error("the host's certificate cannot be used")]
    Tls(#[from] TlsError),
    #[error("it does not count")]
    Statement(#[from] StatementError),
    #[error("{}", .0.message)]
    Refused(Refusal),
}

/// Signs with this host's key.
pub(crate) fn seal(material: &Material, said: &Said) -> Result<Box<RawValue>, FactError> {
    let key = statement::signing_key(&material.key()?)?;
    let signed = statement::sign(Purpose::Fact, serde_json::to_vec(said)?, key.as_ref(), &material.chain()?)?;
    let envelope = Envelope {
        statement: String::from_utf8_lossy(&signed.statement).into_owned(),
        signature: STANDARD.encode(&signed.signature),
        chain: signed.chain.iter().map(|certificate| STANDARD.encode(certificate)).collect(),
    };
    Ok(to_raw_value(&envelope)?)
}

/// What was said, if it is signed by a key that may speak for the host it is said to come from.
pub(crate) fn open(material: &Material, peers: &Peers, text: &str, now: UnixMillis) -> Result<Said, FactError> {
    let envelope: Envelope = serde_json::from_str(text)?;
    let signed = Signed {
        statement: envelope.statement.into_bytes(),
        signature: STANDARD.decode(envelope.signature)?,
        chain: envelope.chain.iter().map(|certificate| STANDARD.decode(certificate)).collect::<Result<_, _>>()?,
    };
    // Read before it is verified, since only it says who should have signed it: a bounded text into a closed type.
    let said: Said = serde_json::from_slice(&signed.statement)?;
    let roots = material.roots()?.into();
    let (_, key) = statement::open(Purpose::Fact, &signed, &host_dns_name(&said.from), &roots, Validity::Outlasts(now))?;
    peers.may_speak(&said.from, &key).map_err(FactError::Refused)?;
    Ok(said)
}

#[cfg(test)]
mod tests {
    use godwit_migration::PeerMessage;
    use godwit_model::{ErrorCode, Generation, VmId};

    use super::*;
    use crate::tls::tests::cluster;

    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

    fn name(text: &str) -> Name {
        Name::new(text).expect("name")
    }

    fn released(from: &str) -> Said {
        let peer = Peer { vm: VmId::new(uuid::Uuid::from_u128(7)), generation: Generation(3), message: PeerMessage::Released };
        Said { from: name(from), grant: "digest".into(), peer }
    }

    #[test]
    fn a_word_counts_only_from_the_host_that_says_it() {
        let [h1, h2] = &cluster(&["h1", "h2"])[..] else { panic!("two hosts") };
        let peers = Peers::default();
        let text = seal(h1, &released("h1")).expect("sealed");
        assert_eq!(open(h2, &peers, text.get(), NOW).expect("it counts"), released("h1"));

        let pretended = seal(h2, &released("h1")).expect("sealed");
        assert!(matches!(open(h2, &peers, pretended.get(), NOW), Err(FactError::Statement(_))));
        let changed = text.get().replace("digest", "another");
        assert!(matches!(open(h2, &peers, &changed, NOW), Err(FactError::Statement(StatementError::Signature))));
        let foreign = seal(&cluster(&["h1"])[0], &released("h1")).expect("sealed");
        assert!(matches!(open(h2, &peers, foreign.get(), NOW), Err(FactError::Statement(_))));
        assert!(matches!(open(h2, &peers, "{}", NOW), Err(FactError::Malformed(_))));
    }

    #[test]
    fn a_removed_hosts_word_does_not_count() {
        let h1 = &cluster(&["h1"])[0];
        let text = seal(h1, &released("h1")).expect("sealed");
        let named = |keys: &[&str]| godwit_link::v1::Member {
            host: "h1".into(),
            address: "10.0.0.1".into(),
            keys: keys.iter().map(|key| (*key).to_owned()).collect(),
            migration_bandwidth: 0,
        };
        let peers = Peers::default();
        peers.set(&[named(&["another key"])]);
        match open(h1, &peers, text.get(), NOW) {
            Err(FactError::Refused(refusal)) => assert_eq!(refusal.code, ErrorCode::CertificateRefused),
            other => panic!("{other:?}"),
        }
        let leaf = &h1.chain().expect("chain")[0];
        let (_, parsed) = x509_parser::parse_x509_certificate(leaf).expect("certificate");
        let key = blake3::hash(parsed.tbs_certificate.subject_pki.raw).to_hex();
        peers.set(&[named(&[key.as_str()])]);
        assert!(open(h1, &peers, text.get(), NOW).is_ok());
    }
}
