//! VMs: create, look, and everything that becomes a task.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use godwit_api::v1;
use godwit_model::{Boot, ErrorCode, ImageKind, Millis, Name, Refusal, VmId, VmSpec};
use serde::Deserialize;
use utoipa::IntoParams;

use super::extract::{Body, Condition, Listing, MaybeBody, Named, Query, Team, team_of};
use super::{Answer, App, Refusals};
use crate::db::{Batch, Fault};
use crate::migratable::Look;
use crate::principals::{Action, Principal, Target, authorize, not_found};
use crate::rows::{HistoryRow, HostRow, ImageRow, NetworkRow, TeamRow, VmRow};
use crate::specs::{claims, complete_new};
use crate::tasks::{Ask, Asked, host_down};
use crate::{clock, views};

/// VMs
#[utoipa::path(get, path = "/v1/vms", tag = "vm", operation_id = "vm_list", params(Listing),
    responses((status = 200, body = v1::Page<v1::Vm>), Refusals))]
pub(super) async fn vm_list(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Listing>,
) -> Answer<Json<v1::Page<v1::Vm>>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    let limit = query.limit()?;
    let names = app.db.claims(&format!("vmname/{team}/"), query.after.as_deref(), limit + 1).await?;
    let next = if names.len() > limit { names.get(limit - 1).map(|(name, _)| name.clone()) } else { None };
    let mut items = Vec::new();
    for (_, id) in names.iter().take(limit) {
        // One that was deleted between the two looks is not there.
        if let Some(row) = app.db.find::<VmRow>(id).await? {
            items.push(views::vm(&row, &app.hub));
        }
    }
    Ok(Json(v1::Page { items, next }))
}

/// A VM
#[utoipa::path(get, path = "/v1/vms/{vm}", tag = "vm", operation_id = "vm_show", params(("vm" = Name, Path), Team),
    responses((status = 200, body = v1::Vm), Refusals))]
pub(super) async fn vm_show(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(vm): Named,
    Query(query): Query<Team>,
) -> Answer<Json<v1::Vm>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    Ok(Json(views::vm(&app.tasks.vm(team, &vm).await?, &app.hub)))
}

/// What became of each generation of a VM: where it ran, from when to when, and why
#[utoipa::path(get, path = "/v1/vms/{vm}/history", tag = "vm", operation_id = "vm_history", params(("vm" = Name, Path), Team),
    responses((status = 200, body = v1::VmHistory), Refusals))]
pub(super) async fn vm_history(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(vm): Named,
    Query(query): Query<Team>,
) -> Answer<Json<v1::VmHistory>> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    let vm = app.tasks.vm(team, &vm).await?.row.id;
    let found = app.db.find::<HistoryRow>(&vm.to_string()).await?;
    Ok(Json(views::history(found.map_or_else(|| HistoryRow { vm, reigns: vec![] }, |found| found.row))))
}

/// Whether a running VM could move now, to each connected host or to one; nothing is changed
#[utoipa::path(get, path = "/v1/vms/{vm}/check", tag = "vm", operation_id = "vm_check", params(("vm" = Name, Path), Checking),
    responses((status = 200, body = v1::VmCheck), Refusals))]
pub(super) async fn vm_check(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(vm): Named,
    Query(Checking { team, to }): Query<Checking>,
) -> Answer<Json<v1::VmCheck>> {
    let team = team_of(&who, team.as_ref());
    authorize(&who, Action::Look, Target::Team(team))?;
    let vm = app.tasks.vm(team, &vm).await?.row;
    if let Some(to) = &to {
        app.db.find::<HostRow>(to.as_str()).await?.ok_or_else(|| not_found("host", to))?;
    }
    let (Some(spec), Some(source), true) = (&vm.resolved, &vm.host, vm.has_process()) else {
        return Err(Refusal::new(ErrorCode::VmNotRunning, format!("VM {} does not run", vm.name))
            .hint("start it first; a VM that does not run starts wherever it fits")
            .into());
    };
    for host in [Some(source), to.as_ref()].into_iter().flatten() {
        app.hub.presence(host).ok_or_else(|| host_down(host))?;
    }
    if to.as_ref() == Some(source) {
        return Err(Refusal::new(ErrorCode::AlreadyOnHost, format!("VM {} runs on {source}", vm.name))
            .hint("choose another host")
            .into());
    }
    let look = Look::at(&app.db, &app.hub).await?;
    let hosts = look.check(&vm, spec, source, to.as_ref()).collect();
    Ok(Json(v1::VmCheck { source: source.clone(), hosts }))
}

