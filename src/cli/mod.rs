//! The command line: one file a command. Every command but `serve` asks the local node through its control socket.

mod allocator;
mod answers;
mod config;
mod descriptors;
mod disks;
mod doctor;
mod events;
mod guard;
mod in_podman;
mod log;
mod manual;
mod migrate;
mod progress;
mod report;
mod runtimes;
mod serve;
mod status;
mod supervisor;
mod tls;
mod values;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};

use crate::control::api::WaitFor;
use crate::control::client::ControlClient;
use crate::device::Via;
use crate::error::{Failure, Kind};
use crate::node::DiskName;
use crate::pull::Order;

/// Moves a running container to another host with a pause that does not depend on its disk.
#[derive(Debug, Parser)]
#[command(name = "lazy-migrate", version, max_term_width = 110)]
#[command(after_help = "Exit codes: 0 done; 1 failed; 2 usage; 3 refused, because it would be unsafe or the phase is \
                        wrong; 4 peer or node unreachable; 5 timed out.")]
struct Arguments {
    /// The node's control socket.
    #[arg(
        long,
        global = true,
        env = "LAZY_MIGRATE_CONTROL",
        value_name = "SOCK",
        default_value = "/run/lazy-migrate/control.sock"
    )]
    control: PathBuf,
    /// Print the answer as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    process: Process,
}

#[derive(Debug, Subcommand)]
enum Process {
    #[command(flatten)]
    Command(Box<Command>),
    /// Freeze a container when its lease ends; the node starts this by itself.
    Guard(guard::GuardArguments),
    /// Stands in for podman's OCI runtime when a container is restored; podman is told to run it.
    #[command(hide = true)]
    InPodman(in_podman::InPodmanArguments),
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run this host's node: its exports, its control socket, its peer link.
    Serve(Box<serve::ServeArguments>),
    /// Make an existing image or block device an export, write-tracked.
    Add {
        /// The export's name.
        name: DiskName,
        /// A file or a block device.
        image: PathBuf,
    },
    /// Make a lazily filled export from any NBD server.
    Pull {
        /// The export's name.
        name: DiskName,
        /// The upstream, for example nbd://host/name or nbd+unix:///name?socket=/path.
        #[arg(long, value_name = "NBD-URI")]
        from: String,
        /// Where the bytes go: a file or a block device [default: a file in the state directory].
        #[arg(long, value_name = "PATH")]
        store: Option<PathBuf>,
        /// The order of the background pull.
        #[arg(long, value_enum, default_value = "dirty")]
        order: Order,
        /// Limit the background pull, in bytes per second, for example 20M.
        #[arg(long, value_name = "BYTES/s", value_parser = values::byte_count)]
        rate: Option<u64>,
        /// Fetch only what is asked for.
        #[arg(long)]
        no_background: bool,
    },
    /// Forget an export; refused while it is attached or owed to a peer.
    Remove {
        /// The export.
        name: DiskName,
    },
    /// Attach an export to a block device, and print the device once a direct read of it succeeds.
    Attach {
        /// The export.
        name: DiskName,
        /// Which device, for example /dev/nbd3 [default: the kernel chooses].
        device: Option<PathBuf>,
        /// By the kernel's NBD device, or by FUSE and a loop device where the kernel has none.
        #[arg(long, value_enum, default_value = "auto")]
        via: Via,
    },
    /// Take an export's block device away; refused while it is in use.
    Detach {
        /// The export.
        name: DiskName,
    },
    /// Make the destination ready: it creates the empty export and connects back.
    Prepare {
        /// The export.
        name: DiskName,
        /// The destination's peer address.
        #[arg(long, value_name = "PEER")]
        to: String,
        #[command(flatten)]
        link: migrate::LinkArguments,
    },
    /// After the freeze: this host's disk becomes read-only and the destination its owner.
    Handover {
        /// The export.
        name: DiskName,
    },
    /// Give a migration up before the handover.
    Cancel {
        /// The export.
        name: DiskName,
    },
    /// Move a container and its disk: prepare, freeze, checkpoint, hand over, resume there, pull the rest.
    Migrate(migrate::MigrateArguments),
    /// Wait until something is true of an export.
    Wait {
        /// The export.
        name: DiskName,
        /// What to wait for.
        #[arg(long = "for", value_enum, default_value = "complete")]
        what: WaitFor,
        /// Give up after this long, for example 90s or 5m.
        #[arg(long, value_parser = values::duration)]
        timeout: Option<Duration>,
    },
    /// Show one export, or all.
    Status {
        /// The export [default: all].
        name: Option<DiskName>,
        /// Show it until interrupted: redrawn in place on a terminal, a line each second otherwise.
        #[arg(long)]
        watch: bool,
    },
    /// Show what happened on the node, and what happens.
    Events(events::EventsArguments),
    /// Tell all that is known of an export's migration or pull, also after its end.
    Report(report::ReportArguments),
    /// Compare all blocks that were not written since the handover with the source's.
    Verify {
        /// The export.
        name: DiskName,
    },
    /// On the source: take the disk back at the freeze point, and let the container go on here.
    Rollback {
        /// The export.
        name: DiskName,
        /// Say what would be done and lost, and whether it is safe; change nothing.
        #[arg(long)]
        plan: bool,
        /// Wait until it is safe instead of refusing.
        #[arg(long)]
        wait: bool,
    },
    /// Where a container came to and its memory was lost with a restart of the host: start it anew from its disk.
    ColdStart {
        /// The export.
        name: DiskName,
    },
    /// Look at this host: is it fit to send and to receive containers, and if not, what to do? Exits with 1 if not.
    Doctor(doctor::DoctorArguments),
    /// Certificates for nodes and NBD clients.
    #[command(subcommand)]
    Tls(tls::TlsCommand),
    /// Print a completion script.
    Completions {
        /// For which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write those of all commands.
    Man(manual::ManArguments),
}

/// Runs the command that the process was called with.
pub fn main() -> ExitCode {
    let command = Arguments::command();
    let completed = config::complete(&command, std::env::args_os().collect(), config::DEFAULT_PATH.as_ref());
    match completed.and_then(|arguments| run(Arguments::parse_from(arguments))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("lazy-migrate: {failure}");
            ExitCode::from(failure.kind.exit_code())
        }
    }
}

