//! The console: piped, and on a terminal that must be given back.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};

use rustix::process::{Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

use crate::fake::{Fake, Script};

#[test]
fn without_a_terminal_it_is_a_pipe() {
    let fake = Fake::start(Script::default());
    let ended = fake.run_with_input(&["vm", "console", "web1", "--linger", "3s"], b"uname\n\x1dhalt\n");
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    // The guest's bytes as they are; Ctrl-] is for people only.
    assert_eq!(ended.stdout, "\u{1b}[1mlogin: UNAME\n\u{1d}HALT\n");
}

struct Terminal {
    ours: File,
    theirs: OwnedFd,
}

impl Terminal {
    fn open() -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&ours).expect("granted");
        unlockpt(&ours).expect("unlocked");
        let path = ptsname(&ours, Vec::new()).expect("a name").into_string().expect("UTF-8");
        let theirs = File::options().read(true).write(true).open(path).expect("the other side").into();
        Self { ours: ours.into(), theirs }
    }

    fn modes(&self) -> Termios {
        tcgetattr(&self.theirs).expect("modes")
    }

    fn start(&self, fake: &Fake) -> Child {
        let copy = || Stdio::from(self.theirs.try_clone().expect("a copy"));
        fake.command(&["vm", "console", "web1"]).stdin(copy()).stdout(copy()).stderr(copy()).spawn().expect("started")
    }

    /// Reads until the text has been shown.
    fn expect(&mut self, text: &str) {
        let mut shown = Vec::new();
        let mut buffer = [0; 256];
        while !String::from_utf8_lossy(&shown).contains(text) {
            let length = self.ours.read(&mut buffer).expect("more to read");
            shown.extend_from_slice(&buffer[..length]);
        }
    }
}

fn same(before: &Termios, after: &Termios) -> bool {
    (before.input_modes, before.output_modes, before.control_modes, before.local_modes)
        == (after.input_modes, after.output_modes, after.control_modes, after.local_modes)
}

#[test]
fn the_terminal_is_given_back_when_the_user_leaves() {
    let fake = Fake::start(Script::default());
    let mut terminal = Terminal::open();
    let before = terminal.modes();
    let mut child = terminal.start(&fake);
    terminal.expect("login: ");
    assert!(!terminal.modes().local_modes.contains(LocalModes::ISIG), "Ctrl-C would not reach the guest");
    terminal.ours.write_all(b"id\x03").expect("typed");
    terminal.expect("ID\u{3}");
    terminal.ours.write_all(b"\x1d").expect("typed");
    assert_eq!(child.wait().expect("ended").code(), Some(0));
    assert!(same(&before, &terminal.modes()));
}

#[test]
fn the_terminal_is_given_back_when_the_process_is_ended() {
    let fake = Fake::start(Script::default());
    for signal in [Signal::TERM, Signal::HUP] {
        let mut terminal = Terminal::open();
        let before = terminal.modes();
        let mut child = terminal.start(&fake);
        terminal.expect("login: ");
        kill_process(rustix::process::Pid::from_child(&child), signal).expect("signalled");
        child.wait().expect("ended");
        assert!(same(&before, &terminal.modes()), "{signal:?}");
    }
}
