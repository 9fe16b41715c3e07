//! The description against reality: what is answered fits what is described.

use godwit_api::v1::{self as api, Role};
use godwit_model::{Bytes, RestoreFigures, SnapshotFigures, VaultFindings, VaultPlan, VaultUsage};
use reqwest::{Method, Response};
use serde_json::{Value, json};

use super::support::*;
use super::walk::{Operation, operations};

/// The schema that the description has for an answer, with everything it refers to.
fn schema(description: &Value, operation: &Operation, status: u16) -> Option<Value> {
    let response = &operation.described["responses"][status.to_string()];
    assert!(response.is_object(), "{} does not describe {status}", operation.id);
    let mut schema = response.get("content")?.as_object()?.values().next()?.get("schema")?.clone();
    schema.as_object_mut()?.insert("components".into(), description["components"].clone());
    Some(schema)
}

struct Contract {
    description: Value,
    operations: Vec<Operation>,
    seen: Vec<String>,
}

impl Contract {
    /// Holds an answer against its description.
    async fn hold(&mut self, id: &str, response: Response, expected: u16) -> Value {
        let operation = self.operations.iter().find(|operation| operation.id == id).unwrap_or_else(|| panic!("no operation {id}"));
        let status = response.status().as_u16();
        let kind = response.headers().get("content-type").and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().to_owned();
        let body = response.bytes().await.expect("body");
        let text = String::from_utf8_lossy(&body);
        assert_eq!(status, expected, "{id}: {text}");
        if !body.is_empty() && kind != "application/json" {
            assert!(operation.described["responses"][status.to_string()]["content"][&kind].is_object(), "{id}: {kind}");
            self.seen.push(id.to_owned());
            return Value::Null;
        }
        self.seen.push(id.to_owned());
        let Some(schema) = schema(&self.description, operation, status) else {
            assert!(body.is_empty(), "{id}: {status} describes no body, but has {text}");
            return Value::Null;
        };
        let value: Value = serde_json::from_slice(&body).unwrap_or_else(|_| panic!("{id}: {text}"));
        let validator = jsonschema::validator_for(&schema).unwrap_or_else(|error| panic!("{id}: {error}"));
        let errors: Vec<String> =
            validator.iter_errors(&value).map(|error| format!("{}: {error}", error.instance_path())).collect();
        assert!(errors.is_empty(), "{id}: {errors:?} in {value}");
        value
    }
}

