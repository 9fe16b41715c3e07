//! What the kernel says of itself in files, and the clock.

use std::fs;
use std::path::{Path, PathBuf};

use godwit_model::Bytes;

use super::Finding;

/// Random bits that the kernel must have collected for keys to be worth anything.
const ENTROPY: u64 = 128;
/// Less free space than this is too little to keep journals, images and logs.
const LITTLE: u64 = 1 << 30;
/// Less than this is none.
const NONE: u64 = 64 << 20;

/// Where the kernel's files are; a test has its own.
pub(crate) struct Machine {
    root: PathBuf,
}

impl Machine {
    /// This machine.
    pub(crate) fn real() -> Self {
        Self { root: "/".into() }
    }

    fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.root.join(path)).ok().map(|text| text.trim().to_owned())
    }

    fn number(&self, path: &str) -> Option<u64> {
        self.read(path)?.parse().ok()
    }

    /// Namespaces, seccomp, landlock, huge pages, entropy.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        vec![self.namespaces(), self.seccomp(), self.landlock(), self.hugepages(), self.entropy()]
    }

    fn namespaces(&self) -> Finding {
        const NAME: &str = "namespaces";
        let missing: Vec<&str> =
            ["mnt", "pid", "ipc", "net"].into_iter().filter(|kind| !self.root.join("proc/self/ns").join(kind).exists()).collect();
        if missing.is_empty() {
            return Finding::ok(NAME, "the kernel has the namespaces that confine a VM");
        }
        let message = format!("the kernel lacks namespaces that confine a VM: {}", missing.join(", "));
        Finding::fail(NAME, message, "boot a distribution's kernel (CONFIG_NAMESPACES with all kinds)")
    }

    fn seccomp(&self) -> Finding {
        const NAME: &str = "seccomp";
        if self.read("proc/sys/kernel/seccomp/actions_avail").is_some_and(|actions| actions.contains("kill_process")) {
            return Finding::ok(NAME, "the kernel filters system calls");
        }
        Finding::fail(
            NAME,
            "the kernel cannot filter system calls: a VM's QEMU would not be confined",
            "boot a kernel with CONFIG_SECCOMP_FILTER",
        )
    }

    fn landlock(&self) -> Finding {
        const NAME: &str = "landlock";
        const FIX: &str = "boot a kernel with CONFIG_SECURITY_LANDLOCK and `landlock` in its lsm= list";
        match self.read("sys/kernel/security/lsm") {
            Some(modules) if modules.split(',').any(|module| module == "landlock") => Finding::ok(NAME, "the kernel has landlock"),
            Some(modules) => Finding::warn(NAME, format!("landlock is not among the kernel's security modules ({modules})"), FIX),
            None => Finding::warn(
                NAME,
                "whether the kernel has landlock cannot be told: securityfs is not mounted",
                "mount -t securityfs securityfs /sys/kernel/security",
            ),
        }
    }

    fn hugepages(&self) -> Finding {
        const NAME: &str = "hugepages";
        let count = |file: &str| self.number(&format!("sys/kernel/mm/hugepages/hugepages-2048kB/{file}")).unwrap_or(0);
        let (all, free) = (count("nr_hugepages"), count("free_hugepages"));
        let mode = self.read("sys/kernel/mm/transparent_hugepage/enabled");
        let chosen = mode.as_deref().and_then(|text| text.split_once('[')?.1.split_once(']').map(|(mode, _)| mode));
        match chosen {
            Some(mode @ ("always" | "madvise")) => {
                Finding::ok(NAME, format!("transparent huge pages: {mode}; 2 MiB pages reserved: {all}, of which {free} are free"))
            }
            other => Finding::warn(
                NAME,
                format!("transparent huge pages are {}: VMs with much memory are slower", other.unwrap_or("not there")),
                "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, or boot with transparent_hugepage=madvise",
            ),
        }
    }

    fn entropy(&self) -> Finding {
        const NAME: &str = "entropy";
        match self.number("proc/sys/kernel/random/entropy_avail") {
            Some(bits) if bits >= ENTROPY => Finding::ok(NAME, format!("the kernel's random source has {bits} bits")),
            found => {
                let bits = found.map_or_else(|| "an unknown number of".into(), |bits| bits.to_string());
                Finding::warn(
                    NAME,
                    format!("the kernel's random source has {bits} bits: keys may have to wait, or be guessed"),
                    "give the machine a hardware or virtio random source, or install rng-tools",
                )
            }
        }
    }
}

/// Whether something keeps this machine's clock in step.
pub(crate) fn clock_synchronised() -> Finding {
    of_clock(unsynchronised())
}

fn of_clock(unsynchronised: std::io::Result<bool>) -> Finding {
    const NAME: &str = "clock";
    const FIX: &str = "let the host keep time by NTP: `systemctl enable --now systemd-timesyncd`, or chrony";
    match unsynchronised {
        Ok(false) => Finding::ok(NAME, "the clock is kept in step by NTP"),
        Ok(true) => {
            Finding::warn(NAME, "nothing keeps this host's clock in step: grants and certificates have an end by the clock", FIX)
        }
        Err(error) => Finding::warn(NAME, format!("whether the clock is kept in step cannot be told: {error}"), FIX),
    }
}

