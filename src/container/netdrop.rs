//! Drops all packets of a network namespace while its container is frozen.
//!
//! A frozen container's kernel still acknowledges TCP data, which is then in no checkpoint: the connection would be
//! dead for good after the restore. So nothing may go in or out from before the freeze until release or rollback on the
//! source, and until after the restore on the destination (where the client would get a reset instead).

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Error, Inspected, command::Call};

/// How long one call of `nft` may take.
const LIMIT: Duration = Duration::from_secs(20);

/// How long the sockets of killed tasks are waited for. With one try left they last about as long again as they have been
/// dead, and at most 100 s.
const DEAD_LIMIT: Duration = Duration::from_secs(60);

/// One table of rules in one network namespace. All operations may be repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetDrop {
    netns: PathBuf,
    table: String,
}

impl NetDrop {
    /// For the namespace at `netns` (`/run/netns/NAME`, `/proc/PID/ns/net`). `owner` tells tables of different moves
    /// apart: each removes only its own.
    pub fn new(netns: impl Into<PathBuf>, owner: &str) -> Self {
        // nft's names may not hold all that an owner's name may.
        Self { netns: netns.into(), table: format!("lazy_migrate_{:08x}", crc32fast::hash(owner.as_bytes())) }
    }

    /// For a container's own namespace; `None` when it shares the host's, where nothing can be dropped.
    pub fn for_container(container: &Inspected, owner: &str) -> Option<Self> {
        container.netns.as_ref().map(|netns| Self::new(netns, owner))
    }

    /// The namespace.
    pub fn netns(&self) -> &Path {
        &self.netns
    }

    /// Lets nothing in or out any more, apart from the namespace's own loopback. Takes effect at once and as a whole.
    pub async fn install(&self) -> Result<(), Error> {
        if same_namespace(&self.netns)? {
            return Err(Error::HostNetwork { netns: self.netns.clone() });
        }
        let table = &self.table;
        // What is forwarded through the namespace comes in by prerouting as well.
        let rules = format!(
            "add table inet {table}\ndelete table inet {table}\ntable inet {table} {{\n\
             chain incoming {{ type filter hook prerouting priority raw; policy drop; iifname \"lo\" accept; }}\n\
             chain outgoing {{ type filter hook output priority raw; policy drop; oifname \"lo\" accept; }}\n}}\n"
        );
        self.nft("drop the packets of", rules).await
    }

    /// Lets packets pass again. A namespace that is gone has no rules left.
    pub async fn remove(&self) -> Result<(), Error> {
        self.remove_with(None).await
    }

    /// The same, together with the table of another owner in the same namespace: in one step, since a container waits.
    pub async fn remove_with(&self, other: Option<&NetDrop>) -> Result<(), Error> {
        if !self.exists()? {
            return Ok(());
        }
        let tables = std::iter::once(self).chain(other).map(|drop| &drop.table);
        let rules = tables.map(|table| format!("add table inet {table}\ndelete table inet {table}\n"));
        self.nft("let packets pass in", rules.collect()).await
    }

    /// Ends all TCP connections in the namespace, unheard by their peers: for a container that has gone and whose
    /// connections live elsewhere. The sockets of killed tasks would try to say goodbye for minutes, and whoever lets
    /// packets pass meanwhile would end the connections there as well. The rules must be in force, and the tasks not be
    /// dead yet: the kernel ends no socket that nobody owns.
    pub async fn end_connections(&self) -> Result<(), Error> {
        if !self.is_installed().await? {
            return Ok(());
        }
        let call = inside(&self.netns, "end the connections of").args(["ss", "-K", "-t", "state", "connected"]);
        call.run_ok().await.map(drop)
    }

    /// Waits until the sockets of killed tasks have given up: their connections cannot be restored before. The rules must
    /// be in force, so that nobody hears their goodbye. A connection that is left after the limit is criu's to report.
    pub async fn outlast_the_dead(&self) -> Result<(), Error> {
        let call = inside_for(&self.netns, "wait for the sockets of killed tasks in", DEAD_LIMIT + LIMIT);
        call.args(["sh", "-c", OUTLAST])
            .also_environment("SECONDS_AT_MOST", DEAD_LIMIT.as_secs().to_string())
            .run_ok()
            .await
            .map(drop)
    }

