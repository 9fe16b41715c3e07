//! A serial console: bytes between the VM's socket and a stream to the controller, for one session that the controller asked for.

use std::time::Duration;

use futures::StreamExt;
use godwit_link::MAX_CHUNK;
use godwit_link::v1::ConsoleChunk;
use godwit_model::{ErrorCode, Refusal, Retry, VmId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::host::{SharedHost, host_failed};

const CONNECT: Duration = Duration::from_secs(5);
const READ: usize = 4 << 10;

/// Opens the console and serves `session` in the background until one side closes.
pub(crate) async fn open(host: &SharedHost, vm: VmId, session: String) -> Result<(), Refusal> {
    let path = host.vm_dir(vm).join("console");
    let connected = tokio::time::timeout(CONNECT, UnixStream::connect(&path)).await;
    let console = match connected {
        Ok(Ok(console)) => console,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Refusal::new(ErrorCode::VmNotRunning, "the VM does not run on this host").hint("start it first"));
        }
        Ok(Err(error)) => return Err(host_failed("the console cannot be opened", &error)),
        Err(_) => return Err(Refusal::new(ErrorCode::InUse, "the console does not answer").retry(Retry::Safe)),
    };
    let mut client = host.controller.client()?;
    let (to_controller, chunks) = mpsc::channel(16);
    let first = ConsoleChunk { session, data: vec![] };
    to_controller.try_send(first).map_err(|_| Refusal::new(ErrorCode::Internal, "the session is closed"))?;
    tokio::spawn(async move {
        let (mut reader, mut writer) = console.into_split();
        let outward = async {
            let mut buffer = vec![0; READ];
            while let Ok(count @ 1..) = reader.read(&mut buffer).await {
                let data = buffer.get(..count).unwrap_or_default().to_vec();
                if to_controller.send(ConsoleChunk { session: String::new(), data }).await.is_err() {
                    break;
                }
            }
        };
        let inward = async {
            let Ok(answer) = client.console(ReceiverStream::new(chunks)).await else { return };
            let mut inbound = answer.into_inner();
            while let Some(Ok(chunk)) = inbound.next().await {
                if chunk.data.len() > MAX_CHUNK || writer.write_all(&chunk.data).await.is_err() {
                    break;
                }
            }
        };
        tokio::select! {
            () = outward => {}
            () = inward => {}
        }
    });
    Ok(())
}
