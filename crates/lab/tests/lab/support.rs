//! A lab that goes away with the test, the stand-in's controller, and probes of links.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use godwit_lab::{ApiAccess, Bootstrap, BootstrapError, Lab, LabSpec, in_namespace, layout};

/// A name that no other test, in this or another run, has now.
pub(crate) fn unique_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("t{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

pub(crate) fn spec(hosts: u16) -> LabSpec {
    LabSpec { hosts, ..LabSpec::new(unique_name(), env!("CARGO_BIN_EXE_godwit-lab-fake")) }
}

/// A lab that is removed when it goes out of scope.
pub(crate) struct Scoped(pub(crate) Lab);

impl Scoped {
    pub(crate) fn network(spec: LabSpec) -> Self {
        Self(Lab::up_network(spec).expect("the network comes up"))
    }

    pub(crate) fn full(spec: LabSpec) -> Self {
        Self(Lab::up_with(spec, &mut FakeController).expect("the lab comes up"))
    }
}

impl Drop for Scoped {
    fn drop(&mut self) {
        let removed = Lab::remove(self.0.name());
        if !thread::panicking() {
            removed.expect("the lab goes away");
        }
    }
}

/// Speaks with the stand-in's controller.
pub(crate) struct FakeController;

impl Bootstrap for FakeController {
    fn is_ready(&mut self, api: &ApiAccess) -> Result<bool, BootstrapError> {
        Ok(api.token_file.is_file() && api.ca_file.is_file() && answers(api))
    }

    fn join_token(&mut self, _api: &ApiAccess, host: &str) -> Result<String, BootstrapError> {
        Ok(format!("token-{host}"))
    }

    fn is_connected(&mut self, api: &ApiAccess, host: &str) -> Result<bool, BootstrapError> {
        let data = api.token_file.parent().and_then(|ctl| ctl.parent()).expect("the token is in the controller's data");
        Ok(data.join(host).join("state/agent.args").is_file())
    }
}

/// Whether the stand-in's API answers in this namespace.
pub(crate) fn answers(api: &ApiAccess) -> bool {
    let ask = || {
        let mut stream = TcpStream::connect(api.url.trim_start_matches("https://"))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"?")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok::<_, std::io::Error>(answer == "ok")
    };
    ask().unwrap_or(false)
}

/// Echoes datagrams in one namespace, and asks from another.
pub(crate) struct Echo {
    asker: UdpSocket,
    server: UdpSocket,
}

impl Echo {
    /// Between a host and the controller's place.
    pub(crate) fn host_to_switch(lab: &Lab, host: &str) -> Self {
        Self::between(&lab.namespace(host).expect("a host"), &lab.switch_namespace(), layout::CONTROLLER_ADDRESS)
    }

    pub(crate) fn between(from: &str, to: &str, address: Ipv4Addr) -> Self {
        let bind = || UdpSocket::bind("0.0.0.0:0").expect("bound");
        let (asker, server) = (in_namespace(from, bind).expect("entered"), in_namespace(to, bind).expect("entered"));
        asker.connect((address, server.local_addr().expect("bound").port())).expect("connected");
        Self { asker, server }
    }

    /// Whether a datagram from the asker arrives within `patience`.
    pub(crate) fn goes(&self, patience: Duration) -> bool {
        drain(&self.server);
        let _ = self.asker.send(b"ping");
        receive(&self.server, patience).is_some()
    }

    /// Whether a datagram from the server arrives within `patience`; `to` is the asker's address in the underlay.
    pub(crate) fn comes(&self, to: Ipv4Addr, patience: Duration) -> bool {
        drain(&self.asker);
        let port = self.asker.local_addr().expect("bound").port();
        let _ = self.server.send_to(b"pong", (to, port));
        receive(&self.asker, patience).is_some()
    }

    /// The shortest of `count` round trips; `None` when all got lost.
    pub(crate) fn round_trip(&self, count: u32) -> Option<Duration> {
        (0..count)
            .filter_map(|_| {
                drain(&self.server);
                drain(&self.asker);
                let start = Instant::now();
                self.asker.send(b"ping").ok()?;
                let from = receive(&self.server, Duration::from_secs(2))?;
                self.server.send_to(b"pong", from).ok()?;
                receive(&self.asker, Duration::from_secs(2))?;
                Some(start.elapsed())
            })
            .min()
    }

    /// How many of `count` datagrams arrive.
    pub(crate) fn arrivals(&self, count: u32) -> u32 {
        (0..count).map(|_| u32::from(self.goes(Duration::from_millis(30)))).sum()
    }
}

fn drain(socket: &UdpSocket) {
    socket.set_nonblocking(true).expect("set");
    while socket.recv(&mut [0; 16]).is_ok() {}
    socket.set_nonblocking(false).expect("set");
}

fn receive(socket: &UdpSocket, patience: Duration) -> Option<std::net::SocketAddr> {
    socket.set_read_timeout(Some(patience)).expect("set");
    match socket.recv_from(&mut [0; 16]) {
        Ok((_, from)) => Some(from),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => None,
        // A refusal came back for an earlier datagram.
        Err(_) => None,
    }
}

/// What a bulk transfer was like.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
}

impl Transfer {
    pub(crate) fn bits_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.seconds
    }
}

/// Sends over one TCP connection from namespace to namespace for a while; measures at the receiver, from the first byte.
pub(crate) fn transfer(from: &str, to: &str, address: Ipv4Addr, length: Duration) -> Transfer {
    let listener = in_namespace(to, || TcpListener::bind("0.0.0.0:0").expect("bound")).expect("entered");
    let port = listener.local_addr().expect("bound").port();
    let mut sender = in_namespace(from, || TcpStream::connect((address, port)).expect("connected")).expect("entered");
    let (mut receiver, _) = listener.accept().expect("accepted");
    thread::scope(|scope| {
        scope.spawn(move || {
            let (block, end) = (vec![7; 256 * 1024], Instant::now() + length);
            while Instant::now() < end && sender.write_all(&block).is_ok() {}
        });
        let mut buffer = vec![0; 256 * 1024];
        let (mut bytes, mut start) = (0, None);
        loop {
            let count = receiver.read(&mut buffer).expect("read");
            let begun = *start.get_or_insert_with(Instant::now);
            if count == 0 {
                return Transfer { bytes, seconds: begun.elapsed().as_secs_f64() };
            }
            bytes += count as u64;
        }
    })
}