    /// Whether the rules are in force.
    pub async fn is_installed(&self) -> Result<bool, Error> {
        if !self.exists()? {
            return Ok(false);
        }
        let tables =
            inside(&self.netns, "look at the rules of").args(["nft", "list", "tables", "inet"]).run_ok().await?;
        Ok(tables.lines().any(|line| line.trim() == format!("table inet {}", self.table)))
    }

    fn exists(&self) -> Result<bool, Error> {
        self.netns.try_exists().map_err(Error::io("look at", &self.netns))
    }

    async fn nft(&self, what: &str, rules: String) -> Result<(), Error> {
        let call = inside(&self.netns, what).args(["nft", "-f", "-"]).input(rules.into_bytes());
        match call.run_ok().await {
            // nsenter was found, but not what it was to run.
            Err(Error::Failed { detail, .. }) if detail.contains("failed to execute nft") => {
                Err(Error::Missing { program: "nft".to_owned(), package: "nftables" })
            }
            other => other.map(drop),
        }
    }
}

/// Removes the rules by which criu holds a network during a dump or a restore, in case it was killed meanwhile: they
/// would cut the container off for good, and later dumps do not remove them either. One look says that there are none,
/// which is nearly always: rules of both kinds of iptables, the one over nftables and the old one.
const LIFT: &str = "if command -v nft >/dev/null && ! nft list chains | grep -qw CRIU \
        && ! grep -qs . /proc/self/net/ip_tables_names /proc/self/net/ip6_tables_names; then exit 0; fi; \
    for t in iptables ip6tables; do \
    command -v $t >/dev/null || continue; \
    $t -w 5 -n -L CRIU >/dev/null 2>&1 || continue; \
    for c in INPUT OUTPUT; do while $t -w 5 -D $c -j CRIU 2>/dev/null; do :; done; done; \
    $t -w 5 -F CRIU && $t -w 5 -X CRIU || exit 1; \
    done";

/// Sockets that nobody owns and that still wait for an answer to their goodbye have one more try, in place of eight.
const OUTLAST: &str = "left() { ss -Htne state fin-wait-1 state closing state last-ack | grep -q 'ino:0 '; }; \
    left || exit 0; tries=/proc/sys/net/ipv4/tcp_orphan_retries; before=$(cat $tries); \
    trap 'echo $before >$tries' EXIT; echo 1 >$tries; \
    n=0; while left && [ $n -lt $((SECONDS_AT_MOST * 10)) ]; do sleep 0.1; n=$((n + 1)); done";

/// Makes sure that no lock of criu's is in force in a network namespace. No criu may be at work there.
pub(crate) async fn lift_criu_lock(netns: &Path) -> Result<(), Error> {
    if !netns.try_exists().map_err(Error::io("look at", netns))? || same_namespace(netns)? {
        return Ok(());
    }
    let call = inside(netns, "remove the rules that a killed criu left in");
    call.args(["sh", "-c", LIFT]).run_ok().await.map(drop)
}

/// A program that is run in a network namespace, and nowhere else: all its other namespaces stay ours.
fn inside(netns: &Path, what: &str) -> Call {
    inside_for(netns, what, LIMIT)
}

fn inside_for(netns: &Path, what: &str, limit: Duration) -> Call {
    let mut net = std::ffi::OsString::from("--net=");
    net.push(netns);
    let what = format!("{what} the network namespace {}", netns.display());
    Call::new(Path::new("nsenter"), "util-linux", what, limit).arg(net)
}

/// Whether the namespace is the one that this process is in.
fn same_namespace(netns: &Path) -> Result<bool, Error> {
    let identity = |path: &Path| {
        std::fs::metadata(path).map(|m| (m.dev(), m.ino())).map_err(Error::io("look at the network namespace", path))
    };
    Ok(identity(netns)? == identity(Path::new("/proc/self/ns/net"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_different_owners_differ_and_any_name_is_safe() {
        let (a, b) = (NetDrop::new("/run/netns/x", "web"), NetDrop::new("/run/netns/x", "web; flush ruleset"));
        assert_ne!(a.table, b.table);
        assert!(b.table.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "{}", b.table);
    }

    #[tokio::test]
    async fn the_hosts_own_network_is_never_cut() {
        let error = NetDrop::new("/proc/self/ns/net", "web").install().await.unwrap_err();
        assert!(matches!(error, Error::HostNetwork { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_namespace_that_is_gone_has_no_rules() {
        let gone = NetDrop::new("/nonexistent/netns", "web");
        gone.remove().await.unwrap();
        assert!(!gone.is_installed().await.unwrap());
        assert!(gone.install().await.is_err());
    }
}
