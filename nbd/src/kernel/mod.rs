//! The Linux kernel's NBD device, driven by generic netlink.
//!
//! The kernel does no handshake: user space negotiates (simple replies only) and hands a connected socket over; from
//! then on the kernel is the client of the transmission phase. So attaching is: make a socket pair, serve one end,
//! [`connect`] with the other. What this module knows beyond the message format was measured on Linux 6.1:
//!
//! - **One socket, no timeout.** A timeout of 0 with one socket means that a slow server is only logged; anything else
//!   kills live but slow sockets. [`DEAD_CONNECTION_TIMEOUT`] holds I/O for practically ever when the server has died,
//!   so that a restarted one can take over with [`reconfigure`].
//! - **[`set_io_timeout`] right after [`connect`]**: requests that were sent to a dead server stay parked until the block
//!   layer's timer fires, 30 s by default, however soon the new socket comes.
//! - **An answer of 0 to RECONFIGURE means nothing**: [`reconfigure`] looks whether the kernel really holds the socket.
//! - **Hang up before [`disconnect`]**: a device whose server is stopped hangs it, and with it every other caller.
//!
//! All calls block, for milliseconds; asynchronous callers use a blocking thread. They need CAP_SYS_ADMIN.

pub mod message;
mod sysfs;
mod transport;
mod watcher;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

pub use sysfs::{backend_identifier, device_path, device_size, devices, is_connected, set_io_timeout, wait_for_size};
pub use watcher::LinkDeadWatcher;

use message::{Attributes, attribute, command, device_attribute, socket_attribute};
use transport::Netlink;

/// For how long I/O is held when the server has gone, in seconds: the largest value that the kernel takes.
pub const DEAD_CONNECTION_TIMEOUT: u64 = (1 << 31) - 1;

/// The block size in bytes that the device is given. It must not exceed the logical block of the filesystem on it.
pub const BLOCK_SIZE: u64 = 512;

/// The value for [`set_io_timeout`] in milliseconds that lets I/O go on 1-2 s after [`reconfigure`].
pub const IO_TIMEOUT_MS: u32 = 3000;

/// The longest backend identifier in bytes. (The kernel shows it through a page of sysfs.)
pub const MAX_BACKEND_IDENTIFIER: usize = 1024;

/// How long [`reconfigure`] waits for the sign that the kernel has dropped the socket, in milliseconds. The kernel does
/// so before it answers; this is for the scheduler.
const NOT_TAKEN_GRACE_MS: u16 = 20;

/// What went wrong with a kernel device.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The kernel has no NBD device, and loading its module did not help.
    #[error(
        "this kernel has no NBD device (no netlink family `nbd`; `modprobe nbd` said: {modprobe}): install the kernel's \
         nbd module, or attach through FUSE"
    )]
    NoNbd {
        /// What modprobe said.
        modprobe: String,
    },
    /// The caller lacks CAP_SYS_ADMIN.
    #[error("not allowed to {what}: attaching a kernel NBD device needs root (CAP_SYS_ADMIN)")]
    NotPermitted {
        /// What was tried.
        what: String,
    },
    /// The device that was asked for is in use.
    #[error("/dev/nbd{index} is in use: choose another device, or detach it first")]
    Busy {
        /// Its number.
        index: u32,
    },
    /// The device has no connection at all, so there is nothing to reconfigure.
    #[error("/dev/nbd{index} is not connected: attach it anew")]
    NotConnected {
        /// Its number.
        index: u32,
    },
    /// The device belongs to somebody else.
    #[error("/dev/nbd{index} is not ours: its backend is {found:?}, not {expected:?}; leave it alone, attach another")]
    WrongBackend {
        /// Its number.
        index: u32,
        /// The identifier that was given.
        expected: String,
        /// The identifier that the kernel has; empty if none.
        found: String,
    },
    /// The kernel did not keep the new socket, because the old one is still alive.
    #[error(
        "/dev/nbd{index} did not take the new connection: its old one is still alive; end the process that serves it"
    )]
    NotTaken {
        /// Its number.
        index: u32,
    },
    /// A parameter that the kernel would misunderstand.
    #[error("cannot attach: {0}")]
    Invalid(String),
    /// A netlink request failed.
    #[error("cannot {what}: {source}")]
    Netlink {
        /// What was tried, on what.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The kernel's answer could not be understood.
    #[error("cannot {what}: the kernel's answer is malformed: {source}")]
    Malformed {
        /// What was tried, on what.
        what: String,
        /// Where it is wrong.
        source: message::Malformed,
    },
    /// A file of /sys could not be read or written.
    #[error("cannot access {}: {source}", path.display())]
    Sysfs {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The device did not get the size that was asked for.
    #[error("/dev/nbd{index} has {found} bytes instead of {expected} after {waited_ms} ms")]
    WrongSize {
        /// Its number.
        index: u32,
        /// The size that was waited for.
        expected: u64,
        /// The size it has.
        found: u64,
        /// How long was waited.
        waited_ms: u64,
    },
}

/// What the server at the other end can do (transmission flags of the protocol document).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServerFlags(pub u64);

impl ServerFlags {
    /// NBD_FLAG_HAS_FLAGS, NBD_FLAG_SEND_FLUSH, NBD_FLAG_SEND_FUA and NBD_FLAG_SEND_TRIM: what every device here has.
    /// Without FLUSH the kernel never flushes; FUA counts only together with it.
    pub const WRITABLE: ServerFlags = ServerFlags(1 | 1 << 2 | 1 << 3 | 1 << 5);
    /// The same with NBD_FLAG_READ_ONLY.
    pub const READ_ONLY: ServerFlags = ServerFlags(ServerFlags::WRITABLE.0 | 1 << 1);
}

/// How a device is to be connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectParams {
    /// The device's number; without it the kernel chooses a free one.
    pub index: Option<u32>,
    /// Size in bytes, 512 or more. The kernel counts in sectors of 512 bytes: a partial last one is cut off.
    pub size: u64,
    /// What the server can do.
    pub flags: ServerFlags,
    /// Says whose device it is; checked by [`reconfigure`]. 1 to [`MAX_BACKEND_IDENTIFIER`] bytes, no NUL, no newline.
    pub backend_identifier: String,
}

