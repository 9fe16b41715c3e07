//! Grants as they arrive: signed by the controller, meant for this host, in their time. Nothing is started, prepared or given away without.

use godwit_link::certificate::CONTROLLER;
use godwit_link::statement::{self, Purpose, Validity};
use godwit_link::v1::Signed;
use godwit_link::{Malformed, decode};
use godwit_model::{ErrorCode, Grant, Name, Refusal, Retry, UnixMillis};

use crate::host::{host_failed, with_causes};
use crate::tls::Material;
use crate::vm::VmCommand;

/// What the controller has granted, if it was the controller.
pub(crate) fn open(material: &Material, grant: Option<Signed>, now: UnixMillis) -> Result<Grant, Refusal> {
    let signed = grant.ok_or(Malformed::Field { field: "grant" })?;
    let roots = material.roots().map_err(|error| host_failed("the cluster's authority cannot be read", &error))?;
    let (statement, _) =
        statement::open(Purpose::Grant, &signed, CONTROLLER, &roots.into(), Validity::At(now)).map_err(|error| {
            Refusal::new(ErrorCode::NotGranted, format!("the grant is not the controller's: {}", with_causes(&error)))
                .hint("compare the clocks of host and controller; `godwit host join --rejoin` if the authority was replaced")
        })?;
    Ok(decode("grant", statement)?)
}

/// A grant counts only for the host that it names, and only in its time.
pub(crate) fn check(command: &VmCommand, me: &Name, now: UnixMillis) -> Result<(), Refusal> {
    let (grant, mine): (&Grant, bool) = match command {
        VmCommand::Start { grant, spec, .. } => (grant, grant.destination == *me && grant.source.is_none() && spec.vm == grant.vm),
        VmCommand::Prepare { grant, spec, .. } => {
            (grant, grant.destination == *me && grant.source.as_ref().is_some_and(|source| source != me) && spec.vm == grant.vm)
        }
        VmCommand::Migrate { grant, .. } => (grant, grant.source.as_ref() == Some(me) && grant.destination != *me),
        _ => return Ok(()),
    };
    if !mine {
        return Err(Refusal::new(ErrorCode::NotGranted, "the grant is not for this host"));
    }
    if now >= grant.expires {
        return Err(Refusal::new(ErrorCode::GrantExpired, "the grant has expired")
            .hint("compare the clocks of host and controller")
            .retry(Retry::Never));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use godwit_link::certificate::host_dns_name;
    use godwit_model::{Generation, MigrationPolicy, PastMoves, TaskId, VmId};

    use super::*;
    use crate::tls::tests::certified;

    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

    fn name(text: &str) -> Name {
        Name::new(text).expect("name")
    }

    fn grant() -> Grant {
        Grant {
            vm: VmId::new(uuid::Uuid::from_u128(7)),
            generation: Generation(3),
            source: Some(name("h1")),
            destination: name("h2"),
            task: TaskId::new(uuid::Uuid::from_u128(9)),
            expires: UnixMillis(NOW.0 + 1),
        }
    }

    fn signed(by: &Material, purpose: Purpose) -> Signed {
        let key = statement::signing_key(&by.key().expect("key")).expect("key");
        let statement = godwit_link::encode(&grant());
        statement::sign(purpose, statement, key.as_ref(), &by.chain().expect("chain")).expect("signed")
    }

    #[test]
    fn nothing_but_what_the_controller_has_signed_is_a_grant() {
        let [controller, h1] = &certified(&[CONTROLLER.to_owned(), host_dns_name(&name("h1"))])[..] else { panic!("two") };
        assert_eq!(open(h1, Some(signed(controller, Purpose::Grant)), NOW), Ok(grant()));

        let code = |signed| open(h1, signed, NOW).expect_err("no grant").code;
        assert_eq!(code(None), ErrorCode::BadRequest);
        assert_eq!(code(Some(signed(h1, Purpose::Grant))), ErrorCode::NotGranted, "a host grants nothing");
        assert_eq!(code(Some(signed(controller, Purpose::Fact))), ErrorCode::NotGranted, "it was said, not granted");
        let foreign = &certified(&[CONTROLLER.to_owned()])[0];
        assert_eq!(code(Some(signed(foreign, Purpose::Grant))), ErrorCode::NotGranted, "another cluster's controller");
        let mut later = signed(controller, Purpose::Grant);
        later.statement = godwit_link::encode(&Grant { generation: Generation(4), ..grant() });
        assert_eq!(code(Some(later)), ErrorCode::NotGranted, "changed");
    }

    #[test]
    fn a_grant_counts_for_its_hosts_and_in_its_time() {
        let command = VmCommand::Migrate {
            grant: grant(),
            address: SocketAddr::from(([127, 0, 0, 1], 1)),
            policy: MigrationPolicy::default(),
            memory_key: None,
            disks: vec![],
            past: PastMoves::default(),
        };
        assert_eq!(check(&command, &name("h1"), NOW), Ok(()));
        let code = |me: &str, now| check(&command, &name(me), now).expect_err("refused").code;
        assert_eq!(code("h2", NOW), ErrorCode::NotGranted, "the destination has nothing to give away");
        assert_eq!(code("h3", NOW), ErrorCode::NotGranted);
        assert_eq!(code("h1", grant().expires), ErrorCode::GrantExpired);
    }
}
