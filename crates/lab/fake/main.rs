//! A stand-in for `godwit` that does only what a lab can see of it. For this crate's tests.

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

/// The value behind a flag.
fn value(arguments: &[String], flag: &str) -> PathBuf {
    let at = arguments.iter().position(|argument| argument == flag).unwrap_or_else(|| panic!("{flag} is missing"));
    PathBuf::from(arguments.get(at + 1).unwrap_or_else(|| panic!("{flag} has no value")))
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["serve", ..] => serve(&arguments),
        ["host", "join", ..] => {
            let token = fs::read_to_string(value(&arguments, "--token-file")).expect("the token can be read");
            assert_eq!(token, format!("token-{}", value(&arguments, "--name").display()));
            fs::write(value(&arguments, "--state-dir").join("joined"), arguments.join("\n")).expect("written");
            ExitCode::SUCCESS
        }
        ["agent", ..] => agent(&arguments),
        ["lab-relay", ..] => {
            let error = godwit_lab::run_relay(arguments.iter().skip(1).map(OsString::from)).expect_err("only errors");
            eprintln!("{error}: {error:?}");
            ExitCode::FAILURE
        }
        _ => ExitCode::from(2),
    }
}

/// Answers everything on the socket it was given.
fn serve(arguments: &[String]) -> ExitCode {
    assert_eq!(variable("LISTEN_FDS"), "1");
    assert_eq!(variable("LISTEN_FDNAMES"), "api");
    assert_eq!(variable("LISTEN_PID"), std::process::id().to_string());
    let data = value(arguments, "--data-dir");
    for file in ["admin.token", "ca.pem"] {
        fs::write(data.join(file), file).expect("written");
    }
    // The link's listener shows in which namespace this runs.
    let _link = TcpListener::bind(value(arguments, "--link-listen").to_str().expect("an address")).expect("bound");
    for mut stream in inherited_listener().incoming().map_while(Result::ok) {
        let _ = stream.read(&mut [0; 1]);
        let _ = stream.write_all(b"ok");
    }
    ExitCode::FAILURE
}

#[expect(unsafe_code, reason = "a descriptor known only by its number")]
fn inherited_listener() -> TcpListener {
    use std::os::fd::FromRawFd;
    // SAFETY: the socket was passed as descriptor 3, as LISTEN_FDS says, and nothing else uses that.
    unsafe { TcpListener::from_raw_fd(3) }
}

/// Leaves a "QEMU" behind that only its user id connects with the lab, then waits for ever.
fn agent(arguments: &[String]) -> ExitCode {
    let state = value(arguments, "--state-dir");
    assert!(state.join("joined").is_file(), "has not joined");
    let uid = value(arguments, "--uid-base").display().to_string();
    #[expect(clippy::zombie_processes, reason = "this process becomes another one below")]
    let child = Command::new("setsid")
        .args(["unshare", "--net", "setpriv", "--reuid", &uid, "--regid", &uid, "--clear-groups", "sleep", "100000"])
        .spawn()
        .expect("unshare");
    fs::write(state.join("qemu.pid"), child.id().to_string()).expect("written");
    fs::write(state.join("agent.args"), arguments.join("\n")).expect("written");
    println!("agent of {} is ready", state.display());
    let error = Command::new("sleep").arg("100000").exec();
    eprintln!("{error}");
    ExitCode::FAILURE
}
