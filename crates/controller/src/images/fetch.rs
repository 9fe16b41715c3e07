//! Fetching an image from a URL: https only, to addresses that may be gone to ([`super::address`]), checked after each resolution and before
//! each redirect, within a size, and against a digest if one was given.

use std::net::SocketAddr;
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use futures::StreamExt;
use godwit_model::{Bytes, ErrorCode, Refusal, Retry};
use ipnet::IpNet;
use reqwest::header::LOCATION;
use reqwest::redirect::Policy;
use reqwest::{Certificate, Client, Response, Url};
use tokio::io::AsyncWriteExt;

use super::address::may_fetch_from;

const MAX_REDIRECTS: usize = 5;
const CONNECT: Duration = Duration::from_secs(15);
/// How long a server may say nothing.
const SILENCE: Duration = Duration::from_secs(60);
/// Addresses of one name that are looked at.
const MAX_ADDRESSES: usize = 32;

/// How images are fetched here.
#[derive(Clone, Debug, Default)]
pub struct FetchRules {
    /// Networks that may be gone to besides the public internet.
    pub allowed: Vec<IpNet>,
    /// Certificates of authorities that are trusted besides the system's, PEM.
    pub authorities: Option<String>,
}

fn failed(message: String) -> Refusal {
    Refusal::new(ErrorCode::FetchFailed, message)
        .hint("check the URL from the controller's host, then import again")
        .retry(Retry::Safe)
}