/// Whose VM, and which host is asked about.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Checking {
    /// The team; by default the principal's own (for an administrator `default`).
    team: Option<Name>,
    /// One host; all connected ones by default.
    to: Option<Name>,
}

/// How long a VM runs before a golden snapshot is taken of it, if nothing else was said and its guest's agent does not answer.
const GOLDEN_AFTER: Millis = Millis(60_000);

/// Creates a VM; it is not started
#[utoipa::path(post, path = "/v1/vms", tag = "vm", operation_id = "vm_create", params(Team), request_body = v1::VmCreate,
    responses((status = 201, body = v1::Vm), Refusals))]
pub(super) async fn vm_create(
    State(app): State<Arc<App>>,
    who: Principal,
    Query(query): Query<Team>,
    Body(request): Body<v1::VmCreate>,
) -> Answer<(StatusCode, Json<v1::Vm>)> {
    let team = team_of(&who, query.team.as_ref());
    authorize(&who, Action::Change, Target::Team(team))?;
    let v1::VmCreate { name, mut spec, golden } = request;
    spec.validate().map_err(Refusal::from)?;
    app.db.find::<TeamRow>(team.as_str()).await?.ok_or_else(|| not_found("team", team))?;
    check_references(&app, team, &spec).await?;
    complete_new(&mut spec)?;
    let mut row = VmRow::new(VmId::new(clock::fresh()), name, team.clone(), spec, clock::now());
    row.golden_after = golden.map(|golden| golden.after.unwrap_or(GOLDEN_AFTER));
    let mut batch = Batch::default().create(&row).claim(format!("vmname/{team}/{}", row.name), &row.id);
    for key in claims(&row.spec) {
        batch = batch.claim(key, &row.id);
    }
    app.db.commit(batch).await.map_err(|fault| claimed(fault, &row.name))?;
    tracing::info!(vm = %row.name, %team, principal = who.name, "VM created");
    Ok((StatusCode::CREATED, Json(views::vm(&app.tasks.vm(team, &row.name).await?, &app.hub))))
}

/// Says whose claim was in the way.
fn claimed(fault: Fault, name: &Name) -> Fault {
    let Fault::Store(crate::store::StoreError::Conflict { key }) = &fault else { return fault };
    let refusal = match key.split_once('/') {
        Some(("mac", mac)) => Refusal::new(ErrorCode::InUse, format!("another VM has the address {mac}"))
            .hint("leave the address out to have one drawn"),
        Some(("volume", volume)) => {
            Refusal::new(ErrorCode::InUse, format!("another VM has the volume {volume}")).hint("choose another volume")
        }
        _ => Refusal::new(ErrorCode::NameTaken, format!("there is a VM {name} already")).hint("choose another name"),
    };
    refusal.into()
}

/// Images and networks that the spec names must be there and fit.
async fn check_references(app: &App, team: &Name, spec: &VmSpec) -> Result<(), Fault> {
    let mut wanted: Vec<(&Name, &[ImageKind])> = Vec::new();
    if let Boot::Kernel { kernel, initrd, .. } = &spec.boot {
        wanted.push((kernel, &[ImageKind::Kernel]));
        wanted.extend(initrd.iter().map(|initrd| (initrd, &[ImageKind::Initrd] as &[_])));
    }
    wanted.extend(spec.disks.iter().filter_map(|disk| Some((disk.image.as_ref()?, &[ImageKind::Raw, ImageKind::Qcow2] as &[_]))));
    wanted.extend(spec.cdroms.iter().filter_map(|cdrom| Some((cdrom.image.as_ref()?, &[ImageKind::Iso] as &[_]))));
    for (image, kinds) in wanted {
        let found = app.db.find::<ImageRow>(&format!("{team}/{image}")).await?.ok_or_else(|| not_found("image", image))?;
        if !kinds.contains(&found.row.kind) {
            let refusal =
                Refusal::new(ErrorCode::SpecInvalid, format!("image {image} is a {:?}, which does not go there", found.row.kind));
            return Err(refusal.hint("`godwit image list` shows the kind of each image").into());
        }
    }
    for nic in &spec.nics {
        let found = app.db.find::<NetworkRow>(&format!("{team}/{}", nic.network)).await?;
        found.ok_or_else(|| not_found("network", &nic.network))?;
    }
    Ok(())
}

