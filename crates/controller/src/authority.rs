//! The cluster's own certificate authority: a root that users and hosts trust and whose key can be taken away, an intermediate that signs, the
//! controller's certificate, the hosts' certificates.
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
use godwit_link::statement::{self, Purpose};
use godwit_link::{encode, v1};
use godwit_model::{ErrorCode, Grant, Name, Refusal, SnapshotId, UnixMillis, VmId};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::pki_types::{ServerName, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

mod files;
mod grace;
mod sealed;

pub(crate) use files::AuthorityFiles;
pub use files::AuthorityView;
use files::Loaded;
pub(crate) use grace::GRACE;
use grace::WithGrace;
pub use sealed::SealError;

const DAY: Duration = Duration::from_secs(24 * 3_600);

/// How long a host's certificate is good for. Agents renew when a little more than half of it is over.
pub(crate) const HOST_LIFETIME: Duration = DAY.saturating_mul(30);
/// How long the controller's own is good for.
pub(crate) const CONTROLLER_LIFETIME: Duration = DAY.saturating_mul(90);
/// How long an intermediate is good for. Its end shortens the life of what it signs.
const INTERMEDIATE_LIFETIME: Duration = DAY.saturating_mul(730);
/// How long the root is good for.
const ROOT_LIFETIME: Duration = DAY.saturating_mul(3_650);
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
    /// A file that is not what it should be.
    #[error("{path} is damaged")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Keys at rest.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// No authority yet.
    #[error("{dir} holds no authority: `godwit serve` makes one at its first start")]
    NoAuthority {
        /// The data directory.
        dir: PathBuf,
    },
    /// The intermediate is missing, and the root's key is away.
    #[error("there is no intermediate: bring the root's key and run `godwit cluster ca rotate-intermediate --root-key FILE`")]
    NoIntermediate,
    /// The root's key is needed, and is away.
    #[error("the root's key is not on this machine: bring it and name it with --root-key")]
    RootAway,
    /// The root's key would stay where it was.
    #[error("{path} lies in the data directory: the root's key belongs on another medium")]
    Inside {
        /// The file.
        path: PathBuf,
    },
    /// Nobody would believe the controller.
    #[error(
        "what the authority signs would not be believed now: check this machine's clock; if the intermediate has ended, run \
         `godwit cluster ca rotate-intermediate`"
    )]
    Unbelievable(#[source] rustls::Error),
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
    /// The intermediate's certificate, which signs.
    intermediate: CertificateDer<'static>,
    intermediate_pem: String,
    ends: UnixMillis,
    root: CertificateDer<'static>,
    root_pem: String,
    advertised: Vec<SanType>,
    host_lifetime: Duration,
    serving: RwLock<Arc<CertifiedKey>>,
    secret: sealed::Secret,
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
    /// Loads the authority, or makes it at the first start.
    pub(crate) fn open(files: &AuthorityFiles, advertise: &[String], now: UnixMillis) -> Result<Self, AuthorityError> {
        let Loaded { root, root_pem, intermediate, intermediate_pem, key, secret } = files.load(now)?;
        let issuer = Issuer::from_ca_cert_der(&intermediate, key)?;
        let ends = validity_of(&intermediate).map_or(now, |(_, ends)| ends);
        let advertised = advertise.iter().map(|name| san(name)).collect::<Result<Vec<_>, _>>()?;
        let serving = serving_key(&issuer, &[&intermediate, &root], &advertised, ends, now)?;
        believable(&root, &serving, now)?;
        let serving = RwLock::new(serving);
        let host_lifetime = HOST_LIFETIME;
        Ok(Self { issuer, intermediate, intermediate_pem, ends, root, root_pem, advertised, host_lifetime, serving, secret })
    }

    /// With another life for hosts' certificates, as tests need it.
    pub(crate) fn with_host_lifetime(mut self, lifetime: Duration) -> Self {
        self.host_lifetime = lifetime;
        self
    }

    /// The key under which hosts seal what they keep of a VM's memory. It is gone with the VM's salt.
    pub(crate) fn memory_key(&self, vm: VmId, salt: &str) -> Result<Vec<u8>, Refusal> {
        let failed = |error: SealError| Refusal::new(ErrorCode::Internal, format!("no key for what is kept of memory: {error}"));
        self.secret.memory_key(vm.uuid(), salt).map(Vec::from).map_err(failed)
    }

    /// The key of a snapshot. It is gone with the snapshot's salt.
    pub(crate) fn snapshot_key(&self, snapshot: SnapshotId, salt: &str) -> Result<Vec<u8>, Refusal> {
        let failed = |error: SealError| Refusal::new(ErrorCode::Internal, format!("no key for the snapshot: {error}"));
        self.secret.snapshot_key(snapshot.uuid(), salt).map(Vec::from).map_err(failed)
    }

    /// The key of a team's vaults.
    pub(crate) fn team_vault_key(&self, team: &Name, salt: &str) -> Result<Vec<u8>, Refusal> {
        let failed = |error: SealError| Refusal::new(ErrorCode::Internal, format!("no key for the team's vault: {error}"));
        self.secret.team_vault_key(team.as_str(), salt).map(Vec::from).map_err(failed)
    }

    /// A salt for one of these keys.
    pub(crate) fn draw_salt(&self) -> Result<String, Refusal> {
        sealed::draw_salt().map_err(|error| Refusal::new(ErrorCode::Internal, error.to_string()))
    }

    /// The root's certificate, PEM: what users and hosts trust.
    pub(crate) fn pem(&self) -> &str {
        &self.root_pem
    }

    /// SHA-256 of the root's certificate, hexadecimal: what join tokens carry.
    pub(crate) fn fingerprint(&self) -> String {
        fingerprint(&self.root)
    }

    /// When the intermediate ends, if that is so soon that it shortens what it signs.
    pub(crate) fn ends_soon(&self, now: UnixMillis) -> Option<UnixMillis> {
        let needed = u64::try_from((CONTROLLER_LIFETIME * 2).as_millis()).unwrap_or(u64::MAX);
        (self.ends.0 < now.0.saturating_add(needed)).then_some(self.ends)
    }

    /// Signs a certificate for `host` and the public key of `request` (PEM).
    pub(crate) fn sign_host(&self, host: &Name, request: &str, now: UnixMillis) -> Result<Issued, Refusal> {
        let malformed = |_| {
            Refusal::new(ErrorCode::BadRequest, "the signing request cannot be read or is not signed by its own key")
                .hint("send a PKCS#10 request in PEM, as `godwit host join` does")
        };
        let request = CertificateSigningRequestParams::from_pem(request).map_err(malformed)?;
        let names = vec![SanType::DnsName(dns(&host_dns_name(host)))];
        let mut params = leaf_params(names, host.as_str(), (self.host_lifetime, self.ends), now);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&request.public_key, &self.issuer).map_err(malformed)?;
        // The intermediate goes along: peers know the root only.
        let chain = format!("{}{}", certificate.pem(), self.intermediate_pem);
        Ok(Issued { certificate: chain, key: key_hash(&request.public_key.subject_public_key_info()) })
    }

    /// Signs a grant, so that it counts wherever it is shown.
    pub(crate) fn grant(&self, grant: &Grant) -> Result<v1::Signed, Refusal> {
        let serving = self.serving.read().expect("no holder panics").clone();
        let chain = [serving.cert.first(), Some(&self.intermediate)].into_iter().flatten().cloned().collect::<Vec<_>>();
        statement::sign(Purpose::Grant, encode(grant), serving.key.as_ref(), &chain)
            .map_err(|error| Refusal::new(ErrorCode::Internal, format!("the grant cannot be signed: {error}")))
    }

    /// Makes the controller a new certificate; connections from now on see it.
    pub(crate) fn renew(&self, now: UnixMillis) -> Result<(), AuthorityError> {
        let fresh = serving_key(&self.issuer, &[&self.intermediate, &self.root], &self.advertised, self.ends, now)?;
        *self.serving.write().expect("no holder panics") = fresh;
        Ok(())
    }

    /// TLS for users: the chain is the controller's certificate, the intermediate's and the root's, which a host that joins looks for.
    pub(crate) fn api_tls(self: &Arc<Self>) -> Result<rustls::ServerConfig, AuthorityError> {
        let mut config = builder()?.with_no_client_auth().with_cert_resolver(Arc::new(Serving(self.clone())));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }

    /// TLS for agents: a certificate of this authority, or none (which is enough to join). One that has ended not too long ago passes the
    /// handshake, and is good for Renew only: see [`grace`].
    pub(crate) fn link_tls(self: &Arc<Self>) -> Result<rustls::ServerConfig, AuthorityError> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.root.clone())?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::new(aws_lc_rs::default_provider()))
            .allow_unauthenticated()
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let verifier = Arc::new(WithGrace::new(verifier));
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

