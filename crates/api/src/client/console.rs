//! A VM's serial console as a WebSocket of binary messages.

use std::sync::Arc;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use godwit_model::{Name, Refusal};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use super::{Client, ClientError, segment};

/// An open console.
pub struct Console {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

impl Client {
    /// Opens the serial console of a running VM. One user at a time: a second one is refused.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn console(&self, vm: &Name) -> Result<Console, ClientError> {
        let endpoint = self.endpoint();
        let broken = |what: &str| ClientError::Endpoint { what: what.into() };
        let url = format!("{}/v1/vms/{}/console", endpoint.url.replacen("http", "ws", 1), segment(vm));
        let mut request = url.into_client_request().map_err(|_| broken("its address is not a URL"))?;
        let bearer =
            HeaderValue::from_str(&format!("Bearer {}", endpoint.token)).map_err(|_| broken("its token has control characters"))?;
        request.headers_mut().insert("authorization", bearer);
        let mut roots = rustls::RootCertStore::empty();
        if let Some(authority) = &endpoint.authority {
            let certificate =
                CertificateDer::from_pem_slice(authority.as_bytes()).map_err(|_| broken("its authority is not PEM"))?;
            roots.add(certificate).map_err(|_| broken("its authority is not a certificate"))?;
        }
        let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let connector = tokio_tungstenite::Connector::Rustls(Arc::new(config));
        match tokio_tungstenite::connect_async_tls_with_config(request, None, true, Some(connector)).await {
            Ok((socket, _)) => Ok(Console { socket }),
            Err(WsError::Http(response)) => {
                let status = reqwest::StatusCode::from_u16(response.status().as_u16()).unwrap_or_default();
                let refusal = response.body().as_ref().and_then(|body| serde_json::from_slice::<Refusal>(body).ok());
                Err(refusal.map_or(ClientError::Foreign { url: endpoint.url.clone(), status }, ClientError::Refused))
            }
            Err(error) => Err(self.unreachable(error)),
        }
    }
}

impl Console {
    /// What the guest wrote next; `None` when the console is closed.
    pub async fn receive(&mut self) -> Option<Bytes> {
        loop {
            match self.socket.next().await? {
                Ok(Message::Binary(data)) => return Some(data),
                Ok(Message::Close(_)) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// Types `data`. Returns whether the console is still open.
    pub async fn send(&mut self, data: Bytes) -> bool {
        self.socket.send(Message::Binary(data)).await.is_ok()
    }
}