/// Reads a URL that may be fetched.
///
/// # Errors
/// `bad_request` for anything but https with a host and without credentials.
pub(crate) fn check_url(text: &str) -> Result<Url, Refusal> {
    let refuse = |why: &str| {
        Refusal::new(ErrorCode::BadRequest, format!("the URL {why}"))
            .hint("give the https:// address of one file, without user name and password")
    };
    let url = Url::parse(text).map_err(|error| refuse(&format!("cannot be read: {error}")))?;
    if url.scheme() != "https" {
        return Err(refuse("does not begin with https://"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(refuse("carries a user name or password, which would be kept and shown"));
    }
    if url.host().is_none() {
        return Err(refuse("names no host"));
    }
    Ok(url)
}

/// Where a name leads: every address must be one that may be gone to, so that nobody chooses between them later.
async fn resolve(url: &Url, rules: &FetchRules) -> Result<Vec<SocketAddr>, Refusal> {
    let host = url.host_str().unwrap_or_default();
    let plain = host.trim_start_matches('[').trim_end_matches(']');
    let found = tokio::net::lookup_host((plain, url.port_or_known_default().unwrap_or(443))).await;
    let addresses: Vec<SocketAddr> =
        found.map_err(|error| failed(format!("{host} cannot be resolved: {error}")))?.take(MAX_ADDRESSES).collect();
    if let Some(address) = addresses.iter().find(|address| !may_fetch_from(address.ip(), &rules.allowed)) {
        return Err(Refusal::new(
            ErrorCode::AddressForbidden,
            format!("{host} leads to {}, which is no address of the public internet", address.ip()),
        )
        .hint("import the file itself, or let the administrator start the controller with `--image-url-allow NETWORK`"));
    }
    if addresses.is_empty() { Err(failed(format!("{host} has no address"))) } else { Ok(addresses) }
}

async fn get(url: &Url, rules: &FetchRules) -> Result<Response, Refusal> {
    let addresses = resolve(url, rules).await?;
    // A client for this one request, which goes nowhere but to the addresses that were looked at.
    let mut builder = Client::builder()
        .https_only(true)
        .no_proxy()
        .redirect(Policy::none())
        .connect_timeout(CONNECT)
        .read_timeout(SILENCE)
        .resolve_to_addrs(url.host_str().unwrap_or_default(), &addresses);
    if let Some(authorities) = &rules.authorities {
        let certificates = Certificate::from_pem_bundle(authorities.as_bytes());
        builder = builder.tls_certs_merge(
            certificates.map_err(|error| failed(format!("the controller's authorities cannot be read: {error}")))?,
        );
    }
    let client = builder.build().map_err(|error| failed(format!("no client could be made: {error}")))?;
    client.get(url.clone()).send().await.map_err(|error| failed(format!("{} cannot be fetched: {}", shown(url), deepest(&error))))
}

/// A URL without what may be a secret in it.
pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}

fn deepest(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

/// Fetches `url` into `file`; `progress` hears what is there of how much.
///
/// # Errors
/// `address_forbidden`, `fetch_failed`, `body_too_large`, `image_invalid` for a digest that is not `digest`, `store_full`.
pub(super) async fn fetch(
    url: &Url,
    digest: Option<&[u8]>,
    limit: Bytes,
    rules: &FetchRules,
    mut file: tokio::fs::File,
    progress: impl Fn(Bytes, Option<Bytes>),
) -> Result<(), Refusal> {
    let mut url = url.clone();
    let mut redirects = 0;
    let response = loop {
        let response = get(&url, rules).await?;
        if !response.status().is_redirection() {
            break response;
        }
        redirects += 1;
        if redirects > MAX_REDIRECTS {
            return Err(failed(format!("more than {MAX_REDIRECTS} redirects")));
        }
        let next = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
        let next = next.and_then(|next| url.join(next).ok()).ok_or_else(|| failed("a redirect leads nowhere".into()))?;
        url = check_url(next.as_str())?;
    };
    if !response.status().is_success() {
        return Err(failed(format!("{} answered {}", shown(&url), response.status())));
    }
    let total = response.content_length().map(Bytes);
    let too_large = || {
        Refusal::new(ErrorCode::BodyTooLarge, format!("an image has at most {limit}, this has more"))
            .hint("import a smaller image, or raise the controller's limit for images")
    };
    if total.is_some_and(|total| total > limit) {
        return Err(too_large());
    }
    let (mut context, mut size) = (Context::new(&SHA256), 0_u64);
    let mut content = response.bytes_stream();
    while let Some(chunk) = content.next().await {
        let chunk = chunk.map_err(|error| failed(format!("{} broke off after {size} bytes: {}", shown(&url), deepest(&error))))?;
        size += chunk.len() as u64;
        if size > limit.get() {
            return Err(too_large());
        }
        context.update(&chunk);
        file.write_all(&chunk).await.map_err(|error| super::trouble(&error))?;
        progress(Bytes(size), total);
    }
    file.flush().await.map_err(|error| super::trouble(&error))?;
    file.sync_all().await.map_err(|error| super::trouble(&error))?;
    if digest.is_some_and(|digest| context.finish().as_ref() != digest) {
        return Err(Refusal::new(
            ErrorCode::ImageInvalid,
            format!("what {} gave does not have the SHA-256 that was asked for", shown(&url)),
        )
        .hint("check the digest and the URL with the publisher of the image; nothing was kept"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_plain_https_url_is_taken() {
        assert!(check_url("https://example.org/a.qcow2?x=1").is_ok());
        for bad in [
            "",
            "file:///etc/shadow",
            "http://example.org/a",
            "https://",
            "https://user:secret@example.org/a",
            "ftp://x/y",
            "/etc/passwd",
        ] {
            let refusal = check_url(bad).expect_err(bad);
            assert!(refusal.hint.is_some() && !refusal.message.contains("secret"), "{refusal:?}");
        }
        assert_eq!(shown(&check_url("https://example.org/a?token=secret#x").expect("url")), "https://example.org/a");
    }

    #[tokio::test]
    async fn a_name_or_number_that_leads_inside_is_refused_before_anything_is_sent() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let rules = FetchRules::default();
        for inside in [
            "https://127.0.0.1:1/x",
            "https://localhost:1/x",
            "https://[::1]:1/x",
            "https://2130706433:1/x",
            "https://0x7f.1/x",
            "https://[::ffff:127.0.0.1]/x",
        ] {
            let url = check_url(inside).expect(inside);
            assert_eq!(get(&url, &rules).await.expect_err(inside).code, ErrorCode::AddressForbidden, "{inside}");
        }
        let allowed = FetchRules { allowed: vec!["127.0.0.0/8".parse().expect("net")], authorities: None };
        let refused = get(&check_url("https://127.0.0.1:1/x").expect("url"), &allowed).await.expect_err("nobody listens");
        assert_eq!(refused.code, ErrorCode::FetchFailed);
    }
}