fn run(arguments: Arguments) -> Result<(), Failure> {
    let Arguments { control, json, process } = arguments;
    let command = match process {
        Process::Guard(arguments) => return guard::run(&arguments),
        Process::InPodman(arguments) => return in_podman::run(&arguments),
        Process::Command(command) => *command,
    };
    // While this is the only thread, which it must be to change the environment.
    let supervisor = match &command {
        Command::Serve(_) => supervisor::Supervisor::of_environment(),
        _ => supervisor::Supervisor::default(),
    };
    let mut runtime = match &command {
        Command::Serve(_) => tokio::runtime::Builder::new_multi_thread(),
        // A question needs no threads, and a container may stand still until it is answered.
        _ => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime =
        runtime.enable_all().build().map_err(|error| Failure::failed(format!("cannot start the runtime: {error}")))?;
    let client = ControlClient::new(&control);
    let answer = answers::Answer { json };
    let outcome = runtime.block_on(async {
        match command {
            Command::Serve(arguments) => serve::run(*arguments, control, supervisor).await,
            Command::Add { name, image } => disks::add(&client, &answer, name, image).await,
            Command::Pull { name, from, store, order, rate, no_background } => {
                let ask = disks::pull_ask(name, from, store, order, rate, !no_background)?;
                disks::pull(&client, &answer, ask).await
            }
            Command::Remove { name } => disks::remove(&client, &answer, name).await,
            Command::Attach { name, device, via } => disks::attach(&client, &answer, name, device, via).await,
            Command::Detach { name } => disks::detach(&client, &answer, name).await,
            Command::Prepare { name, to, link } => migrate::prepare(&client, &answer, name, to, link).await,
            Command::Handover { name } => migrate::handover(&client, &answer, name).await,
            Command::Cancel { name } => migrate::cancel(&client, &answer, name).await,
            Command::Migrate(arguments) => migrate::run(&client, &answer, arguments).await,
            Command::Wait { name, what, timeout } => status::wait(&client, &answer, name, what, timeout).await,
            Command::Status { name, watch } => status::run(&client, &answer, name, watch).await,
            Command::Events(arguments) => events::run(&client, &answer, arguments).await,
            Command::Report(arguments) => report::run(&client, &answer, arguments).await,
            Command::Verify { name } => migrate::verify(&client, &answer, name).await,
            Command::Rollback { name, plan, wait } => migrate::rollback(&client, &answer, name, plan, wait).await,
            Command::ColdStart { name } => migrate::cold_start(&client, &answer, name).await,
            Command::Doctor(arguments) => doctor::run(&client, &answer, arguments).await,
            Command::Tls(command) => tls::run(command, &answer),
            Command::Completions { shell } => {
                clap_complete::generate(shell, &mut Arguments::command(), "lazy-migrate", &mut std::io::stdout());
                Ok(())
            }
            Command::Man(arguments) => {
                let text = manual::run(&arguments, Arguments::command())?;
                if text.is_empty() { Ok(()) } else { answer.print(&text, || text.trim_end().to_owned()) }
            }
        }
    });
    // Blocking file work that was given up must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

/// A wrong argument that only shows when it is looked at closely.
fn usage(message: impl std::fmt::Display) -> Failure {
    Failure::new(Kind::Usage, message)
}
