//! The program `godwit`; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    godwit::run()
}
