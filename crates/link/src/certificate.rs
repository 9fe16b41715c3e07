//! Names inside certificates. A host's certificate carries the DNS name `<host>.host.godwit`, the controller's `controller.godwit`:
//! a host can therefore never pass for the controller, nor for another host.

use godwit_model::Name;

/// The name that the controller's certificate carries and that agents insist on, whatever address they dial.
pub const CONTROLLER: &str = "controller.godwit";

const HOST_SUFFIX: &str = ".host.godwit";

/// The name in the certificate of `host`.
#[must_use]
pub fn host_dns_name(host: &Name) -> String {
    format!("{host}{HOST_SUFFIX}")
}

/// The host that a certificate's DNS name stands for.
#[must_use]
pub fn host_of_dns_name(dns_name: &str) -> Option<Name> {
    dns_name.strip_suffix(HOST_SUFFIX).and_then(|host| Name::new(host).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_name_cannot_spell_the_controller() {
        let host = Name::new("controller").expect("name");
        assert_ne!(host_dns_name(&host), CONTROLLER);
        assert_eq!(host_of_dns_name(&host_dns_name(&host)), Some(host));
        assert_eq!(host_of_dns_name(CONTROLLER), None);
        assert_eq!(host_of_dns_name("../x.host.godwit"), None);
    }
}
