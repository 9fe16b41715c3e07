//! Starting and stopping: the order in which the parts come to life, and go.

use std::collections::HashSet;
use std::fs::{DirBuilder, File};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum_server::tls_rustls::RustlsConfig;
use godwit_api::v1::Role;
use godwit_model::{Name, Refusal};
use rustix::fs::{FlockOperation, flock};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

use crate::authority::{Authority, AuthorityError, AuthorityFiles, CONTROLLER_LIFETIME, write_durably};
use crate::clock;
use crate::db::{Batch, Db, Fault};
use crate::fleet::Fleet;
use crate::http::{App, router};
use crate::hub::Hub;
use crate::images::{Images, source_of};
use crate::link::{LinkServer, listen};
use crate::migratable;
use crate::networks::first_network;
use crate::options::{LogFormat, ServeOptions};
use crate::principals::new_token;
use crate::reports::Reports;
use crate::restore;
use crate::rows::{HostRow, ImageRow, TaskRow, TeamRow, Work};
use crate::sockets::HandedOver;
use crate::store::{SqliteStore, Store, StoreError};
use crate::tasks::Tasks;

const ADMIN_TOKEN: &str = "admin.token";
const DEFAULT_TEAM: &str = "default";
/// How long requests under way may take when the controller stops.
const FAREWELL: Duration = Duration::from_secs(5);
/// How often old changes and old tasks are dropped.
const HOUSEKEEPING: Duration = Duration::from_secs(600);

