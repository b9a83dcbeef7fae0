//! The certificates of a host: whether they can be used, and for how long.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use x509_parser::pem::Pem;

use super::finding::Finding;
use crate::error::chain;
use crate::peer::link::NodeTls;

const DAY: i64 = 86_400;
/// Certificates that end sooner are told of.
const SOON: i64 = 30 * DAY;
const CERTIFICATES: [&str; 3] = ["ca-cert.pem", "server-cert.pem", "client-cert.pem"];
const KEYS: [&str; 3] = ["ca-key.pem", "server-key.pem", "client-key.pem"];

/// From when and until when a certificate is good, in seconds since 1970; or why that cannot be told.
type Dates = Result<(i64, i64), String>;

/// What a directory of certificates holds.
pub(super) struct Facts {
    /// Where.
    pub(super) directory: PathBuf,
    /// What a node would say to it.
    pub(super) usable: Result<(), String>,
    /// Each certificate.
    pub(super) dates: Vec<(&'static str, Dates)>,
    /// Keys that others than their owner may read.
    pub(super) open_keys: Vec<&'static str>,
}

impl Facts {
    /// Reads them.
    pub(super) fn gather(directory: &Path) -> Self {
        let open = |key: &&str| {
            std::fs::metadata(directory.join(key)).is_ok_and(|found| found.permissions().mode() & 0o077 != 0)
        };
        Self {
            directory: directory.to_owned(),
            usable: NodeTls::load(directory).map(drop).map_err(|error| chain(&error)),
            dates: CERTIFICATES.iter().map(|&name| (name, dates(&directory.join(name)))).collect(),
            open_keys: KEYS.into_iter().filter(open).collect(),
        }
    }

    /// One for each certificate, and one for the directory. `now` is in seconds since 1970.
    pub(super) fn verdicts(&self, now: i64) -> Vec<Finding> {
        let mut found: Vec<_> = self.dates.iter().map(|(name, dates)| self.certificate(name, dates, now)).collect();
        found.push(self.whole());
        found
    }

    fn certificate(&self, name: &str, dates: &Dates, now: i64) -> Finding {
        const CHECK: &str = "certificate";
        const WHY: &str = "no other host can be talked to once it is not good, and a lease that cannot be renewed ends";
        let again =
            "make new ones (`lazy-migrate tls init NEWDIR --host NAME --ca DIR`), and restart the node with them";
        let path = self.directory.join(name);
        let path = path.display();
        match dates {
            Err(why) => Finding::fail(CHECK, format!("{path} cannot be read ({why})"), WHY, again),
            Ok((from, _)) if now < *from => Finding::fail(
                CHECK,
                format!("{path} is good only from {}", day(*from)),
                WHY,
                "look at this host's date; if it is right, make new certificates",
            ),
            Ok((_, until)) if now > *until => Finding::fail(CHECK, format!("{path} ended {}", day(*until)), WHY, again),
            Ok((_, until)) if until - now < SOON => {
                let left = (until - now) / DAY;
                Finding::warn(CHECK, format!("{path} ends in {left} days, {}", day(*until)), WHY, again)
            }
            Ok((_, until)) => Finding::ok(CHECK, format!("{path} is good until {}", day(*until))),
        }
    }

    fn whole(&self) -> Finding {
        const CHECK: &str = "tls";
        let directory = self.directory.display();
        match &self.usable {
            Err(why) => Finding::fail(
                CHECK,
                format!("{directory} cannot be used ({why})"),
                "a node does not start with it",
                "`lazy-migrate tls init` makes a directory that can be",
            ),
            Ok(()) if !self.open_keys.is_empty() => Finding::warn(
                CHECK,
                format!("others may read {} in {directory}", self.open_keys.join(", ")),
                "whoever has a key is this host to all others",
                format!("chmod 600 {directory}/*-key.pem"),
            ),
            Ok(()) => Finding::ok(CHECK, format!("{directory} can be used, its keys by their owner only")),
        }
    }
}

fn dates(path: &Path) -> Dates {
    let file = std::fs::read(path).map_err(|error| error.to_string())?;
    let pem = Pem::iter_from_buffer(&file).next().ok_or("there is no certificate in it")?;
    let pem = pem.map_err(|error| error.to_string())?;
    let certificate = pem.parse_x509().map_err(|error| error.to_string())?;
    let validity = certificate.validity();
    Ok((validity.not_before.timestamp(), validity.not_after.timestamp()))
}

fn day(seconds: i64) -> String {
    time::OffsetDateTime::from_unix_timestamp(seconds).map_or("some day".into(), |time| time.date().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::finding::Level;

    const NOW: i64 = 1_800_000_000;

    fn facts(dates: Dates, open_keys: Vec<&'static str>) -> Facts {
        Facts { directory: "/etc/x".into(), usable: Ok(()), dates: vec![("server-cert.pem", dates)], open_keys }
    }

    #[test]
    fn dates_are_judged_to_the_second() {
        let level = |from, until| facts(Ok((from, until)), vec![]).verdicts(NOW)[0].level;
        assert_eq!(level(NOW, NOW + SOON), Level::Ok);
        assert_eq!(level(NOW, NOW + SOON - 1), Level::Warn);
        assert_eq!(level(NOW - 2, NOW - 1), Level::Fail);
        assert_eq!(level(NOW + 1, NOW + SOON), Level::Fail);
    }

    #[test]
    fn what_is_told_names_the_file_and_the_day() {
        let found = &facts(Ok((0, 0)), vec![]).verdicts(NOW)[0];
        assert_eq!(found.found, "/etc/x/server-cert.pem ended 1970-01-01");
        assert!(found.advice.as_deref().unwrap().contains("tls init"));
    }

    #[test]
    fn files_that_are_missing_fail_and_open_keys_warn() {
        let empty = tempfile::tempdir().unwrap();
        assert!(Facts::gather(empty.path()).verdicts(NOW).iter().all(|found| found.level == Level::Fail));
        assert_eq!(facts(Ok((0, NOW)), vec!["server-key.pem"]).whole().level, Level::Warn);
        assert_eq!(facts(Ok((0, NOW)), vec![]).whole().level, Level::Ok);
    }
}
