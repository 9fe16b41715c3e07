//! What the API refuses, with code, reason and fix, and without a trace. No guest is booted here.

use anyhow::{Context, Result, ensure};
use godwit_api::client::{Client, ClientError};
use godwit_api::v1::MAX_BODY;
use godwit_e2e::{Cluster, ClusterSpec};
use godwit_model::{ErrorCode, ImportFormat, Name, Refusal};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

/// Sends what no typed method would.
fn send(cluster: &Cluster, client: &Client, method: Method, path: &str, body: Option<Vec<u8>>) -> Result<(StatusCode, Refusal)> {
    let mut request = client.request(method, path);
    if let Some(body) = body {
        request = request.header("content-type", "application/json").body(body);
    }
    cluster.block_on(async {
        let response = request.send().await?;
        let status = response.status();
        let text = response.text().await?;
        Ok((status, serde_json::from_str(&text).with_context(|| format!("{status} with no refusal: {text}"))?))
    })
}

fn vm(name: &str, kernel: &str) -> Value {
    json!({ "name": name, "spec": { "vcpus": 1, "memory": 134_217_728, "boot": { "from": "kernel", "kernel": kernel } } })
}

struct Bad {
    proves: &'static str,
    method: Method,
    path: String,
    body: Option<Value>,
    status: u16,
    codes: &'static [ErrorCode],
}

fn bad(proves: &'static str, method: Method, path: &str, body: Option<Value>, status: u16, codes: &'static [ErrorCode]) -> Bad {
    Bad { proves, method, path: path.to_owned(), body, status, codes }
}

#[test]
fn a_request_that_cannot_be_right_is_refused_with_code_and_fix_and_changes_nothing() -> Result<()> {
    use ErrorCode::{BadRequest, BodyTooLarge, ImageInvalid, NameInvalid, NotFound};
    let cluster = ClusterSpec::new(1)?.up()?;
    let (get, post, put, delete) = (Method::GET, Method::POST, Method::PUT, Method::DELETE);
    let named: &[ErrorCode] = &[NameInvalid, BadRequest];
    let long = format!("/vms/{}", "x".repeat(64));
    let table = [
        bad("an unknown VM is not found", get.clone(), "/vms/nobody", None, 404, &[NotFound]),
        bad("an unknown VM cannot be started", post.clone(), "/vms/nobody/start", Some(json!({})), 404, &[NotFound]),
        bad("an unknown VM cannot be moved", post.clone(), "/vms/nobody/migrate", Some(json!({"host": "h1"})), 404, &[NotFound]),
        bad("an unknown VM cannot be deleted", delete.clone(), "/vms/nobody", None, 404, &[NotFound]),
        bad("an unknown host is not found", get.clone(), "/hosts/nowhere", None, 404, &[NotFound]),
        bad("an unknown image is not found", get.clone(), "/images/nothing", None, 404, &[NotFound]),
        bad("an unknown image cannot be deleted", delete, "/images/nothing", None, 404, &[NotFound]),
        bad("a VM of an unknown image is refused", post.clone(), "/vms", Some(vm("a", "nothing")), 404, &[NotFound]),
        bad("an unknown task is not found", get.clone(), "/tasks/00000000-0000-4000-8000-000000000000", None, 404, &[NotFound]),
        bad("a name with a path separator is refused", post.clone(), "/vms", Some(vm("a/b", "k")), 400, named),
        bad("a name that climbs is refused", post.clone(), "/vms", Some(vm("../a", "k")), 400, named),
        bad("a name with a control character is refused", post.clone(), "/vms", Some(vm("a\u{1b}[2J", "k")), 400, named),
        bad("a name with a newline is refused", post.clone(), "/vms", Some(vm("a\nb", "k")), 400, named),
        bad("a path separator in a path is no way out", get.clone(), "/vms/..%2F..%2Fetc", None, 400, named),
        bad("a control character in a path is refused", get.clone(), "/vms/a%00b", None, 400, named),
        bad("a name that is too long is refused", get, &long, None, 400, named),
        bad("an image's name with a path separator is refused", put, "/images/..%2Fx?kind=kernel", None, 400, named),
        bad(
            "an unknown field is refused",
            post.clone(),
            "/teams",
            Some(json!({"name": "t", "colour": "blue"})),
            400,
            &[BadRequest],
        ),
        bad(
            "a body over the limit is refused",
            post,
            "/teams",
            Some(json!({"name": "t", "padding": "x".repeat(MAX_BODY)})),
            413,
            &[BodyTooLarge],
        ),
    ];
    for Bad { proves, method, path, body, status, codes } in table {
        let body = body.map(|body| serde_json::to_vec(&body)).transpose()?;
        let (got, refusal) = send(&cluster, cluster.client(), method, &path, body).context(proves)?;
        ensure!(got.as_u16() == status && codes.contains(&refusal.code), "{proves}: {got} {refusal:?}");
        ensure!(refusal.hint.is_some(), "{proves}: no fix in {refusal:?}");
        ensure!(!refusal.message.chars().any(char::is_control), "{proves}: control characters come back: {refusal:?}");
    }

    let name = Name::new("bad")?;
    let backing = [b"QFI\xfb\0\0\0\x03".as_slice(), &[0, 0, 0, 0, 0, 0, 0, 104, 0, 0, 0, 4], &[0; 512]].concat();
    for (proves, kind, content) in [
        ("zeros are no kernel", ImportFormat::Kernel, vec![0; 4096]),
        ("zeros are no initramfs", ImportFormat::Initrd, vec![0; 4096]),
        ("zeros are no qcow2", ImportFormat::Qcow2, vec![0; 4096]),
        ("a qcow2 that refers to another file is refused", ImportFormat::Qcow2, backing),
        ("nothing is no image", ImportFormat::Raw, vec![]),
    ] {
        let refusal = cluster.import(&name, kind, content).err().context(proves)?;
        ensure!(refusal.code == ImageInvalid && refusal.hint.is_some(), "{proves}: {refusal:?}");
    }

    ensure!(cluster.ask(cluster.client().vms())?.is_empty(), "a VM was made");
    ensure!(cluster.ask(cluster.client().images())?.is_empty(), "an image was kept");
    cluster.finish()
}

#[test]
fn nobody_gets_in_without_a_valid_token_and_nobody_is_trusted_without_the_clusters_certificate() -> Result<()> {
    let cluster = ClusterSpec::new(1)?.up()?;
    let endpoint = cluster.client().endpoint().clone();
    for token in ["", "gwt.nonsense", &format!("{}x", endpoint.token)] {
        let stranger = Client::new(godwit_api::client::Endpoint { token: token.to_owned(), ..endpoint.clone() })?;
        let (status, refusal) = send(&cluster, &stranger, Method::GET, "/vms", None)?;
        ensure!(status.as_u16() == 401 && refusal.code == ErrorCode::Unauthenticated, "{token:?}: {status} {refusal:?}");
        ensure!(refusal.hint.is_some(), "no fix in {refusal:?}");
    }
    // A client that trusts another authority does not even say its token.
    let other = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()])?;
    let deceived = Client::new(godwit_api::client::Endpoint { authority: Some(other.cert.pem()), ..endpoint })?;
    let error = cluster.block_on(deceived.vms()).err().context("a foreign certificate was trusted")?;
    ensure!(matches!(error, ClientError::Unreachable { .. }), "{error:?}");
    cluster.finish()
}