/// Why a controller does not start, or ends.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The data directory.
    #[error("cannot use {path}")]
    Data {
        /// What of it.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody else has it.
    #[error("another controller works on {path}: stop it first")]
    Locked {
        /// The data directory.
        path: PathBuf,
    },
    /// Clear text elsewhere than on loopback.
    #[error("the API would be served in clear text on {address}: leave --insecure-loopback out, or listen on 127.0.0.1")]
    ClearText {
        /// Where.
        address: SocketAddr,
    },
    /// A listener.
    #[error("cannot listen for {what} on {address}")]
    Listen {
        /// For whom.
        what: &'static str,
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The authority.
    #[error("the cluster's authority cannot be used")]
    Authority(#[from] AuthorityError),
    /// The store.
    #[error("the store cannot be used: {0}")]
    Store(Refusal),
    /// A server ended by itself.
    #[error("the {what} server ended")]
    Server {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl From<Fault> for ServeError {
    fn from(fault: Fault) -> Self {
        Self::Store(fault.refusal())
    }
}

impl From<StoreError> for ServeError {
    fn from(error: StoreError) -> Self {
        Fault::from(error).into()
    }
}

/// A controller that serves. Dropping it does not stop it; [`Controller::stop`] does.
pub struct Controller {
    api: SocketAddr,
    link: SocketAddr,
    stop: CancellationToken,
    tracker: TaskTracker,
    store: Arc<SqliteStore>,
    hub: Arc<Hub>,
    tasks: Arc<Tasks>,
    api_handle: axum_server::Handle<SocketAddr>,
    failures: tokio::sync::mpsc::Receiver<ServeError>,
    _lock: File,
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// [`ServeError`] if it cannot start, or a listener fails.
pub async fn serve(options: ServeOptions) -> Result<(), ServeError> {
    init_log(options.log);
    let mut handed_over = HandedOver::take();
    let failed = |what: &'static str| move |source: io::Error| ServeError::Server { what, source: Box::new(source) };
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("signal"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed("signal"))?;
    let mut controller = Controller::start_with(options, &mut handed_over).await?;
    let result = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        Some(failure) = controller.failures.recv() => Err(failure),
    };
    tracing::info!("stopping");
    controller.stop().await;
    result
}

fn init_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_span_events(FmtSpan::NONE);
    // Whoever starts us may have set up its own.
    let _ = match format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

impl Controller {
    /// Starts a controller with listeners of its own.
    ///
    /// # Errors
    /// [`ServeError`].
    pub async fn start(options: ServeOptions) -> Result<Self, ServeError> {
        Self::start_with(options, &mut HandedOver::default()).await
    }

    async fn start_with(options: ServeOptions, handed_over: &mut HandedOver) -> Result<Self, ServeError> {
        // Another part of the process may have installed one: then that one is used by what asks for none in particular.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let dir = &options.data_dir;
        let lock = lock(dir)?;
        let listener = |handed_over: &mut HandedOver, what, address| {
            handed_over.listener(what, address).map_err(|source| ServeError::Listen { what, address, source })
        };
        let api_listener = listener(handed_over, "api", options.api_listen)?;
        let link_listener = listener(handed_over, "link", options.link_listen)?;
        let local = |listener: &TcpListener, what, address| {
            listener.local_addr().map_err(|source| ServeError::Listen { what, address, source })
        };
        let api = local(&api_listener, "api", options.api_listen)?;
        let link = local(&link_listener, "link", options.link_listen)?;
        if options.insecure_loopback && !api.ip().is_loopback() {
            return Err(ServeError::ClearText { address: api });
        }
        let files = AuthorityFiles::new(dir, options.authority_secret.as_deref())?;
        let authority = Authority::open(&files, &options.advertise, clock::now())?;
        let authority = Arc::new(authority.with_host_lifetime(options.host_lifetime));
        warn_of_end(&authority);
        let store = Arc::new(SqliteStore::open(&dir.join("store.db"), options.store_pages)?);
        let db = Db::open(store.clone() as Arc<dyn Store>, options.restored).await?;
        first_start(&db, dir).await?;
        first_network(&db, Name::new(DEFAULT_TEAM).expect("a plain word is a name")).await?;
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let hub = Arc::new(Hub::new());
        hub.habits.load(&db).await?;
        let images = Arc::new(open_images(&db, &options).await?);
        let tasks = Arc::new(Tasks::new(
            db.clone(),
            hub.clone(),
            images.clone(),
            authority.clone(),
            (options.clock.clone(), options.heartbeat),
            tracker.clone(),
            stop.clone(),
        ));
        let fleet = Arc::new(Fleet::new(db.clone(), hub.clone()));
        nobody_is_connected(&db).await?;
        if options.restored {
            restore::begin(&db).await?;
        }
        restore::sweep(&db).await?;
        fleet.refresh().await?;
        tasks.resume().await?;

        let reports = Arc::new(Reports { db: db.clone(), hub: hub.clone(), tasks: tasks.clone() });
        let link_server = LinkServer {
            db: db.clone(),
            hub: hub.clone(),
            authority: authority.clone(),
            reports,
            fleet: fleet.clone(),
            images: images.clone(),
            heartbeat: options.heartbeat,
            tracker: tracker.clone(),
            stop: stop.clone(),
        };
        let (failed, failures) = tokio::sync::mpsc::channel(2);
        let link_failed = failed.clone();
        let link_listener = tokio::net::TcpListener::from_std(link_listener).map_err(|source| ServeError::Listen {
            what: "link",
            address: link,
            source,
        })?;
        let serving = listen(link_listener, authority.link_tls()?, link_server, tracker.clone(), stop.clone());
        tracker.spawn(async move {
            if let Err(source) = serving.await {
                let _ = link_failed.send(ServeError::Server { what: "link", source: Box::new(source) }).await;
            }
        });

        let app = Arc::new(App {
            db: db.clone(),
            hub: hub.clone(),
            tasks: tasks.clone(),
            images,
            authority: authority.clone(),
            stop: stop.clone(),
        });
        let api_handle = axum_server::Handle::new();
        serve_api(api_listener, &authority, options.insecure_loopback, app, api_handle.clone(), &tracker, failed)?;
        follow(&tracker, &stop, fleet, authority, tasks.clone(), db.clone(), options.log_kept);
        let (until, known) = (stop.clone(), (db.clone(), hub.clone()));
        tracker.spawn(async move {
            tokio::select! {
                () = until.cancelled() => {}
                () = migratable::follow(known.0, known.1) => {}
            }
        });
        let scheme = if options.insecure_loopback { "http" } else { "https" };
        tracing::info!(api = format!("{scheme}://{api}"), %link, epoch = db.epoch().0, data_dir = %dir.display(), "ready");
        Ok(Self { api, link, stop, tracker, store, hub, tasks, api_handle, failures, _lock: lock })
    }

    /// Where users are served.
    #[must_use]
    pub fn api_address(&self) -> SocketAddr {
        self.api
    }

    /// Where agents are served.
    #[must_use]
    pub fn link_address(&self) -> SocketAddr {
        self.link
    }

    /// Has it look at its schedules: a clock that was told another time says nothing by itself.
    pub fn look_at_schedules(&self) {
        self.tasks.look_at_schedules();
    }

    /// Stops serving and closes the store. Tasks rest where they are; the next start goes on with them.
    pub async fn stop(self) {
        self.api_handle.graceful_shutdown(Some(FAREWELL));
        self.stop.cancel();
        self.hub.close();
        self.tracker.close();
        if tokio::time::timeout(FAREWELL * 2, self.tracker.wait()).await.is_err() {
            tracing::warn!("something did not end in time; the store is closed all the same");
        }
        let store = self.store;
        // Joining a thread blocks.
        let _ = tokio::task::spawn_blocking(move || store.close()).await;
    }
}

pub(crate) fn lock(dir: &Path) -> Result<File, ServeError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        |source| ServeError::Data { path, source }
    };
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed(dir))?;
    let path = dir.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed(&path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ServeError::Locked { path: dir.to_owned() }),
        Err(error) => Err(failed(&path)(error.into())),
    }
}

