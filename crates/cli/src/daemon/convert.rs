//! `godwit convert --from F --to F --limit BYTES --input-fd N --output-fd N`: started by a controller, runs `qemu-img` in a cage.

use std::ffi::OsString;
use std::process::ExitCode;

use godwit_qemu::convert::{Conversion, ConvertFormat, convert};

use crate::error::Exit;
use crate::output::note;

pub(super) fn run(arguments: Vec<OsString>) -> ExitCode {
    let Some(conversion) = read(&arguments) else {
        note("error: this is started by the controller, with --from, --to, --limit, --input-fd and --output-fd");
        return ExitCode::from(Exit::Usage as u8);
    };
    match convert(conversion) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            note(&format!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn read(arguments: &[OsString]) -> Option<Conversion> {
    let [from, to, limit, input, output] = arguments.chunks(2).collect::<Vec<_>>().try_into().ok()?;
    let value = |pair: &'_ [OsString], name: &str| -> Option<String> {
        let [found, value] = pair else { return None };
        value.to_str().filter(|_| *found == *name).map(str::to_owned)
    };
    let fd = |pair, name| value(pair, name)?.parse().ok().filter(|fd| *fd > 2);
    Some(Conversion {
        from: ConvertFormat::from_name(&value(from, "--from")?)?,
        to: ConvertFormat::from_name(&value(to, "--to")?)?,
        limit: value(limit, "--limit")?.parse().ok()?,
        input: fd(input, "--input-fd")?,
        output: fd(output, "--output-fd")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_read_strictly() {
        let read = |text: &str| read(&text.split_whitespace().map(OsString::from).collect::<Vec<_>>());
        let good = "--from vmdk --to qcow2 --limit 4096 --input-fd 3 --output-fd 4";
        assert!(read(good).is_some_and(|conversion| conversion.limit == 4_096 && (conversion.input, conversion.output) == (3, 4)));
        for (part, instead) in
            [("vmdk", "json:{}"), ("qcow2", ""), ("4096", "-1"), ("--input-fd 3", "--input-fd 0"), ("--limit", "--x")]
        {
            assert!(read(&good.replace(part, instead)).is_none(), "{instead}");
        }
        assert!(read("").is_none());
    }
}
