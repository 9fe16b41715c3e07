//! Every operation of the description: without a principal, as a foreign team, and with garbage.

use std::collections::BTreeMap;

use godwit_api::client::Client;
use godwit_api::v1::{PolicyCreate, Role, ScheduleCreate, SnapshotState, VmDelete};
use godwit_model::{Bytes, MigrationSettings, Millis, Refusal, ScheduleSpec, SnapshotFigures};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::support::*;

/// An operation of the served description.
pub(super) struct Operation {
    pub(super) id: String,
    pub(super) method: Method,
    /// With its parameters in braces, without `/v1`.
    pub(super) path: String,
    pub(super) described: Value,
}

pub(super) async fn operations(client: &Client) -> (Value, Vec<Operation>) {
    let description: Value = client.request(Method::GET, "/openapi.json").send().await.expect("answer").json().await.expect("JSON");
    let mut operations = Vec::new();
    for (path, item) in description["paths"].as_object().expect("paths") {
        for (method, described) in item.as_object().expect("item") {
            operations.push(Operation {
                id: described["operationId"].as_str().expect("operationId").to_owned(),
                method: method.to_uppercase().parse().expect("method"),
                path: path.strip_prefix("/v1").expect("under /v1").to_owned(),
                described: described.clone(),
            });
        }
    }
    assert!(operations.len() >= 32, "{} operations", operations.len());
    (description, operations)
}

async fn refusal(response: reqwest::Response, what: &str) -> (StatusCode, Refusal) {
    let status = response.status();
    let body = response.bytes().await.expect("body");
    let refusal: Refusal =
        serde_json::from_slice(&body).unwrap_or_else(|_| panic!("{what}: {status} {}", String::from_utf8_lossy(&body)));
    assert!(!refusal.message.chars().any(char::is_control), "{what}: {refusal:?}");
    assert!(refusal.hint.is_some(), "{what}: no fix in {refusal:?}");
    (status, refusal)
}

/// A path with the objects that the tests make; tasks and tokens by id.
fn filled(path: &str, task: &str, token: &str) -> String {
    path.replace("{vm}", "web1")
        .replace("{image}", "linux")
        .replace("{host}", "h1")
        .replace("{pool}", "shared")
        .replace("{network}", "lan")
        .replace("{policy}", "gold")
        .replace("{snapshot}", "first")
        .replace("{schedule}", "nightly")
        .replace("{team}", "default")
        .replace("{task}", task)
        .replace("{token}", token)
}

#[tokio::test]
async fn every_operation_demands_a_principal() {
    let cluster = Cluster::new().await;
    let (_, operations) = operations(&cluster.client_with("")).await;
    let mut open = Vec::new();
    for token in ["", "gwt", "gwt.x.y", &format!("gwt.{}.{}", uuid::Uuid::new_v4(), "0".repeat(64))] {
        for operation in &operations {
            let client = cluster.client_with(token);
            let path = filled(&operation.path, "x", "x");
            let response = client.request(operation.method.clone(), &path).body("garbage").send().await.expect("answer");
            if response.status().is_success() {
                open.push(operation.id.clone());
                continue;
            }
            let (status, refusal) = refusal(response, &operation.id).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{}: {refusal}", operation.id);
            assert!(refusal.hint.is_some());
        }
    }
    open.dedup();
    assert_eq!(open, ["health"; 1], "these answer without a principal");
}

