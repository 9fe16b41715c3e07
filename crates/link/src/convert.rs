//! Wire values to model values and back. Everything that arrives is checked here, once.

use godwit_model::{ErrorCode, Name, Refusal, Retry, RunState, TaskId, VmId};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::v1;

/// A message that does not mean anything.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    /// A field that is not what its name says.
    #[error("field {field} is malformed")]
    Field {
        /// Its name in the contract.
        field: &'static str,
    },
    /// A field whose JSON does not fit.
    #[error("field {field} does not fit its schema")]
    Json {
        /// Its name in the contract.
        field: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// Serialises a model value for a `bytes` field.
#[must_use]
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("model values have string keys and no failing serialisers")
}

/// Reads a model value from a `bytes` field.
///
/// # Errors
/// [`Malformed::Json`] if it does not fit.
pub fn decode<T: DeserializeOwned>(field: &'static str, bytes: &[u8]) -> Result<T, Malformed> {
    serde_json::from_slice(bytes).map_err(|source| Malformed::Json { field, source })
}

/// Reads a VM id.
///
/// # Errors
/// [`Malformed::Field`].
pub fn vm_id(text: &str) -> Result<VmId, Malformed> {
    text.parse().map_err(|_| Malformed::Field { field: "vm" })
}

/// Reads a task id.
///
/// # Errors
/// [`Malformed::Field`].
pub fn task_id(text: &str) -> Result<TaskId, Malformed> {
    text.parse().map_err(|_| Malformed::Field { field: "task" })
}

/// Reads a name.
///
/// # Errors
/// [`Malformed::Field`] with the field's name.
pub fn name(field: &'static str, text: &str) -> Result<Name, Malformed> {
    Name::new(text).map_err(|_| Malformed::Field { field })
}

impl From<Malformed> for Refusal {
    fn from(malformed: Malformed) -> Self {
        Self::new(ErrorCode::BadRequest, malformed.to_string())
    }
}

impl From<&Refusal> for v1::Refusal {
    fn from(refusal: &Refusal) -> Self {
        let retry = match refusal.retry {
            Retry::Never => "never",
            Retry::Safe => "safe",
            Retry::Unknown => "unknown",
        };
        Self {
            code: refusal.code.to_string(),
            message: refusal.message.clone(),
            hint: refusal.hint.clone().unwrap_or_default(),
            retry: retry.into(),
        }
    }
}

impl From<v1::Refusal> for Refusal {
    /// Never fails: a code or retry of a later version becomes the most careful one of this.
    fn from(refusal: v1::Refusal) -> Self {
        let retry = match refusal.retry.as_str() {
            "never" => Retry::Never,
            "safe" => Retry::Safe,
            _ => Retry::Unknown,
        };
        let told = Self::new(ErrorCode::parse(&refusal.code), refusal.message).retry(retry);
        if refusal.hint.is_empty() { told } else { told.hint(refusal.hint) }
    }
}

impl From<RunState> for v1::RunState {
    fn from(state: RunState) -> Self {
        match state {
            RunState::Stopped => Self::Stopped,
            RunState::Running => Self::Running,
            RunState::Paused => Self::Paused,
            RunState::Crashed => Self::Crashed,
        }
    }
}

impl TryFrom<v1::RunState> for RunState {
    type Error = Malformed;

    fn try_from(state: v1::RunState) -> Result<Self, Malformed> {
        match state {
            v1::RunState::Unspecified => Err(Malformed::Field { field: "state" }),
            v1::RunState::Stopped => Ok(Self::Stopped),
            v1::RunState::Running => Ok(Self::Running),
            v1::RunState::Paused => Ok(Self::Paused),
            v1::RunState::Crashed => Ok(Self::Crashed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_survive_the_wire() {
        let refusal = Refusal::new(ErrorCode::VmBusy, "busy").hint("wait").retry(Retry::Safe);
        assert_eq!(Refusal::from(v1::Refusal::from(&refusal)), refusal);
    }
}
