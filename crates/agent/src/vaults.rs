//! Vaults as a whole: how large they are, whether they are sound, and what in them nobody refers to.

use godwit_link::v1::{self, look_at_vault::What};
use godwit_link::{Malformed, decode, encode};
use godwit_model::Refusal;
use godwit_qemu::PassedFds;

use crate::host::SharedHost;
use crate::snapshot::{Job, Keyed, VaultAt, Worker, id_of, key_of};
use crate::vm::Answer;

async fn work(host: &SharedHost, vault: &VaultAt, job: Job) -> Result<serde_json::Value, Refusal> {
    let directory = host.pools.vault(&vault.pool, &vault.team, host.vault_uid()).await?;
    Worker::start(host, directory, job, PassedFds::new()).await?.done().await
}

/// Removes a snapshot.
pub(crate) async fn delete(host: &SharedHost, delete: &v1::DeleteSnapshot) -> Result<Answer, Refusal> {
    let vault = VaultAt::read(delete.vault.as_ref())?;
    work(host, &vault, Job::Delete { snapshot: id_of(&delete.snapshot)? }).await?;
    Ok(Answer::default())
}

/// Looks at a vault, or prunes it.
pub(crate) async fn look(host: &SharedHost, look: v1::LookAtVault) -> Result<Answer, Refusal> {
    let vault = VaultAt::read(look.vault.as_ref())?;
    let snapshots: Vec<Keyed> = look.snapshots.iter().map(key_of).collect::<Result<_, _>>()?;
    let job = match look.what {
        Some(What::Usage(_)) => Job::Usage,
        Some(What::Verify(_)) => Job::Verify { snapshots, team: vault.key },
        Some(What::PlanPrune(_)) => Job::PlanPrune { snapshots },
        Some(What::Prune(plan)) => Job::Prune { snapshots, plan: decode("prune", &plan)? },
        None => return Err(Malformed::Field { field: "what" }.into()),
    };
    let told = work(host, &vault, job).await?;
    Ok(Answer { result: encode(&told), ..Answer::default() })
}
