//! The agents' side door: gRPC over mutual TLS. Who speaks is what the certificate says, and nothing else.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use godwit_link::status::status_of;
use godwit_link::{MAX_CHUNK, MAX_MESSAGE, convert, v1};
use godwit_model::{ErrorCode, ImageId, Name, Refusal, UnixMillis, VmRequest};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::{Request, Response, Status, Streaming};

use crate::authority::{Authority, GRACE, host_of, key_of, validity_of};
use crate::clock;
use crate::db::{Batch, Db, Fault, retry};
use crate::fleet::Fleet;
use crate::hub::{ConsoleStream, Hub};
use crate::images::Images;
use crate::reports::Reports;
use crate::rows::{HostRow, ImageRow, SnapshotRow, TaskRow, VmRow, Work};

mod attend;
mod join;
mod listen;

pub(crate) use listen::listen;

type Outbound<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A TLS connection of an agent.
pub(crate) type AgentStream = tokio_rustls::server::TlsStream<TcpStream>;

/// What serves agents.
#[derive(Clone)]
pub(crate) struct LinkServer {
    pub(crate) db: Db,
    pub(crate) hub: Arc<Hub>,
    pub(crate) authority: Arc<Authority>,
    pub(crate) reports: Arc<Reports>,
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) images: Arc<Images>,
    pub(crate) heartbeat: Duration,
    pub(crate) tracker: TaskTracker,
    pub(crate) stop: CancellationToken,
}

/// Who speaks, proven by a certificate of this cluster.
pub(crate) struct Peer {
    host: Name,
    key: String,
    /// When its certificate ends. One that has ended gets this far within its grace, and is good for Renew only.
    ends: UnixMillis,
}

fn certificate_refused(message: &str) -> Refusal {
    Refusal::new(ErrorCode::CertificateRefused, message)
        .hint("join the host anew: `godwit host token`, then `godwit host join`; with --rejoin on both if it is still listed")
}

fn certificate_expired(ends: UnixMillis) -> Refusal {
    let (ends, days) = (clock::readable(ends), GRACE.as_secs() / 86_400);
    Refusal::new(ErrorCode::CertificateExpired, format!("the host's certificate ended at {ends}")).hint(format!(
        "its agent renews it by itself for {days} days; later: `godwit host token NAME --rejoin`, then `godwit host join --rejoin`"
    ))
}

fn status(fault: Fault) -> Status {
    status_of(&fault.refusal())
}

fn peer_of<T>(request: &Request<T>) -> Result<Peer, Status> {
    let info = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>();
    let certificates = info.and_then(TlsConnectInfo::peer_certs);
    let leaf = certificates.as_ref().and_then(|certificates| certificates.first());
    let leaf = leaf.ok_or_else(|| status_of(&certificate_refused("the agent shows no certificate")))?;
    match (host_of(leaf), key_of(leaf), validity_of(leaf)) {
        (Some(host), Some(key), Some((_, ends))) => Ok(Peer { host, key, ends }),
        _ => Err(status_of(&certificate_refused("the certificate is not a host's"))),
    }
}

impl LinkServer {
    /// The host that speaks, if it is still one of the cluster, this is its key, and its certificate has not ended.
    async fn member(&self, peer: &Peer) -> Result<HostRow, Fault> {
        let row = self.known(peer).await?;
        if peer.ends < clock::now() {
            return Err(certificate_expired(peer.ends).into());
        }
        Ok(row)
    }

    /// The host that speaks, if it is still one of the cluster and this is its key.
    async fn known(&self, peer: &Peer) -> Result<HostRow, Fault> {
        let row = self.db.find::<HostRow>(peer.host.as_str()).await?;
        let row = row.filter(|row| row.row.keys.contains(&peer.key));
        let row = row.ok_or_else(|| {
            certificate_refused("the certificate belongs to a host that is no longer of this cluster, or joined again since")
        })?;
        Ok(row.row)
    }

