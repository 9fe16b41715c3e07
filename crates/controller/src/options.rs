//! How a controller is started.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use godwit_model::Bytes;

use crate::clock::WallClock;
use crate::images::{Converter, FetchRules};

/// How log lines look on standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What `godwit serve` is told.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Store, authority, images and the administrator's token. Made with mode 0700 if missing.
    pub data_dir: PathBuf,
    /// The file of the secret that the authority's keys are sealed with; made if missing. Beside the data directory by default.
    pub authority_secret: Option<PathBuf>,
    /// Where users are listened to, unless the socket named `api` was handed over.
    pub api_listen: SocketAddr,
    /// Where agents are listened to, unless the socket named `link` was handed over.
    pub link_listen: SocketAddr,
    /// DNS names and addresses under which users and hosts reach this controller; they go into its certificate.
    pub advertise: Vec<String>,
    /// Serve the API in clear text. Refused unless its address is a loopback one.
    pub insecure_loopback: bool,
    /// How log lines look.
    pub log: LogFormat,
    /// Largest image that can be imported.
    pub image_limit: Bytes,
    /// The program that converts images.
    pub converter: Converter,
    /// How images are fetched from URLs.
    pub fetch: FetchRules,
    /// How often agents say that they are there; a host that missed three is disconnected.
    pub heartbeat: Duration,
    /// How long a host's certificate is good for.
    pub host_lifetime: Duration,
    /// How many changes the log keeps for those who watch events.
    pub log_kept: u64,
    /// The store is a copy that was kept: every host is to say first what it runs, and nothing is gone on with.
    pub restored: bool,
    /// Largest size of the store, in pages of 4 KiB; none by default.
    pub store_pages: Option<u32>,
    /// What tells the time to schedules.
    pub clock: WallClock,
}

impl ServeOptions {
    /// The defaults, with everything kept in `data_dir`.
    #[must_use]
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            authority_secret: None,
            api_listen: SocketAddr::from(([127, 0, 0, 1], 7443)),
            link_listen: SocketAddr::from(([0, 0, 0, 0], 7444)),
            advertise: Vec::new(),
            insecure_loopback: false,
            log: LogFormat::Text,
            image_limit: Bytes(64 << 30),
            converter: Converter::default(),
            fetch: FetchRules::default(),
            heartbeat: Duration::from_secs(2),
            host_lifetime: crate::authority::HOST_LIFETIME,
            log_kept: 100_000,
            restored: false,
            store_pages: None,
            clock: WallClock::default(),
        }
    }
}
