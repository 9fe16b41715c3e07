//! `godwit event`: changes as they happen.

use std::pin::pin;
use std::time::Duration;

use clap::Subcommand;
use futures::StreamExt;
use godwit_api::client::ClientError;
use godwit_api::v1::Event;

use crate::error::Failure;
use crate::output::{Format, note, print, print_line, word};
use crate::session::Session;
use crate::text::visible;

/// What can be done with events.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Print every change until interrupted
    #[command(after_help = "With `-o json` each event is one JSON line; its `cursor` is what `--after` takes.

Examples:
  godwit event watch
  godwit event watch --kind vm -o json | jq .name")]
    Watch {
        /// Begin behind this event instead of now
        #[arg(long, value_name = "CURSOR")]
        after: Option<u64>,
        /// Only of this kind of object (vm, host, task, image, team, token); can be repeated
        #[arg(long = "kind", value_name = "KIND")]
        kinds: Vec<String>,
    },
}

pub(crate) async fn run(session: Session, verb: Verb) -> Result<(), Failure> {
    let Verb::Watch { after, kinds } = verb;
    let mut cursor = after;
    let mut begun = false;
    loop {
        let broken = match session.client.events(cursor).await {
            Ok(events) => {
                begun = true;
                let mut events = pin!(events);
                loop {
                    match events.next().await {
                        Some(Ok(event)) => {
                            cursor = Some(event.cursor);
                            if kinds.is_empty() || kinds.contains(&event.kind) {
                                show(session.format, &event)?;
                            }
                        }
                        Some(Err(error)) => break Some(error),
                        None => break None,
                    }
                }
            }
            Err(error @ ClientError::Unreachable { .. }) if begun => Some(error),
            Err(error) => return Err(error.into()),
        };
        if let Some(error) = broken {
            note(&format!("the event stream broke off ({}); trying again", visible(&error.refusal().message)));
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn show(format: Format, event: &Event) -> Result<(), Failure> {
    if format != Format::Table {
        return print_line(event);
    }
    // What is most telling of each kind of object.
    let object = event.object.as_ref();
    let at = |path: &str| object.and_then(|object| object.pointer(path)?.as_str()).unwrap_or_default();
    let telling = match event.kind.as_str() {
        "vm" => format!("{} {}", at("/status/state"), at("/status/host")),
        "task" => format!("{} {} {} {}", at("/kind"), at("/subject"), at("/state"), at("/step")),
        "migratable" => match object.and_then(|object| object.get("possible")?.as_bool()) {
            Some(true) => "could move".to_owned(),
            Some(false) => format!("cannot move: {}", at("/reason/message")),
            None => String::new(),
        },
        "host" => match object.and_then(|object| object.get("connected")?.as_bool()) {
            Some(true) => "connected".to_owned(),
            Some(false) => "not connected".to_owned(),
            None => String::new(),
        },
        _ => String::new(),
    };
    let line = format!("{} {} {} {} {telling}", event.cursor, event.kind, event.name, word(&event.change));
    print(&visible(line.trim_end()))
}
