//! Switching off: the ACPI power button, the guest agent channel, and the machine itself.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use godwit_guest::{AgentAnswer, ConsoleLine, answer_agent};
use rustix::system::{RebootCommand, reboot};

use crate::console::Console;
use crate::{network, thread};

const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
/// `struct input_event`: two words of time, type, code, value.
const INPUT_EVENT: usize = 24;
const AGENT_PORT: &str = "org.qemu.guest_agent.0";
const LONGEST_COMMAND: usize = 64 << 10;
/// In the layer that `scripts/guest-agent-layer` makes.
const QEMU_AGENT: &str = "/usr/sbin/qemu-ga";

/// Switches the machine off. There are no disks to be flushed.
pub(crate) fn off() {
    // Linux 6.1 breaks virtio devices before it switches off, and whoever sends on a broken one spins for ever if an earlier packet was not reaped:
    // with one processor that is the end.
    network::all_down();
    // Not root, or not in a machine: nothing is left to be done.
    let _ = reboot(RebootCommand::PowerOff);
    std::process::exit(1);
}

/// Listens to all input devices for the power button.
pub(crate) fn start_button(console: &Console) -> std::io::Result<()> {
    let Ok(devices) = fs::read_dir("/dev/input") else { return Ok(()) };
    for device in devices.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("event")) {
        let Ok(mut device) = File::open(device.path()) else { continue };
        let console = console.clone();
        thread("button", move || {
            let mut event = [0; INPUT_EVENT];
            while device.read_exact(&mut event).is_ok() {
                if is_power_press(&event) {
                    console.poweroff("button");
                }
            }
        })?;
    }
    Ok(())
}

fn is_power_press(event: &[u8; INPUT_EVENT]) -> bool {
    let [.., t0, t1, c0, c1, v0, v1, v2, v3] = *event;
    u16::from_ne_bytes([t0, t1]) == EV_KEY && u16::from_ne_bytes([c0, c1]) == KEY_POWER && i32::from_ne_bytes([v0, v1, v2, v3]) == 1
}

/// Answers on the guest agent channel, where there is one; or lets QEMU's own agent do that, where there is that.
pub(crate) fn start_agent(console: &Console) -> std::io::Result<()> {
    let Some(path) = agent_port() else { return Ok(()) };
    let console = console.clone();
    if Path::new(QEMU_AGENT).exists() {
        return thread("agent", move || {
            let mut command = Command::new(QEMU_AGENT);
            command
                .args(["--method=virtio-serial", "--statedir=/tmp"])
                .arg("--path")
                .arg(path)
                .env("PATH", "/bin:/usr/bin:/usr/sbin");
            let message = match command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status() {
                Ok(status) => format!("{QEMU_AGENT} has ended: {status}"),
                Err(error) => format!("{QEMU_AGENT}: {error}"),
            };
            console.say(ConsoleLine::Warning { message });
        });
    }
    let mut port = OpenOptions::new().read(true).write(true).open(path)?;
    thread("agent", move || {
        let (mut command, mut piece) = (Vec::new(), [0; 4096]);
        loop {
            let length = match port.read(&mut piece) {
                // Nobody is connected on the host's side, and the port cannot tell when somebody will be.
                Ok(0) | Err(_) => {
                    command.clear();
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
                Ok(length) => length,
            };
            for &byte in piece.get(..length).unwrap_or_default() {
                if command.len() < LONGEST_COMMAND {
                    command.push(byte);
                }
                if byte == b'\n' {
                    match answer_agent(&command) {
                        // An answer that nobody takes is no loss.
                        AgentAnswer::Send(bytes) => drop(port.write_all(&bytes)),
                        AgentAnswer::Poweroff => console.poweroff("agent"),
                        AgentAnswer::Nothing => {}
                    }
                    command.clear();
                }
            }
        }
    })
}

fn agent_port() -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    let port =
        ports.flatten().find(|port| fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == AGENT_PORT))?;
    Some(Path::new("/dev").join(port.file_name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: i32) -> [u8; INPUT_EVENT] {
        let mut event = [9; INPUT_EVENT];
        event[16..18].copy_from_slice(&kind.to_ne_bytes());
        event[18..20].copy_from_slice(&code.to_ne_bytes());
        event[20..].copy_from_slice(&value.to_ne_bytes());
        event
    }

    #[test]
    fn only_pressing_the_power_button_counts() {
        assert!(is_power_press(&event(EV_KEY, KEY_POWER, 1)));
        assert!(!is_power_press(&event(EV_KEY, KEY_POWER, 0)));
        assert!(!is_power_press(&event(EV_KEY, 30, 1)));
        assert!(!is_power_press(&event(0, KEY_POWER, 1)));
    }
}