impl ConnectParams {
    /// The attributes of NBD_CMD_CONNECT.
    fn attributes(&self, socket: BorrowedFd<'_>) -> Attributes {
        let mut attributes = Attributes::new();
        if let Some(index) = self.index {
            attributes.u32(attribute::INDEX, index);
        }
        attributes
            .u64(attribute::SIZE_BYTES, self.size)
            .u64(attribute::BLOCK_SIZE_BYTES, BLOCK_SIZE)
            .u64(attribute::TIMEOUT, 0)
            .u64(attribute::SERVER_FLAGS, self.flags.0)
            .u64(attribute::DEAD_CONN_TIMEOUT, DEAD_CONNECTION_TIMEOUT)
            .string(attribute::BACKEND_IDENTIFIER, &self.backend_identifier)
            .nested(attribute::SOCKETS, &sockets(socket));
        attributes
    }
}

/// Connects a device to a socket that is past the handshake (simple replies), and returns the device's number.
///
/// `socket` is a connected stream socket, Unix or TCP; the kernel keeps its own reference. The call returns before the
/// device is usable: see [`wait_for_size`], and read from it.
pub fn connect(socket: BorrowedFd<'_>, params: &ConnectParams) -> Result<u32, KernelError> {
    if params.size < BLOCK_SIZE {
        return Err(KernelError::Invalid(format!("a disk of {} bytes is smaller than a sector of 512", params.size)));
    }
    check_identifier(&params.backend_identifier)?;
    let what = match params.index {
        Some(index) => format!("connect /dev/nbd{index}"),
        None => "connect an NBD device".to_owned(),
    };
    let mut netlink = Netlink::open()?;
    let answers = netlink.call(command::CONNECT, &params.attributes(socket)).map_err(|error| {
        match (error.errno(), params.index) {
            (Some(Errno::EBUSY), Some(index)) => KernelError::Busy { index },
            _ => error.into_kernel_error(&what),
        }
    })?;
    for answer in &answers {
        if let Some(index) = message::find(answer, attribute::INDEX)
            .and_then(|value| value.map(message::as_u32).transpose())
            .map_err(|source| KernelError::Malformed { what: what.clone(), source })?
        {
            return Ok(index);
        }
    }
    params.index.ok_or(KernelError::Malformed { what, source: message::Malformed::Missing("the device's number") })
}

/// Gives a device whose server has died a new socket, and makes sure that the kernel took it.
///
/// `socket` is the kernel's end of the new connection and is closed here; nobody else may hold a copy of it. `server` is
/// the other end (a Unix socket), or a duplicate of it, of which nothing is read: it shows a hang-up when the kernel did not keep the
/// socket. `size` changes the device's size, also while it is mounted; without it the size stays.
pub fn reconfigure(
    index: u32,
    socket: OwnedFd,
    server: BorrowedFd<'_>,
    backend: &str,
    size: Option<u64>,
) -> Result<(), KernelError> {
    if size.is_some_and(|size| size < BLOCK_SIZE) {
        return Err(KernelError::Invalid(format!("/dev/nbd{index} cannot be made smaller than a sector of 512 bytes")));
    }
    check_identifier(backend)?;
    match backend_identifier(index)? {
        Some(found) if found == backend => {}
        found if is_connected(index) => {
            return Err(KernelError::WrongBackend {
                index,
                expected: backend.to_owned(),
                found: found.unwrap_or_default(),
            });
        }
        _ => return Err(KernelError::NotConnected { index }),
    }
    let what = format!("reconnect /dev/nbd{index}");
    let mut netlink = Netlink::open()?;
    netlink
        .call(command::RECONFIGURE, &reconfigure_attributes(index, socket.as_fd(), backend, size))
        .map_err(|error| error.into_kernel_error(&what))?;
    drop(socket);
    if has_hung_up(server).map_err(|source| KernelError::Netlink { what, source })? {
        return Err(KernelError::NotTaken { index });
    }
    Ok(())
}

