//! The connection between two carries: TLS 1.3 with the certificates of both hosts, counted in bytes on the wire.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::LocalBoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use godwit_carrier::{Decoder, Frame, Greeting};
use godwit_link::certificate::{host_dns_name, host_of_dns_name};
use godwit_model::Name;
use rustls::pki_types::ServerName;
use rustls::server::WebPkiClientVerifier;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::pump::{PumpError, next_frame};
use crate::tls::{Material, TlsError};

const HANDSHAKE_LIMIT: Duration = Duration::from_secs(15);
/// Connections that may be in their handshake at once.
const HANDSHAKES: usize = 64;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("cannot reach the destination's carry at {0}: {1}")]
    Dial(SocketAddr, io::Error),
    #[error("cannot accept: {0}")]
    Accept(io::Error),
    #[error("the TLS handshake failed: {0}")]
    Handshake(io::Error),
    #[error("the TLS handshake took longer than {HANDSHAKE_LIMIT:?}")]
    HandshakeTime,
    #[error("the peer's certificate is not that of host {0}, or of a key that may no longer speak for it")]
    Peer(Name),
    #[error(transparent)]
    Material(#[from] TlsError),
}

/// A TCP connection that counts what passes.
pub(super) struct Counted {
    inner: TcpStream,
    bytes: Arc<AtomicU64>,
}

pub(super) type Connection = TlsStream<Counted>;

/// Who must be at the other end: a certificate that the cluster signed is not enough.
pub(super) struct Expected {
    /// The host that the certificate must name.
    pub(super) host: Name,
    /// BLAKE3 of the public keys that it may be of.
    pub(super) keys: Vec<String>,
}

impl Expected {
    fn is(&self, certificates: Option<&[rustls::pki_types::CertificateDer<'_>]>) -> bool {
        peer_of(certificates).is_some_and(|(host, key)| host == self.host && self.keys.contains(&key))
    }
}

/// The way to the destination's carry.
pub(super) struct Dialler {
    address: SocketAddr,
    peer: Expected,
    name: ServerName<'static>,
    connector: TlsConnector,
    bytes: Arc<AtomicU64>,
}

impl Dialler {
    /// `bytes` counts what goes over the wire, both ways.
    pub(super) fn new(
        address: SocketAddr,
        peer: Expected,
        material: &Material,
        bytes: Arc<AtomicU64>,
    ) -> Result<Self, ConnectError> {
        let config = rustls::ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_root_certificates(material.roots()?)
            .with_client_auth_cert(material.chain()?, material.key()?)
            .map_err(TlsError::Config)?;
        let name = ServerName::try_from(host_dns_name(&peer.host)).map_err(|_| ConnectError::Peer(peer.host.clone()))?;
        Ok(Self { address, peer, name, connector: TlsConnector::from(Arc::new(config)), bytes })
    }

    /// Dials, within `limit`, and insists on a certificate of the peer.
    pub(super) async fn dial(&self, limit: Duration) -> Result<Connection, ConnectError> {
        let dialled = tokio::time::timeout(limit, TcpStream::connect(self.address)).await;
        let tcp = dialled
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(|error| ConnectError::Dial(self.address, error))?;
        let handshake = self.connector.connect(self.name.clone(), counted(tcp, Arc::clone(&self.bytes)));
        let connection = limited(handshake).await?;
        if !self.peer.is(connection.get_ref().1.peer_certificates()) {
            return Err(ConnectError::Peer(self.peer.host.clone()));
        }
        Ok(TlsStream::Client(connection))
    }
}

/// A connection whose other end has said what it is there for.
pub(super) struct Greeted {
    pub(super) connection: Connection,
    pub(super) decoder: Decoder,
    pub(super) greeting: Greeting,
}

/// Why a connection was turned away.
#[derive(Debug, thiserror::Error)]
enum TurnedAway {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("a certificate of another host or key")]
    Certificate,
    #[error("no greeting: {0}")]
    Greeting(#[from] PumpError),
}

impl TurnedAway {
    /// Whether the other end was gone before it had said anything wrong.
    fn hung_up(&self) -> bool {
        let error = match self {
            Self::Connect(ConnectError::Handshake(error)) | Self::Greeting(PumpError::Connection(error)) => error,
            Self::Greeting(PumpError::Closed) => return true,
            _ => return false,
        };
        matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof)
    }
}

