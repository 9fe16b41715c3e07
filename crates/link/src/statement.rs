//! Statements that count by themselves, however they came: what the controller grants, and what the two agents of a move tell each other.
//!
//! A statement is signed with the key of whoever makes it, and travels with the certificates that lead from that key to the cluster's root.
//! The bytes that were signed are the bytes that are read: nothing is encoded anew to be verified.

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use godwit_model::{Grant, UnixMillis};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::aws_lc_rs::{default_provider, sign::any_supported_type};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::SigningKey;
use rustls::{RootCertStore, SignatureScheme};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::v1::Signed;

/// Longest statement.
pub const MAX_STATEMENT: usize = 16 << 10;
/// Longest chain, and each certificate in it.
const MAX_CHAIN: (usize, usize) = (4, 8 << 10);

/// What a statement is for: one that was signed for another purpose is worth nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The controller grants; JSON of the model's `Grant`.
    Grant,
    /// An agent tells the other of a move.
    Fact,
}

impl Purpose {
    /// What is signed: nothing else that these keys sign begins so.
    fn message(self, statement: &[u8]) -> Vec<u8> {
        let prefix: &[u8] = match self {
            Self::Grant => b"godwit grant 1\0",
            Self::Fact => b"godwit fact 1\0",
        };
        [prefix, statement].concat()
    }
}

/// Why a statement does not count, or could not be made.
#[derive(Debug, thiserror::Error)]
pub enum StatementError {
    /// Longer than any.
    #[error("a signed statement is too long")]
    TooLong,
    /// No certificate, or one that cannot be read.
    #[error("a signed statement has no certificate that can be read")]
    Certificate,
    /// A certificate of somebody else, of another authority, or not good now.
    #[error("a statement is not signed by {signer}")]
    Signer {
        /// Whose it should be.
        signer: String,
        /// What is wrong with it.
        #[source]
        source: rustls::Error,
    },
    /// Changed, signed for another purpose, or by another key.
    #[error("a statement's signature is wrong")]
    Signature,
    /// A key of a kind that statements are not signed with.
    #[error("the key cannot sign statements")]
    Key,
}

/// How long a signer's certificate counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    /// It must be good at this moment.
    At(UnixMillis),
    /// It need not be: what is told about a move must arrive, however long a side was away and however wrong its clock is. Whether the key may
    /// still speak for its host is asked elsewhere.
    Outlasts(UnixMillis),
}

/// A private key, ready to sign.
///
/// # Errors
/// [`StatementError::Key`] when it cannot be used.
pub fn signing_key(key: &PrivateKeyDer<'_>) -> Result<Arc<dyn SigningKey>, StatementError> {
    any_supported_type(key).map_err(|_| StatementError::Key)
}

/// Signs a statement; `chain` leads from the key's certificate to one that the root has signed.
///
/// # Errors
/// [`StatementError::TooLong`], [`StatementError::Key`].
pub fn sign(
    purpose: Purpose,
    statement: Vec<u8>,
    key: &dyn SigningKey,
    chain: &[CertificateDer<'_>],
) -> Result<Signed, StatementError> {
    if statement.len() > MAX_STATEMENT {
        return Err(StatementError::TooLong);
    }
    let signer = key.choose_scheme(&[SignatureScheme::ECDSA_NISTP256_SHA256]).ok_or(StatementError::Key)?;
    let signature = signer.sign(&purpose.message(&statement)).map_err(|_| StatementError::Key)?;
    Ok(Signed { statement, signature, chain: chain.iter().map(|certificate| certificate.to_vec()).collect() })
}

/// The statement, if `signer` (a name in a certificate, see [`certificate`](crate::certificate)) has signed it for this purpose; and the
/// hash of the key, as the fleet's members are told it.
///
/// # Errors
/// Every [`StatementError`] but `Key`.
pub fn open<'s>(
    purpose: Purpose,
    signed: &'s Signed,
    signer: &str,
    roots: &Arc<RootCertStore>,
    validity: Validity,
) -> Result<(&'s [u8], String), StatementError> {
    let (certificates, length) = MAX_CHAIN;
    let too_long = signed.statement.len() > MAX_STATEMENT || signed.chain.len() > certificates;
    if too_long || signed.chain.iter().any(|certificate| certificate.len() > length) {
        return Err(StatementError::TooLong);
    }
    let chain: Vec<CertificateDer<'_>> = signed.chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let (leaf, others) = chain.split_first().ok_or(StatementError::Certificate)?;
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| StatementError::Certificate)?;
    let at = match validity {
        Validity::At(now) => Duration::from_millis(now.get()),
        Validity::Outlasts(now) => {
            let seconds = |at: x509_parser::time::ASN1Time| Duration::from_secs(u64::try_from(at.timestamp()).unwrap_or(0));
            let (begins, ends) = (seconds(parsed.validity().not_before), seconds(parsed.validity().not_after));
            Duration::from_millis(now.get()).min(ends).max(begins)
        }
    };
    let refused = |source| StatementError::Signer { signer: signer.to_owned(), source };
    let name = ServerName::try_from(signer).map_err(|_| refused(rustls::Error::General("no name".into())))?;
    WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), Arc::new(default_provider()))
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))
        .and_then(|verifier| verifier.verify_server_cert(leaf, others, &name, &[], UnixTime::since_unix_epoch(at)))
        .map_err(refused)?;
    let info = &parsed.tbs_certificate.subject_pki;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &info.subject_public_key.data)
        .verify(&purpose.message(&signed.statement), &signed.signature)
        .map_err(|_| StatementError::Signature)?;
    Ok((&signed.statement, blake3::hash(info.raw).to_hex().to_string()))
}

/// What stands for a grant where it is meant and not given: the hash of what the controller signs.
#[must_use]
pub fn grant_digest(grant: &Grant) -> String {
    blake3::hash(&crate::encode(grant)).to_hex().to_string()
}

#[cfg(test)]
mod tests;
