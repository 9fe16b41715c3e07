//! The way back: what the destination's QEMU says goes to the source's as it is, but for what is its carry's.

use bytes::BytesMut;
use godwit_carrier::Frame;
use godwit_carrier::frame::MAX_DATA;
use godwit_stream::{ReturnError, ReturnMessage, ReturnReader, ReturnWriteError, ReturnWriter};
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{mpsc, oneshot};

use super::deal::FromQemu;
use super::pump::{ADVISED, Pump};

/// QEMU's answers are short.
const RETURN_READ: usize = 16 << 10;
/// Requests for pages that wait before no more is heard of QEMU: each of its threads can wait for one.
const MOST_ASKS: usize = 4096;

/// What the destination's QEMU says to its carry.
pub(super) fn from_qemu(advises: bool) -> (ToCarryOfQemu, FromQemu) {
    let (advised, is_advised) = oneshot::channel();
    let (asks, asked) = mpsc::channel(MOST_ASKS);
    (ToCarryOfQemu { advised: Some(advised), asks }, FromQemu { advises, advised: is_advised, asks: asked })
}

/// Where what the destination's QEMU says goes, if it is for its carry.
pub(super) struct ToCarryOfQemu {
    advised: Option<oneshot::Sender<()>>,
    asks: mpsc::Sender<ReturnMessage>,
}

/// The destination's QEMU answers: its words go back as they are, but for those of post-copy, which are its carry's.
pub(super) async fn return_path(pump: &Pump, qemu: &OwnedReadHalf, mut to_carry: ToCarryOfQemu) -> ReturnPathError {
    let mut reader = ReturnReader::new();
    let mut writer = ReturnWriter::default();
    loop {
        let buffer = reader.buffer_mut();
        buffer.reserve(RETURN_READ);
        match qemu.try_read_buf(buffer) {
            Ok(0) => break,
            Ok(_) => {
                let mut passed = BytesMut::new();
                loop {
                    let message = match reader.next_message() {
                        Ok(Some(message)) => message,
                        Ok(None) => break,
                        Err(error) => return error.into(),
                    };
                    match message {
                        ReturnMessage::Pong(ADVISED) => drop(to_carry.advised.take().map(|advised| advised.send(()))),
                        ReturnMessage::ReqPages { .. } | ReturnMessage::ReqPagesId { .. } => {
                            drop(to_carry.asks.send(message).await)
                        }
                        ReturnMessage::ResumeAck(_) => tracing::info!("QEMU goes on"),
                        message => {
                            if let Err(error) = writer.write(&message, &mut passed) {
                                return error.into();
                            }
                        }
                    }
                }
                while !passed.is_empty() {
                    let data = passed.split_to(passed.len().min(MAX_DATA)).freeze();
                    let raw = data.len() as u64;
                    pump.push(&Frame::Return(data), raw);
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if qemu.readable().await.is_err() {
                    break;
                }
            }
            Err(_) => break,
        }
    }
    pump.push(&Frame::ReturnEnd, 0);
    std::future::pending().await
}

/// Why the return path cannot be passed on.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReturnPathError {
    #[error("the return path is not understood: {0}")]
    Read(#[from] ReturnError),
    #[error("the return path cannot be written again: {0}")]
    Write(#[from] ReturnWriteError),
}