/// Who asks for something of which VM, under which condition, and why.
pub(super) struct Request {
    pub(super) who: Principal,
    pub(super) team: Option<Name>,
    pub(super) vm: Name,
    pub(super) revision: Option<u64>,
    pub(super) reason: Option<String>,
}

pub(super) fn check_reason(reason: Option<&String>) -> Result<(), Refusal> {
    if reason.is_some_and(|reason| reason.len() > 1_000 || reason.chars().any(char::is_control)) {
        return Err(Refusal::new(ErrorCode::BadRequest, "a reason has at most 1000 characters and no control characters"));
    }
    Ok(())
}

/// Authorises, records, starts; answers the task.
pub(super) async fn ask(app: &App, request: Request, asked: Asked) -> Answer<(StatusCode, Json<v1::Task>)> {
    let Request { who, team, vm, revision, reason } = request;
    let team = team_of(&who, team.as_ref()).clone();
    authorize(&who, Action::Change, Target::Team(&team))?;
    check_reason(reason.as_ref())?;
    let ask = Ask { team, vm, principal: who.name, reason, revision, schedule: None };
    let task = app.tasks.ask(&ask, &asked).await?;
    Ok((StatusCode::ACCEPTED, Json(views::task(&task))))
}

macro_rules! asks {
    ($(#[$doc:meta])* $name:ident, $verb:literal, $body:ident, $asked:expr) => {
        $(#[$doc])*
        #[utoipa::path(post, path = concat!("/v1/vms/{vm}/", $verb), tag = "vm", operation_id = concat!("vm_", $verb),
            params(("vm" = Name, Path), Team, ("If-Match" = Option<String>, Header, description = "Revision that the VM must still have.")),
            request_body = Option<v1::$body>, responses((status = 202, body = v1::Task), Refusals))]
        pub(super) async fn $name(
            State(app): State<Arc<App>>,
            who: Principal,
            Named(vm): Named,
            Query(query): Query<Team>,
            Condition(revision): Condition,
            MaybeBody(body): MaybeBody<v1::$body>,
        ) -> Answer<(StatusCode, Json<v1::Task>)> {
            let asked: fn(v1::$body) -> Asked = $asked;
            ask(&app, Request { who, team: query.team, vm, revision, reason: None }, asked(body)).await
        }
    };
    ($(#[$doc:meta])* $name:ident, $verb:literal, $asked:expr) => {
        $(#[$doc])*
        #[utoipa::path(post, path = concat!("/v1/vms/{vm}/", $verb), tag = "vm", operation_id = concat!("vm_", $verb),
            params(("vm" = Name, Path), Team, ("If-Match" = Option<String>, Header, description = "Revision that the VM must still have.")),
            responses((status = 202, body = v1::Task), Refusals))]
        pub(super) async fn $name(
            State(app): State<Arc<App>>,
            who: Principal,
            Named(vm): Named,
            Query(query): Query<Team>,
            Condition(revision): Condition,
            MaybeBody(()): MaybeBody<()>,
        ) -> Answer<(StatusCode, Json<v1::Task>)> {
            ask(&app, Request { who, team: query.team, vm, revision, reason: None }, $asked).await
        }
    };
}

