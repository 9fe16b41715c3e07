//! Reading what cloud-init's NoCloud source tells a guest, as much of it as the test guest needs.

/// The value of `local-hostname` in `meta-data`, which is YAML: one line, quoted or not.
#[must_use]
pub fn host_name_of(meta_data: &str) -> Option<String> {
    let value = meta_data.lines().find_map(|line| line.strip_prefix("local-hostname:"))?.trim();
    let name = value.trim_matches(['"', '\'']);
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
    (!name.is_empty() && name.len() <= 64 && name.bytes().all(fits)).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_name_is_found_and_nothing_else_is_taken_for_one() {
        assert_eq!(host_name_of("instance-id: x\nlocal-hostname: web1\n"), Some("web1".to_owned()));
        assert_eq!(host_name_of("local-hostname: \"web1.example\"\r\n"), Some("web1.example".to_owned()));
        for none in ["", "hostname: a", "local-hostname:", "local-hostname: a b", "local-hostname: ../x", " local-hostname: a"] {
            assert_eq!(host_name_of(none), None, "{none:?}");
        }
    }
}
