//! Events: nothing lost, nothing repeated, nothing of a foreign team.

use std::collections::BTreeSet;

use futures::{Stream, StreamExt};
use godwit_api::client::{Client, ClientError};
use godwit_api::v1::{self as api, Change, Role};
use godwit_model::{Bytes, ErrorCode};

use super::support::*;

async fn take(stream: &mut (impl Stream<Item = Result<api::Event, ClientError>> + Unpin), count: usize) -> Vec<api::Event> {
    let mut events = Vec::new();
    while events.len() < count {
        events.push(soon(stream.next()).await.expect("the stream goes on").expect("an event"));
    }
    events
}

async fn watch(client: &Client, after: Option<u64>) -> impl Stream<Item = Result<api::Event, ClientError>> + Unpin {
    Box::pin(client.events(after).await.expect("stream"))
}

#[tokio::test]
async fn a_stream_that_is_cut_anywhere_goes_on_without_loss_or_repetition() {
    let mut cluster = Cluster::new().await;
    let admin = cluster.admin();
    let mut whole = watch(&admin, Some(0)).await;
    for number in 0..6 {
        cluster.create_vm(&format!("vm{number}"), Bytes::mib(64)).await;
    }
    let task = admin.delete_vm(&name("vm3"), &api::VmDelete { volumes: false }).await.expect("accepted");
    cluster.ended(task.id).await;
    let mut all = Vec::new();
    // Up to the removal, which shares a transaction with the end of its task.
    while !all.iter().any(|event: &api::Event| event.kind == "vm" && event.change == Change::Deleted) {
        all.extend(take(&mut whole, 1).await);
    }
    let cursors: Vec<u64> = all.iter().map(|event| event.cursor).collect();
    assert!(cursors.is_sorted() && cursors.iter().collect::<BTreeSet<_>>().len() == cursors.len(), "{cursors:?}");
    for cut in 0..all.len() {
        let after = if cut == 0 { 0 } else { cursors[cut - 1] };
        let rest = take(&mut watch(&admin, Some(after)).await, all.len() - cut).await;
        let (seen, expected): (Vec<_>, Vec<_>) =
            (rest.iter().map(|e| (e.cursor, &e.name)).collect(), all[cut..].iter().map(|e| (e.cursor, &e.name)).collect());
        assert_eq!(seen, expected, "cut after {cut}");
    }
    let deleted = all.last().expect("the removal");
    assert_eq!((deleted.name.as_str(), deleted.object.is_none()), ("vm3", true));
    // Across a restart of the controller as well.
    cluster.stop().await;
    cluster.start().await;
    let admin = cluster.admin();
    let rest = take(&mut watch(&admin, Some(cursors[0])).await, all.len() - 1).await;
    assert_eq!(rest.iter().map(|event| event.cursor).collect::<Vec<_>>(), cursors[1..]);
    let response = admin.request(reqwest::Method::GET, "/events").header("last-event-id", "x").send().await.expect("answer");
    assert_eq!(response.status(), 400);
    assert_eq!(code(admin.events(Some(u64::MAX)).await.map(|_| ())), ErrorCode::RevisionConflict);
}

#[tokio::test]
async fn a_cursor_that_is_no_longer_in_the_log_is_refused_with_the_fix() {
    let cluster = Cluster::with(|options| options.log_kept = 0).await;
    let admin = cluster.admin();
    let refusal = soon(async {
        loop {
            // Housekeeping runs right after the start.
            if let Err(error) = admin.events(Some(0)).await.map(|_| ()) {
                return error.refusal();
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(refusal.code, ErrorCode::RevisionConflict);
    assert!(refusal.hint.expect("hint").contains("list the objects again"));
}

#[tokio::test]
async fn a_team_hears_of_its_own_objects_and_of_hosts_only() {
    let cluster = Cluster::new().await;
    let red = cluster.member("red", Role::Viewer).await;
    let mut stream = watch(&red, Some(0)).await;
    cluster.create_vm("foreign", Bytes::mib(64)).await;
    cluster.host("h1").await;
    let events = take(&mut stream, 2).await;
    let heard: Vec<_> = events.iter().map(|event| (event.kind.as_str(), event.name.as_str())).collect();
    assert_eq!(heard, [("team", "red"), ("host", "h1")]);
}