/// Ends a device's connection: everything that waits on it fails. The caller has unmounted it and hung its socket up.
/// A device that is not connected counts as done.
pub fn disconnect(index: u32) -> Result<(), KernelError> {
    let mut attributes = Attributes::new();
    attributes.u32(attribute::INDEX, index);
    match Netlink::open()?.call(command::DISCONNECT, &attributes) {
        Ok(_) => Ok(()),
        // 6.1 answers EINVAL for a number that it does not know, or whose device is going away.
        Err(error) if error.errno() == Some(Errno::EINVAL) && !is_connected(index) => Ok(()),
        Err(error) => Err(error.into_kernel_error(&format!("disconnect /dev/nbd{index}"))),
    }
}

/// Whether the kernel says that a device is connected. (It says so too of one whose server has died.)
pub fn status(index: u32) -> Result<bool, KernelError> {
    let what = format!("ask for the status of /dev/nbd{index}");
    let mut attributes = Attributes::new();
    attributes.u32(attribute::INDEX, index);
    let answers =
        Netlink::open()?.call(command::STATUS, &attributes).map_err(|error| error.into_kernel_error(&what))?;
    let malformed = |source| KernelError::Malformed { what: what.clone(), source };
    for answer in &answers {
        for (device, connected) in decode_status(answer).map_err(malformed)? {
            if device == index {
                return Ok(connected);
            }
        }
    }
    Ok(false)
}

/// Whether this kernel has NBD devices; loads the module if that is what is missing.
pub fn available() -> Result<(), KernelError> {
    Netlink::open().map(|_| ())
}

fn check_identifier(identifier: &str) -> Result<(), KernelError> {
    let good = !identifier.is_empty()
        && identifier.len() <= MAX_BACKEND_IDENTIFIER
        && !identifier.contains(['\0', '\n'])
        && identifier.trim() == identifier;
    if good {
        return Ok(());
    }
    Err(KernelError::Invalid(format!(
        "the backend identifier {identifier:?} is empty, longer than {MAX_BACKEND_IDENTIFIER} bytes, or has a NUL, a line \
         end or blanks around it"
    )))
}

/// The attributes of NBD_CMD_RECONFIGURE. The size is left out unless it is meant: the kernel would take a 0.
fn reconfigure_attributes(index: u32, socket: BorrowedFd<'_>, backend: &str, size: Option<u64>) -> Attributes {
    let mut attributes = Attributes::new();
    attributes.u32(attribute::INDEX, index);
    if let Some(size) = size {
        attributes.u64(attribute::SIZE_BYTES, size);
    }
    attributes
        .u64(attribute::DEAD_CONN_TIMEOUT, DEAD_CONNECTION_TIMEOUT)
        .string(attribute::BACKEND_IDENTIFIER, backend)
        .nested(attribute::SOCKETS, &sockets(socket));
    attributes
}

/// The content of the attribute for sockets: a list of one item, which holds one descriptor.
fn sockets(socket: BorrowedFd<'_>) -> Attributes {
    let mut item = Attributes::new();
    item.u32(socket_attribute::FD, socket.as_raw_fd() as u32);
    let mut list = Attributes::new();
    list.nested(socket_attribute::ITEM, &item);
    list
}

/// The devices of an answer to STATUS and whether each is connected.
fn decode_status(answer: &[u8]) -> Result<Vec<(u32, bool)>, message::Malformed> {
    let mut found = Vec::new();
    let Some(list) = message::find(answer, attribute::DEVICE_LIST)? else { return Ok(found) };
    for item in message::attributes(list) {
        let (_, item) = item?;
        let index = message::find(item, device_attribute::INDEX)?;
        let connected = message::find(item, device_attribute::CONNECTED)?;
        if let (Some(index), Some(connected)) = (index, connected) {
            found.push((message::as_u32(index)?, connected.first().is_some_and(|&byte| byte != 0)));
        }
    }
    Ok(found)
}

