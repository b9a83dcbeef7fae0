//! The connection between a device and the node's own NBD server: a Unix socket pair.
//!
//! [`Link::to_export`] does it all: it serves one end, negotiates on the other (simple replies only, which is all that the
//! kernel knows), and gives the negotiated end to the device.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;

use ::nbd::client::{ConnectOptions, negotiate};
use ::nbd::export::Exports;
use ::nbd::server::{Draining, ServeOptions, serve_socket};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

/// Send buffer of both ends in bytes: with the default of 208 KiB both sides stall on large requests.
const SEND_BUFFER: usize = 4 << 20;

/// Both ends of a new connection.
#[derive(Debug)]
pub struct Ends {
    /// For the NBD server.
    pub server: StdStream,
    /// To be kept by the server's task for as long as it runs.
    pub hang_up: HangUp,
    /// For the client: to be negotiated on, then for [`Link::new`].
    pub client: UnixStream,
    /// For [`Link::new`].
    pub witness: Witness,
}

/// Hangs up when dropped. Closing the server's end is not enough: the device keeps a copy of it to watch.
#[derive(Debug)]
pub struct HangUp(StdStream);

/// A copy of the server's end, of which nothing is read: it shows whether the kernel holds the other one, and it can
/// hang up.
#[derive(Debug)]
pub struct Witness(StdStream);

/// A connection past the handshake, ready for a device.
#[derive(Debug)]
pub struct Link {
    kernel: OwnedFd,
    witness: Witness,
}

impl Ends {
    /// Makes a socket pair. Call it inside a tokio runtime.
    pub fn new() -> io::Result<Self> {
        let (server, client) = StdStream::pair()?;
        for end in [&server, &client] {
            // More is better, but without the right to it the default does.
            let _ = setsockopt(end, sockopt::SndBufForce, &SEND_BUFFER);
            end.set_nonblocking(true)?;
        }
        Ok(Self {
            hang_up: HangUp(server.try_clone()?),
            witness: Witness(server.try_clone()?),
            server,
            client: UnixStream::from_std(client)?,
        })
    }
}

impl Link {
    /// Serves an export to a device until the device hangs up or `shutdown`. The server's task runs in `tasks`.
    ///
    /// Requests that come while it shuts down are left without an answer: the kernel sends them again to the next server,
    /// where an error would reach the filesystem.
    pub async fn to_export(
        exports: Arc<dyn Exports>,
        name: &str,
        tasks: &TaskTracker,
        shutdown: CancellationToken,
    ) -> io::Result<Self> {
        let Ends { server, hang_up, client, witness } = Ends::new()?;
        let options = ServeOptions { draining: Draining::HangUp, ..ServeOptions::default() };
        let disk = name.to_owned();
        let served = async move {
            let _hang_up = hang_up;
            if let Err(error) = serve_socket(server, exports, &options, shutdown).await {
                tracing::warn!(disk, "the connection to the device has ended: {error}");
            }
        };
        tasks.spawn(served.in_current_span());
        let negotiated = negotiate(client, name, &ConnectOptions::default()).await;
        let (client, _) = negotiated.map_err(io::Error::other)?;
        Self::new(client, witness)
    }

    /// From the client's end, of which everything that the handshake sent has been read and nothing else.
    pub fn new(client: UnixStream, witness: Witness) -> io::Result<Self> {
        let client = client.into_std()?;
        client.set_nonblocking(false)?;
        Ok(Self { kernel: client.into(), witness })
    }

    /// The end for the kernel, and the witness of the other.
    pub(super) fn into_parts(self) -> (OwnedFd, Witness) {
        (self.kernel, self.witness)
    }
}

impl Witness {
    /// Ends the connection in both directions, at once, whatever the server is doing.
    pub(super) fn hang_up(&self) {
        // It fails only when the connection has ended already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl AsFd for Witness {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for HangUp {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use std::time::Duration;

    use ::nbd::export::Export;
    use tokio::time::timeout;

    use super::*;

    struct NoExports;

    impl Exports for NoExports {
        fn find(&self, _: &str) -> Option<Arc<dyn Export>> {
            None
        }

        fn list(&self) -> Vec<(String, String)> {
            Vec::new()
        }
    }

    #[tokio::test]
    async fn an_unknown_export_is_refused_and_its_server_ends() {
        let tasks = TaskTracker::new();
        let link = Link::to_export(Arc::new(NoExports), "web", &tasks, CancellationToken::new()).await;
        assert!(link.is_err());
        tasks.close();
        timeout(Duration::from_secs(20), tasks.wait()).await.expect("the server's task goes on");
    }

    #[tokio::test]
    async fn the_client_sees_the_server_go_although_the_witness_stays() {
        let mut ends = Ends::new().unwrap();
        drop(ends.server);
        drop(ends.hang_up);
        assert_eq!(ends.client.read(&mut [0; 1]).await.unwrap(), 0);
        drop(ends.witness);
    }

    #[tokio::test]
    async fn the_witness_ends_a_connection_whose_server_does_nothing() {
        let mut ends = Ends::new().unwrap();
        ends.witness.hang_up();
        assert_eq!(ends.client.read(&mut [0; 1]).await.unwrap(), 0);
        ends.witness.hang_up();
    }
}
