//! The cluster's own certificate authority: its key, the controller's certificate, the hosts' certificates.
//!
//! A host's certificate is made of nothing of its request but the public key. Renewal is the agent's part (the Renew call); the
//! controller renews its own certificate at half its life, without a restart.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use ::aws_lc_rs::digest as aws_lc_rs_digest;
use godwit_link::certificate::{CONTROLLER, host_dns_name, host_of_dns_name};
use godwit_model::{ErrorCode, Name, Refusal, UnixMillis};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

const DAY: Duration = Duration::from_secs(24 * 3_600);

/// How long a host's certificate is good for. Agents renew at half of it.
pub(crate) const HOST_LIFETIME: Duration = DAY.saturating_mul(30);
/// How long the controller's own is good for.
pub(crate) const CONTROLLER_LIFETIME: Duration = DAY.saturating_mul(90);
/// How long the authority itself is good for.
const AUTHORITY_LIFETIME: Duration = DAY.saturating_mul(3_650);
/// Clocks of hosts may be behind by this much.
const BACKDATED: Duration = Duration::from_secs(3_600);

/// Why the authority cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file of its.
    #[error("cannot use {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its key or a certificate.
    #[error("a key or certificate cannot be made or read")]
    Certificate(#[from] rcgen::Error),
    /// What was made cannot be served.
    #[error("the certificate cannot be served")]
    Tls(#[from] rustls::Error),
    /// A name to advertise that is none.
    #[error("{name:?} is neither a DNS name nor an address")]
    Advertised {
        /// The name.
        name: String,
    },
    /// Files of different authorities.
    #[error("{path} does not belong to the key beside it")]
    Mismatch {
        /// The certificate.
        path: PathBuf,
    },
}

/// The authority.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pem: String,
    advertised: Vec<SanType>,
    serving: RwLock<Arc<CertifiedKey>>,
}

/// A certificate for a host, and the hash of the key that it is for.
pub(crate) struct Issued {
    /// PEM.
    pub(crate) certificate: String,
    /// BLAKE3 of the public key.
    pub(crate) key: String,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Authority({})", self.fingerprint())
    }
}

impl Authority {
    /// Loads the authority from `dir`, or makes it at the first start.
    pub(crate) fn open(dir: &Path, advertise: &[String], now: UnixMillis) -> Result<Self, AuthorityError> {
        let (key_path, path) = (dir.join("ca.key"), dir.join("ca.pem"));
        let file = |path: &Path| {
            let path = path.to_owned();
            |source| AuthorityError::File { path, source }
        };
        let key = match fs::read_to_string(&key_path) {
            Ok(pem) => KeyPair::from_pem(&pem)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key = KeyPair::generate()?;
                write_durably(&key_path, key.serialize_pem().as_bytes(), 0o600).map_err(file(&key_path))?;
                key
            }
            Err(error) => return Err(file(&key_path)(error)),
        };
        let pem = match fs::read_to_string(&path) {
            Ok(pem) => pem,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let pem = authority_params(now).self_signed(&key)?.pem();
                write_durably(&path, pem.as_bytes(), 0o644).map_err(file(&path))?;
                pem
            }
            Err(error) => return Err(file(&path)(error)),
        };
        let mismatch = || AuthorityError::Mismatch { path: path.clone() };
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| mismatch())?;
        if key_of(&certificate) != Some(key_hash(&key.subject_public_key_info())) {
            return Err(mismatch());
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        let advertised = advertise.iter().map(|name| san(name)).collect::<Result<Vec<_>, _>>()?;
        let serving = RwLock::new(serving_key(&issuer, &certificate, &advertised, now)?);
        Ok(Self { issuer, certificate, pem, advertised, serving })
    }

    /// Its certificate, PEM.
    pub(crate) fn pem(&self) -> &str {
        &self.pem
    }

    /// SHA-256 of its certificate, hexadecimal: what join tokens carry.
    pub(crate) fn fingerprint(&self) -> String {
        let digest = aws_lc_rs_digest::digest(&aws_lc_rs_digest::SHA256, &self.certificate);
        digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Signs a certificate for `host` and the public key of `request` (PEM).
    pub(crate) fn sign_host(&self, host: &Name, request: &str, now: UnixMillis) -> Result<Issued, Refusal> {
        let malformed = |_| {
            Refusal::new(ErrorCode::BadRequest, "the signing request cannot be read or is not signed by its own key")
                .hint("send a PKCS#10 request in PEM, as `godwit host join` does")
        };
        let request = CertificateSigningRequestParams::from_pem(request).map_err(malformed)?;
        let mut params = leaf_params(vec![SanType::DnsName(dns(&host_dns_name(host)))], host.as_str(), HOST_LIFETIME, now);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&request.public_key, &self.issuer).map_err(malformed)?;
        Ok(Issued { certificate: certificate.pem(), key: key_hash(&request.public_key.subject_public_key_info()) })
    }

    /// Makes the controller a new certificate; connections from now on see it.
    pub(crate) fn renew(&self, now: UnixMillis) -> Result<(), AuthorityError> {
        let fresh = serving_key(&self.issuer, &self.certificate, &self.advertised, now)?;
        *self.serving.write().expect("no holder panics") = fresh;
        Ok(())
    }

    /// TLS for users: the chain is the controller's certificate and the authority's.
    pub(crate) fn api_tls(self: &Arc<Self>) -> Result<rustls::ServerConfig, AuthorityError> {
        let mut config = builder()?.with_no_client_auth().with_cert_resolver(Arc::new(Serving(self.clone())));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }

    /// TLS for agents: a certificate of this authority, or none (which is enough to join).
    pub(crate) fn link_tls(self: &Arc<Self>) -> Result<rustls::ServerConfig, AuthorityError> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.certificate.clone())?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::new(aws_lc_rs::default_provider()))
            .allow_unauthenticated()
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let mut config = builder()?.with_client_cert_verifier(verifier).with_cert_resolver(Arc::new(Serving(self.clone())));
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