/// Whether a host that trusts `root` would believe what is served.
fn believable(root: &CertificateDer<'static>, serving: &CertifiedKey, now: UnixMillis) -> Result<(), AuthorityError> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(root.clone())?;
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::new(aws_lc_rs::default_provider()))
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))?;
    let name = ServerName::try_from(CONTROLLER).expect("it is a DNS name");
    let [leaf, chain @ ..] = serving.cert.as_slice() else {
        return Err(AuthorityError::Unbelievable(rustls::Error::NoCertificatesPresented));
    };
    let time = UnixTime::since_unix_epoch(Duration::from_millis(now.0));
    verifier.verify_server_cert(leaf, chain, &name, &[], time).map(|_| ()).map_err(AuthorityError::Unbelievable)
}

fn serving_key(
    issuer: &Issuer<'static, KeyPair>,
    chain: &[&CertificateDer<'static>],
    advertised: &[SanType],
    ends: UnixMillis,
    now: UnixMillis,
) -> Result<Arc<CertifiedKey>, AuthorityError> {
    let key = KeyPair::generate()?;
    let mut names = vec![SanType::DnsName(dns(CONTROLLER)), SanType::DnsName(dns("localhost"))];
    names.extend([IpAddr::from([127, 0, 0, 1]), IpAddr::from(std::net::Ipv6Addr::LOCALHOST)].map(SanType::IpAddress));
    names.extend(advertised.iter().filter(|name| !names.contains(name)).cloned().collect::<Vec<_>>());
    let mut params = leaf_params(names, CONTROLLER, (CONTROLLER_LIFETIME, ends), now);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let leaf = params.signed_by(&key, issuer)?;
    let private = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| rustls::Error::General(error.into()))?;
    let signer = aws_lc_rs::sign::any_supported_type(&private)?;
    let certificates = std::iter::once(leaf.der().clone()).chain(chain.iter().map(|certificate| (*certificate).clone()));
    Ok(Arc::new(CertifiedKey::new(certificates.collect(), signer)))
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

/// From a little before `now` for `lifetime`, but not beyond `ends`.
fn validity(params: &mut CertificateParams, (lifetime, ends): (Duration, UnixMillis), now: UnixMillis) {
    let moment = |at: UnixMillis| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_millis(at.0);
    let life = u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX);
    params.not_before = moment(now) - BACKDATED.min(lifetime / 10);
    params.not_after = moment(UnixMillis(now.0.saturating_add(life)).min(ends));
}

