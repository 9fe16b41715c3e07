//! The authority: what it signs, for whom, what it keeps to itself, and how its keys are kept.

use std::os::unix::fs::PermissionsExt;

use rustls::pki_types::pem::PemObject;
use rustls::server::danger::ClientCertVerifier;

use super::*;
use crate::clock::now;

fn request(names: &[&str]) -> (KeyPair, String) {
    let key = KeyPair::generate().expect("key");
    let params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).expect("params");
    let pem = params.serialize_request(&key).expect("request").pem().expect("pem");
    (key, pem)
}

/// A data directory with room for the secret beside it.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("dir");
        fs::create_dir(dir.path().join("data")).expect("data");
        Self { dir }
    }

    fn data(&self, file: &str) -> PathBuf {
        self.dir.path().join("data").join(file)
    }

    fn files(&self) -> AuthorityFiles {
        AuthorityFiles::new(&self.dir.path().join("data"), None).expect("files")
    }

    fn open(&self) -> Authority {
        self.open_at(now()).expect("authority")
    }

    fn open_at(&self, now: UnixMillis) -> Result<Authority, AuthorityError> {
        Authority::open(&self.files(), &[], now)
    }
}

fn later(now: UnixMillis, days: u64) -> UnixMillis {
    UnixMillis(now.0 + days * 24 * 3_600_000)
}

/// The chain of a host's certificate.
fn chain(issued: &Issued) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(issued.certificate.as_bytes()).collect::<Result<_, _>>().expect("certificates")
}

/// Whether a host that trusts `root` takes the certificate, as another host's or as a user's.
fn trusted(root: &str, issued: &Issued, now: UnixMillis) -> Result<(), rustls::Error> {
    verifier(root).verify_client_cert(&chain(issued)[0], &chain(issued)[1..], time(now)).map(|_| ())
}

fn verifier(root: &str) -> Arc<dyn ClientCertVerifier> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(root.as_bytes()).expect("root")).expect("added");
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::new(aws_lc_rs::default_provider())).build().expect("verifier")
}

fn time(now: UnixMillis) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_millis(now.0))
}

#[test]
fn a_host_gets_its_own_name_whatever_it_asks_for() {
    let place = Place::new();
    let authority = place.open();
    let (key, pem) = request(&["controller.godwit", "h2.host.godwit"]);
    let h1 = Name::new("h1").expect("name");
    let issued = authority.sign_host(&h1, &pem, now()).expect("signed");
    let der = chain(&issued)[0].clone();
    assert_eq!(host_of(&der), Some(h1.clone()));
    assert_eq!(key_of(&der), Some(issued.key.clone()));
    assert_eq!(key_of(&der), Some(key_hash(&key.subject_public_key_info())));
    let (_, parsed) = X509Certificate::from_der(&der).expect("certificate");
    assert!(!parsed.is_ca());
    let usage = parsed.extended_key_usage().expect("readable").expect("there").value;
    assert!(usage.server_auth && usage.client_auth && !usage.any);
    let days = parsed.validity().time_to_expiration().expect("valid").whole_days();
    assert!((29..=30).contains(&days), "{days} days");
    for bad in ["", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"] {
        assert_eq!(authority.sign_host(&h1, bad, now()).err().expect("refused").code, ErrorCode::BadRequest);
    }
    trusted(authority.pem(), &issued, now()).expect("a peer takes it");
}

#[test]
fn the_authority_survives_a_restart_and_a_copy_of_its_directory_opens_nothing() {
    let place = Place::new();
    let first = Authority::open(&place.files(), &["10.77.0.254".into(), "godwit.example.org".into()], now()).expect("authority");
    let again = place.open();
    assert_eq!(first.fingerprint(), again.fingerprint());
    assert_eq!(first.fingerprint().len(), 64);
    for entry in fs::read_dir(place.data("")).expect("data") {
        let path = entry.expect("entry").path();
        let text = fs::read_to_string(&path).expect("text");
        assert!(!text.contains("PRIVATE KEY"), "{} holds a key in clear text", path.display());
        let mode = fs::metadata(&path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode, if path.ends_with("ca.pem") { 0o644 } else { 0o600 }, "{}", path.display());
    }
    // A copy without the secret, and one with another secret.
    fs::rename(place.dir.path().join("data.key"), place.dir.path().join("kept")).expect("taken away");
    assert!(matches!(place.open_at(now()), Err(AuthorityError::Seal(SealError::Missing { .. }))));
    sealed::Secret::create(&place.dir.path().join("data.key")).expect("another");
    assert!(matches!(place.open_at(now()), Err(AuthorityError::Seal(SealError::Closed { .. }))));
    fs::rename(place.dir.path().join("kept"), place.dir.path().join("data.key")).expect("put back");
    let other = Place::new();
    other.open();
    fs::copy(other.data("ca.pem"), place.data("ca.pem")).expect("copy");
    assert!(matches!(place.open_at(now()), Err(AuthorityError::Mismatch { .. })));
}

