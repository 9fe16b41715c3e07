//! What end-to-end tests need from outside: the guest's kernel and initramfs, QEMU's guest agent for it, a Debian with cloud-init, Schemathesis,
//! and a second version of QEMU.
//! Each script prints paths, one a line; making them, or finding them made, is its own business.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// Says that this Debian release has no other version of QEMU in reach.
const NO_OTHER: i32 = 3;

/// Variables for the tests.
pub(crate) fn environment(root: &Path) -> Result<Vec<(String, String)>> {
    let mut all = guest(root)?;
    let agent: &[&str] = &["GODWIT_GUEST_AGENT"];
    for (path, names) in [
        ("scripts/guest-agent-layer", agent),
        ("scripts/cloud-image", &["GODWIT_CLOUD_IMAGE", "GODWIT_CLOUD_BOOT"]),
        ("scripts/schemathesis", &["GODWIT_SCHEMATHESIS"]),
    ] {
        all.extend(made(root, path, names)?);
    }
    all.extend(other_qemu(root)?);
    Ok(all)
}

/// Variables for what a guest boots.
pub(crate) fn guest(root: &Path) -> Result<Vec<(String, String)>> {
    made(root, "scripts/guest-image", &["GODWIT_GUEST_KERNEL", "GODWIT_GUEST_INITRD"])
}

/// The variable for a second version of QEMU, where there is one.
pub(crate) fn other_qemu(root: &Path) -> Result<Vec<(String, String)>> {
    let output = script(root, "scripts/qemu-other")?;
    match output.status.code() {
        Some(0) => named(&output, "scripts/qemu-other", &["GODWIT_QEMU_OTHER"]),
        Some(NO_OTHER) => {
            println!("images: one version of QEMU only: nothing is proven here about moves between versions");
            Ok(Vec::new())
        }
        _ => bail!("scripts/qemu-other: {}", output.status),
    }
}

fn made(root: &Path, path: &str, names: &[&str]) -> Result<Vec<(String, String)>> {
    let output = script(root, path)?;
    if !output.status.success() {
        bail!("{path}: {}", output.status);
    }
    named(&output, path, names)
}

fn script(root: &Path, script: &str) -> Result<Output> {
    let mut command = Command::new("bash");
    command.arg(root.join(script)).current_dir(root).stdin(Stdio::null()).stderr(Stdio::inherit());
    command.output().with_context(|| format!("run {script}"))
}

/// The lines of an output under the names of variables.
fn named(output: &Output, script: &str, names: &[&str]) -> Result<Vec<(String, String)>> {
    let text = str::from_utf8(&output.stdout).with_context(|| format!("{script} printed no text"))?;
    let lines: Vec<&str> = text.lines().collect();
    if lines.len() != names.len() || lines.iter().any(|line| !line.starts_with('/')) {
        bail!("{script} must print {} absolute path(s), one a line, and printed: {lines:?}", names.len());
    }
    Ok(names.iter().zip(lines).map(|(name, line)| ((*name).to_owned(), line.to_owned())).collect())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::environment;

    fn repository(guest_image: &str, qemu_other: &str) -> TempDir {
        let root = TempDir::new().unwrap();
        let scripts = root.path().join("scripts");
        fs::create_dir(&scripts).unwrap();
        fs::write(scripts.join("guest-image"), guest_image).unwrap();
        fs::write(scripts.join("guest-agent-layer"), "echo /c/agent").unwrap();
        fs::write(scripts.join("cloud-image"), "echo /c/disk; echo /c/boot").unwrap();
        fs::write(scripts.join("schemathesis"), "echo /c/schemathesis").unwrap();
        fs::write(scripts.join("qemu-other"), qemu_other).unwrap();
        root
    }

    fn variables(guest_image: &str, qemu_other: &str) -> Result<Vec<String>, String> {
        let root = repository(guest_image, qemu_other);
        let set = environment(root.path()).map_err(|error| error.to_string())?;
        Ok(set.iter().map(|(name, value)| format!("{name}={value}")).collect())
    }

    #[test]
    fn paths_become_variables() {
        let set = variables("echo talk >&2; echo /c/vmlinuz; echo /c/initramfs", "echo /c/qemu");
        let expected = [
            "GODWIT_GUEST_KERNEL=/c/vmlinuz",
            "GODWIT_GUEST_INITRD=/c/initramfs",
            "GODWIT_GUEST_AGENT=/c/agent",
            "GODWIT_CLOUD_IMAGE=/c/disk",
            "GODWIT_CLOUD_BOOT=/c/boot",
            "GODWIT_SCHEMATHESIS=/c/schemathesis",
            "GODWIT_QEMU_OTHER=/c/qemu",
        ];
        assert_eq!(set.unwrap(), expected);
    }

    #[test]
    fn no_other_version_is_no_failure_and_no_variable() {
        assert_eq!(variables("echo /k; echo /i", "exit 3").unwrap().len(), 6);
    }

    #[test]
    fn scripts_that_fail_or_print_something_else_stop_the_step() {
        let table = [
            ("exit 1", "echo /q"),
            ("echo /k", "echo /q"),
            ("echo /k; echo not a path", "echo /q"),
            ("echo /k; echo /i", "exit 1"),
        ];
        for (guest_image, qemu_other) in table {
            assert!(variables(guest_image, qemu_other).is_err(), "{guest_image}; {qemu_other}");
        }
    }
}
