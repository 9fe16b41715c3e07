//! Which system calls a process may make: filters of the kernel (seccomp), which it keeps for life and hands on to what it executes.
//!
//! What runs in a cage is refused the calls that change what a process is or sees ([`refuse_dangerous`]): such a call fails, and the program
//! goes on. Programs of ours, whose calls we know, are ended by the kernel for any other ([`only`]): the signal is SIGSYS, and the kernel
//! writes the call's number to its audit log.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
    sock_filter,
};

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum CallsError {
    /// Ours is not one. A fault of ours.
    #[error("the filter of system calls is not one")]
    Filter(#[from] seccompiler::BackendError),
    /// The kernel refused it.
    #[error("the kernel does not take the filter of system calls")]
    Apply(#[from] seccompiler::Error),
}

const ARCH: TargetArch = TargetArch::x86_64;

/// Calls that nothing in a cage has a use for: mounts and namespaces, other processes' memory, the kernel itself, keys that are not bound to
/// namespaces, and interfaces known for their size (io_uring and BPF; QEMU does without).
const DANGEROUS: &[libc::c_long] = &[
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_quotactl,
    libc::SYS_fanotify_init,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_iopl,
    libc::SYS_ioperm,
];

/// Flags of `clone` that make namespaces.
const NAMESPACES: &[libc::c_int] = &[
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// From here on this process and its children are refused [`DANGEROUS`] calls, new namespaces, and sockets of other families than unix, IP and
/// netlink. Needs `no_new_privs`.
pub(super) fn refuse_dangerous() -> Result<(), CallsError> {
    let mut rules: BTreeMap<libc::c_long, Vec<SeccompRule>> = DANGEROUS.iter().map(|call| (*call, vec![])).collect();
    let namespaces = NAMESPACES.iter().map(|flag| {
        let flag = u64::from(flag.unsigned_abs());
        rule([condition(0, SeccompCmpOp::MaskedEq(flag), flag)?])
    });
    rules.insert(libc::SYS_clone, namespaces.collect::<Result<_, _>>()?);
    rules.insert(libc::SYS_socket, other_families()?);
    let refuse = |rules, action| program(rules, SeccompAction::Allow, action);
    // Its flags are in memory, where a filter cannot look: the C library then takes `clone`.
    let clone3 = BTreeMap::from([(libc::SYS_clone3, vec![])]);
    for program in [
        refuse(rules, SeccompAction::Errno(libc::EPERM.unsigned_abs()))?,
        refuse(clone3, SeccompAction::Errno(libc::ENOSYS.unsigned_abs()))?,
        refuse_x32(),
    ] {
        seccompiler::apply_filter(&program)?;
    }
    Ok(())
}

/// Everything but AF_UNIX (1), AF_INET (2), AF_INET6 (10) and AF_NETLINK (16): virtual sockets of the host above all, which know no network
/// namespaces.
fn other_families() -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let between = |least, most| rule([condition(0, SeccompCmpOp::Ge, least)?, condition(0, SeccompCmpOp::Le, most)?]);
    Ok(vec![between(3, 9)?, between(11, 15)?, rule([condition(0, SeccompCmpOp::Ge, 17)?])?])
}

/// From here on this process may make `calls`, `if_arguments` where its arguments are as said, and is ended for any other. Sets `no_new_privs`.
pub(super) fn only(calls: &[libc::c_long], if_arguments: &[(libc::c_long, Vec<SeccompRule>)]) -> Result<(), CallsError> {
    let mut rules: BTreeMap<libc::c_long, Vec<SeccompRule>> = calls.iter().map(|call| (*call, vec![])).collect();
    rules.extend(if_arguments.iter().cloned());
    seccompiler::apply_filter(&program(rules, SeccompAction::KillProcess, SeccompAction::Allow)?)?;
    Ok(())
}

fn program(
    rules: BTreeMap<libc::c_long, Vec<SeccompRule>>,
    others: SeccompAction,
    these: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(rules, others, these, ARCH)?.try_into()
}

pub(super) fn rule<const N: usize>(conditions: [SeccompCondition; N]) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(conditions.to_vec())
}

pub(super) fn condition(argument: u8, how: SeccompCmpOp, value: u64) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how, value)
}

/// The calls of the x32 interface have numbers of their own, which a list of refused calls would miss.
fn refuse_x32() -> BpfProgram {
    const X32: u32 = 0x4000_0000;
    let instruction = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    let (load, at_least, answer) =
        (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, libc::BPF_RET);
    let code = |code: u32| u16::try_from(code).expect("BPF's codes have 16 bits");
    vec![
        instruction(code(load), 0, 0, 0),
        instruction(code(at_least), 0, 1, X32),
        instruction(code(answer), 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()),
        instruction(code(answer), 0, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

/// What every Rust program needs to go on and to end.
pub(super) const LIVING: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The same, of calls that can do more: new memory, which is never to be executed; and whether a descriptor is open, which the standard library
/// looks at before it closes one.
pub(super) fn living_rules() -> Result<[(libc::c_long, Vec<SeccompRule>); 3], CallsError> {
    let not_executable = || rule([condition(2, SeccompCmpOp::MaskedEq(u64::from(libc::PROT_EXEC.unsigned_abs())), 0)?]);
    let is_open = rule([condition(1, SeccompCmpOp::Eq, u64::from(libc::F_GETFD.unsigned_abs()))?])?;
    Ok([(libc::SYS_mmap, vec![not_executable()?]), (libc::SYS_mprotect, vec![not_executable()?]), (libc::SYS_fcntl, vec![is_open])])
}
