//! The real controller, asked through its API.

use std::error::Error;
use std::fs;
use std::io;

use godwit_api::client::{Client, ClientError, Endpoint};
use godwit_api::v1::JoinTokenCreate;
use godwit_model::Name;
use tokio::runtime::Runtime;

use super::{ApiAccess, Bootstrap, BootstrapError};

impl ApiAccess {
    /// What a client of this controller needs; reads the token and the certificate.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn endpoint(&self) -> io::Result<Endpoint> {
        Ok(Endpoint {
            url: self.url.clone(),
            token: fs::read_to_string(&self.token_file)?.trim().to_owned(),
            authority: Some(fs::read_to_string(&self.ca_file)?),
        })
    }
}

/// Speaks with the controller on a runtime of its own.
pub(crate) struct ApiBootstrap {
    runtime: Runtime,
}

impl ApiBootstrap {
    pub(crate) fn new() -> Result<Self, BootstrapError> {
        // Somebody else may have installed a provider before; any will do.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(client_error)?;
        Ok(Self { runtime })
    }

    fn client(api: &ApiAccess) -> Result<Client, BootstrapError> {
        Client::new(api.endpoint().map_err(client_error)?).map_err(client_error)
    }
}

impl Bootstrap for ApiBootstrap {
    fn is_ready(&mut self, api: &ApiAccess) -> Result<bool, BootstrapError> {
        // The certificate is there before the token; both before it answers.
        if !(api.token_file.is_file() && api.ca_file.is_file()) {
            return Ok(false);
        }
        match self.runtime.block_on(Self::client(api)?.health()) {
            Ok(_) => Ok(true),
            Err(ClientError::Unreachable { .. }) => Ok(false),
            Err(error) => Err(client_error(error)),
        }
    }

    fn join_token(&mut self, api: &ApiAccess, host: &str) -> Result<String, BootstrapError> {
        let request = JoinTokenCreate { host: name(host)?, lifetime: None, rejoin: false };
        let created = self.runtime.block_on(Self::client(api)?.create_join_token(&request));
        created.map(|created| created.token).map_err(client_error)
    }

    fn is_connected(&mut self, api: &ApiAccess, host: &str) -> Result<bool, BootstrapError> {
        let host = self.runtime.block_on(Self::client(api)?.host(&name(host)?));
        host.map(|host| host.connected).map_err(client_error)
    }
}

fn name(host: &str) -> Result<Name, BootstrapError> {
    Name::new(host).map_err(client_error)
}

fn client_error(error: impl Error + Send + Sync + 'static) -> BootstrapError {
    BootstrapError::Client(Box::new(error))
}