asks! {
    /// Starts a VM
    vm_start, "start", VmStart, |body| Asked::Start(body.host)
}
asks! {
    /// Asks the guest to power off
    vm_stop, "stop", VmStop, |body| Asked::Stop(body.timeout)
}
asks! {
    /// Ends a VM without asking it
    vm_kill, "kill", Asked::Kill
}
asks! {
    /// Lets a VM stand still
    vm_pause, "pause", Asked::Pause
}
asks! {
    /// Lets a paused VM run on
    vm_unpause, "unpause", Asked::Unpause
}

asks! {
    /// Suspends a VM: keeps it with its memory while it stands still, and ends QEMU
    ///
    /// Its next start goes on from there. If that fails, or is cancelled, the VM runs on.
    vm_suspend, "suspend", Asked::Suspend
}
asks! {
    /// Lets a suspended VM go on; so does a start
    vm_unsuspend, "unsuspend", VmStart, |body| Asked::Unsuspend(body.host)
}

/// Moves a running VM
///
/// Everything is checked before the answer. With `dry_run` the task is only described: it is `done` and was never recorded.
#[utoipa::path(post, path = "/v1/vms/{vm}/migrate", tag = "vm", operation_id = "vm_migrate",
    params(("vm" = Name, Path), Team, ("If-Match" = Option<String>, Header, description = "Revision that the VM must still have.")),
    request_body = v1::VmMigrate, responses((status = 202, body = v1::Task), Refusals))]
pub(super) async fn vm_migrate(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(vm): Named,
    Query(query): Query<Team>,
    Condition(revision): Condition,
    Body(body): Body<v1::VmMigrate>,
) -> Answer<(StatusCode, Json<v1::Task>)> {
    let reason = body.reason.clone();
    ask(&app, Request { who, team: query.team, vm, revision, reason }, Asked::Migrate(body)).await
}

/// Changes what a VM is made of
///
/// What is left out stays as it is where it was chosen once (addresses, places, the generation id), and becomes the default elsewhere.
/// What can change while the VM runs does; the rest takes effect at its next start and is listed in `status.waiting` until then.
#[utoipa::path(put, path = "/v1/vms/{vm}/spec", tag = "vm", operation_id = "vm_set",
    params(("vm" = Name, Path), Team, ("If-Match" = Option<String>, Header, description = "Revision that the VM must still have.")),
    request_body = VmSpec, responses((status = 202, body = v1::Task), Refusals))]
pub(super) async fn vm_set(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(vm): Named,
    Query(query): Query<Team>,
    Condition(revision): Condition,
    Body(spec): Body<VmSpec>,
) -> Answer<(StatusCode, Json<v1::Task>)> {
    let team = team_of(&who, query.team.as_ref()).clone();
    authorize(&who, Action::Change, Target::Team(&team))?;
    spec.validate().map_err(Refusal::from)?;
    // Before its images are looked at: of a VM that is not there nothing shall be learned.
    app.tasks.vm(&team, &vm).await?;
    check_references(&app, &team, &spec).await?;
    let request = Request { who, team: query.team, vm, revision, reason: None };
    ask(&app, request, Asked::Set(Box::new(spec))).await
}

/// What a deletion takes with it.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Deletion {
    /// The team; by default the principal's own (for an administrator `default`).
    team: Option<Name>,
    /// Also delete its volumes.
    #[serde(default)]
    volumes: bool,
}

/// Deletes a stopped VM
#[utoipa::path(delete, path = "/v1/vms/{vm}", tag = "vm", operation_id = "vm_delete",
    params(("vm" = Name, Path), Deletion, ("If-Match" = Option<String>, Header, description = "Revision that the VM must still have.")),
    responses((status = 202, body = v1::Task), Refusals))]
pub(super) async fn vm_delete(
    State(app): State<Arc<App>>,
    who: Principal,
    Named(vm): Named,
    Query(query): Query<Deletion>,
    Condition(revision): Condition,
) -> Answer<(StatusCode, Json<v1::Task>)> {
    let asked = Asked::Delete { volumes: query.volumes };
    ask(&app, Request { who, team: query.team, vm, revision, reason: None }, asked).await
}
