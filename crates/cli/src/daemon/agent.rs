//! `godwit agent`: the agent of this host.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use godwit_agent::AgentOptions;
use godwit_model::{Bytes, Millis, Name};

use super::{log, run_to_end};
use crate::error::Failure;

/// What the host offers.
#[derive(Args)]
#[command(
    after_help = "The host must have joined: see `godwit host join --help`. Restarting the agent touches neither VMs nor migrations.

Example:
  godwit agent --pool fast=/srv/vms --pool nfs=/mnt/vms --shared-pool nfs"
)]
pub(crate) struct AgentArgs {
    /// Directory for identity, journal, images and logs
    #[arg(long, value_name = "DIR", default_value = "/var/lib/godwit/agent")]
    state_dir: PathBuf,
    /// Directory for sockets; a short path
    #[arg(long, value_name = "DIR", default_value = "/run/godwit")]
    run_dir: PathBuf,
    /// QEMU, 7.2 or newer [default: qemu-system-x86_64 as found in PATH]
    #[arg(long, value_name = "FILE")]
    qemu: Option<PathBuf>,
    /// A pool and its directory; can be repeated
    #[arg(long = "pool", value_name = "NAME=DIR", value_parser = parse_pool)]
    pools: Vec<(Name, PathBuf)>,
    /// A pool whose directory other hosts see too; can be repeated
    #[arg(long = "shared-pool", value_name = "NAME")]
    shared_pools: Vec<Name>,
    /// Memory for VMs, such as 16GiB [default: all but 1 GiB or an eighth, whichever is more]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Bytes>,
    /// Parent of the VMs' cgroups, below the mount of cgroup v2
    #[arg(long, value_name = "PATH", default_value = "godwit")]
    cgroup: String,
    /// First of the 1001 user ids that VMs and carry get
    #[arg(long, value_name = "UID", default_value_t = 900_000)]
    uid_base: u32,
    /// A tunnel endpoint outside of the cluster that takes part in its networks, such as a gateway's; can be repeated
    #[arg(long = "vtep", value_name = "ADDRESS")]
    vteps: Vec<IpAddr>,
    /// Address at which other hosts reach this one's moves [default: what it joined with]
    #[arg(long, value_name = "ADDRESS")]
    migration_address: Option<IpAddr>,
    /// Disk that the memory of VMs which left may take, encrypted, so that they come home quickly; 0 keeps nothing
    #[arg(long, value_name = "SIZE", default_value = "16GiB")]
    stays: Bytes,
    /// How often to measure for a second how much each VM writes, so that its quiet time of day is known; 0 never
    #[arg(long, value_name = "TIME", default_value = "10m")]
    sample_writes: Millis,
    /// Let the agent set vm.unprivileged_userfaultfd=1, which QEMU 7.2 needs for post-copy and RAM snapshots
    #[arg(long)]
    unprivileged_userfaultfd: bool,
}

pub(crate) fn run(mut args: AgentArgs) -> Result<(), Failure> {
    let Some(qemu) = args.qemu.take().or_else(|| find(QEMU)) else {
        return Err(Failure::usage(
            format!("there is no {QEMU} in PATH"),
            "install QEMU (Debian: qemu-system-x86) or name it with --qemu",
        ));
    };
    let options = args.options(qemu)?;
    log();
    run_to_end(async { godwit_agent::run(options).await.map_err(Failure::daemon) })
}

impl AgentArgs {
    fn options(self, qemu: PathBuf) -> Result<AgentOptions, Failure> {
        if let Some(unknown) = self.shared_pools.iter().find(|shared| !self.pools.iter().any(|(name, _)| name == *shared)) {
            return Err(Failure::usage(
                format!("pool {unknown} is said to be shared, but is no pool"),
                "name its directory with --pool NAME=DIR",
            ));
        }
        let shared = |name: &Name| self.shared_pools.contains(name);
        Ok(AgentOptions {
            state_dir: self.state_dir,
            run_dir: self.run_dir,
            qemu,
            pools: self.pools.iter().map(|(name, path)| (name.clone(), path.clone(), shared(name))).collect(),
            memory: self.memory,
            cgroup: self.cgroup,
            uid_base: self.uid_base,
            vteps: self.vteps,
            migration_address: self.migration_address,
            stays: self.stays,
            sample_writes: (self.sample_writes.get() > 0).then(|| Duration::from_millis(self.sample_writes.get())),
            unprivileged_userfaultfd: self.unprivileged_userfaultfd,
        })
    }

    /// As an agent would get them; a QEMU that is not there is a finding.
    pub(crate) fn options_for_check(mut self) -> Result<AgentOptions, Failure> {
        let qemu = self.qemu.take().or_else(|| find(QEMU)).unwrap_or_else(|| PathBuf::from("/usr/bin").join(QEMU));
        self.options(qemu)
    }
}

const QEMU: &str = "qemu-system-x86_64";

/// Where PATH has a program.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

fn parse_pool(text: &str) -> Result<(Name, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("write NAME=DIR")?;
    let path = PathBuf::from(path);
    if !path.is_absolute() {
        return Err("the directory must be an absolute path".to_owned());
    }
    Ok((Name::new(name).map_err(|error| error.to_string())?, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_are_read_strictly() {
        assert_eq!(parse_pool("a=/x=y"), Ok((Name::new("a").expect("name"), "/x=y".into())));
        for bad in ["", "a", "a=", "a=x", "=/x", "../a=/x"] {
            assert!(parse_pool(bad).is_err(), "{bad:?}");
        }
    }
}