/// Whether the other end of a connected Unix socket has been closed for good.
fn has_hung_up(socket: BorrowedFd<'_>) -> io::Result<bool> {
    // A hang-up and an error are reported without being asked for.
    let mut polled = [PollFd::new(socket, PollFlags::empty())];
    loop {
        match poll(&mut polled, PollTimeout::from(NOT_TAKEN_GRACE_MS)) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => break,
        }
    }
    let closed = PollFlags::POLLHUP | PollFlags::POLLERR;
    Ok(polled[0].revents().is_some_and(|events| events.intersects(closed)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn params(index: Option<u32>) -> ConnectParams {
        ConnectParams { index, size: 1 << 30, flags: ServerFlags::WRITABLE, backend_identifier: "web".to_owned() }
    }

    #[test]
    fn connect_says_everything_that_was_measured_to_be_needed() {
        let (socket, _server) = UnixStream::pair().unwrap();
        let bytes = params(Some(3)).attributes(socket.as_fd());
        let value = |kind| message::find(bytes.as_bytes(), kind).unwrap().map(<[u8]>::to_vec);
        assert_eq!(value(attribute::INDEX), Some(3u32.to_ne_bytes().to_vec()));
        assert_eq!(value(attribute::SIZE_BYTES), Some((1u64 << 30).to_ne_bytes().to_vec()));
        assert_eq!(value(attribute::BLOCK_SIZE_BYTES), Some(512u64.to_ne_bytes().to_vec()));
        assert_eq!(value(attribute::TIMEOUT), Some(0u64.to_ne_bytes().to_vec()));
        // HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM.
        assert_eq!(value(attribute::SERVER_FLAGS), Some(0b10_1101u64.to_ne_bytes().to_vec()));
        assert_eq!(value(attribute::DEAD_CONN_TIMEOUT), Some(0x7fff_ffffu64.to_ne_bytes().to_vec()));
        assert_eq!(value(attribute::BACKEND_IDENTIFIER), Some(b"web\0".to_vec()));
        assert_eq!(value(attribute::CLIENT_FLAGS), None, "a device that vanishes on close loses data");
        let list = value(attribute::SOCKETS).unwrap();
        let item = message::find(&list, socket_attribute::ITEM).unwrap().unwrap();
        let fd = message::find(item, socket_attribute::FD).unwrap().unwrap();
        assert_eq!(message::as_u32(fd).unwrap(), socket.as_raw_fd() as u32);
    }

    #[test]
    fn no_index_means_no_attribute_so_that_the_kernel_chooses() {
        let (socket, _server) = UnixStream::pair().unwrap();
        let attributes = params(None).attributes(socket.as_fd());
        assert_eq!(message::find(attributes.as_bytes(), attribute::INDEX).unwrap(), None);
    }

    #[test]
    fn reconfigure_never_sends_a_size_by_accident() {
        let (socket, _server) = UnixStream::pair().unwrap();
        let attributes = reconfigure_attributes(0, socket.as_fd(), "web", None);
        assert_eq!(message::find(attributes.as_bytes(), attribute::SIZE_BYTES).unwrap(), None);
        let attributes = reconfigure_attributes(0, socket.as_fd(), "web", Some(4096));
        let size = message::find(attributes.as_bytes(), attribute::SIZE_BYTES).unwrap();
        assert_eq!(size, Some(4096u64.to_ne_bytes().as_slice()));
    }

    #[test]
    fn bad_parameters_are_refused_before_the_kernel_sees_them() {
        let (socket, _server) = UnixStream::pair().unwrap();
        let too_small = ConnectParams { size: 511, ..params(None) };
        assert!(matches!(connect(socket.as_fd(), &too_small), Err(KernelError::Invalid(_))));
        for identifier in ["", "a\0b", "a\nb", " a", &"x".repeat(MAX_BACKEND_IDENTIFIER + 1)] {
            let bad = ConnectParams { backend_identifier: identifier.to_owned(), ..params(None) };
            assert!(matches!(connect(socket.as_fd(), &bad), Err(KernelError::Invalid(_))), "{identifier:?}");
        }
    }

    #[test]
    fn a_closed_end_is_seen_and_an_open_one_is_not() {
        let (socket, server) = UnixStream::pair().unwrap();
        assert!(!has_hung_up(server.as_fd()).unwrap());
        drop(socket);
        assert!(has_hung_up(server.as_fd()).unwrap());
    }

    #[test]
    fn status_lists_devices() {
        let mut item = Attributes::new();
        item.u32(device_attribute::INDEX, 7).u8(device_attribute::CONNECTED, 1);
        let mut list = Attributes::new();
        list.nested(1, &item);
        let mut answer = Attributes::new();
        answer.nested(attribute::DEVICE_LIST, &list);
        assert_eq!(decode_status(answer.as_bytes()).unwrap(), vec![(7, true)]);
        assert_eq!(decode_status(&[]).unwrap(), vec![]);
        assert!(decode_status(&answer.as_bytes()[..answer.as_bytes().len() - 2]).is_err());
    }
}
