//! Certificates for QEMU's own TLS, made for one row: an authority, and one key for both ends of both hosts.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use serde_json::json;

use super::qmp::Qmp;

/// The name that the destination shows.
pub(super) const NAME: &str = "destination";
/// QEMU's objects.
pub(super) const SERVER: &str = "tls-server";
pub(super) const CLIENT: &str = "tls-client";

/// Writes the files that QEMU looks for.
pub(super) fn make(dir: &Path) -> Result<()> {
    let authority_key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(rcgen::DnType::CommonName, "authority of a bench");
    let authority = params.self_signed(&authority_key)?;
    let issuer = Issuer::new(params, authority_key);

    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![NAME.to_owned()])?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.distinguished_name.push(rcgen::DnType::CommonName, NAME);
    let certificate = params.signed_by(&key, &issuer)?;

    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    for (name, content) in [
        ("ca-cert.pem", authority.pem()),
        ("server-cert.pem", certificate.pem()),
        ("server-key.pem", key.serialize_pem()),
        ("client-cert.pem", certificate.pem()),
        ("client-key.pem", key.serialize_pem()),
    ] {
        fs::write(dir.join(name), content).with_context(|| format!("write {name}"))?;
    }
    Ok(())
}

/// Gives a QEMU both ends: one that a guest has come to may be left again.
pub(super) fn give(qmp: &mut Qmp, dir: &Path) -> Result<()> {
    for (id, endpoint) in [(SERVER, "server"), (CLIENT, "client")] {
        let object = json!({ "qom-type": "tls-creds-x509", "id": id, "dir": dir, "endpoint": endpoint, "verify-peer": true });
        qmp.run("object-add", object)?;
    }
    Ok(())
}

/// Has the next migration use one end.
pub(super) fn choose(qmp: &mut Qmp, end: &str) -> Result<()> {
    let name = if end == CLIENT { NAME } else { "" };
    qmp.run("migrate-set-parameters", json!({ "tls-creds": end, "tls-hostname": name })).map(drop)
}
