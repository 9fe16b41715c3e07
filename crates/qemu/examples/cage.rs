//! The hidden subcommands alone, so that tests of this crate need no `godwit` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |name: &str| {
        let position = arguments.iter().position(|argument| argument == name)?;
        arguments.get(position + 1)?.parse().ok()
    };
    match (arguments.first().map(String::as_str), number("--plan-fd")) {
        (Some("cage"), Some(plan)) => {
            let error = godwit_qemu::cage::run(plan, number("--status-fd"));
            eprintln!("cage: {error}");
            ExitCode::from(125)
        }
        (Some("kvm-probe"), _) => godwit_qemu::accel::run_probe_child(),
        _ => {
            eprintln!("usage: cage cage --plan-fd N [--status-fd N] | cage kvm-probe");
            ExitCode::from(2)
        }
    }
}
