//! One connection after the other: the source dials again when one is lost, the destination takes the newest.

use std::io::ErrorKind;
use std::time::Duration;

use bytes::Bytes;
use godwit_carrier::{Decoder, Greeting};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::connect::{Acceptor, ConnectError, Dialler, Greeted};
use super::pump::{Pump, PumpError};

/// Time for the first connection; the destination listens before the source is told of it.
const FIRST_DIAL: Duration = Duration::from_secs(10);
/// Time for a later one. The kernel repeats what was lost after one second, then more and more seldom: better to begin anew.
const NEXT_DIAL: Duration = Duration::from_secs(1);
const GREETING: Duration = Duration::from_secs(15);
/// Time for all of a later attempt: handshake and greeting are a few round trips.
const NEXT_ATTEMPT: Duration = Duration::from_secs(4);
const PAUSE: Duration = Duration::from_millis(200);
/// So much of one attempt counts as time without a connection: in the rest this very process may have stood still.
const COUNTS: Duration = Duration::from_secs(2);

/// Why there will be no further connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Pump(#[from] PumpError),
    #[error("the destination's carry is gone")]
    Gone,
    #[error("there was no connection for {0:?}")]
    Patience(Duration),
}

/// How long there has been no connection.
struct Lost {
    patience: Duration,
    time: Duration,
}

impl Lost {
    fn add(&mut self, since: Instant) -> Result<(), SessionError> {
        self.time += since.elapsed().min(COUNTS);
        if self.time > self.patience { Err(SessionError::Patience(self.time)) } else { Ok(()) }
    }
}

/// The source's side: dials until the destination's carry is gone or `patience` is over, and tells whether there is a connection.
pub(super) async fn of_source(
    pump: &Pump,
    dialler: &Dialler,
    key: [u8; 32],
    patience: Duration,
    from_agent: &mut mpsc::Receiver<Bytes>,
    tell: impl Fn(bool),
) -> SessionError {
    let mut lost = Lost { patience, time: Duration::ZERO };
    let mut connected = false;
    loop {
        let began = Instant::now();
        let ended = match attempt(pump, dialler, key, connected).await {
            Ok((connection, decoder)) => {
                (connected, lost.time) = (true, Duration::ZERO);
                tell(true);
                let error = pump.run(connection, decoder, from_agent).await;
                tell(false);
                SessionError::Pump(error)
            }
            Err(error) => error,
        };
        match ended {
            SessionError::Connect(ConnectError::Dial(_, error)) if connected && error.kind() == ErrorKind::ConnectionRefused => {
                return SessionError::Gone;
            }
            SessionError::Connect(ConnectError::Material(_)) => return ended,
            SessionError::Pump(ref error) if !error.is_passing() => return ended,
            ended if !connected => return ended,
            ended => tracing::info!(reason = %ended, "dials again"),
        }
        tokio::time::sleep(PAUSE).await;
        if let Err(error) = lost.add(began) {
            return error;
        }
    }
}

async fn attempt(
    pump: &Pump,
    dialler: &Dialler,
    key: [u8; 32],
    again: bool,
) -> Result<(super::connect::Connection, Decoder), SessionError> {
    let (dial, limit) = if again { (NEXT_DIAL, NEXT_ATTEMPT) } else { (FIRST_DIAL, FIRST_DIAL + GREETING) };
    let greeted = async {
        let mut connection = dialler.dial(dial).await?;
        let mut decoder = Decoder::default();
        pump.greet(&mut connection, &mut decoder, key).await?;
        Ok((connection, decoder))
    };
    tokio::time::timeout(limit, greeted).await.unwrap_or_else(|_| Err(PumpError::Silent(limit).into()))
}

/// The destination's side: takes every connection of this move, the newest instead of the one before, and tells whether there is one.
/// `key` is told the session's, once.
pub(super) async fn of_destination(
    pump: &Pump,
    acceptor: &mut Acceptor,
    key: oneshot::Sender<[u8; 32]>,
    patience: Duration,
    from_agent: &mut mpsc::Receiver<Bytes>,
    tell: impl Fn(bool),
) -> SessionError {
    let mut lost = Lost { patience, time: Duration::ZERO };
    let (mut session, mut untold, mut newer) = (None, Some(key), None);
    loop {
        let greeted = match newer.take() {
            Some(greeted) => greeted,
            None => match next(pump, acceptor, session, &mut lost).await {
                Ok(greeted) => greeted,
                Err(error) => return error,
            },
        };
        let Greeted { mut connection, decoder, greeting } = greeted;
        let welcomed = tokio::time::timeout(GREETING, pump.welcome(&mut connection, greeting)).await;
        match welcomed {
            Ok(Ok(())) => {}
            Ok(Err(error)) if !error.is_passing() => return error.into(),
            Ok(Err(_)) | Err(_) => continue,
        }
        session = Some(greeting.key);
        if let Some(key) = untold.take() {
            let _ = key.send(greeting.key);
        }
        lost.time = Duration::ZERO;
        tell(true);
        let ended = tokio::select! {
            error = pump.run(connection, decoder, from_agent) => Some(error),
            Ok(greeted) = of_this_move(pump, acceptor, session) => {
                newer = Some(greeted);
                None
            }
        };
        tell(false);
        match ended {
            Some(error) if !error.is_passing() => return error.into(),
            Some(error) => tracing::info!(reason = %error, "waits for the source to dial again"),
            None => tracing::info!("the source has dialled again"),
        }
    }
}

async fn next(pump: &Pump, acceptor: &mut Acceptor, session: Option<[u8; 32]>, lost: &mut Lost) -> Result<Greeted, SessionError> {
    loop {
        let began = Instant::now();
        match tokio::time::timeout(COUNTS, of_this_move(pump, acceptor, session)).await {
            Ok(greeted) => return Ok(greeted?),
            Err(_) => lost.add(began)?,
        }
    }
}

/// The next connection of this move and, once there is one, of this session.
async fn of_this_move(pump: &Pump, acceptor: &mut Acceptor, session: Option<[u8; 32]>) -> Result<Greeted, ConnectError> {
    loop {
        let greeted = acceptor.next().await?;
        let Greeting { identity, key, taken } = greeted.greeting;
        if identity != pump.identity() || session.is_some_and(|session| session != key) {
            tracing::warn!("turned away a connection of another move");
        } else if taken < pump.acknowledged() {
            // It was under way for long, and the source has gone on with a later one.
            tracing::info!("a greeting that is out of date");
        } else {
            return Ok(greeted);
        }
    }
}
