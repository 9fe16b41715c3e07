//! What is asked of a guest through its agent: programs to be run.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use godwit_api::v1;
use godwit_model::{ExecOutcome, ExecRequest, Name};

use super::extract::{Body, Named, Query, Team, team_of};
use super::{Answer, App, Refusals};
use crate::principals::{Action, Principal, Target, authorize};
use crate::tasks::Ask;

/// Runs a program in the guest and answers how it ended
///
/// Recorded as a task of kind `vm.exec` before it starts: who, when, and the program's name, not its arguments. Refused with `vm_busy`
/// while another task works on the VM; a program that runs already is followed when the VM moves. With `exec_unfinished` the program goes on.
#[utoipa::path(post, path = "/v1/vms/{vm}/exec", tag = "vm", operation_id = "vm_exec", params(("vm" = Name, Path), Team),
    request_body = v1::VmExec, responses((status = 200, body = ExecOutcome), Refusals))]
pub(super) async fn vm_exec(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(vm): Named,
    Query(query): Query<Team>,
    Body(body): Body<v1::VmExec>,
) -> Answer<Json<ExecOutcome>> {
    let team = team_of(&who, query.team.as_ref()).clone();
    // Whoever runs programs there is as good as the guest's administrator.
    authorize(&who, Action::Change, Target::Team(&team))?;
    let request = ExecRequest::from(body);
    request.validate()?;
    let ask = Ask { team, vm, principal: who.name, reason: None, revision: None, schedule: None };
    Ok(Json(app.tasks.exec(&ask, request).await?))
}