#[test]
fn the_roots_key_leaves_the_machine_and_comes_back_to_sign() {
    let place = Place::new();
    let first = place.open();
    let h1 = Name::new("h1").expect("name");
    let (_, pem) = request(&["x"]);
    let before = first.sign_host(&h1, &pem, now()).expect("signed");
    let files = place.files();
    let out = place.dir.path().join("usb.pem");
    assert!(matches!(files.export_root(&place.data("root.pem")), Err(AuthorityError::Inside { .. })));
    files.export_root(&out).expect("exported");
    assert_eq!(fs::metadata(&out).expect("there").permissions().mode() & 0o777, 0o600);
    assert!(!place.data("root.sealed").exists() && !files.show().expect("view").root_key_here);
    assert!(matches!(files.export_root(&place.dir.path().join("again.pem")), Err(AuthorityError::RootAway)));
    // Without it everything goes on, but nobody can make an intermediate.
    assert_eq!(place.open().fingerprint(), first.fingerprint());
    assert!(matches!(files.rotate_intermediate(None, now()), Err(AuthorityError::RootAway)));
    let stranger = Place::new();
    stranger.open();
    stranger.files().export_root(&stranger.dir.path().join("usb.pem")).expect("exported");
    let foreign = files.rotate_intermediate(Some(&stranger.dir.path().join("usb.pem")), now());
    assert!(matches!(foreign, Err(AuthorityError::Mismatch { .. })), "a foreign root signed");

    let old = files.show().expect("view");
    files.rotate_intermediate(Some(&out), now()).expect("rotated");
    let new = files.show().expect("view");
    assert_ne!(old.intermediate, new.intermediate);
    assert_eq!((&old.fingerprint, new.root_key_here), (&new.fingerprint, false));
    let second = place.open();
    let after = second.sign_host(&h1, &pem, now()).expect("signed");
    assert_ne!(chain(&before)[1], chain(&after)[1]);
    for issued in [&before, &after] {
        trusted(first.pem(), issued, now()).expect("old and new are trusted");
    }
    // A lost secret is no loss while the root's key can be brought.
    fs::remove_file(place.dir.path().join("data.key")).expect("lost");
    assert!(matches!(place.open_at(now()), Err(AuthorityError::Seal(SealError::Missing { .. }))));
    files.rotate_intermediate(Some(&out), now()).expect("rotated");
    assert_eq!(place.open().fingerprint(), first.fingerprint());
}

#[test]
fn an_intermediate_is_renewed_in_time_where_the_root_is_and_refused_at_its_end_where_it_is_not() {
    let place = Place::new();
    let began = now();
    place.open_at(began).expect("authority");
    let number = || place.files().show().expect("view").intermediate;
    let first = number();
    place.open_at(later(began, 300)).expect("authority");
    assert_eq!(number(), first);
    let authority = place.open_at(later(began, 400)).expect("authority");
    assert_ne!(number(), first, "it was past its half");
    assert_eq!(authority.ends_soon(later(began, 400)), None);
    place.files().export_root(&place.dir.path().join("usb.pem")).expect("exported");
    let late = later(began, 400 + 720);
    let authority = place.open_at(late).expect("it still serves");
    assert!(authority.ends_soon(late).is_some());
    let issued = authority.sign_host(&Name::new("h1").expect("name"), &request(&["x"]).1, late).expect("signed");
    let (_, ends) = validity_of(&chain(&issued)[0]).expect("validity");
    assert_eq!(Some(ends), place.files().show().expect("view").intermediate_ends, "it outlives what signed it");
    assert!(matches!(place.open_at(later(began, 400 + 731)), Err(AuthorityError::Unbelievable(_))));
}

/// As the controller made it before there was an intermediate.
fn old_authority(place: &Place) -> (KeyPair, String) {
    let key = KeyPair::generate().expect("key");
    let mut params = root_params(now());
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let pem = params.self_signed(&key).expect("signed").pem();
    fs::write(place.data("ca.key"), key.serialize_pem()).expect("key");
    fs::write(place.data("ca.pem"), &pem).expect("certificate");
    (key, pem)
}

