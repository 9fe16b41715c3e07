//! Building a lab. The record is written before the first thing is made, so that `down` finds everything after a crash.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::{Duration, Instant};

use crate::layout::{OUTSIDE, Paths};
use crate::link::{Link, apply_qdiscs};
use crate::record::{self, CONTROLLER, Record, make_dir};
use crate::{ApiAccess, Bootstrap, BootstrapError, LabError, LabSpec, LinkRate, LinkStatus};
use crate::{daemon, down, network, status};

/// How long a daemon may take until it is ready.
const PATIENCE: Duration = Duration::from_secs(60);

/// Builds a lab; without a controller only its network. Takes it down again when a step fails.
pub(crate) fn build(spec: LabSpec, controller: Option<&mut dyn Bootstrap>) -> Result<(), LabError> {
    spec.check()?;
    if !rustix::process::geteuid().is_root() {
        return Err(LabError::NotRoot);
    }
    let _lock = record::lock(&spec.name)?;
    let mut record = begin(spec)?;
    let name = record.spec.name.clone();
    let result = network_of(&record).and_then(|()| controller.map_or(Ok(()), |it| daemons_of(&mut record, it)));
    let result = result.and_then(|()| {
        record.complete = true;
        record.save()
    });
    if result.is_err() {
        // The first failure is the one worth telling; what cannot be removed now can be later, by the record.
        let _ = down::remove_locked(&name);
    }
    result
}

/// The link that a place has when the lab is built.
pub(crate) fn initial_link(spec: &LabSpec, place: &str) -> LinkStatus {
    LinkStatus::with_rate(if place == OUTSIDE { LinkRate::UNLIMITED } else { spec.link_rate })
}

/// Claims the name, the directories and the user ids.
fn begin(spec: LabSpec) -> Result<Record, LabError> {
    let paths = Paths::new(&spec.name, spec.dir.as_deref());
    let exists = || LabError::Exists { name: spec.name.clone() };
    // Without a record there may still be leftovers, of a crash before it was written or of a removed directory.
    let used = |dir: &std::path::Path| fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some());
    if used(&paths.home()) || used(&paths.run()) || !network::existing(&spec.name).is_empty() {
        return Err(exists());
    }
    if used(paths.data()) {
        return Err(LabError::DirectoryUsed { path: paths.data().to_path_buf() });
    }
    let places = spec.host_names().chain([OUTSIDE.to_owned()]);
    let links: BTreeMap<_, _> = places
        .map(|place| {
            let status = initial_link(&spec, &place);
            (place, Link { status, relay: None })
        })
        .collect();
    let _all = record::lock_all()?;
    let record = Record {
        boot: record::boot_id(),
        uid_slot: record::free_uid_slot(&spec.name),
        api_port: None,
        links,
        processes: BTreeMap::new(),
        complete: false,
        spec,
    };
    make_dir(&paths.home(), 0o711)?;
    record.save()?;
    make_dir(&paths.run(), 0o711)?;
    make_dir(paths.data(), 0o711)?;
    make_dir(&daemon::pool(&record), 0o711)?;
    for host in record.spec.host_names() {
        make_dir(&paths.host(&host), 0o711)?;
    }
    Ok(record)
}

fn network_of(record: &Record) -> Result<(), LabError> {
    network::build(&record.spec)?;
    record.links.iter().try_for_each(|(place, link)| apply_qdiscs(&record.spec.name, place, link.status))
}

fn daemons_of(record: &mut Record, controller: &mut dyn Bootstrap) -> Result<(), LabError> {
    daemon::start_controller(record)?;
    let api = status::api(record);
    wait(record, CONTROLLER, "the controller", || controller.is_ready(&api))?;
    let hosts: Vec<String> = record.spec.host_names().collect();
    for host in &hosts {
        join(record, host, &api, controller)?;
        daemon::start_agent(record, host)?;
    }
    for host in &hosts {
        wait(record, host, &format!("the agent of {host}"), || controller.is_connected(&api, host))?;
    }
    Ok(())
}

fn join(record: &Record, host: &str, api: &ApiAccess, controller: &mut dyn Bootstrap) -> Result<(), LabError> {
    let token = controller.join_token(api, host).map_err(|source| bootstrap_error(record, source))?;
    let path = record.paths().host(host).join("join.token");
    let failed = || LabError::file("write", &path);
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path).map_err(failed())?;
    file.write_all(token.as_bytes()).map_err(failed())?;
    let joined = daemon::join(record, host, &path);
    fs::remove_file(&path).map_err(LabError::file("remove", &path))?;
    joined
}

/// Asks until the answer is yes, while the daemon lives.
fn wait(record: &Record, role: &str, awaited: &str, mut ask: impl FnMut() -> Result<bool, BootstrapError>) -> Result<(), LabError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if ask().map_err(|source| bootstrap_error(record, source))? {
            return Ok(());
        }
        if record.running(role).is_none() {
            return Err(daemon::failed(record, role));
        }
        if Instant::now() > deadline {
            let awaited = awaited.to_owned();
            return Err(bootstrap_error(record, BootstrapError::Patience { awaited, seconds: PATIENCE.as_secs() }));
        }
        // The daemons tell nobody when they are ready; this is the interval of asking.
        thread::sleep(Duration::from_millis(50));
    }
}

fn bootstrap_error(record: &Record, source: BootstrapError) -> LabError {
    LabError::Bootstrap { tail: daemon::tail(&record.paths().controller_log()), source }
}
