//! Hosts whose certificate ended while the controller was away for long: for a bounded time they may still prove who they were, and get a
//! new certificate, nothing else.
//!
//! The handshake proves that the host has the key; what may be said over such a connection is decided by each call (see `link`).

use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use super::{DAY, validity_of};

/// How long after its end a certificate is good for Renew. Later the host joins again (`godwit host join --rejoin`).
pub(crate) const GRACE: Duration = DAY.saturating_mul(90);

/// The moment at which a certificate that ended is looked at: its last, if that was not too long ago.
fn decide_moment(ended: Duration, now: Duration) -> Option<Duration> {
    let past = now.checked_sub(ended)?;
    (past <= GRACE).then_some(ended)
}

/// Verifies as `inner`, but takes a certificate that ended within [`GRACE`] for what it was.
#[derive(Debug)]
pub(super) struct WithGrace {
    inner: Arc<dyn ClientCertVerifier>,
}

impl WithGrace {
    pub(super) fn new(inner: Arc<dyn ClientCertVerifier>) -> Self {
        Self { inner }
    }
}

impl ClientCertVerifier for WithGrace {
    fn offer_client_auth(&self) -> bool {
        self.inner.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.inner.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let refused = match self.inner.verify_client_cert(leaf, chain, now) {
            Err(error @ Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. })) => error,
            result => return result,
        };
        let ended = validity_of(leaf).map(|(_, ends)| Duration::from_millis(ends.0));
        match ended.and_then(|ended| decide_moment(ended, Duration::from_secs(now.as_secs()))) {
            Some(last) => self.inner.verify_client_cert(leaf, chain, UnixTime::since_unix_epoch(last)),
            None => Err(refused),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grace_begins_at_the_end_and_ends() {
        let ended = DAY * 1_000;
        let second = Duration::from_secs(1);
        assert_eq!(decide_moment(ended, ended - second), None, "it has not ended: another reason stands");
        assert_eq!(decide_moment(ended, ended), Some(ended));
        assert_eq!(decide_moment(ended, ended + GRACE), Some(ended));
        assert_eq!(decide_moment(ended, ended + GRACE + second), None);
    }
}