#[test]
fn an_authority_of_before_there_was_an_intermediate_becomes_the_root() {
    let place = Place::new();
    let (key, old_pem) = old_authority(&place);
    let old = Issuer::from_ca_cert_pem(&old_pem, key).expect("issuer");
    let host = KeyPair::generate().expect("key");
    let h1 = SanType::DnsName(dns("h1.host.godwit"));
    let mut params = leaf_params(vec![h1], "h1", (HOST_LIFETIME, UnixMillis(u64::MAX)), now());
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let leaf = params.signed_by(&host, &old).expect("signed");
    let authority = place.open();
    assert!(!place.data("ca.key").exists());
    // Hosts of before hold the old certificate; theirs is of it.
    verifier(authority.pem()).verify_client_cert(leaf.der(), &[], time(now())).expect("an old host is trusted");
    let fresh = authority.sign_host(&Name::new("h2").expect("name"), &request(&["x"]).1, now()).expect("signed");
    trusted(&old_pem, &fresh, now()).expect("an old host trusts a new one");
    let serving = authority.serving.read().expect("lock").clone();
    believable(&CertificateDer::from_pem_slice(old_pem.as_bytes()).expect("old"), &serving, now()).expect("and the controller");
    assert_eq!(place.open().fingerprint(), authority.fingerprint());
}

#[test]
fn a_takeover_that_was_cut_off_goes_on() {
    let place = Place::new();
    let (key, _) = old_authority(&place);
    // Everything was done but the removal.
    place.open();
    let made = fs::read_to_string(place.data("ca.pem")).expect("certificate");
    fs::write(place.data("ca.key"), key.serialize_pem()).expect("key");
    place.open();
    assert!(!place.data("ca.key").exists());
    trusted(&made, &place.open().sign_host(&Name::new("h1").expect("name"), &request(&["x"]).1, now()).expect("signed"), now())
        .expect("the same root");
}

#[test]
fn a_certificate_that_ended_passes_the_handshake_for_its_grace_and_a_foreign_one_never() {
    let place = Place::new();
    let began = now();
    let authority = place.open_at(began).expect("authority");
    let issued = authority.sign_host(&Name::new("h1").expect("name"), &request(&["x"]).1, began).expect("signed");
    let shake = |issued: &Issued, at| {
        let graced = WithGrace::new(verifier(authority.pem()));
        graced.verify_client_cert(&chain(issued)[0], &chain(issued)[1..], time(at)).map(|_| ())
    };
    for days in [0, 29, 31, 119] {
        shake(&issued, later(began, days)).unwrap_or_else(|error| panic!("after {days} days: {error}"));
    }
    assert!(shake(&issued, later(began, 121)).is_err(), "there is no end to it");
    assert!(trusted(authority.pem(), &issued, later(began, 31)).is_err(), "another host takes what has ended");
    let stranger = Place::new();
    let foreign = stranger.open_at(began).expect("authority");
    let foreign = foreign.sign_host(&Name::new("h1").expect("name"), &request(&["x"]).1, began).expect("signed");
    for days in [0, 31] {
        assert!(shake(&foreign, later(began, days)).is_err(), "a foreign certificate passed after {days} days");
    }
}

#[test]
fn only_names_and_addresses_are_advertised() {
    let place = Place::new();
    for bad in ["", "a b", "https://x", "ä"] {
        let refused = Authority::open(&place.files(), &[bad.into()], now());
        assert!(matches!(refused, Err(AuthorityError::Advertised { .. })), "{bad:?} was accepted");
    }
}

#[test]
fn the_controllers_certificate_is_replaced_without_a_restart() {
    let place = Place::new();
    let authority = Authority::open(&place.files(), &["10.1.2.3".into()], now()).expect("authority");
    let leaf = |authority: &Authority| authority.serving.read().expect("lock").cert.first().expect("leaf").clone();
    let before = leaf(&authority);
    authority.renew(now()).expect("renewed");
    assert_ne!(before, leaf(&authority));
    assert_eq!(host_of(&before), None, "the controller must not pass for a host");
}

#[test]
fn a_grant_counts_by_the_root_alone_after_a_renewal_too() {
    let place = Place::new();
    let authority = place.open();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).expect("root")).expect("root");
    let roots = Arc::new(roots);
    let grant = Grant {
        vm: godwit_model::VmId::new(uuid::Uuid::from_u128(7)),
        generation: godwit_model::Generation(3),
        source: None,
        destination: Name::new("h1").expect("name"),
        task: godwit_model::TaskId::new(uuid::Uuid::from_u128(9)),
        expires: later(now(), 1),
    };
    let read = |signed: &v1::Signed| {
        let validity = statement::Validity::At(now());
        let (statement, _) = statement::open(Purpose::Grant, signed, CONTROLLER, &roots, validity).expect("it counts");
        serde_json::from_slice::<Grant>(statement).expect("a grant")
    };
    let before = authority.grant(&grant).expect("signed");
    authority.renew(now()).expect("renewed");
    let after = authority.grant(&grant).expect("signed");
    assert_ne!(before.chain, after.chain);
    assert_eq!((read(&before), read(&after)), (grant.clone(), grant));
}
