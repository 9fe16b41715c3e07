//! The outside client: sockets in the lab's outside namespace, from which guests are watched as their users see them.

mod ear;
mod echo;
mod stream;
mod witness;

use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use godwit_guest::{PANIC, SPOOF_MARK, SPOOF_PORT, STATUS_PORT, Spoof, SpoofRequest, Status, VERIFY};
use godwit_lab::in_namespace;
use godwit_lab::layout::OUTSIDE_GUEST_ADDRESS;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, eth, recv, socket_with};

pub use echo::Echo;
pub use stream::{StreamClient, StreamReport};
pub use witness::Witness;

/// Where guests send their records.
pub(crate) const WITNESS_PORT: u16 = 9999;

/// How long frames that were sent may take until here.
const LISTEN: Duration = Duration::from_millis(500);

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
        self.ask(address, b"?", patience)
    }

    /// As [`Outside::status`], once the guest has verified the memory that it is measured with.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn verify(&self, address: Ipv4Addr, patience: Duration) -> Result<Status> {
        let deadline = Instant::now() + patience;
        let before = self.ask(address, b"?", patience)?;
        self.ask(address, VERIFY, patience)?;
        loop {
            let now = self.ask(address, b"?", patience)?;
            if now.sweeps > before.sweeps {
                return Ok(now);
            }
            ensure!(Instant::now() < deadline, "the guest at {address} has not verified its memory within {patience:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Breaks the guest at `address`: its kernel panics, and stands still.
    ///
    /// # Errors
    /// When it answers on.
    pub fn panic(&self, address: Ipv4Addr, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        while self.ask(address, PANIC, Duration::from_millis(500)).is_ok() {
            ensure!(Instant::now() < deadline, "the guest at {address} answers on");
        }
        Ok(())
    }

    fn ask(&self, address: Ipv4Addr, question: &[u8], patience: Duration) -> Result<Status> {
        let socket = self.datagrams(address, STATUS_PORT)?;
        socket.set_read_timeout(Some(Duration::from_millis(250)))?;
        let deadline = Instant::now() + patience;
        let mut datagram = [0; 4096];
        while Instant::now() < deadline {
            // Refusals and losses alike: asked again.
            let _ = socket.send(question);
            if let Ok(length) = socket.recv(&mut datagram) {
                return serde_json::from_slice(&datagram[..length]).context("the guest's status is not its language");
            }
        }
        bail!("the guest at {address} does not answer within {patience:?}")
    }

    /// Lets the guest at `address` send frames that claim something; answers how many of them were heard out here, also inside tunnels.
    ///
    /// # Errors
    /// When the guest does not do it.
    pub fn spoof(&self, address: Ipv4Addr, spoof: Spoof, count: u16) -> Result<usize> {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let open = || socket_with(AddressFamily::PACKET, SocketType::RAW, flags, Some(eth::ALL));
        let listener = in_namespace(&self.namespace, open)?.context("listen to frames outside")?;
        let socket = self.datagrams(address, SPOOF_PORT)?;
        socket.set_read_timeout(Some(Duration::from_millis(250)))?;
        let request = SpoofRequest { spoof, count, number: NUMBER.fetch_add(1, Ordering::Relaxed) }.to_string();
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut answer = [0; 64];
        loop {
            ensure!(Instant::now() < deadline, "the guest at {address} does not send frames of kind {spoof}");
            let _ = socket.send(request.as_bytes());
            if let Ok(length) = socket.recv(&mut answer) {
                let said = String::from_utf8_lossy(answer.get(..length).unwrap_or_default()).into_owned();
                ensure!(said == request, "the guest was asked for {request:?} and said {said:?}");
                break;
            }
        }
        let mark = format!("{SPOOF_MARK}{spoof}\n").into_bytes();
        let (until, mut heard, mut frame) = (Instant::now() + LISTEN, 0, [0; 2_048]);
        while Instant::now() < until {
            match recv(&listener, &mut frame[..], RecvFlags::empty()) {
                Ok((length, _)) => {
                    let got = frame.get(..length).unwrap_or_default();
                    heard += usize::from(got.windows(mark.len()).any(|window| window == mark));
                }
                // Nothing is there; what is late is waited for.
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        Ok(heard)
    }

    /// Probes the guest at `address` a thousand times a second from now on.
    ///
    /// # Errors
    /// When there is no socket.
    pub fn echo(&self, address: Ipv4Addr) -> Result<Echo> {
        self.echo_every(Echo::PERIOD, address)
    }

    /// Probes the guest at `address` again and again after this time, from now on.
    ///
    /// # Errors
    /// When there is no socket.
    pub(crate) fn echo_every(&self, period: Duration, address: Ipv4Addr) -> Result<Echo> {
        Echo::start(self.datagrams(address, godwit_guest::ECHO_PORT)?, period)
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