/// The default team, and the administrator's token, which exists as a file before the store knows it: a crash in between makes a new one.
async fn first_start(db: &Db, dir: &Path) -> Result<(), ServeError> {
    let team = Name::new(DEFAULT_TEAM).expect("a plain word is a name");
    if db.find::<TeamRow>(team.as_str()).await?.is_some() {
        return Ok(());
    }
    let (token, text) = new_token(team.clone(), Role::Admin, "made at the first start".into());
    let path = dir.join(ADMIN_TOKEN);
    write_durably(&path, text.as_bytes(), 0o600).map_err(|source| ServeError::Data { path: path.clone(), source })?;
    db.commit(Batch::default().create(&TeamRow { name: team, created: clock::now(), share_memory: false }).create(&token)).await?;
    tracing::info!(path = %path.display(), "the administrator's token was made");
    Ok(())
}

async fn open_images(db: &Db, options: &ServeOptions) -> Result<Images, ServeError> {
    let mut known: HashSet<String> = db.all::<ImageRow>().await?.iter().map(|image| image.row.id.to_string()).collect();
    // What an import works on is needed until it has ended.
    known.extend(db.all::<TaskRow>().await?.iter().filter(|task| !task.row.state.ended()).filter_map(
        |task| match &task.row.work {
            Work::Import { image, .. } => Some(source_of(*image)),
            _ => None,
        },
    ));
    let path = options.data_dir.join("images");
    let ways = (options.converter.clone(), options.fetch.clone());
    Images::open_dir(&path, options.image_limit, ways, |name| known.contains(name))
        .map_err(|source| ServeError::Data { path, source })
}

/// What the store says of connections is of the epoch before.
async fn nobody_is_connected(db: &Db) -> Result<(), Fault> {
    for mut host in db.all::<HostRow>().await? {
        if host.row.connected {
            host.row.connected = false;
            host.row.since = clock::now();
            match db.commit(Batch::default().update(&host)).await {
                Err(fault) if fault.is_full() => {
                    tracing::warn!(host = %host.row.name, "no space to store that it is not connected")
                }
                result => result?,
            }
        }
    }
    Ok(())
}

fn serve_api(
    listener: TcpListener,
    authority: &Arc<Authority>,
    clear: bool,
    app: Arc<App>,
    handle: axum_server::Handle<SocketAddr>,
    tracker: &TaskTracker,
    failed: tokio::sync::mpsc::Sender<ServeError>,
) -> Result<(), ServeError> {
    let ended = |source: io::Error| ServeError::Server { what: "api", source: Box::new(source) };
    let service = router(app).into_make_service();
    if clear {
        let server = axum_server::from_tcp(listener).map_err(ended)?.handle(handle);
        tracker.spawn(async move {
            if let Err(source) = server.serve(service).await {
                let _ = failed.send(ended(source)).await;
            }
        });
    } else {
        let tls = RustlsConfig::from_config(Arc::new(authority.api_tls()?));
        let server = axum_server::from_tcp_rustls(listener, tls).map_err(ended)?.handle(handle);
        tracker.spawn(async move {
            if let Err(source) = server.serve(service).await {
                let _ = failed.send(ended(source)).await;
            }
        });
    }
    Ok(())
}

/// An intermediate that ends takes every certificate with it; with the root's key away only people can sign a new one.
fn warn_of_end(authority: &Authority) {
    if let Some(ends) = authority.ends_soon(clock::now()) {
        let ends = clock::readable(ends);
        tracing::warn!(ends, "the intermediate ends soon: run `godwit cluster ca rotate-intermediate` with the root's key");
    }
}

/// What runs beside the requests.
fn follow(
    tracker: &TaskTracker,
    stop: &CancellationToken,
    fleet: Arc<Fleet>,
    authority: Arc<Authority>,
    tasks: Arc<Tasks>,
    db: Db,
    kept: u64,
) {
    let until = stop.clone();
    tracker.spawn(async move {
        tokio::select! {
            () = until.cancelled() => {}
            () = fleet.follow() => {}
        }
    });
    let until = stop.clone();
    tracker.spawn(async move {
        let mut period = tokio::time::interval(HOUSEKEEPING);
        let mut renewed = clock::now();
        loop {
            tokio::select! {
                () = until.cancelled() => return,
                _ = period.tick() => {}
            }
            for result in [tasks.prune().await, db.trim(kept).await] {
                if let Err(fault) = result {
                    tracing::warn!(error = &fault as &dyn std::error::Error, "old changes or tasks cannot be dropped");
                }
            }
            let now = clock::now();
            if u128::from(now.0.saturating_sub(renewed.0)) > CONTROLLER_LIFETIME.as_millis() / 2 {
                match authority.renew(now) {
                    Ok(()) => {
                        renewed = now;
                        warn_of_end(&authority);
                    }
                    Err(error) => {
                        tracing::error!(error = &error as &dyn std::error::Error, "the controller's certificate cannot be renewed")
                    }
                }
            }
        }
    });
}
