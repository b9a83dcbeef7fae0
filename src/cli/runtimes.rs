//! `--runtime`: which programs may run, dump and restore containers on this host.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::usage;
use crate::container::{Hook, OciKind, Podman, Runc, Runtime};
use crate::error::{Outcome, chain};
use crate::migration::driver::Runtimes;

/// Each is `NAME[=PATH][,root=DIR]`. What cannot work is refused before anything is served.
pub(super) async fn runtimes(options: &[String]) -> Outcome<Runtimes> {
    let mut runtimes: BTreeMap<String, Arc<dyn Runtime>> = BTreeMap::new();
    for text in options {
        let bad = |why: String| usage(format!("--runtime {text}: {why}"));
        let (program, root) = match text.split_once(",root=") {
            Some((program, root)) => (program, Some(PathBuf::from(root))),
            None => (text.as_str(), None),
        };
        if root.as_ref().is_some_and(|root| !root.is_absolute()) {
            return Err(bad("the root must be an absolute path".into()));
        }
        let (name, path) = match program.split_once('=') {
            Some((name, path)) => (name, Some(PathBuf::from(path))),
            None => (program, None),
        };
        let runtime: Arc<dyn Runtime> = match name {
            "runc" => Arc::new(Runc { binary: path.unwrap_or_else(|| name.into()), root, ..Runc::default() }),
            "crun" => {
                let binary = path.unwrap_or_else(|| name.into());
                let crun = Runc { kind: OciKind::Crun, binary, root, criu: None };
                // It will not learn it later, as a host may still get its runc.
                crun.check_build().await.map_err(|error| bad(chain(&error)))?;
                Arc::new(crun)
            }
            "podman" => {
                if root.is_some() {
                    return Err(bad(
                        "podman's places are in its storage.conf; or name a script that gives it --root".into()
                    ));
                }
                Arc::new(Podman::new(path.unwrap_or_else(|| name.into())))
            }
            "hook" => {
                let file =
                    path.ok_or_else(|| bad("name the file of its commands: hook=/etc/lazy-migrate/hooks.toml".into()))?;
                Arc::new(Hook::read(&file, root).map_err(|error| bad(chain(&error)))?)
            }
            other => return Err(bad(format!("no runtime '{other}' is known; there are runc, crun, podman and hook"))),
        };
        if runtimes.insert(name.into(), runtime).is_some() {
            return Err(bad(format!("{name} was given before; a host has one of each")));
        }
    }
    Ok(Runtimes::new(runtimes))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn said(options: &[&str]) -> String {
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        runtimes(&options).await.map_or_else(|failure| failure.to_string(), |_| String::new())
    }

    #[tokio::test]
    async fn what_cannot_work_is_refused_with_a_reason() {
        assert_eq!(said(&["runc"]).await, "");
        assert_eq!(said(&["runc=/usr/sbin/runc,root=/run/r", "podman=/usr/bin/podman"]).await, "");
        for (options, word) in [
            (&["runc,root=r"][..], "the root must be an absolute path"),
            (&["docker"], "there are runc, crun, podman and hook"),
            (&["crun=/bin/echo"], "was built without criu"),
            (&["crun=/nonexistent/crun"], "install package crun"),
            (&["podman,root=/var/lib/p"], "storage.conf"),
            (&["runc", "runc=/usr/sbin/runc"], "was given before"),
            (&["hook"], "name the file"),
            (&["hook=/nonexistent.toml"], "hooks file /nonexistent.toml: it cannot be read"),
        ] {
            let text = said(options).await;
            assert!(text.contains(word) && text.contains("--runtime"), "{text:?} says nothing of {word:?}");
        }
    }
}
