//! Who is believed: join tokens, and the certificates of hosts.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context, Result, ensure};
use godwit_api::v1::JoinTokenCreate;
use godwit_e2e::{Cluster, ClusterSpec, GuestSpec, godwit_binary};
use godwit_lab::in_namespace;
use godwit_lab::layout::{CONTROLLER_ADDRESS, LINK_PORT};
use godwit_link::certificate::CONTROLLER;
use godwit_link::status::refusal_of;
use godwit_link::v1::agent_message::Body;
use godwit_link::v1::link_client::LinkClient;
use godwit_link::v1::{AgentMessage, FetchImageRequest, Hello, Holding, RunState, VmReport};
use godwit_model::{ErrorCode, HostLoad, MigrationPolicy, Millis, Name};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

/// Runs `godwit host join` in a namespace of the lab, with a state directory of its own; what it printed when it refused.
fn join(cluster: &Cluster, name: &str, token: &str) -> Result<Result<(), String>> {
    let dir = cluster.lab_status()?.dir.join(format!("join-{name}"));
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("token"), token)?;
    let mut command = Command::new(godwit_binary()?);
    command
        .args(["host", "join", "--controller", &format!("{CONTROLLER_ADDRESS}:{LINK_PORT}")])
        .args(["--name", name, "--address", "10.77.0.99", "--token-file"])
        .arg(dir.join("token"))
        .arg("--state-dir")
        .arg(dir.join("state"));
    let output = in_namespace(&cluster.lab().outside_namespace(), || command.output())??;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let identity = dir.join("state/identity");
    if output.status.success() {
        ensure!(identity.join("host.json").is_file(), "joined, but without an identity");
    } else {
        ensure!(!identity.exists(), "refused, but an identity is left");
    }
    fs::remove_dir_all(&dir)?;
    Ok(if output.status.success() { Ok(()) } else { Err(said) })
}

#[test]
fn a_join_token_is_good_once_for_one_host_and_for_its_time() -> Result<()> {
    let cluster = ClusterSpec::new(1)?.up()?;
    let token = |host: &str, lifetime: Option<Millis>| -> Result<String> {
        let request = JoinTokenCreate { host: Name::new(host)?, lifetime, rejoin: false };
        Ok(cluster.ask(cluster.client().create_join_token(&request))?.token)
    };
    let refused = |proves: &str, joined: Result<(), String>, words: &str| -> Result<()> {
        let said = joined.err().with_context(|| format!("{proves}: joined"))?;
        ensure!(said.contains(words), "{proves}: it said {said:?}");
        Ok(())
    };
    let once = token("x1", None)?;
    refused("a token for another host", join(&cluster, "x2", &once)?, "token_invalid")?;
    join(&cluster, "x1", &once)?.map_err(anyhow::Error::msg)?;
    refused("a token used twice", join(&cluster, "x1", &once)?, "token_used")?;
    refused("an expired token", join(&cluster, "x3", &token("x3", Some(Millis(0)))?)?, "token_expired")?;
    refused("a token that nobody made", join(&cluster, "x4", &once.replace("gwj.", "gwj.0"))?, "token_invalid")?;
    let other = once.rsplit_once('.').map(|(head, _)| format!("{head}.{}", "00".repeat(32))).context("a token has parts")?;
    let said = join(&cluster, "x1", &other)?.err().context("a token of another cluster: joined")?;
    ensure!(said.contains("certificate_refused"), "a token of another cluster: it said {said:?}");
    cluster.finish()
}

/// A channel to the controller with these credentials, from the outside namespace.
async fn channel(namespace: String, authority: String, pair: String) -> Result<Channel> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.as_bytes())?)?;
    let chain = CertificateDer::pem_slice_iter(pair.as_bytes()).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(pair.as_bytes())?;
    let mut config = rustls::ClientConfig::builder().with_root_certificates(roots).with_client_auth_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let service = tower::service_fn(move |_: tonic::transport::Uri| {
        let (namespace, connector) = (namespace.clone(), connector.clone());
        async move {
            let connect = || std::net::TcpStream::connect((CONTROLLER_ADDRESS, LINK_PORT));
            let tcp = in_namespace(&namespace, connect).map_err(io::Error::other)??;
            tcp.set_nonblocking(true)?;
            let name = ServerName::try_from(CONTROLLER).map_err(io::Error::other)?;
            Ok::<_, io::Error>(TokioIo::new(connector.connect(name, tokio::net::TcpStream::from_std(tcp)?).await?))
        }
    });
    Ok(Endpoint::from_static("http://controller").connect_with_connector(service).await?)
}

