//! The outside client: sockets in the lab's outside namespace, from which guests are watched as their users see them.

mod echo;
mod stream;
mod witness;

use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use godwit_guest::{STATUS_PORT, Status};
use godwit_lab::in_namespace;
use godwit_lab::layout::OUTSIDE_GUEST_ADDRESS;

pub use echo::Echo;
pub use stream::{StreamClient, StreamReport};
pub use witness::Witness;

/// Where guests send their records.
pub(crate) const WITNESS_PORT: u16 = 9999;

/// The outside client of one lab.
#[derive(Debug, Clone)]
pub struct Outside {
    namespace: String,
}

impl Outside {
    /// The outside client in this namespace.
    pub(crate) fn new(namespace: String) -> Self {
        Self { namespace }
    }

    /// A datagram socket towards a port of a guest.
    fn datagrams(&self, to: Ipv4Addr, port: u16) -> Result<UdpSocket> {
        let open = || {
            let socket = UdpSocket::bind((OUTSIDE_GUEST_ADDRESS, 0))?;
            socket.connect((to, port))?;
            Ok::<_, std::io::Error>(socket)
        };
        in_namespace(&self.namespace, open)?.context("open a datagram socket outside")
    }

    /// A connection to a port of a guest.
    fn connection(&self, to: Ipv4Addr, port: u16, patience: Duration) -> Result<TcpStream> {
        let connect = || TcpStream::connect_timeout(&(to, port).into(), patience);
        in_namespace(&self.namespace, connect)?.with_context(|| format!("connect to {to}:{port} from outside"))
    }

    /// What the guest at `address` says of itself, asked again and again for as long as `patience`.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self, address: Ipv4Addr, patience: Duration) -> Result<Status> {
        let socket = self.datagrams(address, STATUS_PORT)?;
        socket.set_read_timeout(Some(Duration::from_millis(250)))?;
        let deadline = Instant::now() + patience;
        let mut datagram = [0; 4096];
        while Instant::now() < deadline {
            // Refusals and losses alike: asked again.
            let _ = socket.send(b"?");
            if let Ok(length) = socket.recv(&mut datagram) {
                return serde_json::from_slice(&datagram[..length]).context("the guest's status is not its language");
            }
        }
        bail!("the guest at {address} does not answer within {patience:?}")
    }

    /// Probes the guest at `address` a thousand times a second from now on.
    ///
    /// # Errors
    /// When there is no socket.
    pub fn echo(&self, address: Ipv4Addr) -> Result<Echo> {
        Echo::start(self.datagrams(address, godwit_guest::ECHO_PORT)?)
    }

    /// Reads the stream of the guest at `address` from now on.
    ///
    /// # Errors
    /// When it cannot be connected to.
    pub fn stream(&self, address: Ipv4Addr) -> Result<StreamClient> {
        StreamClient::start(self.clone(), address)
    }

    /// Hears the records of all guests from now on.
    ///
    /// # Errors
    /// When there is no socket.
    pub(crate) fn witness(&self) -> Result<Witness> {
        let bind = || UdpSocket::bind((OUTSIDE_GUEST_ADDRESS, WITNESS_PORT));
        Witness::start(in_namespace(&self.namespace, bind)?.context("bind the witness's port")?)
    }
}
