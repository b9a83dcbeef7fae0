//! Accepts clients on an address, and ends in order.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::socket::ClientSocket;
use super::unix_path::{UnixPath, bind_owned_unix};
use super::{ServeOptions, serve_admitted};
use crate::address::Address;
use crate::export::Exports;
use crate::socket::{tune_tcp, tune_unix};

/// Pause after a failed accept (out of descriptors, say), so that it is not repeated in a tight loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another server is there.
    #[error("cannot listen on {0}: another server is listening there; stop it or choose another address")]
    InUse(Address),
    /// Something that is not a socket has the path.
    #[error("cannot listen on unix:{}: the path exists and is not a socket; remove it or choose another", .0.display())]
    NotASocket(PathBuf),
    /// Anything else.
    #[error("cannot listen on {address}")]
    Io {
        /// The address.
        address: Address,
        /// Why.
        source: io::Error,
    },
}

enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A bound address; [`Listener::run`] serves it.
pub struct Listener {
    socket: Socket,
    address: Address,
    /// Kept to be dropped.
    path: Option<UnixPath>,
}

impl Listener {
    /// Binds an address. A Unix socket can be opened only by its owner (mode 0600); a socket that a dead server left
    /// behind is replaced, one on which somebody listens is not.
    ///
    /// # Errors
    /// [`ListenError`].
    pub async fn bind(address: &Address) -> Result<Listener, ListenError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => ListenError::InUse(address.clone()),
            _ => ListenError::Io { address: address.clone(), source },
        };
        match address {
            Address::Tcp { host, port } => {
                let listener = TcpListener::bind((host.as_str(), *port)).await.map_err(failed)?;
                let port = listener.local_addr().map_err(failed)?.port();
                let address = Address::Tcp { host: host.clone(), port };
                Ok(Listener { socket: Socket::Tcp(listener), address, path: None })
            }
            Address::Unix(path) => {
                let (listener, path) = bind_owned_unix(path).await?;
                Ok(Listener { socket: Socket::Unix(listener), address: address.clone(), path: Some(path) })
            }
        }
    }

    /// The address, with the real port where port 0 was asked for.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Serves clients until `shutdown`; then accepts no more, and returns when the last connection has ended, which
    /// takes [`ServeOptions::drain_time`] at most.
    pub async fn run(self, exports: Arc<dyn Exports>, options: ServeOptions, shutdown: CancellationToken) {
        let tracker = TaskTracker::new();
        let options = Arc::new(options);
        let slots = Arc::new(Semaphore::new(options.max_connections));
        let half_open = Arc::new(Semaphore::new(options.max_handshakes));
        loop {
            let accepted = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                accepted = async {
                    // The semaphore is never closed.
                    let place = half_open.clone().acquire_owned().await.map_err(io::Error::other)?;
                    self.accept().await.map(|stream| (place, stream))
                } => accepted,
            };
            let (place, stream) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(address = %self.address, %error, "a client could not be accepted");
                    tokio::select! {
                        () = shutdown.cancelled() => break,
                        () = tokio::time::sleep(ACCEPT_PAUSE) => continue,
                    }
                }
            };
            let (exports, options, shutdown) = (exports.clone(), options.clone(), shutdown.clone());
            let slots = slots.clone();
            let address = self.address.clone();
            tracker.spawn(async move {
                let admission = async move {
                    let slot = slots.acquire_owned().await;
                    drop(place);
                    slot
                };
                if let Err(error) = serve_admitted(stream, exports, &options, shutdown, admission).await {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    tracing::info!(%address, %error, cause, "a client was hung up on");
                }
            });
        }
        // New clients are refused from here on, while the old ones finish.
        drop((self.path, self.socket));
        tracker.close();
        tracker.wait().await;
    }

    async fn accept(&self) -> io::Result<ClientSocket> {
        match &self.socket {
            Socket::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                tune_unix(&stream);
                ClientSocket::new(stream.into_std()?)
            }
            Socket::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                tune_tcp(&stream);
                ClientSocket::new(stream.into_std()?)
            }
        }
    }
}
