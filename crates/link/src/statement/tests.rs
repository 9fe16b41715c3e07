//! Statements that count, and every way in which one does not.

use godwit_model::Name;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose};

use super::*;
use crate::certificate::{CONTROLLER, host_dns_name};

struct Signer {
    key: Arc<dyn SigningKey>,
    chain: Vec<CertificateDer<'static>>,
}

struct Cluster {
    root: CertifiedIssuer<'static, KeyPair>,
    roots: Arc<RootCertStore>,
}

const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

impl Cluster {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let root = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("root");
        let mut roots = RootCertStore::empty();
        roots.add(root.der().clone()).expect("root");
        Self { root, roots: Arc::new(roots) }
    }

    /// Somebody with a certificate that is good until `ends`.
    fn signer(&self, name: &str, ends: UnixMillis) -> Signer {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("name");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.not_after = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_millis(ends.get());
        let certificate = params.signed_by(&key, &self.root).expect("certificate");
        let private = PrivateKeyDer::try_from(key.serialize_der()).expect("key");
        Signer { key: signing_key(&private).expect("key"), chain: vec![certificate.der().clone()] }
    }
}

impl Signer {
    fn sign(&self, purpose: Purpose, statement: &[u8]) -> Signed {
        sign(purpose, statement.to_vec(), self.key.as_ref(), &self.chain).expect("signed")
    }
}

fn h1() -> String {
    host_dns_name(&Name::new("h1").expect("name"))
}

const LATER: UnixMillis = UnixMillis(NOW.0 + 3_600_000);

#[test]
fn a_statement_is_read_as_it_was_signed_with_the_hash_of_the_key() {
    let cluster = Cluster::new();
    let controller = cluster.signer(CONTROLLER, LATER);
    let signed = controller.sign(Purpose::Grant, b"{}");
    let (statement, key) = open(Purpose::Grant, &signed, CONTROLLER, &cluster.roots, Validity::At(NOW)).expect("it counts");
    assert_eq!(statement, b"{}");
    let (_, parsed) = X509Certificate::from_der(&controller.chain[0]).expect("certificate");
    assert_eq!(key, blake3::hash(parsed.tbs_certificate.subject_pki.raw).to_hex().as_str());
}

#[test]
fn what_was_changed_or_is_signed_by_another_or_for_another_purpose_does_not_count() {
    let (cluster, foreign) = (Cluster::new(), Cluster::new());
    let host = cluster.signer(&h1(), LATER);
    let good = host.sign(Purpose::Fact, b"statement");
    let opened = |purpose, signed: &Signed, signer: &str| open(purpose, signed, signer, &cluster.roots, Validity::At(NOW)).err();
    assert!(opened(Purpose::Fact, &good, &h1()).is_none());

    let changed = Signed { statement: b"Statement".to_vec(), ..good.clone() };
    assert!(matches!(opened(Purpose::Fact, &changed, &h1()), Some(StatementError::Signature)));
    assert!(matches!(opened(Purpose::Grant, &good, &h1()), Some(StatementError::Signature)), "another purpose");
    assert!(matches!(opened(Purpose::Fact, &good, CONTROLLER), Some(StatementError::Signer { .. })), "another's name");
    let stranger = foreign.signer(&h1(), LATER).sign(Purpose::Fact, b"statement");
    assert!(matches!(opened(Purpose::Fact, &stranger, &h1()), Some(StatementError::Signer { .. })), "another authority");
    // The certificate of the one, the signature of the other.
    let borrowed = Signed { chain: good.chain.clone(), ..cluster.signer(&h1(), LATER).sign(Purpose::Fact, b"statement") };
    assert!(matches!(opened(Purpose::Fact, &borrowed, &h1()), Some(StatementError::Signature)));
    let bare = Signed { chain: vec![], ..good.clone() };
    assert!(matches!(opened(Purpose::Fact, &bare, &h1()), Some(StatementError::Certificate)));
}

#[test]
fn a_certificate_of_another_time_counts_only_where_that_is_said() {
    let cluster = Cluster::new();
    let signed = cluster.signer(&h1(), NOW).sign(Purpose::Fact, b"statement");
    let at = |validity| open(Purpose::Fact, &signed, &h1(), &cluster.roots, validity);
    assert!(matches!(at(Validity::At(LATER)), Err(StatementError::Signer { .. })));
    assert!(matches!(at(Validity::At(UnixMillis(0))), Err(StatementError::Signer { .. })), "not yet");
    for now in [LATER, NOW, UnixMillis(0)] {
        assert!(at(Validity::Outlasts(now)).is_ok(), "{now:?}");
    }
}

#[test]
fn what_is_too_long_is_refused_before_it_is_looked_at() {
    let cluster = Cluster::new();
    let host = cluster.signer(&h1(), LATER);
    let long = vec![b'x'; MAX_STATEMENT + 1];
    assert!(matches!(sign(Purpose::Fact, long.clone(), host.key.as_ref(), &host.chain), Err(StatementError::TooLong)));
    let good = host.sign(Purpose::Fact, b"statement");
    let hostile = [
        Signed { statement: long, ..good.clone() },
        Signed { chain: vec![good.chain[0].clone(); 5], ..good.clone() },
        Signed { chain: vec![vec![0; 9 << 10]], ..good },
    ];
    for signed in hostile {
        assert!(matches!(open(Purpose::Fact, &signed, &h1(), &cluster.roots, Validity::At(NOW)), Err(StatementError::TooLong)));
    }
}
