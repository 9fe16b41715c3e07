//! The one place that maps an error code to an HTTP status.

use godwit_model::ErrorCode;

/// HTTP status of a refusal with this code.
#[must_use]
pub const fn http_status(code: ErrorCode) -> u16 {
    use ErrorCode as E;
    match code {
        E::BadRequest | E::NameInvalid | E::SpecInvalid => 400,
        E::Unauthenticated | E::TokenInvalid | E::TokenUsed | E::TokenExpired => 401,
        E::NotPermitted | E::CertificateRefused | E::CertificateExpired | E::NotGranted => 403,
        E::NotFound => 404,
        E::NameTaken
        | E::RevisionConflict
        | E::VmBusy
        | E::VmRunning
        | E::VmNotRunning
        | E::AlreadyOnHost
        | E::InUse
        | E::GenerationStale
        | E::DisksUnfinished
        | E::TooLate => 409,
        E::BodyTooLarge => 413,
        E::NoHost
        | E::HostIncompatible
        | E::ClockSkew
        | E::MigrationBlocked
        | E::NotEnoughMemory
        | E::NotEnoughSpace
        | E::PoolUnavailable
        | E::VolumeMissing
        | E::VolumeTruncated
        | E::VolumeFormat
        | E::ImageInvalid
        | E::AddressForbidden
        | E::FetchFailed
        | E::GrantExpired
        | E::MigrationFailed
        | E::MigrationStalled
        | E::NotConverging
        | E::QemuFirst
        | E::Cancelled
        | E::UserfaultUnavailable
        | E::Unsupported
        | E::GuestSilent
        | E::GuestRefused
        | E::ExecUnfinished
        | E::SnapshotDamaged
        | E::SnapshotFailed
        | E::SnapshotInvalid => 422,
        E::QemuFailed | E::HostFailed | E::Internal => 500,
        E::HostDown => 503,
        E::StoreFull => 507,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_status_is_the_served_one() {
        let page = include_str!("../../../docs/errors.md");
        for code in ErrorCode::ALL {
            let row = page.lines().find(|line| line.starts_with(&format!("| `{code}` |"))).expect("every code has a row");
            assert!(row.contains(&format!("| {} |", http_status(*code))), "{row} does not say {}", http_status(*code));
        }
    }
}
