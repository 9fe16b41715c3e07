//! `godwit serve`: the controller.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use godwit_controller::{Converter, FetchRules, LogFormat, ServeOptions, WallClock, serve};
use godwit_model::{Bytes, Millis};
use ipnet::IpNet;

use crate::error::Failure;

/// How to serve.
#[derive(Args)]
#[command(
    after_help = "At its first start it makes the cluster's authority (ca.pem) and an administrator's token (admin.token) in the data \
directory. Its keys are sealed with a secret in a file outside of it; `godwit cluster ca` says more. Sockets handed over by systemd (LISTEN_FDS, named `api` and `link`) take the place of the addresses.

Example:
  godwit serve --data-dir /var/lib/godwit/controller --api-listen 0.0.0.0:7443 \\
      --advertise gw.example.org --advertise 192.0.2.10"
)]
pub(crate) struct ServeArgs {
    /// Directory for the store, the authority, images and the administrator's token
    #[arg(long, value_name = "DIR", default_value = "/var/lib/godwit/controller")]
    data_dir: PathBuf,
    #[command(flatten)]
    secret: SecretArgs,
    /// Where to listen for users
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:7443")]
    api_listen: SocketAddr,
    /// Where to listen for agents
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:7444")]
    link_listen: SocketAddr,
    /// A name or address under which users and hosts reach this controller; can be repeated
    #[arg(long, value_name = "NAME|ADDRESS")]
    advertise: Vec<String>,
    /// Serve the API in clear text; refused unless it listens on loopback
    #[arg(long)]
    insecure_loopback: bool,
    /// How log lines look
    #[arg(long, value_enum, default_value = "text", value_name = "text|json", hide_possible_values = true)]
    log: LogArg,
    /// Largest image that can be imported
    #[arg(long, value_name = "SIZE", default_value = "64GiB")]
    image_limit: Bytes,
    /// A network that images may be fetched from besides the public internet; can be repeated
    #[arg(long, value_name = "NETWORK")]
    image_url_allow: Vec<IpNet>,
    /// Certificates of authorities, PEM, that are trusted for fetching images besides the system's
    #[arg(long, value_name = "FILE")]
    image_url_ca: Option<PathBuf>,
    /// How often agents say that they are there
    #[arg(long, value_name = "TIME", default_value = "2s", hide = true)]
    heartbeat: Millis,
    /// How long a host's certificate is good for; its agent renews it when a little more than half of it is over
    #[arg(long, value_name = "TIME", default_value = "720h", hide = true)]
    host_lifetime: Millis,
    /// How many changes are kept for those who watch events
    #[arg(long, value_name = "COUNT", default_value_t = 100_000, hide = true)]
    log_kept: u64,
    /// The store is a copy from a backup: ask every host first what it runs. Once, not in a unit file
    #[arg(long)]
    restored: bool,
    /// Largest size of the store, in pages of 4 KiB
    #[arg(long, value_name = "PAGES", hide = true)]
    store_pages: Option<u32>,
}

/// Where the secret is that the authority's keys are sealed with.
#[derive(Args)]
pub(crate) struct SecretArgs {
    /// File of the secret that the authority's keys are sealed with; made if missing [default: systemd's credential
    /// godwit-authority, else beside DIR as DIR.key]
    #[arg(long, value_name = "FILE")]
    authority_secret: Option<PathBuf>,
}

impl SecretArgs {
    /// The file that is named, or handed over by systemd.
    pub(crate) fn file(&self) -> Option<PathBuf> {
        let credential = || {
            let file = PathBuf::from(std::env::var_os("CREDENTIALS_DIRECTORY")?).join("godwit-authority");
            file.is_file().then_some(file)
        };
        self.authority_secret.clone().or_else(credential)
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum LogArg {
    Text,
    Json,
}

pub(crate) fn run(args: ServeArgs) -> Result<(), Failure> {
    let read = |path: PathBuf| match std::fs::read_to_string(&path) {
        Ok(text) => Ok(text),
        Err(source) => Err(Failure::File { action: "read", path, source }),
    };
    let fetch = FetchRules { allowed: args.image_url_allow, authorities: args.image_url_ca.map(read).transpose()? };
    let options = ServeOptions {
        data_dir: args.data_dir,
        authority_secret: args.secret.file(),
        api_listen: args.api_listen,
        link_listen: args.link_listen,
        advertise: args.advertise,
        insecure_loopback: args.insecure_loopback,
        log: match args.log {
            LogArg::Text => LogFormat::Text,
            LogArg::Json => LogFormat::Json,
        },
        image_limit: args.image_limit,
        converter: Converter::default(),
        fetch,
        heartbeat: std::time::Duration::from_millis(args.heartbeat.get()),
        host_lifetime: std::time::Duration::from_millis(args.host_lifetime.get()),
        log_kept: args.log_kept,
        restored: args.restored,
        store_pages: args.store_pages,
        clock: WallClock::default(),
    };
    super::run_to_end(async { serve(options).await.map_err(Failure::daemon) })
}
