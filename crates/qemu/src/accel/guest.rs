//! The smallest 64-bit guest: computes a number in long mode and writes it to a port.

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

/// Why the guest did not run as it must.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProbeError {
    #[error("/dev/kvm cannot {step}: {source}")]
    Refused { step: &'static str, source: kvm_ioctls::Error },
    #[error("/dev/kvm has API version {0}, not {wanted}", wanted = kvm_bindings::KVM_API_VERSION)]
    Version(i32),
    #[error("/dev/kvm did not run 64-bit guest code: {0}")]
    Exit(String),
}

fn refused(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> ProbeError {
    move |source| ProbeError::Refused { step, source }
}

const PAGE: usize = 4_096;
const PML4: usize = PAGE;
const PDPT: usize = 2 * PAGE;
const CODE: usize = 3 * PAGE;
const HANDLER: usize = CODE + 0x40;
const GDT: usize = CODE + 0x800;
const IDT: usize = CODE + 0x900;
const STACK: usize = CODE + 0xf00;
const MEMORY: usize = 4 * PAGE;
const PORT: u16 = 0x00f4;
const CODE_SEGMENT: u16 = 8;

/// What every ordinary 64-bit kernel does and a `/dev/kvm` that merely emulates a few instructions, or runs only guests made for it,
/// does not: vector arithmetic, an exception through the IDT and back, and privilege level 0.
const PROGRAM: &[u8] = &[
    0x48, 0xb8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, // mov rax, 0x1122334455667788
    0x66, 0x48, 0x0f, 0x6e, 0xc0, // movq xmm0, rax
    0x48, 0xbb, 0x08, 0x07, 0x06, 0x05, 0x04, 0x03, 0x02, 0x01, // mov rbx, 0x0102030405060708
    0x66, 0x48, 0x0f, 0x6e, 0xcb, // movq xmm1, rbx
    0x66, 0x0f, 0xd4, 0xc1, // paddq xmm0, xmm1
    0x66, 0x48, 0x0f, 0x7e, 0xc0, // movq rax, xmm0
    0xcc, // int3
    0x8c, 0xc9, // mov ecx, cs
    0x83, 0xe1, 0x03, // and ecx, 3
    0x48, 0x01, 0xc8, // add rax, rcx
    0x48, 0xc1, 0xc0, 0x08, // rol rax, 8
    0xef, // out dx, eax
    0xf4, // hlt
];
/// The breakpoint's handler: `add rax, 1; iretq`.
const HANDLER_PROGRAM: &[u8] = &[0x48, 0x83, 0xc0, 0x01, 0x48, 0xcf];
/// The sum 0x12243648…7e91 with the handler's 1, rotated so that its top byte comes first.
const ANSWER: [u8; 4] = [0x12, 0x91, 0x7e, 0x6c];

/// Guest memory: page tables and code, page-aligned as KVM wants it.
#[repr(C, align(4096))]
struct Memory([u8; MEMORY]);

pub(super) fn run() -> Result<(), ProbeError> {
    let kvm = Kvm::new().map_err(refused("be opened"))?;
    let version = kvm.get_api_version();
    if u32::try_from(version).ok() != Some(kvm_bindings::KVM_API_VERSION) {
        return Err(ProbeError::Version(version));
    }
    let vm = kvm.create_vm().map_err(refused("make a VM"))?;
    let mut memory = Box::new(Memory([0; MEMORY]));
    fill(&mut memory);
    attach(&vm, &memory)?;
    let mut vcpu = vm.create_vcpu(0).map_err(refused("make a vCPU"))?;
    let features = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(refused("name the CPU's features"))?;
    vcpu.set_cpuid2(&features).map_err(refused("give the vCPU its features"))?;
    enter_long_mode(&vcpu)?;
    let outcome = expect_answer(&mut vcpu);
    // The VM must be gone before the memory that it maps.
    drop((vcpu, vm));
    drop(memory);
    outcome
}

fn fill(memory: &mut Memory) {
    const PRESENT_WRITABLE: u64 = 0b11;
    const HUGE: u64 = 1 << 7;
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = memory.0.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    // One page of 1 GiB would need a CPU feature; PML4 -> PDPT -> one directory in the first page -> a page of 2 MiB.
    put(PML4, &(PDPT as u64 | PRESENT_WRITABLE).to_le_bytes());
    put(PDPT, &PRESENT_WRITABLE.to_le_bytes());
    put(0, &(PRESENT_WRITABLE | HUGE).to_le_bytes());
    put(CODE, PROGRAM);
    put(HANDLER, HANDLER_PROGRAM);
    // Flat 64-bit code and data; an interrupt gate for vector 3.
    put(GDT + usize::from(CODE_SEGMENT), &0x00af_9b00_0000_ffff_u64.to_le_bytes());
    put(GDT + 16, &0x00cf_9300_0000_ffff_u64.to_le_bytes());
    let gate = HANDLER as u64 | u64::from(CODE_SEGMENT) << 16 | 0x8e00 << 32;
    put(IDT + 3 * 16, &gate.to_le_bytes());
}

#[expect(unsafe_code, reason = "KVM is told the address of memory that is ours")]
fn attach(vm: &VmFd, memory: &Memory) -> Result<(), ProbeError> {
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: std::ptr::from_ref(memory) as u64,
    };
    // SAFETY: the memory is page-aligned, as long as said, boxed so that it stays where it is, and dropped after the VM.
    unsafe { vm.set_user_memory_region(region) }.map_err(refused("take memory"))
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), ProbeError> {
    const PROTECTED_PAGING: u64 = 1 | 1 << 31;
    const PAE_AND_SSE: u64 = 1 << 5 | 1 << 9 | 1 << 10;
    const LONG_MODE_ENABLED_ACTIVE: u64 = 1 << 8 | 1 << 10;
    let mut special = vcpu.get_sregs().map_err(refused("read registers"))?;
    let flat = kvm_segment { limit: 0xffff_ffff, selector: CODE_SEGMENT, type_: 3, present: 1, s: 1, g: 1, ..Default::default() };
    special.cs = kvm_segment { type_: 11, l: 1, ..flat };
    for segment in [&mut special.ds, &mut special.es, &mut special.fs, &mut special.gs, &mut special.ss] {
        *segment = kvm_segment { selector: 16, db: 1, ..flat };
    }
    special.cr3 = PML4 as u64;
    special.cr4 = PAE_AND_SSE;
    (special.gdt.base, special.gdt.limit) = (GDT as u64, 0x17);
    (special.idt.base, special.idt.limit) = (IDT as u64, 0x3f);
    special.cr0 = PROTECTED_PAGING;
    special.efer = LONG_MODE_ENABLED_ACTIVE;
    vcpu.set_sregs(&special).map_err(refused("enter long mode"))?;
    let mut registers = vcpu.get_regs().map_err(refused("read registers"))?;
    registers.rip = CODE as u64;
    registers.rsp = STACK as u64;
    registers.rdx = PORT.into();
    registers.rflags = 2;
    vcpu.set_regs(&registers).map_err(refused("set registers"))
}

fn expect_answer(vcpu: &mut VcpuFd) -> Result<(), ProbeError> {
    match vcpu.run().map_err(refused("run guest code"))? {
        VcpuExit::IoOut(PORT, data) if data == ANSWER => {}
        other => return Err(ProbeError::Exit(format!("expected its answer, got {other:?}"))),
    }
    match vcpu.run().map_err(refused("run guest code"))? {
        VcpuExit::Hlt => Ok(()),
        other => Err(ProbeError::Exit(format!("expected it to halt, got {other:?}"))),
    }
}