/// Where the source's connections come in, one after the other.
pub(super) struct Acceptor {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    peer: Arc<Expected>,
    bytes: Arc<AtomicU64>,
    /// Side by side: a stranger that says nothing takes no time from the one that is expected.
    handshakes: FuturesUnordered<LocalBoxFuture<'static, (SocketAddr, Result<Greeted, TurnedAway>)>>,
}

impl Acceptor {
    /// `bytes` counts what goes over the wire, both ways.
    pub(super) fn new(
        listener: TcpListener,
        peer: Expected,
        material: &Material,
        bytes: Arc<AtomicU64>,
    ) -> Result<Self, ConnectError> {
        let verifier = WebPkiClientVerifier::builder(Arc::new(material.roots()?)).build().map_err(TlsError::Verifier)?;
        let config = rustls::ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_client_cert_verifier(verifier)
            .with_single_cert(material.chain()?, material.key()?)
            .map_err(TlsError::Config)?;
        let acceptor = TlsAcceptor::from(Arc::new(config));
        Ok(Self { listener, acceptor, peer: Arc::new(peer), bytes, handshakes: FuturesUnordered::new() })
    }

    /// The next connection that carries a certificate of the peer and greets; others are turned away. May be dropped and asked again.
    pub(super) async fn next(&mut self) -> Result<Greeted, ConnectError> {
        loop {
            tokio::select! {
                accepted = self.listener.accept(), if self.handshakes.len() < HANDSHAKES => {
                    let (tcp, from) = accepted.map_err(ConnectError::Accept)?;
                    let handshake = self.acceptor.accept(counted(tcp, Arc::clone(&self.bytes)));
                    let peer = Arc::clone(&self.peer);
                    self.handshakes.push(async move { (from, receive(handshake, &peer).await) }.boxed_local());
                }
                Some((from, received)) = self.handshakes.next() => match received {
                    Ok(greeted) => return Ok(greeted),
                    // As a source does that dials again because nobody answered.
                    Err(reason) if reason.hung_up() => tracing::info!(%from, %reason, "a connection came to nothing"),
                    Err(reason) => tracing::warn!(%from, peer = %self.peer.host, %reason, "turned away a connection"),
                },
            }
        }
    }
}

async fn receive(handshake: tokio_rustls::Accept<Counted>, peer: &Expected) -> Result<Greeted, TurnedAway> {
    let connection = limited(handshake).await?;
    if !peer.is(connection.get_ref().1.peer_certificates()) {
        return Err(TurnedAway::Certificate);
    }
    let mut connection = TlsStream::Server(connection);
    let mut decoder = Decoder::default();
    let first = tokio::time::timeout(HANDSHAKE_LIMIT, next_frame(&mut connection, &mut decoder)).await;
    match first.map_err(|_| ConnectError::HandshakeTime)?? {
        Frame::Hello(greeting) => Ok(Greeted { connection, decoder, greeting }),
        _ => Err(PumpError::Unexpected("no greeting").into()),
    }
}

fn counted(tcp: TcpStream, bytes: Arc<AtomicU64>) -> Counted {
    if let Err(error) = tcp.set_nodelay(true) {
        tracing::warn!(%error, "cannot set TCP_NODELAY");
    }
    Counted { inner: tcp, bytes }
}

async fn limited<T>(handshake: impl Future<Output = io::Result<T>>) -> Result<T, ConnectError> {
    match tokio::time::timeout(HANDSHAKE_LIMIT, handshake).await {
        Ok(done) => done.map_err(ConnectError::Handshake),
        Err(_) => Err(ConnectError::HandshakeTime),
    }
}

/// The host that a certificate names, and the hash of its public key.
fn peer_of(certificates: Option<&[rustls::pki_types::CertificateDer<'_>]>) -> Option<(Name, String)> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificates?.first()?).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let host = names.value.general_names.iter().find_map(|name| match name {
        x509_parser::extensions::GeneralName::DNSName(name) => host_of_dns_name(name),
        _ => None,
    });
    Some((host?, blake3::hash(certificate.tbs_certificate.subject_pki.raw).to_hex().to_string()))
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(context, buffer);
        self.bytes.fetch_add((buffer.filled().len() - before) as u64, Ordering::Relaxed);
        polled
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.inner).poll_write(context, data);
        if let Poll::Ready(Ok(written)) = &polled {
            self.bytes.fetch_add(*written as u64, Ordering::Relaxed);
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}