#[tokio::test]
async fn no_operation_shows_or_changes_what_belongs_to_a_foreign_team() {
    let cluster = Cluster::new().await;
    let (_, mut agent) = cluster.agent("h1").await;
    cluster.running_vm("web1", &mut agent).await;
    let admin = cluster.admin();
    let task = admin.tasks().await.expect("tasks").first().expect("the start").id.to_string();
    let token = admin.tokens().await.expect("tokens").first().expect("admin").id.to_string();
    let keep = serde_json::from_value(json!({"vm": "web1", "name": "first"})).expect("a request");
    let taking = admin.create_snapshot(&keep).await.expect("accepted");
    let command = agent.command().await;
    agent.tell(&command, &SnapshotFigures::default()).await;
    cluster.ended(taking.id).await;
    let before = admin.vm(&name("web1")).await.expect("vm");
    let first = admin.snapshot(&name("first")).await.expect("snapshot");
    assert_eq!(first.state, SnapshotState::Ready);
    let lan = admin.create_network(&network("lan")).await.expect("network");
    let limits = MigrationSettings { max_blackout: Some(Millis(70)), ..MigrationSettings::default() };
    let gold = admin.create_policy(&PolicyCreate { name: name("gold"), labels: BTreeMap::new(), limits }).await.expect("policy");
    let spec = ScheduleSpec { enabled: false, ..ScheduleSpec::new("@daily") };
    let nightly = admin.create_schedule(&ScheduleCreate { name: name("nightly"), spec }).await.expect("schedule");
    let (_, operations) = operations(&admin).await;
    for role in [Role::Viewer, Role::Operator] {
        let foreign = cluster.member("red", role).await;
        for operation in &operations {
            for team in ["", "?team=default"] {
                let what = format!("{} as {role:?} {team}", operation.id);
                let path = format!("{}{team}", filled(&operation.path, &task, &token));
                let body = body_for(&operation.id);
                // What ends never, or makes something of one's own.
                let makes = matches!(operation.id.as_str(), "image_fetch" | "policy_create" | "schedule_create");
                let own = makes && team.is_empty() && role == Role::Operator;
                if own || matches!(operation.id.as_str(), "event_watch" | "image_import") {
                    continue;
                }
                let response = foreign.request(operation.method.clone(), &path).json(&body).send().await.expect("answer");
                if response.status().is_success() {
                    let text = response.text().await.expect("text");
                    assert_eq!(operation.method, Method::GET, "{what} changed something");
                    assert!(
                        !text.contains("web1")
                            && !text.contains("linux")
                            && !text.contains("\"lan\"")
                            && !text.contains("\"gold\"")
                            && !text.contains("\"first\"")
                            && !text.contains("\"nightly\"")
                            && !text.contains(&token),
                        "{what} shows {text}"
                    );
                } else {
                    let (status, refusal) = refusal(response, &what).await;
                    // Hosts and the like have no team: asking for one is asking for what is not there.
                    let cluster_wide = status == StatusCode::BAD_REQUEST && !team.is_empty();
                    assert!(matches!(status.as_u16(), 403 | 404) || cluster_wide, "{what}: {status} {refusal}");
                    let asked = !team.is_empty() || operation.path.contains("{team}");
                    assert!(!refusal.message.contains("default") || cluster_wide || asked, "{what}: {refusal}");
                }
            }
        }
        let import =
            foreign.request(Method::PUT, "/images/linux?kind=kernel&team=default").body(kernel()).send().await.expect("answer");
        assert_eq!(import.status(), 404);
    }
    let after = admin.vm(&name("web1")).await.expect("vm");
    assert_eq!(without_migratable(after), without_migratable(before));
    assert_eq!(admin.snapshot(&name("first")).await.expect("snapshot"), first);
    assert_eq!(admin.network(&name("lan")).await.expect("network"), lan);
    assert_eq!(admin.policy(&name("gold")).await.expect("policy"), gold);
    assert_eq!(admin.schedule(&name("nightly")).await.expect("schedule"), nightly);
}

/// A body that would be accepted of somebody who may.
fn body_for(operation: &str) -> Value {
    match operation {
        "vm_create" => json!({"name": "stolen", "spec": spec(Bytes::mib(64))}),
        "network_create" => json!({"name": "stolen", "kind": {"type": "bridge", "bridge": "br0"}}),
        "policy_create" => json!({"name": "stolen", "limits": {"max_blackout": 1}}),
        "snapshot_create" => json!({"vm": "web1", "memory": false}),
        "snapshot_set" => json!({"golden": true}),
        "snapshot_clone" => json!({"name": "stolen"}),
        "snapshot_rollback" => json!({"discard_present": true}),
        "snapshot_export" => json!({"host": "h1"}),
        "snapshot_import" => json!({"vm": "web1", "from": "shared/stolen"}),
        "schedule_create" => json!({"name": "stolen", "spec": {"when": "@hourly"}}),
        "schedule_set" => json!({"spec": {"when": "@hourly"}}),
        "policy_set" => json!({"limits": {"max_blackout": 1}}),
        "host_set" => json!({"migration_bandwidth": 125_000_000}),
        "network_set" => json!({"mtu": 9000}),
        "task_bandwidth" => json!({"bandwidth": 125_000_000}),
        "vm_migrate" => json!({"host": "h1"}),
        "vm_set" => json!(spec(Bytes::mib(64))),
        "vm_exec" => json!({"program": "/bin/true"}),
        "join_token_create" => json!({"host": "h7"}),
        "image_fetch" => json!({"url": "https://127.0.0.1/x", "kind": "raw"}),
        "team_create" => json!({"name": "blue"}),
        "team_set" => json!({"share_memory": true}),
        "token_create" => json!({"team": "default", "role": "admin"}),
        _ => Value::Null,
    }
}

