//! Refusals of whole calls: a gRPC status whose details are the contract's `Refusal`.

use godwit_model::{ErrorCode, Refusal, Retry};
use prost::Message;
use tonic::{Code, Status};

use crate::v1;

/// The status that carries `refusal`.
#[must_use]
pub fn status_of(refusal: &Refusal) -> Status {
    use ErrorCode as E;
    let code = match refusal.code {
        E::BadRequest | E::NameInvalid | E::SpecInvalid => Code::InvalidArgument,
        E::Unauthenticated | E::TokenInvalid | E::TokenUsed | E::TokenExpired => Code::Unauthenticated,
        E::NotPermitted | E::CertificateRefused | E::CertificateExpired | E::NotGranted => Code::PermissionDenied,
        E::NotFound => Code::NotFound,
        E::HostDown => Code::Unavailable,
        E::StoreFull => Code::ResourceExhausted,
        E::Internal => Code::Internal,
        _ => Code::FailedPrecondition,
    };
    Status::with_details(code, refusal.message.clone(), v1::Refusal::from(refusal).encode_to_vec().into())
}

/// The refusal that a status carries; one without details, as gRPC itself makes them, is described by its message.
#[must_use]
pub fn refusal_of(status: &Status) -> Refusal {
    match v1::Refusal::decode(status.details()) {
        Ok(refusal) if !refusal.code.is_empty() => refusal.into(),
        _ => {
            let code = if status.code() == Code::Unavailable { ErrorCode::HostDown } else { ErrorCode::Internal };
            Refusal::new(code, format!("the controller broke off: {}", status.message())).retry(Retry::Unknown)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_survives_its_status() {
        let refusal = Refusal::new(ErrorCode::TokenUsed, "used").hint("make a new one");
        assert_eq!(refusal_of(&status_of(&refusal)), refusal);
        assert_eq!(refusal_of(&Status::unavailable("gone")).code, ErrorCode::HostDown);
    }
}
