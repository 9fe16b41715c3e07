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
            let in_time = row.row.expires > now;
            if let Some(used) = &row.row.used {
                // With a token for joining again the host has facts of before: then the key that was given must still be the one.
                let unanswered = known.is_some_and(|known| match row.row.rejoin {
                    false => known.row.facts.is_none(),
                    true => in_time && known.row.keys == [issued.key.clone()],
                });
                if *used == issued.key && unanswered {
                    return Ok(issued);
                }
                return Err(Refusal::new(ErrorCode::TokenUsed, "this join token has been used")
                    .hint(format!("make a new one: `godwit host token {host}`"))
                    .into());
            }
            if !in_time {
                let since = clock::readable(row.row.expires);
                return Err(Refusal::new(ErrorCode::TokenExpired, format!("this join token expired at {since}"))
                    .hint(format!("make a new one: `godwit host token {host}`"))
                    .into());
            }
            row.row.used = Some(issued.key.clone());
            let keys = vec![issued.key.clone()];
            match (known, row.row.rejoin) {
                (Some(mut known), true) => {
                    // Its old keys are refused from now on; what is known of its VMs stays.
                    known.row.keys = keys;
                    known.row.address.clone_from(&address);
                    self.db.commit(Batch::default().update(&row).update(&known)).await?;
                    return Ok(issued);
                }
                (Some(_), false) => {
                    return Err(Refusal::new(ErrorCode::NameTaken, format!("a host {host} has already joined"))
                        .hint(format!(
                            "if this is that host, with its state: `godwit host token {host} --rejoin`, then `godwit host join --rejoin`; \
                             else `godwit host remove {host}`, or join with another name"
                        ))
                        .into());
                }
                (None, true) => {
                    return Err(Refusal::new(ErrorCode::NotFound, format!("there is no host {host} that could join again"))
                        .hint(format!("make a token for joining: `godwit host token {host}`"))
                        .into());
                }
                (None, false) => {}
            }
            let (name, address) = (host.clone(), address.clone());
            let joined = HostRow {
                name,
                address,
                migration_address: None,
                migration_bandwidth: None,
                joined: now,
                keys,
                connected: false,
                since: now,
                facts: None,
            };
            self.db.commit(Batch::default().update(&row).create(&joined)).await?;
            Ok(issued)
        })?;
        // Whoever spoke for the host with an older key has spoken.
        self.hub.expel(&host);
        tracing::info!(%host, address, "joined");
        Ok(v1::JoinReply { certificate: issued.certificate, authority: self.authority.pem().to_owned() })
    }

    /// A new certificate for a host that holds a valid one, or one that ended within its grace: the handshake has proven that it has the key.
    pub(super) async fn renew_host(&self, peer: &Peer, request: &str) -> Result<v1::RenewReply, Fault> {
        self.known(peer).await?;
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
