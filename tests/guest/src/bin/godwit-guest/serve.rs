//! What the guest answers on the network: echo, status, stream.

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use godwit_guest::{ECHO_PORT, Knobs, PANIC, Pace, STATUS_PORT, STREAM_PORT, VERIFY, fill_stream};

use crate::counters::Counters;
use crate::{now, thread};

/// More would only take memory from the pages under test.
const MOST_STREAMS: u64 = 16;
const TICK: Duration = Duration::from_millis(10);

/// Starts all services.
pub(crate) fn start(knobs: &Knobs, counters: &Arc<Counters>) -> std::io::Result<()> {
    let echo = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, ECHO_PORT))?;
    let counted = Arc::clone(counters);
    thread("echo", move || {
        let mut datagram = [0; 2048];
        loop {
            let Ok((length, from)) = echo.recv_from(&mut datagram) else { continue };
            // A sender that cannot be reached any more is a lost datagram, as anywhere in a network.
            if echo.send_to(datagram.get(..length).unwrap_or_default(), from).is_ok() {
                counted.echoes.add(1);
            }
        }
    })?;

    let status = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, STATUS_PORT))?;
    let counted = Arc::clone(counters);
    thread("status", move || {
        loop {
            let mut datagram = [0; 64];
            let Ok((length, from)) = status.recv_from(&mut datagram) else { continue };
            if datagram.get(..length) == Some(VERIFY) {
                counted.verify.set(1);
            }
            if datagram.get(..length) == Some(PANIC) {
                // Instead of booting again.
                let _ = std::fs::write("/proc/sys/kernel/panic", "0");
                let _ = std::fs::write("/proc/sysrq-trigger", "c");
            }
            let answer = serde_json::to_vec(&counted.status()).unwrap_or_default();
            let _ = status.send_to(&answer, from);
        }
    })?;

    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, STREAM_PORT))?;
    let (counted, rate) = (Arc::clone(counters), knobs.tcp_rate);
    thread("streams", move || {
        for stream in listener.incoming().flatten() {
            if counted.tcp_connections.get() >= MOST_STREAMS {
                continue;
            }
            counted.tcp_connections.add(1);
            counted.tcp_accepted.add(1);
            let of_thread = Arc::clone(&counted);
            let started = thread("stream", move || {
                // How a stream ends is the client's business: it counts what it got.
                let _ = send_stream(stream, rate, &of_thread);
                of_thread.tcp_connections.subtract(1);
            });
            if started.is_err() {
                counted.tcp_connections.subtract(1);
            }
        }
    })
}

fn send_stream(mut stream: TcpStream, rate: u64, counters: &Counters) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut pace = Pace::new(rate, now());
    let mut offset = 0;
    let mut bytes = [0; 16 << 10];
    loop {
        let mut due = pace.due(now());
        while due > 0 {
            let length = usize::try_from(due).unwrap_or(usize::MAX).min(bytes.len());
            let piece = bytes.get_mut(..length).unwrap_or_default();
            fill_stream(offset, piece);
            stream.write_all(piece)?;
            offset += length as u64;
            due -= length as u64;
            counters.tcp_bytes.add(length as u64);
        }
        std::thread::sleep(TICK);
    }
}
