//! The handle on a lab.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use crate::bootstrap::ApiBootstrap;
use crate::down::{self, Removed};
use crate::layout::{self, OUTSIDE};
use crate::network::SWITCH;
use crate::record::{self, CONTROLLER, Record};
use crate::spec::check_name;
use crate::{ApiAccess, Bootstrap, Daemon, LabError, LabSpec, LabStatus, LinkChange, LinkStatus, link, status, up};

/// A lab that was built. Dropping the handle changes nothing; daemons outlive the process that started them.
///
/// All calls block; from an async task use `spawn_blocking`.
#[derive(Debug, Clone)]
pub struct Lab {
    name: String,
}

impl Lab {
    /// Builds a lab: namespaces and links, then the controller, then each host joins and its agent starts.
    ///
    /// What was made is taken down again if a step fails.
    ///
    /// # Errors
    /// The step that failed, with the end of the log concerned.
    pub fn up(spec: LabSpec) -> Result<Self, LabError> {
        let failed = |source| LabError::Bootstrap { tail: String::new(), source };
        Self::up_with(spec, &mut ApiBootstrap::new().map_err(failed)?)
    }

    /// As [`Lab::up`], with another way to speak with the controller.
    ///
    /// # Errors
    /// As [`Lab::up`].
    pub fn up_with(spec: LabSpec, controller: &mut dyn Bootstrap) -> Result<Self, LabError> {
        let name = spec.name.clone();
        up::build(spec, Some(controller))?;
        Ok(Self { name })
    }

    /// Builds only the namespaces and links; no daemon is started.
    ///
    /// # Errors
    /// The step that failed.
    pub fn up_network(spec: LabSpec) -> Result<Self, LabError> {
        let name = spec.name.clone();
        up::build(spec, None)?;
        Ok(Self { name })
    }

    /// A handle on a lab that was built before, by this or another process.
    ///
    /// # Errors
    /// [`LabError::Unknown`] when there is none of that name.
    pub fn open(name: &str) -> Result<Self, LabError> {
        check_name(name)?;
        let lab = Self { name: name.to_owned() };
        lab.record()?;
        Ok(lab)
    }

    /// The names of all labs on this machine.
    #[must_use]
    pub fn list() -> Vec<String> {
        record::names()
    }

    /// Removes everything of the lab called `name`: also what is left of a half built or half removed one.
    ///
    /// # Errors
    /// What could not be removed. Doing it again is always right.
    pub fn remove(name: &str) -> Result<Removed, LabError> {
        check_name(name)?;
        down::remove(name)
    }

    /// Removes everything of this lab.
    ///
    /// # Errors
    /// As [`Lab::remove`].
    pub fn down(self) -> Result<Removed, LabError> {
        down::remove(&self.name)
    }

    /// What the lab is like now.
    ///
    /// # Errors
    /// When the record cannot be read.
    pub fn status(&self) -> Result<LabStatus, LabError> {
        Ok(status::of(&self.record()?))
    }

    /// Changes the link of a host, or of `out`, the outside client.
    ///
    /// # Errors
    /// [`LabError::UnknownHost`], or the command that failed.
    pub fn set_link(&self, place: &str, change: LinkChange) -> Result<LinkStatus, LabError> {
        let _lock = record::lock(&self.name)?;
        let mut record = self.record()?;
        link::change(&mut record, place, change)?;
        Ok(record.links.get(place).map_or(LinkStatus::with_rate(record.spec.link_rate), |link| link.status))
    }

    /// Gives a host, or `out`, the link that it had when the lab was built.
    ///
    /// # Errors
    /// As [`Lab::set_link`].
    pub fn restore_link(&self, place: &str) -> Result<LinkStatus, LabError> {
        let initial = up::initial_link(&self.record()?.spec, place);
        let change = LinkChange {
            rate: Some(initial.rate),
            delay: Some(std::time::Duration::from_micros(initial.delay_us)),
            loss: Some(initial.loss),
            state: Some(initial.state),
        };
        self.set_link(place, change)
    }

    /// The lab's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The names of the hosts, in order.
    ///
    /// # Errors
    /// When the record cannot be read.
    pub fn hosts(&self) -> Result<Vec<String>, LabError> {
        Ok(self.record()?.spec.host_names().collect())
    }

    /// The controller's process.
    #[must_use]
    pub fn controller(&self) -> Daemon {
        Daemon::new(&self.name, CONTROLLER)
    }

    /// The process of a host's agent.
    ///
    /// # Errors
    /// [`LabError::UnknownHost`] when the lab has no such host.
    pub fn agent(&self, host: &str) -> Result<Daemon, LabError> {
        self.check_host(host)?;
        Ok(Daemon::new(&self.name, host))
    }

    /// Where the API is.
    ///
    /// # Errors
    /// When the record cannot be read.
    pub fn api(&self) -> Result<ApiAccess, LabError> {
        Ok(status::api(&self.record()?))
    }

    /// The directory of a host's pool `local`, which no other host sees.
    ///
    /// # Errors
    /// When the record cannot be read.
    pub fn local_pool(&self, host: &str) -> Result<PathBuf, LabError> {
        Ok(self.record()?.paths().host_pool(host))
    }

    /// The directory of the pool `shared`.
    ///
    /// # Errors
    /// When the record cannot be read.
    pub fn shared_pool(&self) -> Result<PathBuf, LabError> {
        Ok(crate::daemon::pool(&self.record()?))
    }

    /// The network namespace of a host.
    ///
    /// # Errors
    /// [`LabError::UnknownHost`] when the lab has no such host.
    pub fn namespace(&self, host: &str) -> Result<String, LabError> {
        self.check_host(host)?;
        Ok(layout::namespace(&self.name, host))
    }

    /// The network namespace of the outside client, which reaches guests on the default network.
    #[must_use]
    pub fn outside_namespace(&self) -> String {
        layout::namespace(&self.name, OUTSIDE)
    }

    /// The network namespace of the switch and the controller.
    #[must_use]
    pub fn switch_namespace(&self) -> String {
        layout::namespace(&self.name, SWITCH)
    }

    /// The underlay address of a host.
    ///
    /// # Errors
    /// [`LabError::UnknownHost`] when the lab has no such host.
    pub fn address(&self, host: &str) -> Result<Ipv4Addr, LabError> {
        self.check_host(host)?;
        Ok(layout::host_address(layout::host_number(host).unwrap_or_default()))
    }

    fn check_host(&self, host: &str) -> Result<(), LabError> {
        let unknown = || LabError::UnknownHost { lab: self.name.clone(), host: host.to_owned() };
        self.record()?.spec.has_host(host).then_some(()).ok_or_else(unknown)
    }

    fn record(&self) -> Result<Record, LabError> {
        Record::load(&self.name)?.ok_or_else(|| LabError::Unknown { name: self.name.clone() })
    }
}
