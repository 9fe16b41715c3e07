//! Who asks, and the one function that decides what they may do. Denied by default.

use godwit_api::v1::Role;
use godwit_model::{ErrorCode, Name, Refusal, TokenId};

use crate::clock;
use crate::db::{Db, Fault};
use crate::rows::TokenRow;

const PREFIX: &str = "gwt";

/// Who makes a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Principal {
    /// How the record calls it.
    pub(crate) name: String,
    /// Its team.
    pub(crate) team: Name,
    /// What it may do.
    pub(crate) role: Role,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Look at it.
    Look,
    /// Change it.
    Change,
}

/// To what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target<'a> {
    /// Hosts, pools, bridges of hosts.
    Cluster,
    /// VMs, images, networks, tasks of a team; the team itself.
    Team(&'a Name),
    /// API tokens, join tokens, the list of teams.
    Administration,
}

/// What is answered for what does not exist and for what may not be seen: the two must not be told apart.
pub(crate) fn not_found(kind: &str, name: impl std::fmt::Display) -> Refusal {
    Refusal::new(ErrorCode::NotFound, format!("there is no {kind} {name}"))
        .hint(format!("`godwit {kind} list` shows what there is; objects of other teams are not shown"))
}

/// Decides whether `principal` may do `action` to `target`. Objects of a foreign team do not exist for it.
pub(crate) fn authorize(principal: &Principal, action: Action, target: Target<'_>) -> Result<(), Refusal> {
    let refused = |needs: &str| {
        Err(Refusal::new(ErrorCode::NotPermitted, format!("{} may not do this: it takes {needs}", principal.name))
            .hint("ask an administrator of the cluster for a token with that role"))
    };
    match (principal.role, action, target) {
        (Role::Admin, ..) => Ok(()),
        (_, _, Target::Team(team)) if *team != principal.team => Err(not_found("team", team)),
        (Role::Operator | Role::Viewer, Action::Look, Target::Cluster | Target::Team(_)) => Ok(()),
        (Role::Operator, Action::Change, Target::Team(_)) => Ok(()),
        (Role::Viewer, Action::Change, Target::Team(_)) => refused("the role operator"),
        (Role::Operator | Role::Viewer, Action::Change, Target::Cluster)
        | (Role::Operator | Role::Viewer, _, Target::Administration) => refused("the role admin"),
    }
}

fn hash_of(secret: &str) -> blake3::Hash {
    blake3::hash(secret.as_bytes())
}

/// Makes an API token: the row to store, and the text that is shown once.
pub(crate) fn new_token(team: Name, role: Role, description: String) -> (TokenRow, String) {
    let (id, secret) = (TokenId::new(clock::fresh()), clock::secret());
    let hash = hash_of(&secret).to_hex().to_string();
    let text = format!("{PREFIX}.{id}.{secret}");
    (TokenRow { id, team, role, description, created: clock::now(), hash }, text)
}

/// Whether `secret` is the one whose hash was stored; takes as long for every wrong one.
pub(crate) fn matches(secret: &str, stored: &str) -> bool {
    blake3::Hash::from_hex(stored).is_ok_and(|stored| stored == hash_of(secret))
}

/// The hash of a secret, as it is stored.
pub(crate) fn stored_hash(secret: &str) -> String {
    hash_of(secret).to_hex().to_string()
}

/// The principal that a token's text stands for.
pub(crate) async fn authenticate(db: &Db, text: &str) -> Result<Principal, Fault> {
    let unknown = || {
        Refusal::new(ErrorCode::Unauthenticated, "the request carries no token that this cluster knows")
            .hint("send `Authorization: Bearer gwt.…`; the first one is in admin.token in the controller's data directory")
    };
    let mut parts = text.split('.');
    let (Some(PREFIX), Some(id), Some(secret), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Err(unknown().into());
    };
    let id: TokenId = id.parse().map_err(|_| unknown())?;
    let token = db.find::<TokenRow>(&id.to_string()).await?.ok_or_else(unknown)?.row;
    if !matches(secret, &token.hash) {
        return Err(unknown().into());
    }
    Ok(Principal { name: format!("token {id}"), team: token.team, role: token.role })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_allowed_is_denied() {
        let (own, foreign) = (Name::new("red").expect("name"), Name::new("blue").expect("name"));
        let principal = |role| Principal { name: "token x".into(), team: own.clone(), role };
        let code = |role, action, target| authorize(&principal(role), action, target).err().map(|refusal| refusal.code);
        use {Action::*, ErrorCode as E, Role::*, Target as T};
        let table = [
            (Viewer, Look, T::Cluster, None),
            (Viewer, Look, T::Team(&own), None),
            (Viewer, Change, T::Team(&own), Some(E::NotPermitted)),
            (Viewer, Look, T::Administration, Some(E::NotPermitted)),
            (Viewer, Change, T::Cluster, Some(E::NotPermitted)),
            (Operator, Look, T::Cluster, None),
            (Operator, Change, T::Cluster, Some(E::NotPermitted)),
            (Operator, Change, T::Team(&own), None),
            (Operator, Change, T::Administration, Some(E::NotPermitted)),
            (Operator, Look, T::Team(&foreign), Some(E::NotFound)),
            (Operator, Change, T::Team(&foreign), Some(E::NotFound)),
            (Viewer, Change, T::Team(&foreign), Some(E::NotFound)),
            (Admin, Change, T::Team(&foreign), None),
            (Admin, Change, T::Administration, None),
        ];
        for (role, action, target, expected) in table {
            assert_eq!(code(role, action, target), expected, "{role:?} {action:?} {target:?}");
        }
    }

    #[test]
    fn a_token_matches_its_secret_only() {
        let (row, text) = new_token(Name::new("red").expect("name"), Role::Viewer, String::new());
        let secret = text.rsplit('.').next().expect("secret");
        assert!(matches(secret, &row.hash));
        assert!(!matches("", &row.hash) && !matches(secret, "") && !row.hash.contains(secret));
    }
}