    /// Whether `host` runs, or prepares to run, a VM that needs the image.
    async fn needs_image(&self, host: &Name, image: ImageId) -> Result<bool, Fault> {
        let vms = self.db.all::<VmRow>().await?;
        let needed = vms.iter().any(|vm| {
            // One that only stopped there needs nothing of it: its next start is a new grant, perhaps elsewhere.
            let begins = |request| matches!(request, VmRequest::Start | VmRequest::Rollback);
            let starting = vm.row.activity.is_some_and(|activity| begins(activity.request));
            let here = vm.row.host.as_ref() == Some(host) && (starting || vm.row.has_process());
            let concerned = here || vm.row.pending.as_ref().is_some_and(|p| p.destination == *host);
            concerned && vm.row.resolved.as_ref().is_some_and(|spec| spec.images().any(|needed| needed.id == image))
        });
        if needed {
            return Ok(true);
        }
        // A medium that a running VM is about to get is in its spec only.
        let changes = |vm: &VmRow| vm.activity.is_some_and(|activity| activity.request == VmRequest::Set);
        for vm in vms.iter().filter(|vm| vm.row.host.as_ref() == Some(host) && changes(&vm.row)) {
            for name in vm.row.spec.cdroms.iter().filter_map(|cdrom| cdrom.image.as_ref()) {
                let found = self.db.find::<ImageRow>(&format!("{}/{name}", vm.row.team)).await?;
                if found.is_some_and(|found| found.row.id == image) {
                    return Ok(true);
                }
            }
        }
        // What a snapshot's VM boots from goes along when it is exported.
        for task in self.db.all::<TaskRow>().await?.into_iter().filter(|task| !task.row.state.ended()) {
            if let Work::SnapshotExport { name, host: there, .. } = &task.row.work
                && there == host
            {
                let found = self.db.find::<SnapshotRow>(&format!("{}/{name}", task.row.team)).await?;
                if found.is_some_and(|found| found.row.resolved.images().any(|needed| needed.id == image)) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

#[tonic::async_trait]
impl v1::link_server::Link for LinkServer {
    type AttendStream = Outbound<v1::ControllerMessage>;
    type FetchImageStream = Outbound<v1::ImageChunk>;
    type ConsoleStream = Outbound<v1::ConsoleChunk>;

    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinReply>, Status> {
        self.accept(request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Result<Response<v1::RenewReply>, Status> {
        let peer = peer_of(&request)?;
        self.renew_host(&peer, &request.get_ref().signing_request).await.map(Response::new).map_err(status)
    }

    async fn clock(&self, _request: Request<v1::ClockRequest>) -> Result<Response<v1::ClockReply>, Status> {
        Ok(Response::new(v1::ClockReply { unix_ms: clock::now().0 }))
    }

    async fn attend(&self, request: Request<Streaming<v1::AgentMessage>>) -> Result<Response<Self::AttendStream>, Status> {
        let peer = peer_of(&request)?;
        let host = self.member(&peer).await.map_err(status)?;
        // The last key but the newest is of no more use once the newest is used.
        if host.keys.len() > 1 && host.keys.last() == Some(&peer.key) {
            let forgotten: Result<(), Fault> = retry!({
                let Some(mut row) = self.db.find::<HostRow>(peer.host.as_str()).await? else { return Ok(()) };
                row.row.keys.retain(|key| *key == peer.key);
                self.db.commit(Batch::default().update(&row)).await
            });
            forgotten.map_err(status)?;
        }
        let stream = self.begin_attendance(peer, request.into_inner());
        Ok(Response::new(Box::pin(stream)))
    }

    async fn fetch_image(&self, request: Request<v1::FetchImageRequest>) -> Result<Response<Self::FetchImageStream>, Status> {
        let peer = peer_of(&request)?;
        let host = self.member(&peer).await.map_err(status)?.name;
        let id: ImageId =
            request.get_ref().image.parse().map_err(|_| status_of(&Refusal::new(ErrorCode::BadRequest, "not an image id")))?;
        if !self.needs_image(&host, id).await.map_err(status)? {
            tracing::warn!(%host, image = %id, "not_granted: asked for an image that no VM of its needs");
            return Err(status_of(&Refusal::new(ErrorCode::NotGranted, "no VM granted to this host needs that image")));
        }
        let mut file = self.images.open(id).await.map_err(|refusal| status_of(&refusal))?;
        let expelled = self.hub.expelled(&host);
        let stream = async_stream::try_stream! {
            loop {
                if expelled.is_cancelled() {
                    Err(status_of(&certificate_refused("the host was removed from the cluster")))?;
                }
                let mut data = vec![0_u8; MAX_CHUNK];
                let count = file.read(&mut data).await.map_err(|error| Status::internal(format!("the image cannot be read: {error}")))?;
                if count == 0 {
                    break;
                }
                data.truncate(count);
                yield v1::ImageChunk { data };
            }
        };
        Ok(Response::new(Box::pin(stream)))
    }

    async fn console(&self, request: Request<Streaming<v1::ConsoleChunk>>) -> Result<Response<Self::ConsoleStream>, Status> {
        let peer = peer_of(&request)?;
        let host = self.member(&peer).await.map_err(status)?.name;
        let mut inbound = request.into_inner();
        let (to_guest, typed) = mpsc::channel(64);
        let (output, from_guest) = mpsc::channel(64);
        let hub = self.hub.clone();
        let expelled = self.hub.expelled(&host);
        // The answer's headers must not wait for the first chunk: an agent may wait for them before it sends it.
        self.tracker.spawn({
            let stop = self.stop.clone();
            async move {
                let refused = Status::not_found("no such console session is awaited of this host");
                let refuse = to_guest.clone();
                let Ok(Some(first)) = inbound.message().await else { return };
                if !hub.bring_console(&host, &first.session, ConsoleStream { from_guest, to_guest }) {
                    // The agent may be gone already.
                    let _ = refuse.send(Err(refused)).await;
                    return;
                }
                drop(refuse);
                let mut next = Some(first.data);
                while let Some(data) = next {
                    if !data.is_empty() && output.send(data.into()).await.is_err() {
                        return;
                    }
                    let message = tokio::select! {
                        message = inbound.message() => message,
                        () = output.closed() => return,
                        () = expelled.cancelled() => return,
                        () = stop.cancelled() => return,
                    };
                    next = message.ok().flatten().map(|chunk| chunk.data);
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(typed))))
    }
}

/// The service with the contract's limits.
pub(crate) fn service(server: LinkServer) -> v1::link_server::LinkServer<LinkServer> {
    v1::link_server::LinkServer::new(server).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE)
}

/// An address as peers can use it. Every agent reads every other's, so one that is none must not get into the fleet.
fn checked_address(address: &str) -> Result<String, Refusal> {
    let address = address.parse::<std::net::IpAddr>().map_err(|_| {
        Refusal::new(ErrorCode::BadRequest, "the host's address is not an IP address")
            .hint("join with `--address` and the IP address at which other hosts reach it")
    })?;
    Ok(address.to_string())
}

fn checked_host(name: &str) -> Result<Name, Refusal> {
    convert::name("host", name).map_err(|_| {
        Refusal::new(ErrorCode::NameInvalid, "the host's name breaks the rules for names")
            .hint("use a-z, 0-9, '-', '.', '_', at most 63")
    })
}
