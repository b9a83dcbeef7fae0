//! `tls init`: a certificate authority, and the certificates of a host.
//!
//! The files have the names that QEMU, nbdkit and libnbd share. A directory is made whole or not at all, and one that
//! holds any of the files is left as it is: a key that is overwritten locks hosts out.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use serde_json::json;
use time::{Duration, OffsetDateTime};

use super::answers::Answer;
use super::usage;
use crate::error::{Failure, Outcome};

/// How long a CA that is made here is good for, in days: ten years.
const CA_DAYS: i64 = 3650;
/// How long certificates are, in days: the longest that public authorities ever gave, two years and a quarter.
const DAYS: i64 = 825;
/// Clocks of hosts differ: certificates are good from a day ago.
const BACKDATED: Duration = Duration::DAY;
/// The longest common name (RFC 5280, ub-common-name).
const MAX_COMMON_NAME: usize = 64;

const FILES: [&str; 6] =
    ["ca-cert.pem", "ca-key.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem"];

#[derive(Debug, clap::Subcommand)]
pub(super) enum TlsCommand {
    /// Make certificates for a host: for its node as a server and as a client, by a new CA or an existing one.
    Init {
        /// The directory to make; `serve --tls DIR` uses it, and so do QEMU, nbdkit and libnbd.
        directory: PathBuf,
        /// The host's name or address, as others dial it. May be given several times.
        #[arg(long, value_name = "NAME", required = true)]
        host: Vec<String>,
        /// Use the CA of this directory (ca-cert.pem and ca-key.pem) instead of a new one.
        #[arg(long, value_name = "DIR")]
        ca: Option<PathBuf>,
    },
}

pub(super) fn run(command: TlsCommand, answer: &Answer) -> Outcome<()> {
    let TlsCommand::Init { directory, host, ca } = command;
    let names = host.iter().map(|name| checked(name)).collect::<Outcome<Vec<_>>>()?;
    if let Some(found) = FILES.iter().map(|name| directory.join(name)).find(|path| path.symlink_metadata().is_ok()) {
        return Err(Failure::refused(format!(
            "{} is there already, and certificates are not overwritten: choose another directory, or remove it",
            found.display()
        )));
    }
    let files = make(&names, ca.as_deref())?;
    write(&directory, &files)
        .map_err(|error| Failure::failed(format!("cannot write certificates to {}: {error}", directory.display())))?;
    let told = json!({
        "directory": directory,
        "hosts": names,
        "files": files.iter().map(|(name, _)| name).collect::<Vec<_>>(),
        "days": DAYS,
    });
    answer.print(&told, || {
        let next = match &ca {
            None => format!(
                "; for the next host: `lazy-migrate tls init DIR --host NAME --ca {}`, and keep ca-key.pem where only you \
                 can read it",
                directory.display()
            ),
            Some(_) => String::new(),
        };
        format!("{}: certificates for {}, good for {DAYS} days{next}", directory.display(), names.join(" and "))
    })
}

/// A name that can stand in a certificate and be dialled.
fn checked(name: &str) -> Outcome<String> {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_".contains(letter))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let is_name = name.len() <= 253 && name.split('.').all(label);
    if name.parse::<std::net::IpAddr>().is_ok() || is_name {
        Ok(name.to_ascii_lowercase())
    } else {
        Err(usage(format!("--host {name}: it is neither a host name nor an address")))
    }
}

/// The files of the directory, by name.
fn make(names: &[String], ca: Option<&Path>) -> Outcome<Vec<(&'static str, String)>> {
    let failed = |error: rcgen::Error| Failure::failed(format!("cannot make the certificates: {error}"));
    let now = OffsetDateTime::from(SystemTime::now());
    let mut files = Vec::new();
    let issuer = match ca {
        Some(directory) => {
            let (certificate, issuer) = existing(directory)?;
            files.push(("ca-cert.pem", certificate));
            issuer
        }
        None => {
            let key = KeyPair::generate().map_err(failed)?;
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, "lazy-migrate CA");
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            (params.not_before, params.not_after) = (now - BACKDATED, now + Duration::days(CA_DAYS));
            files.push(("ca-cert.pem", params.self_signed(&key).map_err(failed)?.pem()));
            files.push(("ca-key.pem", key.serialize_pem()));
            Issuer::new(params, key)
        }
    };
    for (cert, key, purpose) in [
        ("server-cert.pem", "server-key.pem", ExtendedKeyUsagePurpose::ServerAuth),
        ("client-cert.pem", "client-key.pem", ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let pair = KeyPair::generate().map_err(failed)?;
        let mut params = CertificateParams::new(names.to_vec()).map_err(failed)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        if let Some(name) = names.iter().find(|name| name.len() <= MAX_COMMON_NAME) {
            params.distinguished_name.push(DnType::CommonName, name.as_str());
        }
        // No key usage: QEMU takes a certificate that names some only if keyEncipherment is among them, which must not be
        // there for a key of an elliptic curve (RFC 8813, section 3).
        params.extended_key_usages = vec![purpose];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (now - BACKDATED, now + Duration::days(DAYS));
        files.push((cert, params.signed_by(&pair, &issuer).map_err(failed)?.pem()));
        files.push((key, pair.serialize_pem()));
    }
    Ok(files)
}

