//! Certificates in the form that rustls wants them, and the one exception to verification: a host that joins knows the authority only by
//! the fingerprint in its token.

use std::sync::Arc;

use aws_lc_rs::digest;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};

/// A host's certificate, key, and the cluster's authority, all PEM.
#[derive(Clone)]
pub(crate) struct Material {
    pub(crate) certificate: String,
    pub(crate) key: String,
    pub(crate) authority: String,
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("a certificate or key is not PEM: {0}")]
    Pem(rustls::pki_types::pem::Error),
    #[error("certificate and key cannot be used: {0}")]
    Config(rustls::Error),
    #[error("the authority cannot be used: {0}")]
    Verifier(rustls::server::VerifierBuilderError),
}

impl Material {
    pub(crate) fn chain(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        CertificateDer::pem_slice_iter(self.certificate.as_bytes()).collect::<Result<_, _>>().map_err(TlsError::Pem)
    }

    pub(crate) fn key(&self) -> Result<PrivateKeyDer<'static>, TlsError> {
        PrivateKeyDer::from_pem_slice(self.key.as_bytes()).map_err(TlsError::Pem)
    }

    pub(crate) fn roots(&self) -> Result<RootCertStore, TlsError> {
        let mut roots = RootCertStore::empty();
        for authority in CertificateDer::pem_slice_iter(self.authority.as_bytes()) {
            roots.add(authority.map_err(TlsError::Pem)?).map_err(TlsError::Config)?;
        }
        Ok(roots)
    }

    /// Whether the authority is the one with this fingerprint.
    pub(crate) fn is_of(&self, authority: &str) -> bool {
        CertificateDer::from_pem_slice(self.authority.as_bytes()).is_ok_and(|root| fingerprint(&root) == authority)
    }

    /// How this host dials the controller.
    pub(crate) fn client_config(&self) -> Result<rustls::ClientConfig, TlsError> {
        let mut config = rustls::ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(self.chain()?, self.key()?)
            .map_err(TlsError::Config)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

/// How a host that joins dials the controller: the authority is whichever certificate of the chain has `fingerprint`.
pub(crate) fn joining_config(fingerprint: String) -> rustls::ClientConfig {
    let provider =
        CryptoProvider::get_default().cloned().unwrap_or_else(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    let mut config = rustls::ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ByFingerprint { fingerprint, provider }))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

/// SHA-256 in hexadecimal.
fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    digest::digest(&digest::SHA256, certificate).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Finds the authority in the chain by its fingerprint and then verifies as always.
#[derive(Debug)]
struct ByFingerprint {
    fingerprint: String,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ByFingerprint {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let authority = intermediates
            .iter()
            .find(|certificate| fingerprint(certificate) == self.fingerprint)
            .ok_or(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        verifier.verify_server_cert(leaf, intermediates, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use godwit_link::certificate::host_dns_name;
    use godwit_model::Name;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::Material;

    /// Certificates for hosts of one cluster.
    pub(crate) fn cluster(hosts: &[&str]) -> Vec<Material> {
        let names: Vec<String> = hosts.iter().map(|host| host_dns_name(&Name::new(*host).expect("name"))).collect();
        certified(&names)
    }

    /// Certificates of one authority, each with one DNS name.
    pub(crate) fn certified(names: &[String]) -> Vec<Material> {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let authority_key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(vec![]).expect("params");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = params.self_signed(&authority_key).expect("authority");
        let issuer = rcgen::Issuer::new(params, authority_key);
        names
            .iter()
            .map(|name| {
                let key = KeyPair::generate().expect("key");
                let params = CertificateParams::new(vec![name.clone()]).expect("params");
                let certificate = params.signed_by(&key, &issuer).expect("signed");
                Material { certificate: certificate.pem(), key: key.serialize_pem(), authority: authority.pem() }
            })
            .collect()
    }
}
