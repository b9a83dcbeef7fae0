//! `serve`: this host's node, in the foreground, until it is told to stop.

use std::path::PathBuf;
use std::time::Duration;

use nbd::address::Address;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::supervisor::Supervisor;
use super::usage;
use crate::control::api::PullAsk;
use crate::control::client::ControlClient;
use crate::error::{Failure, Outcome, chain};
use crate::migration::driver::Runtimes;
use crate::migration::lease::Timings;
use crate::node::{ClientRight, DiskName, NodeConfig, Running, is_private};
use crate::peer::DEFAULT_PORT;
use crate::peer::link::NodeTls;
use crate::pull::Order;
use crate::web::WebPage;

#[derive(Debug, clap::Args)]
pub(super) struct ServeArguments {
    /// A file with settings: TOML, keys named as these options. What is given here as well replaces the file's [default:
    /// /etc/lazy-migrate/config.toml, where that exists and no --state-dir is given].
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where everything is kept.
    #[arg(long, value_name = "DIR")]
    state_dir: PathBuf,
    /// Serve all exports here: unix:/path or host:port. May be given several times.
    #[arg(long, value_name = "ADDR")]
    nbd: Vec<Address>,
    /// The one port between hosts: peer messages and the data of migrations.
    #[arg(long, value_name = "HOST:PORT")]
    peer: Option<String>,
    /// Where peers dial this host [default: the address that its connections come from].
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// This host's certificates, as `tls init` makes them. The peer address then speaks TLS only, an NBD address that other
    /// hosts can reach too.
    #[arg(long, value_name = "DIR", conflicts_with = "insecure")]
    tls: Option<PathBuf>,
    /// Listen on other hosts' networks although nothing is encrypted and nobody is authenticated.
    #[arg(long)]
    insecure: bool,
    /// A host that may bring disks here, by the name in its certificate. May be given several times.
    #[arg(long, value_name = "NAME", requires = "tls")]
    allow_peer: Vec<String>,
    /// What NBD clients with a certificate of that name see: these exports, or all. Others see none. May be given several
    /// times.
    #[arg(long, value_name = "NAME[=EXPORT,...]", requires = "tls")]
    allow_client: Vec<ClientRight>,
    /// Show all disks on a web page here, on loopback only and for looking only, for example 127.0.0.1:8080.
    #[arg(long, value_name = "HOST:PORT")]
    http: Option<String>,
    /// Make an image an export, as `add` does. May be given several times.
    #[arg(long, value_name = "NAME=IMAGE")]
    disk: Vec<String>,
    /// Make a lazily filled export, as `pull` does. May be given several times.
    #[arg(long, value_name = "NAME=NBD-URI")]
    pull: Vec<String>,
    /// A runtime whose containers may move from and to this host: runc, crun, podman, or hook with the file of its commands;
    /// with its state directory, if that is not its own default. May be given several times.
    #[arg(long, value_name = "NAME[=PATH][,root=DIR]")]
    runtime: Vec<String>,
    /// Where this host's bundles are: DIR/CONTAINER holds the config.json that a container is restored with.
    #[arg(long, value_name = "DIR")]
    bundle_dir: Option<PathBuf>,
    /// Where disks of containers that come here are mounted: DIR/NAME.
    #[arg(long, value_name = "DIR")]
    mount_dir: Option<PathBuf>,
    /// What all disks together may pull in the background, in bytes per second, for example 100M. What a client waits for is
    /// fetched at once all the same.
    #[arg(long, value_name = "BYTES/s", value_parser = super::values::byte_count)]
    pull_rate: Option<u64>,
    /// Freeze a container that came here when a read of its disk waits longer than this for the source, and let it go on when
    /// the data is here [default: it waits like a slow disk].
    #[arg(long, value_name = "TIME", value_parser = super::values::duration)]
    starve_after: Option<Duration>,
    /// How long a destination may run without hearing from here.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = super::values::duration)]
    lease: Duration,
    /// How the log on stderr looks; RUST_LOG says how much is logged.
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "text")]
    log: super::log::Format,
}

