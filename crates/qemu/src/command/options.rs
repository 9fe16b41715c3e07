//! QEMU's two syntaxes for options, both written so that a value can never become another option.

use std::fmt::{self, Display, Write};

use serde_json::Value;

/// `first,key=value,…`: commas in values are doubled, as QEMU wants them.
pub(super) struct Pairs(String);

impl Pairs {
    pub(super) const fn new() -> Self {
        Self(String::new())
    }

    /// A part without key.
    pub(super) fn first(self, value: impl Display) -> Self {
        self.part(&value.to_string())
    }

    pub(super) fn with(self, key: &str, value: impl Display) -> Self {
        self.part(&format!("{key}={value}"))
    }

    fn part(mut self, text: &str) -> Self {
        if !self.0.is_empty() {
            self.0.push(',');
        }
        self.0.push_str(&text.replace(',', ",,"));
        self
    }
}

impl Display for Pairs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A JSON object whose fields keep their order, so that a command line can be compared as text.
pub(crate) struct Object(Vec<(&'static str, String)>);

/// What a field of an [`Object`] may be.
pub(crate) trait Field {
    fn json(self) -> String;
}

macro_rules! fields {
    ($($kind:ty),*) => {$(
        impl Field for $kind {
            fn json(self) -> String {
                Value::from(self).to_string()
            }
        }
    )*};
}
fields!(&str, String, bool, u16, u32, i32, u64, usize, Vec<u32>);

impl Field for Object {
    fn json(self) -> String {
        self.to_string()
    }
}

impl Field for godwit_model::MacAddress {
    fn json(self) -> String {
        self.to_string().json()
    }
}

impl Object {
    pub(crate) const fn new() -> Self {
        Self(Vec::new())
    }

    /// A device of QEMU's type `driver`.
    pub(crate) fn device(driver: &str, id: &str) -> Self {
        Self::new().with("driver", driver).with("id", id)
    }

    /// A device at a fixed place on the root bus.
    pub(crate) fn pci(driver: &str, id: &str, slot: usize) -> Self {
        Self::device(driver, id).with("bus", "pcie.0").with("addr", format!("0x{slot:x}"))
    }

    /// Virtio 1 only: no I/O ports, and no choice that depends on the bus.
    pub(crate) fn modern(self) -> Self {
        self.with("disable-legacy", "on").with("disable-modern", false)
    }

    pub(crate) fn with(mut self, key: &'static str, value: impl Field) -> Self {
        self.0.push((key, value.json()));
        self
    }

    pub(crate) fn with_null(mut self, key: &'static str) -> Self {
        self.0.push((key, "null".to_owned()));
        self
    }
}

impl Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('{')?;
        for (index, (key, value)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}\"{key}\":{value}")?;
        }
        f.write_char('}')
    }
}
