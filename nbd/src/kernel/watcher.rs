//! Tells when a device's server has gone: the family's multicast group sends LINK_DEAD.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::KernelError;
use super::message::{self, Message, attribute, command};
use super::transport::Netlink;

const RECEIVE_BUFFER: usize = 16 << 10;
const WHAT: &str = "watch for lost connections of NBD devices";

/// Receives the number of every device, of anyone, whose connection has died since the watcher was opened.
pub struct LinkDeadWatcher {
    socket: AsyncFd<OwnedFd>,
    family: u16,
}

impl LinkDeadWatcher {
    /// Joins the group. Call it inside a tokio runtime.
    pub fn open() -> Result<Self, KernelError> {
        let netlink = Netlink::open()?;
        let family = netlink.family();
        let malformed = || KernelError::Malformed {
            what: WHAT.to_owned(),
            source: message::Malformed::Missing("the group for lost connections"),
        };
        let group = family.group.ok_or_else(malformed)?;
        let socket = join(netlink.into_socket(), group).and_then(register).map_err(failed)?;
        Ok(Self { socket, family: family.number })
    }

    /// Waits for the next event. Events may be lost when nobody waits for long: then `None` says that any device may be
    /// concerned. May be dropped at any await without losing an event.
    pub async fn next(&self) -> Result<Option<u32>, KernelError> {
        loop {
            let received = self.socket.async_io(Interest::READABLE, |socket| {
                let mut buffer = vec![0; RECEIVE_BUFFER];
                let length = recv(socket.as_fd().as_raw_fd(), &mut buffer, MsgFlags::empty())?;
                buffer.truncate(length);
                Ok(buffer)
            });
            let datagram = match received.await {
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => return Ok(None),
                other => other.map_err(failed)?,
            };
            // The kernel sends one event a datagram.
            if let Some(index) = dead_link(&datagram, self.family) {
                return Ok(Some(index));
            }
        }
    }
}

/// The device of a LINK_DEAD message.
fn dead_link(datagram: &[u8], nbd: u16) -> Option<u32> {
    message::messages(datagram).map_while(Result::ok).find_map(|message| match message {
        Message::Data { family, command: command::LINK_DEAD, attributes, .. } if family == nbd => {
            message::find(attributes, attribute::INDEX).ok()?.and_then(|value| message::as_u32(value).ok())
        }
        _ => None,
    })
}

fn failed(source: io::Error) -> KernelError {
    KernelError::Netlink { what: WHAT.to_owned(), source }
}

fn join(socket: OwnedFd, group: u32) -> io::Result<OwnedFd> {
    add_membership(&socket, group)?;
    fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(socket)
}

/// Hands the socket to the runtime's reactor.
#[allow(unsafe_code)]
fn register(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor until it is dropped, and the `AsyncFd` owns it until then.
    unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }.map_err(io::Error::from)
}

/// Joins a multicast group of netlink: the socket option that nix does not have.
#[allow(unsafe_code)]
fn add_membership(socket: &OwnedFd, group: u32) -> io::Result<()> {
    let length = size_of::<u32>() as libc::socklen_t;
    let (level, name) = (libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP);
    // SAFETY: the option takes an `unsigned int`, `group` is one and outlives the call, and `length` is its size.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const group).cast(), length) };
    Errno::result(result).map(drop).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::super::message::{Attributes, NBD_VERSION, request};
    use super::*;

    #[test]
    fn only_the_familys_own_event_counts() {
        let mut attributes = Attributes::new();
        attributes.u32(attribute::INDEX, 5);
        let event = request(27, 0, command::LINK_DEAD, NBD_VERSION, &attributes);
        assert_eq!(dead_link(&event, 27), Some(5));
        assert_eq!(dead_link(&event, 28), None);
        assert_eq!(dead_link(&request(27, 0, command::STATUS, NBD_VERSION, &attributes), 27), None);
        assert_eq!(dead_link(&event[..10], 27), None);
    }
}