pub(super) async fn run(arguments: ServeArguments, control: PathBuf, supervisor: Supervisor) -> Outcome<()> {
    super::log::begin(arguments.log);
    super::allocator::keep_pages();
    super::descriptors::raise_limit();
    if let Some(path) = &arguments.config {
        tracing::info!(file = %path.display(), "settings");
    }
    let pulls = arguments.pull.iter().map(|text| pair("--pull", text)).collect::<Outcome<Vec<_>>>()?;
    let config = config(&arguments, super::runtimes::runtimes(&arguments.runtime).await?)?;
    // Before anything is served, so that none is lost.
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::failed)?;
    let page = match &arguments.http {
        Some(address) => Some(WebPage::bind(address).await?),
        None => None,
    };
    let running = Running::start(config, &control).await?;
    let page_stop = CancellationToken::new();
    let page = page.map(|page| {
        tracing::info!(address = page.address().map(tracing::field::display), "the page is served");
        tokio::spawn(page.serve(running.node.clone(), page_stop.clone()))
    });
    let made = async {
        for (name, from) in pulls {
            let ask = PullAsk { name, from, store: None, order: Order::default(), rate: None, background: true };
            running.node.pull(ask).await?;
        }
        Ok(())
    };
    let served = async {
        made.await?;
        tracing::info!(control = %control.display(), "ready");
        supervisor.ready();
        supervisor.keep_told(&ControlClient::new(&control)).await
    };
    let outcome = tokio::select! {
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
        outcome = served => outcome,
    };
    tracing::info!("stopping");
    supervisor.stopping();
    page_stop.cancel();
    if let Some(page) = page {
        let _ = page.await;
    }
    running.stop().await;
    outcome
}

fn config(arguments: &ServeArguments, runtimes: Runtimes) -> Outcome<NodeConfig> {
    let tls = match &arguments.tls {
        Some(directory) => Some(NodeTls::load(directory).map_err(|error| {
            usage(format!(
                "--tls {}: {}; `lazy-migrate tls init` makes certificates",
                directory.display(),
                chain(&error)
            ))
        })?),
        None => None,
    };
    let peer: Option<Address> = arguments.peer.as_deref().map(peer_address).transpose()?;
    let exposed = arguments.nbd.iter().chain(&peer).filter(|address| !is_private(address));
    let exposed: Vec<_> = exposed.map(ToString::to_string).collect();
    if !exposed.is_empty() && tls.is_none() {
        if !arguments.insecure {
            return Err(usage(format!(
                "{} can be reached from other hosts, where anybody could read and write the disks: give --tls DIR \
                 (`lazy-migrate tls init DIR --host NAME` makes one), or say --insecure if that network is yours alone",
                exposed.join(" and ")
            )));
        }
        tracing::warn!(
            addresses = exposed.join(" "),
            "INSECURE: nothing is encrypted and nobody is authenticated; whoever reaches these addresses reads and \
             writes the disks"
        );
    }
    let timings = Timings::of(arguments.lease).checked().map_err(|error| usage(format!("--lease: {error}")))?;
    let absolute = |path: &Option<PathBuf>| {
        path.as_ref().map(std::path::absolute).transpose().map_err(|error| usage(error.to_string()))
    };
    let disks = arguments.disk.iter().map(|text| {
        let (name, image) = pair("--disk", text)?;
        Ok((name, std::path::absolute(&image).map_err(|error| usage(format!("--disk {text}: {error}")))?))
    });
    Ok(NodeConfig {
        state_dir: std::path::absolute(&arguments.state_dir).map_err(|error| usage(error.to_string()))?,
        disks: disks.collect::<Outcome<_>>()?,
        nbd: arguments.nbd.clone(),
        peer: arguments.peer.clone(),
        advertise: arguments.advertise.clone(),
        tls,
        allowed_peers: arguments.allow_peer.clone(),
        clients: arguments.allow_client.iter().cloned().collect(),
        runtimes,
        bundle_dir: absolute(&arguments.bundle_dir)?,
        mount_dir: absolute(&arguments.mount_dir)?,
        pull_rate: arguments.pull_rate,
        starve_after: arguments.starve_after,
        timings,
    })
}

fn pair(option: &str, text: &str) -> Outcome<(DiskName, String)> {
    let (name, value) =
        text.split_once('=').ok_or_else(|| usage(format!("{option} {text}: write it as NAME=VALUE")))?;
    Ok((name.parse().map_err(|error| usage(format!("{option} {text}: {error}")))?, value.into()))
}

/// The peer address is always TCP, with its port.
fn peer_address(text: &str) -> Outcome<Address> {
    match text.parse() {
        Ok(address @ Address::Tcp { .. })
            if text.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) =>
        {
            Ok(address)
        }
        _ => Err(usage(format!("--peer {text}: a peer address is host:port, for example 10.0.0.1:{DEFAULT_PORT}"))),
    }
}