#[test]
fn a_hosts_certificate_gets_and_says_nothing_about_another_hosts_vm() -> Result<()> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    let guest = cluster.boot(&GuestSpec::small("mine"), "h1")?;
    let image = cluster.ask(cluster.client().image(&Name::new("guest-kernel")?))?.id;
    let identity: PathBuf = cluster.lab_status()?.dir.join("h2/state/identity");
    let (authority, pair) = (fs::read_to_string(identity.join("ca.pem"))?, fs::read_to_string(identity.join("pair.pem"))?);
    // Whoever stole it speaks in the place of the agent.
    cluster.lab().agent("h2")?.crash()?;
    cluster.wait_connected("h2", false)?;
    cluster.expect_log("not_granted");
    let namespace = cluster.lab().outside_namespace();
    cluster.block_on(async {
        let mut client = LinkClient::new(channel(namespace.clone(), authority.clone(), pair).await?);
        let refused = client.fetch_image(FetchImageRequest { image: image.to_string() }).await;
        let refusal = refusal_of(&refused.err().context("it got the image of another host's VM")?);
        ensure!(refusal.code == ErrorCode::NotGranted, "{refusal:?}");

        let host = cluster.client().host(&Name::new("h2")?).await?;
        let lie = VmReport {
            vm: guest.id.to_string(),
            generation: 1_000,
            state: RunState::Crashed.into(),
            holding: Holding::Owner.into(),
            detail: "mine now".into(),
            ended_with_host: false,
            blocked: vec![],
        };
        let hello = Hello {
            protocol: godwit_link::PROTOCOL,
            address: host.address,
            facts: godwit_link::encode(&host.facts.context("h2 has been there")?),
            load: godwit_link::encode(&HostLoad::default()),
            vms: vec![lie.clone()],
            epoch: 0,
            migration_address: String::new(),
            epoch_id: String::new(),
            mark: 0,
            members: vec![],
        };
        let said = [Body::Hello(hello), Body::Vm(VmReport { generation: 1, ..lie })].map(|body| AgentMessage { body: Some(body) });
        let mut answers = client.attend(tokio_stream::iter(said)).await?.into_inner();
        // Everything is taken in by the time the stream is over.
        while answers.message().await?.is_some() {}
        Ok(())
    })?;
    let vm = cluster.ask(cluster.client().vm(&guest.name))?;
    ensure!(vm.status.host.as_ref().is_some_and(|host| host.as_str() == "h1"), "the lie was believed: {:?}", vm.status);
    ensure!(vm.status.state == godwit_model::RunState::Running, "the lie was believed: {:?}", vm.status);

    let forged = rcgen::generate_simple_self_signed(vec!["h1.host.godwit".into()])?;
    let forged = format!("{}\n{}", forged.cert.pem(), forged.signing_key.serialize_pem());
    let attempt = cluster.block_on(async {
        let mut client = LinkClient::new(channel(namespace, authority, forged).await?);
        Ok::<_, anyhow::Error>(client.fetch_image(FetchImageRequest { image: image.to_string() }).await?.into_inner())
    });
    ensure!(attempt.is_err(), "a certificate of no authority was accepted");
    cluster.lab().agent("h2")?.spawn()?;
    cluster.wait_connected("h2", true)?;
    cluster.migrate("mine", "h2")?;
    cluster.finish()
}

/// Waits for what is so at some time.
fn until(what: &str, mut so: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !so()? {
        ensure!(begun.elapsed() < Duration::from_secs(120), "it never came about: {what}");
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

#[test]
fn hosts_outlast_a_controller_that_is_away_for_longer_than_their_certificates() -> Result<()> {
    const LIFE: Duration = Duration::from_secs(20);
    let mut cluster = ClusterSpec::new(1)?.serve(&["--host-lifetime", "20s"]).up()?;
    let guest = cluster.boot(&GuestSpec::small("stays"), "h1")?;
    let pair: PathBuf = cluster.lab_status()?.dir.join("h1/state/identity/pair.pem");
    let first = fs::read(&pair)?;
    until("the agent renews in time", || Ok(fs::read(&pair)? != first))?;
    cluster.lab().controller().crash()?;
    let last = fs::read(&pair)?;
    until("its certificate ends", || Ok(fs::metadata(&pair)?.modified()?.elapsed()? > LIFE + Duration::from_secs(2)))?;
    ensure!(fs::read(&pair)? == last, "it was renewed by nobody");
    cluster.lab().controller().spawn()?;
    cluster.wait_connected("h1", true)?;
    ensure!(fs::read(&pair)? != last, "it is connected with what has ended");
    ensure!(cluster.ask(cluster.client().vm(&guest.name))?.status.state == godwit_model::RunState::Running);
    cluster.finish()
}

#[test]
fn a_removed_host_is_shut_out_until_it_joins_again_with_what_it_holds() -> Result<()> {
    let mut cluster = ClusterSpec::new(2)?.up()?;
    let guest = cluster.boot(&GuestSpec::small("kept"), "h2")?;
    let (h2, state) = (Name::new("h2")?, cluster.lab_status()?.dir.join("h2/state"));
    let refused = cluster.ask(cluster.client().delete_host(&h2, false)).err().context("removed with a VM on it")?;
    ensure!(refused.code == ErrorCode::InUse, "{refused:?}");
    cluster.ask(cluster.client().delete_host(&h2, true))?;
    let log = cluster.lab().agent("h2")?.log()?;
    until("the agent is told", || Ok(fs::read_to_string(&log)?.contains("no longer of this cluster")))?;
    let refused = cluster.begin_move("kept", "h1", MigrationPolicy::default()).err().context("it can still be moved")?;
    ensure!(refused.code == ErrorCode::HostDown, "{refused:?}");

    cluster.lab().agent("h2")?.crash()?;
    let request = JoinTokenCreate { host: h2, lifetime: None, rejoin: false };
    let token = cluster.ask(cluster.client().create_join_token(&request))?.token;
    let file = state.join("token");
    fs::write(&file, token)?;
    let address = godwit_lab::layout::host_address(2);
    let mut command = Command::new(godwit_binary()?);
    command
        .args(["host", "join", "--rejoin", "--controller", &format!("{CONTROLLER_ADDRESS}:{LINK_PORT}"), "--name", "h2"])
        .args(["--address", &address.to_string(), "--token-file"])
        .arg(&file)
        .arg("--state-dir")
        .arg(&state);
    let output = in_namespace(&cluster.lab().outside_namespace(), || command.output())??;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::remove_file(&file)?;
    cluster.lab().agent("h2")?.spawn()?;
    cluster.wait_connected("h2", true)?;
    ensure!(cluster.host_of("kept")? == "h2");
    cluster.migrate("kept", "h1")?;
    ensure!(cluster.host_of(guest.name.as_str())? == "h1");
    cluster.finish()
}
