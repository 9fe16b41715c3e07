//! Accepting agents: TLS first, each handshake on its own and with a limit, then gRPC.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{AgentStream, LinkServer, service};

const HANDSHAKE: Duration = Duration::from_secs(10);
/// Accepted connections that may wait to be served.
const BACKLOG: usize = 64;

/// Serves agents on `listener` until `stop`.
pub(crate) async fn listen(
    listener: TcpListener,
    tls: rustls::ServerConfig,
    server: LinkServer,
    tracker: TaskTracker,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let (sender, accepted) = mpsc::channel::<io::Result<AgentStream>>(BACKLOG);
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let accepting = stop.clone();
    tracker.clone().spawn(async move {
        loop {
            let stream = tokio::select! {
                () = accepting.cancelled() => return,
                stream = listener.accept() => stream,
            };
            let (stream, address) = match stream {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Too many open files, or a connection that was reset before it was taken: neither is a reason to end.
                    tracing::warn!(%error, "an agent's connection cannot be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (acceptor, sender, stop) = (acceptor.clone(), sender.clone(), accepting.clone());
            tracker.spawn(async move {
                // Small messages matter here, in both directions.
                let _ = stream.set_nodelay(true);
                let handshake = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream));
                let result = tokio::select! {
                    () = stop.cancelled() => return,
                    result = handshake => result,
                };
                match result {
                    Ok(Ok(stream)) => {
                        // The server ends only with this one.
                        let _ = sender.send(Ok(stream)).await;
                    }
                    Ok(Err(error)) => tracing::info!(%address, %error, "certificate_refused: no handshake with an agent"),
                    Err(_) => tracing::info!(%address, "no handshake with an agent in time"),
                }
            });
        }
    });
    let incoming = ReceiverStream::new(accepted).boxed();
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .add_service(service(server))
        .serve_with_incoming_shutdown(incoming, async move { stop.cancelled().await })
        .await
}