/// The kernel's own word: whoever keeps the clock tells it.
#[expect(unsafe_code, reason = "rustix has no adjtimex")]
fn unsynchronised() -> std::io::Result<bool> {
    // SAFETY: `timex` is plain numbers, for which zero is a value; with no mode set the kernel only fills it in.
    let (state, status) = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        let state = libc::adjtimex(&raw mut timex);
        (state, timex.status)
    };
    if state < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(state == libc::TIME_ERROR || status & libc::STA_UNSYNC != 0)
}

/// Free space where `path` is, or will be.
pub(crate) fn space(name: &str, what: &str, path: &Path) -> Finding {
    let there = path.ancestors().find(|path| path.exists()).unwrap_or_else(|| Path::new("/"));
    match rustix::fs::statvfs(there) {
        Ok(found) => of_space(name, what, there, found.f_bavail.saturating_mul(found.f_frsize)),
        Err(error) => Finding::fail(
            name,
            format!("the file system of {} cannot be asked: {error}", there.display()),
            "mount it, or name another",
        ),
    }
}

fn of_space(name: &str, what: &str, path: &Path, free: u64) -> Finding {
    let message = format!("{} free in {} for {what}", Bytes(free), path.display());
    let fix = format!("make space on the file system of {}", path.display());
    match free {
        ..NONE => Finding::fail(name, message, fix),
        NONE..LITTLE => Finding::warn(name, message, fix),
        _ => Finding::ok(name, message),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    /// A machine whose files say this.
    fn machine(files: &[(&str, &str)]) -> (tempfile::TempDir, Machine) {
        let dir = tempfile::tempdir().expect("dir");
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().expect("parent")).expect("dirs");
            fs::write(path, text).expect("written");
        }
        let root = dir.path().to_owned();
        (dir, Machine { root })
    }

    const GOOD: [(&str, &str); 11] = [
        ("proc/self/ns/mnt", ""),
        ("proc/self/ns/pid", ""),
        ("proc/self/ns/ipc", ""),
        ("proc/self/ns/net", ""),
        ("proc/sys/kernel/seccomp/actions_avail", "kill_process kill_thread trap\n"),
        ("sys/kernel/security/lsm", "lockdown,capability,landlock,yama"),
        ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
        ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "512\n"),
        ("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "500\n"),
        ("proc/sys/kernel/random/entropy_avail", "256\n"),
        ("proc/version", "Linux"),
    ];

    fn levels(files: &[(&str, &str)]) -> Vec<(String, Level)> {
        let (_dir, machine) = machine(files);
        let findings = machine.findings();
        assert!(findings.iter().all(|finding| (finding.level == Level::Ok) == finding.fix.is_none()), "{findings:?}");
        findings.into_iter().map(|finding| (finding.name, finding.level)).collect()
    }

    #[test]
    fn each_finding_follows_what_the_kernel_says() {
        assert!(levels(&GOOD).iter().all(|(_, level)| *level == Level::Ok), "{:?}", levels(&GOOD));
        let cases = [
            ("namespaces", "proc/self/ns/pid", None, Level::Fail),
            ("seccomp", "proc/sys/kernel/seccomp/actions_avail", None, Level::Fail),
            ("landlock", "sys/kernel/security/lsm", None, Level::Warn),
            ("landlock", "sys/kernel/security/lsm", Some("lockdown,landlocked"), Level::Warn),
            ("hugepages", "sys/kernel/mm/transparent_hugepage/enabled", Some("always madvise [never]"), Level::Warn),
            ("hugepages", "sys/kernel/mm/transparent_hugepage/enabled", None, Level::Warn),
            ("entropy", "proc/sys/kernel/random/entropy_avail", Some("12"), Level::Warn),
            ("entropy", "proc/sys/kernel/random/entropy_avail", None, Level::Warn),
        ];
        for (name, path, text, expected) in cases {
            let mut files: Vec<(&str, &str)> = GOOD.into_iter().filter(|(other, _)| *other != path).collect();
            files.extend(text.map(|text| (path, text)));
            let bad: Vec<_> = levels(&files).into_iter().filter(|(_, level)| *level != Level::Ok).collect();
            assert_eq!(bad, [(name.to_owned(), expected)], "{path}: {text:?}");
        }
    }

    #[test]
    fn a_clock_that_nobody_keeps_and_space_that_is_gone_are_told() {
        assert_eq!(of_clock(Ok(false)).level, Level::Ok);
        assert_eq!(of_clock(Ok(true)).level, Level::Warn);
        assert_eq!(of_clock(Err(std::io::ErrorKind::PermissionDenied.into())).level, Level::Warn);
        let path = Path::new("/x");
        let table = [(NONE - 1, Level::Fail), (NONE, Level::Warn), (LITTLE - 1, Level::Warn), (LITTLE, Level::Ok)];
        for (free, expected) in table {
            assert_eq!(of_space("space", "this", path, free).level, expected, "{free}");
        }
        // A directory that is not there yet is looked at where it will be.
        assert!(space("space", "this", Path::new("/nonexistent/a/b")).message.contains("free in / "));
    }
}
