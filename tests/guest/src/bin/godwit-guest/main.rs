//! Init of the test guest: brings the machine up, starts the threads, says `ready`, and works until it is switched off.
//!
//! boot → knobs → memory → network → threads → ready. What a guest can be asked for is in `godwit_guest::Knobs`.

mod boot;
mod console;
mod counters;
mod network;
mod power;
mod seed;
mod serve;
mod spoof;
mod witness;
mod work;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use godwit_guest::{ConsoleLine, Knobs, Load, Noise, PagePool};

use crate::console::Console;
use crate::counters::Counters;

fn main() {
    let mounted = boot::mount_all();
    let console = Console::open();
    let spoken = console.clone();
    // A thread that panics would be silent: init has nobody who looks at its standard error.
    std::panic::set_hook(Box::new(move |panic| spoken.say(ConsoleLine::Warning { message: panic.to_string() })));
    if let Err(error) = mounted.map_err(Into::into).and_then(|()| run(&console)) {
        console.say_at_once(&ConsoleLine::Failed { message: error.to_string() });
        power::off();
    }
    loop {
        std::thread::park();
    }
}

/// Starts everything; the guest lives on in the threads.
fn run(console: &Console) -> Result<(), Box<dyn std::error::Error>> {
    for problem in boot::load_modules() {
        console.say(ConsoleLine::Warning { message: problem });
    }
    let host_name = seed::take().unwrap_or_else(|problem| {
        console.say(ConsoleLine::Warning { message: problem });
        None
    });
    let mut knobs = Knobs::parse(&std::fs::read_to_string("/proc/cmdline")?)?;
    let free = boot::available_memory().unwrap_or(u64::MAX);
    let most = free / 10 * 8;
    if knobs.touch_total > most {
        let message = format!("touch_total is {} but only {free} are free: uses {most}", knobs.touch_total);
        console.say(ConsoleLine::Warning { message });
        knobs.touch_total = most;
    }

    let boot = u128::from(witness::nonce(None)) << 64 | u128::from(witness::nonce(None));
    let counters = Arc::new(Counters::new(knobs.id.clone(), host_name.unwrap_or_default(), boot));
    let memory = match knobs.load {
        Some(rewrite) => {
            let size = *knobs.write_size.start();
            Memory::Measured(Load::new(knobs.touch_total, knobs.mix, boot as u64, rewrite, knobs.working_set, size))
        }
        None => Memory::Checked(Arc::new(PagePool::new(knobs.touch_total, knobs.mix, boot as u64))),
    };
    counters.pages.set(memory.pages() as u64);

    // Whoever is answered may press it.
    power::start_button(console)?;
    if let Some((address, prefix)) = knobs.ip {
        network::up("lo", Some((Ipv4Addr::LOCALHOST, 8)), None)?;
        network::up("eth0", Some((address, prefix)), knobs.mtu)?;
        if let Some(gateway) = knobs.gateway {
            network::default_route(gateway)?;
        }
        serve::start(&knobs, &counters)?;
        spoof::start("eth0", address)?;
        if let Some(witness) = knobs.witness {
            witness::start(&knobs, witness, boot, &counters)?;
        }
    }
    work::start_disks(&knobs, boot as u64, &counters, console)?;
    work::start_clock_watch(&knobs, &counters)?;
    match memory {
        Memory::Measured(load) => work::start_load(&knobs, load, &counters)?,
        Memory::Checked(pool) => {
            work::start_checker(&knobs, &pool, &counters, console)?;
            work::start_writer(&knobs, &pool, &counters, Noise::new(boot as u64))?;
        }
    }
    power::start_agent(console)?;
    console.start(&counters)?;
    Ok(())
}

/// What the guest works on.
enum Memory {
    Checked(Arc<PagePool>),
    Measured(Load),
}

impl Memory {
    fn pages(&self) -> usize {
        match self {
            Self::Checked(pool) => pool.pages(),
            Self::Measured(load) => load.pages(),
        }
    }
}

/// A named thread with a small stack: what the guest itself needs of its memory is noise in measurements.
fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).stack_size(256 << 10).spawn(body).map(drop)
}

/// CLOCK_MONOTONIC, which stands still while the VM does.
fn now() -> Duration {
    clock(rustix::time::ClockId::Monotonic)
}

fn clock(id: rustix::time::ClockId) -> Duration {
    let time = rustix::time::clock_gettime(id);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
