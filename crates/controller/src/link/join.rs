//! How a host becomes one of the cluster, and how it keeps its certificate fresh.

use godwit_link::{JoinToken, v1};
use godwit_model::{ErrorCode, Refusal};

use super::{LinkServer, Peer, checked_address, checked_host};
use crate::clock;
use crate::db::{Batch, Fault, retry};
use crate::principals::matches;
use crate::rows::{HostRow, JoinRow};

fn invalid() -> Refusal {
    Refusal::new(ErrorCode::TokenInvalid, "this join token is unknown, or is for another host")
        .hint("make one for this host: `godwit host token NAME`, and join with that name")
}

impl LinkServer {
    /// Exchanges a join token for a certificate. A token is good for one key: a host whose answer got lost may ask again with the same key,
    /// as long as it has never attended.
    pub(super) async fn accept(&self, request: v1::JoinRequest) -> Result<v1::JoinReply, Fault> {
        let host = checked_host(&request.host)?;
        let address = checked_address(&request.address)?;
        let token: JoinToken = request.token.parse().map_err(|_| invalid())?;
        let now = clock::now();
        let issued = retry!({
            let mut row = self.db.find::<JoinRow>(&token.id.to_string()).await?.ok_or_else(invalid)?;
            if row.row.host != host || !matches(&token.secret, &row.row.hash) {
                return Err(invalid().into());
            }
            let issued = self.authority.sign_host(&host, &request.signing_request, now)?;
            let known = self.db.find::<HostRow>(host.as_str()).await?;
            if let Some(used) = &row.row.used {
                let unanswered = known.is_some_and(|known| known.row.facts.is_none());
                if *used == issued.key && unanswered {
                    return Ok(issued);
                }
                return Err(Refusal::new(ErrorCode::TokenUsed, "this join token has been used")
                    .hint(format!("make a new one: `godwit host token {host}`"))
                    .into());
            }
            if row.row.expires <= now {
                let since = clock::readable(row.row.expires);
                return Err(Refusal::new(ErrorCode::TokenExpired, format!("this join token expired at {since}"))
                    .hint(format!("make a new one: `godwit host token {host}`"))
                    .into());
            }
            if known.is_some() {
                return Err(Refusal::new(ErrorCode::NameTaken, format!("a host {host} has already joined"))
                    .hint(format!("remove it first (DELETE /v1/hosts/{host}), or join with another name"))
                    .into());
            }
            row.row.used = Some(issued.key.clone());
            let keys = vec![issued.key.clone()];
            let (name, address) = (host.clone(), address.clone());
            let joined =
                HostRow { name, address, migration_address: None, joined: now, keys, connected: false, since: now, facts: None };
            self.db.commit(Batch::default().update(&row).create(&joined)).await?;
            Ok(issued)
        })?;
        tracing::info!(%host, address, "joined");
        Ok(v1::JoinReply { certificate: issued.certificate, authority: self.authority.pem().to_owned() })
    }

    /// A new certificate for a host that holds a valid one.
    pub(super) async fn renew_host(&self, peer: &Peer, request: &str) -> Result<v1::RenewReply, Fault> {
        self.member(peer).await?;
        let issued = self.authority.sign_host(&peer.host, request, clock::now())?;
        retry!({
            let Some(mut row) = self.db.find::<HostRow>(peer.host.as_str()).await? else { return Err(invalid().into()) };
            // The key that asks stays good until the new one has been used: the answer may get lost.
            row.row.keys = vec![peer.key.clone()];
            if issued.key != peer.key {
                row.row.keys.push(issued.key.clone());
            }
            self.db.commit(Batch::default().update(&row)).await
        })?;
        tracing::info!(host = %peer.host, "certificate renewed");
        Ok(v1::RenewReply { certificate: issued.certificate })
    }
}
