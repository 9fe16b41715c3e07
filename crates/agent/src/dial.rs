//! Dials the controller: TLS of our own configuration under tonic's channel, and always under the controller's one name.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use godwit_link::certificate::CONTROLLER;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

const DIAL_LIMIT: Duration = Duration::from_secs(10);
const KEEP_ALIVE: Duration = Duration::from_secs(5);
const KEEP_ALIVE_LIMIT: Duration = Duration::from_secs(10);
/// What may be under way of an image: 50 MB/s where a round trip takes 80 ms.
const WINDOW: u32 = 4 << 20;

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The address is not `host:port`.
    #[error("{0:?} is not host:port")]
    Address(String),
    /// No connection, or the wrong certificate.
    #[error("{}", deepest(.0))]
    Connect(#[source] tonic::transport::Error),
}

impl DialError {
    /// Whether nobody answered, rather than somebody who is not the controller.
    pub(crate) fn is_unreachable(&self) -> bool {
        let Self::Connect(error) = self else { return false };
        let mut cause: Option<&dyn std::error::Error> = Some(error);
        while let Some(error) = cause {
            if let Some(error) = error.downcast_ref::<io::Error>() {
                // What TLS dislikes comes as invalid data.
                return error.kind() != io::ErrorKind::InvalidData;
            }
            cause = error.source();
        }
        // tonic's own time limit.
        true
    }
}

/// The cause that says something: the layers above it only say that there is one.
fn deepest(error: &tonic::transport::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

/// A channel to `controller` (`host:port`), verified by `config`.
pub(crate) async fn dial(controller: &str, config: rustls::ClientConfig) -> Result<Channel, DialError> {
    // TLS is the connector's: tonic refuses a scheme that asks for its own.
    let uri = format!("http://{controller}");
    let endpoint = Endpoint::from_shared(uri)
        .map_err(|_| DialError::Address(controller.to_owned()))?
        .connect_timeout(DIAL_LIMIT)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_LIMIT)
        .keep_alive_while_idle(true);
    let connector = TlsConnector::from(Arc::new(config));
    let address = controller.to_owned();
    let service = tower::service_fn(move |_: Uri| {
        let (connector, address) = (connector.clone(), address.clone());
        async move {
            let tcp = TcpStream::connect(address).await?;
            tcp.set_nodelay(true)?;
            let name = ServerName::try_from(CONTROLLER).map_err(io::Error::other)?;
            Ok::<_, io::Error>(TokioIo::new(connector.connect(name, tcp).await?))
        }
    });
    endpoint.connect_with_connector(service).await.map_err(DialError::Connect)
}
