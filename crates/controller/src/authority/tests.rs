//! The authority: what it signs, for whom, and what it keeps to itself.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::clock::now;

fn request(names: &[&str]) -> (KeyPair, String) {
    let key = KeyPair::generate().expect("key");
    let params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).expect("params");
    let pem = params.serialize_request(&key).expect("request").pem().expect("pem");
    (key, pem)
}

#[test]
fn a_host_gets_its_own_name_whatever_it_asks_for() {
    let dir = tempfile::tempdir().expect("dir");
    let authority = Authority::open(dir.path(), &[], now()).expect("authority");
    let (key, pem) = request(&["controller.godwit", "h2.host.godwit"]);
    let h1 = Name::new("h1").expect("name");
    let issued = authority.sign_host(&h1, &pem, now()).expect("signed");
    let der = CertificateDer::from_pem_slice(issued.certificate.as_bytes()).expect("certificate");
    assert_eq!(host_of(&der), Some(h1.clone()));
    assert_eq!(key_of(&der), Some(issued.key));
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
}

#[test]
fn the_authority_survives_a_restart_and_its_key_is_private() {
    let dir = tempfile::tempdir().expect("dir");
    let first = Authority::open(dir.path(), &["10.77.0.254".into(), "godwit.example.org".into()], now()).expect("authority");
    let again = Authority::open(dir.path(), &[], now()).expect("authority");
    assert_eq!(first.fingerprint(), again.fingerprint());
    assert_eq!(first.fingerprint().len(), 64);
    let mode = fs::metadata(dir.path().join("ca.key")).expect("key").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let other = tempfile::tempdir().expect("dir");
    Authority::open(other.path(), &[], now()).expect("authority");
    fs::copy(other.path().join("ca.pem"), dir.path().join("ca.pem")).expect("copy");
    assert!(matches!(Authority::open(dir.path(), &[], now()), Err(AuthorityError::Mismatch { .. })));
}

#[test]
fn only_names_and_addresses_are_advertised() {
    let dir = tempfile::tempdir().expect("dir");
    for bad in ["", "a b", "https://x", "ä"] {
        let refused = Authority::open(dir.path(), &[bad.into()], now());
        assert!(matches!(refused, Err(AuthorityError::Advertised { .. })), "{bad:?} was accepted");
    }
}

#[test]
fn the_controllers_certificate_is_replaced_without_a_restart() {
    let dir = tempfile::tempdir().expect("dir");
    let authority = Authority::open(dir.path(), &["10.1.2.3".into()], now()).expect("authority");
    let leaf = |authority: &Authority| authority.serving.read().expect("lock").cert.first().expect("leaf").clone();
    let before = leaf(&authority);
    authority.renew(now()).expect("renewed");
    assert_ne!(before, leaf(&authority));
    assert_eq!(host_of(&before), None, "the controller must not pass for a host");
}
