//! What a lab needs from its controller while it is built: is it ready, and a join token for each host.

mod client;

use std::error::Error;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub(crate) use self::client::ApiBootstrap;

/// Where the controller's API is and what it takes to use it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiAccess {
    /// `https://127.0.0.1:PORT`.
    pub url: String,
    /// The administrator's token, made by the controller at its first start.
    pub token_file: PathBuf,
    /// The certificate of the cluster's authority.
    pub ca_file: PathBuf,
}

/// The controller, as far as building a lab needs it. Every call is one attempt; the lab repeats and gives up.
pub trait Bootstrap {
    /// Whether the controller answers and its files are there. An error ends the building of the lab.
    ///
    /// # Errors
    /// What makes waiting pointless, such as a certificate that does not verify.
    fn is_ready(&mut self, api: &ApiAccess) -> Result<bool, BootstrapError>;

    /// A token with which the host called `host` may join once.
    ///
    /// # Errors
    /// Whatever kept the controller from making one.
    fn join_token(&mut self, api: &ApiAccess, host: &str) -> Result<String, BootstrapError>;

    /// Whether the controller has the host's agent on the line.
    ///
    /// # Errors
    /// What makes waiting pointless.
    fn is_connected(&mut self, api: &ApiAccess, host: &str) -> Result<bool, BootstrapError>;
}

/// Why the controller could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootstrapError {
    /// It did not become ready, or a host did not connect, in time.
    #[error("waited {seconds} s for {awaited}")]
    Patience {
        /// What was waited for.
        awaited: String,
        /// For how long.
        seconds: u64,
    },
    /// The client of its API failed.
    #[error("its API cannot be used")]
    Client(#[source] Box<dyn Error + Send + Sync>),
}
