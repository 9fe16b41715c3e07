//! `qemu-img convert` in a cage, with two open files and nothing else: bounded time, memory and size. What it reads was made by somebody who may
//! want to own its reader.

use std::io;
use std::os::fd::RawFd;

use crate::cage::{self, CageError, CagePlan, LimitedResource, tool};

/// The kernel's user for those who are nobody.
const NOBODY: u32 = 65_534;
/// Processor time of one conversion, in seconds.
const CPU_SECONDS: u64 = 6 * 3_600;

/// A disk format that is read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConvertFormat {
    /// Plain bytes.
    Raw,
    /// QEMU's qcow2.
    Qcow2,
    /// VMware's VMDK; written stream-optimised.
    Vmdk,
    /// Hyper-V's VHDX; only read.
    Vhdx,
}

impl ConvertFormat {
    /// The format that `qemu-img` calls so.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "raw" => Self::Raw,
            "qcow2" => Self::Qcow2,
            "vmdk" => Self::Vmdk,
            "vhdx" => Self::Vhdx,
            _ => return None,
        })
    }

    const fn driver(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
        }
    }
}

/// What to convert.
#[derive(Clone, Copy, Debug)]
pub struct Conversion {
    /// Format of the input.
    pub from: ConvertFormat,
    /// Format of the output.
    pub to: ConvertFormat,
    /// Descriptor of the input, a file.
    pub input: RawFd,
    /// Descriptor of the output, an empty file.
    pub output: RawFd,
    /// Largest output in bytes.
    pub limit: u64,
}

/// Why nothing was converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The operating system refused a step.
    #[error("cannot {step}: {source}")]
    Step {
        /// Which.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// `qemu-img` is not there.
    #[error("qemu-img is not in PATH")]
    Missing,
    /// The cage could not be made.
    #[error(transparent)]
    Cage(#[from] CageError),
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> ConvertError {
    move |error| ConvertError::Step { step, source: error.into() }
}

/// Runs `qemu-img` in a cage to its end, and answers its code. Must be called before any thread or runtime is started.
///
/// Without root there is no cage: then it has the rights of the caller, within the same limits and without new privileges.
///
/// # Errors
/// See [`ConvertError`]; what `qemu-img` says is on standard error.
pub fn convert(conversion: Conversion) -> Result<u8, ConvertError> {
    let plan = plan(conversion)?;
    if rustix::process::geteuid().is_root() {
        // The files are opened anew by their descriptors' names, with the rights that their owner has then.
        for fd in [conversion.input, conversion.output] {
            std::os::unix::fs::chown(place(fd), Some(NOBODY), Some(NOBODY)).map_err(step("give the files away"))?;
        }
        return Ok(cage::run_to_end(&plan)?);
    }
    Ok(cage::run_as_we_are(&plan)?)
}

fn place(fd: RawFd) -> String {
    format!("/proc/self/fd/{fd}")
}

fn plan(conversion: Conversion) -> Result<CagePlan, ConvertError> {
    let mut arguments: Vec<String> =
        ["convert", "-p", "-f", conversion.from.driver(), "-O", conversion.to.driver()].map(str::to_owned).to_vec();
    if conversion.to == ConvertFormat::Vmdk {
        arguments.extend(["-o", "subformat=streamOptimized"].map(str::to_owned));
    }
    arguments.extend([place(conversion.input), place(conversion.output)]);
    let limits = [
        (LimitedResource::ProcessorTime, CPU_SECONDS),
        (LimitedResource::AddressSpace, tool::QEMU_IMG_SPACE.get()),
        (LimitedResource::FileSize, conversion.limit),
    ];
    let program = tool::find("qemu-img").ok_or(ConvertError::Missing)?;
    let plan = tool::bare_plan(program, arguments, (NOBODY, NOBODY), &limits);
    Ok(CagePlan { keep: vec![conversion.input, conversion.output], ..plan })
}
