//! Joining towards impostors, and when certificates are renewed.

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;

/// An authority, and a certificate that it gave to who calls itself the controller.
struct Cluster {
    root: CertificateDer<'static>,
    leaf: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

fn cluster() -> Cluster {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let root_key = KeyPair::generate().expect("key");
    let mut params = CertificateParams::new(vec![]).expect("params");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(&root_key).expect("root").der().clone();
    let issuer = Issuer::new(params, root_key);
    let key = KeyPair::generate().expect("key");
    let mut params = CertificateParams::new(vec![godwit_link::certificate::CONTROLLER.to_owned()]).expect("params");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let leaf = params.signed_by(&key, &issuer).expect("signed").der().clone();
    Cluster { root, leaf, key: PrivateKeyDer::try_from(key.serialize_der()).expect("key") }
}

/// Answers one connection with this chain, and hands out whatever came through TLS, as far as TLS came about.
async fn impostor(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> (String, tokio::task::JoinHandle<Vec<u8>>) {
    let config = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).expect("config");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
    let address = listener.local_addr().expect("address").to_string();
    let heard = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.expect("accepted");
        let mut heard = Vec::new();
        if let Ok(mut tls) = TlsAcceptor::from(Arc::new(config)).accept(tcp).await {
            // Its end may be abrupt.
            let _ = tls.read_to_end(&mut heard).await;
        }
        heard
    });
    (address, heard)
}

fn token_of(root: &CertificateDer<'_>) -> JoinToken {
    let authority = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, root);
    let authority = authority.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    JoinToken { id: "00000000-0000-0000-0000-000000000000".parse().expect("id"), secret: "5e".repeat(32), authority }
}

fn options(controller: String, state_dir: &Path, token: &JoinToken) -> JoinOptions {
    JoinOptions {
        controller,
        name: Name::new("h1").expect("name"),
        address: [127, 0, 0, 1].into(),
        migration_address: None,
        state_dir: state_dir.to_owned(),
        token: token.reveal(),
        rejoin: false,
    }
}

#[tokio::test]
async fn a_man_in_the_middle_with_another_certificate_hears_nothing() {
    let (real, other) = (cluster(), cluster());
    let token = token_of(&real.root);
    // A cluster of its own; its own leaf beside the real root, which everybody can have; and the real leaf, without its key.
    let chains = [
        vec![other.leaf.clone(), other.root.clone()],
        vec![other.leaf.clone(), real.root.clone()],
        vec![other.leaf.clone(), other.root.clone(), real.root.clone()],
        vec![other.leaf.clone(), real.leaf.clone(), real.root.clone()],
    ];
    for (number, chain) in chains.into_iter().enumerate() {
        let (address, heard) = impostor(chain, other.key.clone_key()).await;
        let dir = tempfile::tempdir().expect("dir");
        let refused = join(options(address, dir.path(), &token)).await.expect_err("it joined an impostor");
        assert_eq!(refused.refusal().code, ErrorCode::CertificateRefused, "chain {number}: {refused}");
        assert_eq!(heard.await.expect("heard"), b"", "chain {number}: something was said");
        assert!(!dir.path().join("identity").exists(), "chain {number}: an identity is left");
    }
    // The same ears hear the one that the token is for.
    let (address, heard) = impostor(vec![real.leaf.clone(), real.root.clone()], real.key.clone_key()).await;
    let dir = tempfile::tempdir().expect("dir");
    let joined = tokio::time::timeout(Duration::from_secs(2), join(options(address, dir.path(), &token))).await;
    assert!(!matches!(joined, Ok(Ok(_))), "nobody answered");
    assert!(!heard.await.expect("heard").is_empty(), "the test hears nothing at all");
}

#[tokio::test]
async fn joining_again_needs_to_be_said_and_the_agent_to_stand_still() {
    let real = cluster();
    let token = token_of(&real.root);
    let dir = tempfile::tempdir().expect("dir");
    let identity = dir.path().join("identity");
    fs::create_dir(&identity).expect("dir");
    let host = HostFile {
        name: Name::new("h1").expect("name"),
        address: [127, 0, 0, 1].into(),
        migration_address: None,
        controller: "x:1".into(),
    };
    for (name, text) in
        [("host.json", serde_json::to_string(&host).expect("JSON")), ("pair.pem", "p".into()), ("ca.pem", "c".into())]
    {
        fs::write(identity.join(name), text).expect("written");
    }
    let code = async |change: fn(&mut JoinOptions)| {
        // Nothing listens there.
        let mut options = options("127.0.0.1:1".into(), dir.path(), &token);
        change(&mut options);
        join(options).await.expect_err("refused").refusal().code
    };
    assert_eq!(code(|_| {}).await, ErrorCode::NameTaken);
    let other = |options: &mut JoinOptions| {
        options.rejoin = true;
        options.name = Name::new("h2").expect("name");
    };
    assert_eq!(code(other).await, ErrorCode::NameTaken);
    assert_eq!(code(|options| options.rejoin = true).await, ErrorCode::HostDown);
    let _agent = crate::lock(dir.path()).expect("locked");
    assert_eq!(code(|options| options.rejoin = true).await, ErrorCode::InUse);
    assert_eq!(fs::read_to_string(identity.join("pair.pem")).expect("there"), "p", "a refusal changed the identity");
}

#[test]
fn certificates_are_renewed_in_the_middle_of_their_life_and_not_all_at_once() {
    const DAY: i64 = 24 * 3_600;
    let moments: Vec<i64> = (0..200_u32).map(|seed| decide_renewal(0, 30 * DAY, (seed * 7_919).to_le_bytes())).collect();
    assert!(moments.iter().all(|moment| (15 * DAY..=18 * DAY).contains(moment)), "{moments:?}");
    let (first, last) = (moments.iter().min().expect("some"), moments.iter().max().expect("some"));
    assert!(last - first > 2 * DAY, "they come together");
    assert_eq!(decide_renewal(5, 5, [9; 4]), 5);
    assert_eq!(decide_renewal(9, 5, [9; 4]), 9, "nonsense is renewed at once");
}