fn builder() -> Result<rustls::ConfigBuilder<rustls::ServerConfig, rustls::WantsVerifier>, rustls::Error> {
    rustls::ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider())).with_safe_default_protocol_versions()
}

/// Answers each handshake with the certificate of the moment.
struct Serving(Arc<Authority>);

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Serving")
    }
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.serving.read().expect("no holder panics").clone())
    }
}

fn serving_key(
    issuer: &Issuer<'static, KeyPair>,
    authority: &CertificateDer<'static>,
    advertised: &[SanType],
    now: UnixMillis,
) -> Result<Arc<CertifiedKey>, AuthorityError> {
    let key = KeyPair::generate()?;
    let mut names = vec![SanType::DnsName(dns(CONTROLLER)), SanType::DnsName(dns("localhost"))];
    names.extend([IpAddr::from([127, 0, 0, 1]), IpAddr::from(std::net::Ipv6Addr::LOCALHOST)].map(SanType::IpAddress));
    names.extend(advertised.iter().filter(|name| !names.contains(name)).cloned().collect::<Vec<_>>());
    let mut params = leaf_params(names, CONTROLLER, CONTROLLER_LIFETIME, now);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let leaf = params.signed_by(&key, issuer)?;
    let private = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| rustls::Error::General(error.into()))?;
    let signer = aws_lc_rs::sign::any_supported_type(&private)?;
    Ok(Arc::new(CertifiedKey::new(vec![leaf.der().clone(), authority.clone()], signer)))
}

/// A name that is made of characters a DNS name may have.
fn dns(name: &str) -> rcgen::string::Ia5String {
    rcgen::string::Ia5String::try_from(name).expect("names are ASCII")
}

fn san(name: &str) -> Result<SanType, AuthorityError> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let plain = (1..=253).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'));
    if plain { Ok(SanType::DnsName(dns(name))) } else { Err(AuthorityError::Advertised { name: name.into() }) }
}

fn validity(params: &mut CertificateParams, lifetime: Duration, now: UnixMillis) {
    let now = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_millis(now.0);
    params.not_before = now - BACKDATED;
    params.not_after = now + lifetime;
}

fn authority_params(now: UnixMillis) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "Godwit cluster authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    validity(&mut params, AUTHORITY_LIFETIME, now);
    params
}

fn leaf_params(names: Vec<SanType>, subject: &str, lifetime: Duration, now: UnixMillis) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, subject);
    params.subject_alt_names = names;
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    validity(&mut params, lifetime, now);
    params
}

fn key_hash(info: &[u8]) -> String {
    blake3::hash(info).to_hex().to_string()
}

/// The hash of the public key in a certificate.
pub(crate) fn key_of(certificate: &[u8]) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some(key_hash(parsed.tbs_certificate.subject_pki.raw))
}

/// The host that a certificate, already verified to be of this authority, speaks for.
pub(crate) fn host_of(certificate: &[u8]) -> Option<Name> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let names = &parsed.subject_alternative_name().ok()??.value.general_names;
    match names.as_slice() {
        [GeneralName::DNSName(name)] => host_of_dns_name(name),
        _ => None,
    }
}

/// Writes a file that is whole or not there, whatever happens.
pub(crate) fn write_durably(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let _ = fs::remove_file(&fresh);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&fresh)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&fresh, path)?;
    fs::File::open(path.parent().unwrap_or_else(|| Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests;