#[tokio::test]
async fn garbage_is_refused_in_the_one_form_and_breaks_nothing() {
    let cluster = Cluster::new().await;
    cluster.create_vm("web1", Bytes::mib(64)).await;
    let admin = cluster.admin();
    let (_, operations) = operations(&admin).await;
    let bodies: [&[u8]; 7] =
        [b"{\"a\\u001b[2J\": 1}", b"{", b"\xff\xfe", b"[]", b"{\"name\": \"../x\"}", b"{\"unknown\": 1}", b"\"text\""];
    let paths = ["%2e%2e%2fetc", "a%00b", "%ff", "A", &"x".repeat(64), "a%0ab", "%F0%9F%92%A9"];
    for operation in &operations {
        if operation.id == "event_watch" || operation.id == "health" {
            continue;
        }
        for (number, body) in bodies.iter().enumerate() {
            let path = filled(&operation.path, "x", "x");
            let response = admin.request(operation.method.clone(), &path).body(body.to_vec()).send().await.expect("answer");
            if !response.status().is_success() {
                let (status, refusal) = refusal(response, &operation.id).await;
                assert!(
                    status.is_client_error() && status != StatusCode::UNAUTHORIZED,
                    "{} with body {number}: {status} {refusal}",
                    operation.id
                );
            } else {
                // Only what takes no body may be content with any.
                assert!(operation.described.get("requestBody").is_none(), "{} took body {number}", operation.id);
            }
        }
        if operation.path.contains('{') {
            let open = operation.path.find('{').expect("brace");
            let close = operation.path.find('}').expect("brace");
            for name in paths {
                let path = format!("{}{name}{}", &operation.path[..open], &operation.path[close + 1..]);
                let response = admin.request(operation.method.clone(), &path).send().await.expect("answer");
                let (status, refusal) = refusal(response, &operation.id).await;
                assert!(matches!(status.as_u16(), 400 | 404), "{} {path}: {status} {refusal}", operation.id);
            }
        }
    }
    let nobody = uuid::Uuid::nil().to_string();
    let large = format!("{{\"name\": \"{}\"}}", "x".repeat(2 << 20));
    for operation in
        operations.iter().filter(|operation| operation.described.get("requestBody").is_some() && operation.id != "image_import")
    {
        let response = admin
            .request(operation.method.clone(), &filled(&operation.path, &nobody, &nobody))
            .body(large.clone())
            .send()
            .await
            .expect("answer");
        assert_eq!(refusal(response, &operation.id).await.0, StatusCode::PAYLOAD_TOO_LARGE, "{}", operation.id);
        // Without a length that could be looked at.
        let chunks = futures::stream::iter((0..40).map(|_| Ok::<_, std::io::Error>(vec![b' '; 64 << 10])));
        let response = admin
            .request(operation.method.clone(), &filled(&operation.path, &nobody, &nobody))
            .body(reqwest::Body::wrap_stream(chunks))
            .send()
            .await
            .expect("answer");
        assert_eq!(refusal(response, &operation.id).await.0, StatusCode::PAYLOAD_TOO_LARGE, "{} in chunks", operation.id);
    }
    for (method, path, expected) in
        [(Method::GET, "/nothing", 404), (Method::DELETE, "/vms", 405), (Method::PATCH, "/pools/shared", 405)]
    {
        assert_eq!(refusal(admin.request(method, path).send().await.expect("answer"), path).await.0, expected);
    }
    cluster.create_vm("web9", Bytes::mib(64)).await;
    let task = admin.delete_vm(&name("web9"), &VmDelete { volumes: false }).await.expect("it still works");
    cluster.ended(task.id).await;
}
