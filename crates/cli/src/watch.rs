//! `--watch` on lists: everything there is, then every change, as JSON lines.
//!
//! The stream is opened before the list is read, and after a break the list is read again if the cursor is refused: what was seen is
//! kept with its revision, so that nothing is told twice and nothing is missed.

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Duration;

use futures::StreamExt;
use godwit_api::client::{Client, ClientError};
use godwit_api::v1::{Change, Event, Host, Image, Network, Policy, Schedule, Snapshot, Task, Vm};
use serde::Serialize;
use serde_json::Value;

use crate::error::Failure;
use crate::output::{note, print_line};

/// Between two attempts to open the stream.
const RETRY: Duration = Duration::from_secs(1);

/// An object whose changes are events.
pub(crate) trait Watched: Serialize + Sized {
    /// What events call its kind.
    const KIND: &'static str;
    /// What events call it.
    fn name(&self) -> String;
    /// Its revision.
    fn revision(&self) -> u64;
    /// All of them.
    async fn list(client: &Client) -> Result<Vec<Self>, ClientError>;
}

macro_rules! watched {
    ($($object:ty, $kind:literal, $name:ident, $list:ident $(($all:expr))?;)*) => {$(
        impl Watched for $object {
            const KIND: &'static str = $kind;

            fn name(&self) -> String {
                self.$name.to_string()
            }

            fn revision(&self) -> u64 {
                self.revision
            }

            async fn list(client: &Client) -> Result<Vec<Self>, ClientError> {
                client.$list($($all)?).await
            }
        }
    )*};
}
watched! {
    Vm, "vm", name, vms;
    Host, "host", name, hosts;
    Image, "image", name, images;
    Network, "network", name, networks;
    Policy, "policy", name, policies;
    Schedule, "schedule", name, schedules;
    Snapshot, "snapshot", name, snapshots(None);
    Task, "task", id, tasks;
}

/// A line of the watch.
#[derive(Serialize)]
struct Line<'a> {
    change: Change,
    kind: &'a str,
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    object: Option<&'a Value>,
}

/// Prints all objects of a kind, then every change, until interrupted.
pub(crate) async fn watch<T: Watched>(client: &Client) -> Result<(), Failure> {
    let mut seen: BTreeMap<String, u64> = BTreeMap::new();
    let mut cursor = None;
    loop {
        let failed = match client.events(cursor).await {
            Ok(events) => {
                if cursor.is_none() {
                    catch_up::<T>(client, &mut seen).await?;
                }
                let mut events = pin!(events);
                loop {
                    match events.next().await {
                        Some(Ok(event)) => {
                            cursor = Some(event.cursor);
                            tell(T::KIND, event, &mut seen)?;
                        }
                        Some(Err(error)) => break Some(error),
                        None => break None,
                    }
                }
            }
            Err(ClientError::Refused(_)) if cursor.is_some() => {
                cursor = None;
                continue;
            }
            Err(error @ ClientError::Unreachable { .. }) if !seen.is_empty() || cursor.is_some() => Some(error),
            Err(error) => return Err(error.into()),
        };
        if let Some(error) = failed {
            note(&format!("the event stream broke off ({}); trying again", crate::text::visible(&error.refusal().message)));
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Tells what differs between what was told and what is.
async fn catch_up<T: Watched>(client: &Client, seen: &mut BTreeMap<String, u64>) -> Result<(), Failure> {
    let objects = T::list(client).await?;
    let names: Vec<String> = objects.iter().map(Watched::name).collect();
    for gone in seen.keys().filter(|name| !names.contains(name)) {
        print_line(&Line { change: Change::Deleted, kind: T::KIND, name: gone, object: None })?;
    }
    seen.retain(|name, _| names.contains(name));
    for (object, name) in objects.iter().zip(names) {
        if seen.insert(name.clone(), object.revision()) != Some(object.revision()) {
            let value = serde_json::to_value(object).map_err(|error| Failure::Output(error.into()))?;
            print_line(&Line { change: Change::Set, kind: T::KIND, name: &name, object: Some(&value) })?;
        }
    }
    Ok(())
}

fn tell(kind: &str, event: Event, seen: &mut BTreeMap<String, u64>) -> Result<(), Failure> {
    if event.kind != kind {
        return Ok(());
    }
    let revision = event.object.as_ref().and_then(|object| object.get("revision")?.as_u64()).unwrap_or_default();
    let known = match event.change {
        Change::Set => seen.get(&event.name).is_some_and(|known| *known >= revision),
        Change::Deleted => seen.remove(&event.name).is_none(),
    };
    if known {
        return Ok(());
    }
    if event.change == Change::Set {
        seen.insert(event.name.clone(), revision);
    }
    print_line(&Line { change: event.change, kind, name: &event.name, object: event.object.as_ref() })
}
