//! Wire values to model values and back. Everything that arrives is checked here, once.

use godwit_model::{ErrorCode, Generation, Grant, Name, Refusal, Retry, RunState, TaskId, UnixMillis, VmId};
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

impl From<&Grant> for v1::Grant {
    fn from(grant: &Grant) -> Self {
        Self {
            vm: grant.vm.to_string(),
            generation: grant.generation.0,
            source: grant.source.as_ref().map(ToString::to_string).unwrap_or_default(),
            destination: grant.destination.to_string(),
            task: grant.task.to_string(),
            expires_unix_ms: grant.expires.0,
        }
    }
}

impl TryFrom<v1::Grant> for Grant {
    type Error = Malformed;

    fn try_from(grant: v1::Grant) -> Result<Self, Malformed> {
        Ok(Self {
            vm: vm_id(&grant.vm)?,
            generation: Generation(grant.generation),
            source: if grant.source.is_empty() { None } else { Some(name("source", &grant.source)?) },
            destination: name("destination", &grant.destination)?,
            task: task_id(&grant.task)?,
            expires: UnixMillis(grant.expires_unix_ms),
        })
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
    fn grants_and_refusals_survive_the_wire() {
        let grant = Grant {
            vm: VmId::new(uuid::Uuid::from_u128(7)),
            generation: Generation(3),
            source: Some(Name::new("h1").expect("name")),
            destination: Name::new("h2").expect("name"),
            task: TaskId::new(uuid::Uuid::from_u128(9)),
            expires: UnixMillis(5),
        };
        assert_eq!(Grant::try_from(v1::Grant::from(&grant)).expect("well formed"), grant);
        let refusal = Refusal::new(ErrorCode::VmBusy, "busy").hint("wait").retry(Retry::Safe);
        assert_eq!(Refusal::from(v1::Refusal::from(&refusal)), refusal);
        let bad = v1::Grant { destination: "../x".into(), ..v1::Grant::from(&grant) };
        assert!(Grant::try_from(bad).is_err());
    }
}