fn root_params(now: UnixMillis) -> CertificateParams {
    let mut params = CertificateParams::default();
    // The name of an authority of before there was an intermediate: who trusts that one trusts its successor with the same key.
    params.distinguished_name.push(DnType::CommonName, "Godwit cluster authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    validity(&mut params, (ROOT_LIFETIME, UnixMillis(u64::MAX)), now);
    params
}

fn intermediate_params(key: &KeyPair, ends: UnixMillis, now: UnixMillis) -> CertificateParams {
    let mut params = CertificateParams::default();
    // A name of its own: chains of the old and of the new intermediate cannot be taken for each other.
    let number: String = key_hash(&key.subject_public_key_info()).chars().take(8).collect();
    params.distinguished_name.push(DnType::CommonName, format!("Godwit cluster intermediate {number}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    validity(&mut params, (INTERMEDIATE_LIFETIME, ends), now);
    params
}

fn leaf_params(names: Vec<SanType>, subject: &str, life: (Duration, UnixMillis), now: UnixMillis) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, subject);
    params.subject_alt_names = names;
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    validity(&mut params, life, now);
    params
}

fn key_hash(info: &[u8]) -> String {
    blake3::hash(info).to_hex().to_string()
}

/// SHA-256 in hexadecimal.
fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    sealed::hex(aws_lc_rs_digest::digest(&aws_lc_rs_digest::SHA256, certificate).as_ref())
}

/// From when to when a certificate is good.
pub(crate) fn validity_of(certificate: &[u8]) -> Option<(UnixMillis, UnixMillis)> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let moment = |seconds: i64| u64::try_from(seconds).ok().map(|seconds| UnixMillis(seconds.saturating_mul(1_000)));
    Some((moment(parsed.validity().not_before.timestamp())?, moment(parsed.validity().not_after.timestamp())?))
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