#[tokio::test]
async fn what_is_answered_fits_what_is_described() {
    let cluster = Cluster::new().await;
    let (_, mut agent) = cluster.agent("h1").await;
    let (_, mut other) = cluster.agent("h2").await;
    cluster.running_vm("web1", &mut agent).await;
    let admin = cluster.admin();
    let (description, operations) = operations(&admin).await;
    let mut contract = Contract { description, operations, seen: vec![] };
    let send = async |method: Method, path: &str, body: Value| {
        let request = admin.request(method, path);
        let request = if body.is_null() { request } else { request.json(&body) };
        request.send().await.expect("answer")
    };
    let (get, post, delete) = (Method::GET, Method::POST, Method::DELETE);
    let null = Value::Null;

    for (id, path) in [
        ("health", "/health"),
        ("host_list", "/hosts"),
        ("host_show", "/hosts/h1"),
        ("pool_list", "/pools"),
        ("pool_show", "/pools/shared"),
        ("network_list", "/networks"),
        ("network_show", "/networks/default"),
        ("image_list", "/images"),
        ("image_show", "/images/linux"),
        ("vm_list", "/vms?limit=1"),
        ("vm_show", "/vms/web1"),
        ("vm_check", "/vms/web1/check"),
        ("vm_history", "/vms/web1/history"),
        ("task_list", "/tasks"),
        ("team_list", "/teams"),
        ("token_list", "/tokens"),
        ("cpu_baseline", "/cluster/cpu-baseline"),
        ("metrics", "/metrics"),
    ] {
        contract.hold(id, send(get.clone(), path, null.clone()).await, 200).await;
    }
    let create = json!({"name": "web2", "spec": spec(Bytes::mib(64))});
    contract.hold("vm_create", send(post.clone(), "/vms", create.clone()).await, 201).await;
    contract.hold("vm_create", send(post.clone(), "/vms", create).await, 409).await;
    contract.hold("vm_show", send(get.clone(), "/vms/nothing", null.clone()).await, 404).await;
    contract.hold("vm_console", send(get.clone(), "/vms/web1/console", null.clone()).await, 400).await;
    let task = contract.hold("vm_migrate", send(post.clone(), "/vms/web1/migrate", json!({"host": "h2"})).await, 202).await;
    let id = task["id"].as_str().expect("id").to_owned();
    contract.hold("task_show", send(get.clone(), &format!("/tasks/{id}"), null.clone()).await, 200).await;
    let limit = json!({"bandwidth": 1_000_000});
    contract.hold("task_bandwidth", send(post.clone(), &format!("/tasks/{id}/bandwidth"), limit).await, 200).await;
    for (operation, path) in [("task_postcopy", "postcopy"), ("task_throttle", "throttle")] {
        contract.hold(operation, send(post.clone(), &format!("/tasks/{id}/{path}"), null.clone()).await, 400).await;
    }
    contract.hold("task_cancel", send(post.clone(), &format!("/tasks/{id}/cancel"), null.clone()).await, 200).await;
    let prepare = other.command().await;
    other.refuse(&prepare, godwit_model::ErrorCode::NotEnoughSpace).await;
    let settle = other.command().await;
    other.done(&settle, 0).await;
    cluster.ended(id.parse().expect("id")).await;
    let run = async {
        let begin = agent.command().await;
        agent.tell(&begin, &7).await;
        let ask = agent.command().await;
        agent.tell(&ask, &json!({"exit_code": 1, "signal": null, "stdout": "", "stderr": "bm8=", "stdout_truncated": false, "stderr_truncated": false})).await;
    };
    let body = json!({"program": "/bin/false", "args": ["-a"], "stdin": "aW4=", "timeout": 10_000});
    let (response, ()) = tokio::join!(send(post.clone(), "/vms/web1/exec", body), run);
    contract.hold("vm_exec", response, 200).await;
    let keep = json!({"vm": "web1", "name": "one", "quiesce": 1_000, "reason": "x"});
    let task = contract.hold("snapshot_create", send(post.clone(), "/snapshots", keep.clone()).await, 202).await;
    contract.hold("snapshot_show", send(get.clone(), "/snapshots/one", null.clone()).await, 200).await;
    let take = agent.command().await;
    agent.tell(&take, &SnapshotFigures::default()).await;
    cluster.ended(task["id"].as_str().expect("id").parse().expect("id")).await;
    contract.hold("snapshot_create", send(post.clone(), "/snapshots", keep).await, 409).await;
    contract.hold("snapshot_create", send(post.clone(), "/snapshots", json!({"vm": "web1", "quiesce": 0})).await, 400).await;
    contract.hold("snapshot_list", send(get.clone(), "/snapshots?vm=web1", null.clone()).await, 200).await;
    contract.hold("snapshot_show", send(get.clone(), "/snapshots/one", null.clone()).await, 200).await;
    contract.hold("snapshot_set", send(Method::PATCH, "/snapshots/one", json!({"golden": false})).await, 200).await;
    let request = json!({"discard_present": true, "host": "h1"});
    let task = contract.hold("snapshot_rollback", send(post.clone(), "/snapshots/one/rollback", request).await, 202).await;
    let kill = agent.command().await;
    agent.done(&kill, 0).await;
    let begin = agent.command().await;
    agent.tell(&begin, &RestoreFigures::default()).await;
    let id = task["id"].as_str().expect("id").to_owned();
    cluster.ended(id.parse().expect("id")).await;
    contract.hold("task_show", send(get.clone(), &format!("/tasks/{id}"), null.clone()).await, 200).await;
    let task =
        contract.hold("snapshot_export", send(post.clone(), "/snapshots/one/export", json!({"host": "h1"})).await, 202).await;
    let write = agent.command().await;
    agent.tell(&write, &json!({"host": "h1", "path": "/pool/exports/default/one", "bytes": 1})).await;
    let id = task["id"].as_str().expect("id").to_owned();
    cluster.ended(id.parse().expect("id")).await;
    contract.hold("task_show", send(get.clone(), &format!("/tasks/{id}"), null.clone()).await, 200).await;
    contract.hold("snapshot_export", send(post.clone(), "/snapshots/none/export", null.clone()).await, 404).await;
    let request = json!({"vm": "web1", "from": "shared/one", "memory": true});
    let task = contract.hold("snapshot_import", send(post.clone(), "/snapshots/back/import", request.clone()).await, 202).await;
    let read = agent.command().await;
    agent.tell(&read, &SnapshotFigures::default()).await;
    cluster.ended(task["id"].as_str().expect("id").parse().expect("id")).await;
    contract.hold("snapshot_import", send(post.clone(), "/snapshots/back/import", request).await, 409).await;
    let (response, ()) = tokio::join!(send(delete.clone(), "/snapshots/back", null.clone()), async {
        let remove = agent.command().await;
        agent.done(&remove, 0).await;
    });
    contract.hold("snapshot_delete", response, 204).await;
    contract.hold("vm_suspend", send(post.clone(), "/vms/web1/suspend", null.clone()).await, 422).await;
    contract.hold("vm_unsuspend", send(post.clone(), "/vms/web1/unsuspend", null.clone()).await, 202).await;
    let request = json!({"name": "web9", "start": false, "reason": "x"});
    contract.hold("snapshot_clone", send(post.clone(), "/snapshots/one/clone", request.clone()).await, 202).await;
    contract.hold("snapshot_clone", send(post.clone(), "/snapshots/one/clone", request).await, 409).await;
    let task = contract.hold("vm_delete", send(delete.clone(), "/vms/web9", null.clone()).await, 202).await;
    cluster.ended(task["id"].as_str().expect("id").parse().expect("id")).await;
    let (response, ()) = tokio::join!(send(get.clone(), "/vaults", null.clone()), async {
        let look = agent.command().await;
        agent.tell(&look, &VaultUsage::default()).await;
    });
    contract.hold("vault_list", response, 200).await;
    let task = contract.hold("vault_verify", send(post.clone(), "/vaults/shared/verify", null.clone()).await, 202).await;
    let look = agent.command().await;
    agent.tell(&look, &VaultFindings::default()).await;
    cluster.ended(task["id"].as_str().expect("id").parse().expect("id")).await;
    let (response, ()) = tokio::join!(send(post.clone(), "/vaults/shared/prune", null.clone()), async {
        let look = agent.command().await;
        agent.tell(&look, &VaultPlan::default()).await;
    });
    contract.hold("vault_prune", response, 200).await;
    contract.hold("vault_prune", send(post.clone(), "/vaults/shared/prune", json!({"apply": true})).await, 400).await;
    let (response, ()) = tokio::join!(send(delete.clone(), "/snapshots/one", null.clone()), async {
        let remove = agent.command().await;
        agent.done(&remove, 0).await;
    });
    contract.hold("snapshot_delete", response, 204).await;
    contract.hold("snapshot_delete", send(delete.clone(), "/snapshots/one", null.clone()).await, 404).await;
    for (id, verb) in
        [("vm_pause", "pause"), ("vm_unpause", "unpause"), ("vm_stop", "stop"), ("vm_kill", "kill"), ("vm_start", "start")]
    {
        let response = send(post.clone(), &format!("/vms/web1/{verb}"), null.clone()).await;
        let task = contract.hold(id, response, 202).await;
        let command = agent.command().await;
        if verb != "stop" {
            agent.done(&command, 0).await;
            cluster.ended(task["id"].as_str().expect("id").parse().expect("id")).await;
        }
    }
    let changed = send(Method::PUT, "/vms/web2/spec", json!(spec(Bytes::mib(96)))).await;
    contract.hold("vm_set", changed, 202).await;
    contract.hold("vm_set", send(Method::PUT, "/vms/nothing/spec", json!(spec(Bytes::mib(96)))).await, 404).await;
    contract.hold("vm_delete", send(delete.clone(), "/vms/web1", null.clone()).await, 409).await;
    contract.hold("vm_delete", send(delete.clone(), "/vms/web2", null.clone()).await, 202).await;
    let image = admin.request(Method::PUT, "/images/two?kind=kernel").body(kernel()).send().await.expect("answer");
    contract.hold("image_import", image, 201).await;
    let image = admin.request(Method::PUT, "/images/three?kind=kernel").body("text").send().await.expect("answer");
    contract.hold("image_import", image, 422).await;
    contract.hold("image_export", send(get.clone(), "/images/two/content", null.clone()).await, 200).await;
    contract.hold("image_export", send(get.clone(), "/images/two/content?format=ova", null.clone()).await, 400).await;
    let fetch = json!({"url": "https://127.0.0.1/x", "kind": "raw"});
    let task = contract.hold("image_fetch", send(post.clone(), "/images/far/fetch", fetch).await, 202).await;
    cluster.ended(task["id"].as_str().expect("id").parse().expect("id")).await;
    contract
        .hold("image_fetch", send(post.clone(), "/images/far/fetch", json!({"url": "file:///x", "kind": "raw"})).await, 400)
        .await;
    contract.hold("image_delete", send(delete.clone(), "/images/two", null.clone()).await, 204).await;
    let bridge = json!({"name": "lan", "kind": {"type": "bridge", "bridge": "br0", "vlan": 20}, "mtu": 1500});
    contract.hold("network_create", send(post.clone(), "/networks", bridge.clone()).await, 201).await;
    contract.hold("network_create", send(post.clone(), "/networks", bridge).await, 409).await;
    contract.hold("network_set", send(Method::PATCH, "/networks/lan", json!({"mtu": 9000})).await, 200).await;
    contract.hold("network_set", send(Method::PATCH, "/networks/lan", json!({"mtu": 100})).await, 400).await;
    contract.hold("network_delete", send(delete.clone(), "/networks/default", null.clone()).await, 409).await;
    contract.hold("network_delete", send(delete.clone(), "/networks/lan", null.clone()).await, 204).await;
    let gold = json!({"name": "gold", "labels": {"tier": "gold"}, "limits": {"max_blackout": 70, "on_miss": ["throttle"], "postcopy": "never"}});
    contract.hold("policy_create", send(post.clone(), "/policies", gold.clone()).await, 201).await;
    contract.hold("policy_create", send(post.clone(), "/policies", gold).await, 409).await;
    contract
        .hold("policy_create", send(post.clone(), "/policies", json!({"name": "odd", "limits": {"timeout": 0}})).await, 400)
        .await;
    contract.hold("policy_list", send(Method::GET, "/policies", null.clone()).await, 200).await;
    contract.hold("policy_show", send(Method::GET, "/policies/gold", null.clone()).await, 200).await;
    contract.hold("policy_set", send(Method::PATCH, "/policies/gold", json!({"limits": {"patience": 5000}})).await, 200).await;
    contract.hold("policy_delete", send(delete.clone(), "/policies/gold", null.clone()).await, 204).await;
    contract.hold("policy_delete", send(delete.clone(), "/policies/gold", null.clone()).await, 404).await;
    let create = json!({"name": "web5", "spec": spec(Bytes::mib(64))});
    contract.hold("vm_create", send(post.clone(), "/vms", create).await, 201).await;
    let nightly = json!({"name": "nightly", "spec": {"vms": ["web5"], "when": "30 2 * * *", "zone": "Europe/Berlin", "quiesce": 1_000, "keep": {"daily": 7}}});
    contract.hold("schedule_create", send(post.clone(), "/schedules", nightly.clone()).await, 201).await;
    contract.hold("schedule_create", send(post.clone(), "/schedules", nightly).await, 409).await;
    let never = json!({"name": "odd", "spec": {"when": "0 0 30 2 *"}});
    contract.hold("schedule_create", send(post.clone(), "/schedules", never).await, 400).await;
    contract.hold("schedule_list", send(get.clone(), "/schedules", null.clone()).await, 200).await;
    contract.hold("schedule_run", send(post.clone(), "/schedules/nightly/run", null.clone()).await, 202).await;
    contract.hold("schedule_run", send(post.clone(), "/schedules/none/run", null.clone()).await, 404).await;
    contract.hold("schedule_show", send(get.clone(), "/schedules/nightly", null.clone()).await, 200).await;
    contract.hold("schedule_status", send(get.clone(), "/schedules/nightly/status", null.clone()).await, 200).await;
    let changed = json!({"spec": {"labels": {"tier": "db"}, "when": "@daily", "enabled": false}});
    contract.hold("schedule_set", send(Method::PATCH, "/schedules/nightly", changed).await, 200).await;
    contract.hold("schedule_set", send(Method::PATCH, "/schedules/nightly", json!({"spec": {"when": "x"}})).await, 400).await;
    contract.hold("schedule_delete", send(delete.clone(), "/schedules/nightly", null.clone()).await, 204).await;
    contract.hold("schedule_delete", send(delete.clone(), "/schedules/nightly", null.clone()).await, 404).await;
    contract.hold("join_token_create", send(post.clone(), "/join-tokens", json!({"host": "h3"})).await, 201).await;
    let limit = json!({"migration_bandwidth": 125_000_000});
    contract.hold("host_set", send(Method::PATCH, "/hosts/h1", limit).await, 200).await;
    agent.fleet_when(|fleet| fleet.members.iter().any(|member| member.migration_bandwidth == 125_000_000)).await;
    contract.hold("host_set", send(Method::PATCH, "/hosts/h1", json!({"migration_bandwidth": 10})).await, 400).await;
    contract.hold("host_set", send(Method::PATCH, "/hosts/h1", json!({})).await, 400).await;
    contract.hold("host_set", send(Method::PATCH, "/hosts/h9", json!({"migration_bandwidth": null})).await, 404).await;
    contract.hold("host_delete", send(delete.clone(), "/hosts/h1", null.clone()).await, 409).await;
    contract.hold("team_create", send(post.clone(), "/teams", json!({"name": "red"})).await, 201).await;
    let shares = json!({"share_memory": true});
    let set = contract.hold("team_set", send(Method::PATCH, "/teams/red", shares.clone()).await, 200).await;
    assert_eq!(set["share_memory"], true);
    contract.hold("team_set", send(Method::PATCH, "/teams/red", json!({})).await, 400).await;
    contract.hold("team_set", send(Method::PATCH, "/teams/none", shares).await, 404).await;
    contract.hold("team_set", send(Method::PATCH, "/teams/red", json!({"share_memory": 1})).await, 400).await;
    let token = api::TokenCreate { team: name("red"), role: Role::Viewer, description: "x".into() };
    let made = contract.hold("token_create", send(post.clone(), "/tokens", json!(token)).await, 201).await;
    let id = made["token"]["id"].as_str().expect("id");
    contract.hold("token_delete", send(delete.clone(), &format!("/tokens/{id}"), null.clone()).await, 204).await;

    // Events have a test of their own, since they never end.
    let mut missing: Vec<&str> = contract.operations.iter().map(|operation| operation.id.as_str()).collect();
    missing.retain(|id| !contract.seen.iter().any(|seen| seen == id) && *id != "event_watch");
    assert!(missing.is_empty(), "never held against their description: {missing:?}");
    for operation in &contract.operations {
        assert!(operation.described["tags"].as_array().is_some_and(|tags| !tags.is_empty()), "{} has no tag", operation.id);
        assert!(operation.described["summary"].is_string(), "{} has no summary", operation.id);
        assert!(operation.described["responses"]["401"].is_object(), "{} describes no refusal", operation.id);
    }
    assert_eq!(contract.description["components"]["securitySchemes"]["bearer"]["scheme"], "bearer");
}