/// The CA of a directory: its certificate, and what signs with its key.
fn existing(directory: &Path) -> Outcome<(String, Issuer<'static, KeyPair>)> {
    let read = |name: &str| {
        let path = directory.join(name);
        fs::read_to_string(&path).map_err(|error| {
            Failure::failed(format!(
                "cannot read {}: {error}; name the directory where `tls init` made the CA, with its key",
                path.display()
            ))
        })
    };
    let (certificate, key) = (read("ca-cert.pem")?, read("ca-key.pem")?);
    let wrong =
        |error: rcgen::Error| Failure::failed(format!("the CA in {} cannot be used: {error}", directory.display()));
    let key = KeyPair::from_pem(&key).map_err(wrong)?;
    let issuer = Issuer::from_ca_cert_pem(&certificate, key).map_err(wrong)?;
    Ok((certificate, issuer))
}

/// All of them or none: through a directory beside it.
fn write(directory: &Path, files: &[(&str, String)]) -> io::Result<()> {
    let directory = std::path::absolute(directory)?;
    if let Some(parent) = directory.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut beside = directory.clone().into_os_string();
    beside.push(format!(".{}.new", std::process::id()));
    let beside = PathBuf::from(beside);
    fs::DirBuilder::new().mode(0o700).create(&beside)?;
    let written = (|| {
        for (name, content) in files {
            let mode = if name.ends_with("-key.pem") { 0o600 } else { 0o644 };
            let mut file = File::options().write(true).create_new(true).mode(mode).open(beside.join(name))?;
            file.write_all(content.as_bytes())?;
            file.sync_all()?;
        }
        File::open(&beside)?.sync_all()?;
        // An empty directory is replaced; one with something in it is refused by the system.
        fs::rename(&beside, &directory)?;
        crate::files::sync_parent(&directory)
    })();
    if written.is_err() {
        let _ = fs::remove_dir_all(&beside);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use nbd::tls::{TlsClient, TlsServer};

    use super::*;

    fn init(directory: &Path, host: &str, ca: Option<&Path>) -> Outcome<()> {
        let command =
            TlsCommand::Init { directory: directory.into(), host: vec![host.into()], ca: ca.map(Path::to_owned) };
        run(command, &Answer { json: true })
    }

    #[test]
    fn a_directory_is_made_whole_and_never_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let a = root.path().join("new/a");
        init(&a, "a.example", None).unwrap();
        let before = fs::read(a.join("server-key.pem")).unwrap();
        let refused = init(&a, "a.example", None).unwrap_err();
        assert_eq!(refused.kind.exit_code(), 3, "{refused}");
        assert_eq!(fs::read(a.join("server-key.pem")).unwrap(), before);
        let mode = |name: &str| a.join(name).metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("ca-key.pem"), mode("client-key.pem"), mode("ca-cert.pem")), (0o600, 0o600, 0o644));
        assert_eq!(fs::read_dir(a.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");

        let full = root.path().join("full");
        fs::create_dir(&full).unwrap();
        fs::write(full.join("notes"), "x").unwrap();
        init(&full, "a", None).unwrap_err();
        assert_eq!(fs::read_dir(&full).unwrap().count(), 1);
        assert!(!root.path().join("x").exists());
    }

    #[test]
    fn the_second_host_has_the_same_ca_and_no_key_of_it() {
        let root = tempfile::tempdir().unwrap();
        let (a, b) = (root.path().join("a"), root.path().join("b"));
        init(&a, "a.example", None).unwrap();
        init(&b, "10.0.0.2", Some(&a)).unwrap();
        assert_eq!(fs::read(a.join("ca-cert.pem")).unwrap(), fs::read(b.join("ca-cert.pem")).unwrap());
        assert!(!b.join("ca-key.pem").exists());
        for directory in [&a, &b] {
            TlsServer::load(directory).unwrap();
            TlsClient::load(directory).unwrap();
        }
        let refused = init(&root.path().join("c"), "c", Some(&b)).unwrap_err();
        assert!(refused.message.contains("ca-key.pem"), "{refused}");
    }

    #[test]
    fn what_nobody_can_dial_is_in_no_certificate() {
        for host in ["", "a b", "a/b", "-a", "a..b", "*.example", "a:1", &"x".repeat(64)] {
            let failure = checked(host).unwrap_err();
            assert_eq!(failure.kind.exit_code(), 2, "{host:?}: {failure}");
        }
        assert_eq!(checked("Host_1.Example").unwrap(), "host_1.example");
        assert_eq!(checked("fe80::1").unwrap(), "fe80::1");
    }
}
