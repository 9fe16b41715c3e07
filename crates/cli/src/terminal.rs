//! Raw mode of the terminal, given back on every way out.

use std::io::{self, Write};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::error::Failure;

/// The terminal in raw mode; dropping gives it back as it was.
pub(crate) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Puts the terminal at standard input into raw mode.
    pub(crate) fn enter() -> Result<Self, Failure> {
        let refused = |error: rustix::io::Errno| Failure::Terminal(error.into());
        let before = tcgetattr(io::stdin()).map_err(refused)?;
        let mut raw = before.clone();
        raw.make_raw();
        // From here on drop gives it back, also if only half of the change was made.
        let terminal = Self { before };
        tcsetattr(io::stdin(), OptionalActions::Flush, &raw).map_err(refused)?;
        Ok(terminal)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
        // The guest may have left colours on and the cursor hidden.
        let mut stderr = io::stderr();
        let _ = stderr.write_all(b"\x1b[0m\x1b[?25h\r\n").and_then(|()| stderr.flush());
    }
}
