//! Join tokens: `gwj.<id>.<secret>.<authority>`: one use, short-lived, and carrying the authority's fingerprint, so that a host that
//! joins checks the controller before it says its secret.

use std::fmt;
use std::str::FromStr;

use godwit_model::TokenId;

const PREFIX: &str = "gwj";
const SECRET_DIGITS: usize = 64;
const FINGERPRINT_DIGITS: usize = 64;

/// A join token as handed to a person.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Its public half.
    pub id: TokenId,
    /// Its secret, 64 hexadecimal digits.
    pub secret: String,
    /// SHA-256 of the authority's certificate (DER), 64 hexadecimal digits.
    pub authority: String,
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}, secret withheld)", self.id)
    }
}

/// A text that is not a join token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is not a join token (gwj.….….…): copy it whole, as `godwit host token` printed it")]
pub struct InvalidJoinToken;

fn hexadecimal(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

impl FromStr for JoinToken {
    type Err = InvalidJoinToken;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.trim().split('.');
        let mut next = || parts.next().ok_or(InvalidJoinToken);
        let (prefix, id, secret, authority) = (next()?, next()?, next()?, next()?);
        let well_formed = prefix == PREFIX && hexadecimal(secret, SECRET_DIGITS) && hexadecimal(authority, FINGERPRINT_DIGITS);
        if !well_formed || parts.next().is_some() {
            return Err(InvalidJoinToken);
        }
        Ok(Self { id: id.parse().map_err(|_| InvalidJoinToken)?, secret: secret.into(), authority: authority.into() })
    }
}

impl JoinToken {
    /// The text for the person who joins a host. Secret: never log it.
    #[must_use]
    pub fn reveal(&self) -> String {
        format!("{PREFIX}.{}.{}.{}", self.id, self.secret, self.authority)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_text_and_hides_its_secret() {
        let token = JoinToken { id: TokenId::new(uuid::Uuid::nil()), secret: "ab".repeat(32), authority: "01".repeat(32) };
        assert_eq!(token.reveal().parse(), Ok(token.clone()));
        assert!(!format!("{token:?}").contains("abab"));
        for bad in ["", "gwj", "gwj.x.y.z", &token.reveal().replace("ab", "zz"), &format!("{}.x", token.reveal())] {
            assert_eq!(bad.parse::<JoinToken>(), Err(InvalidJoinToken), "{bad:?} was accepted");
        }
    }
}
