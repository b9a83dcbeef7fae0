//! The generic netlink socket: opens it, finds the family `nbd`, sends a request and collects its answers.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};
use std::{io, thread};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::KernelError;
use super::message::{self, Attributes, Malformed, Message, controller};

/// The name of the kernel's family.
const FAMILY: &str = "nbd";
/// The multicast group for LINK_DEAD.
const GROUP: &str = "nbd_mc_group";
/// The kernel's datagrams are at most a page or two.
const RECEIVE_BUFFER: usize = 64 << 10;
/// How long the kernel may take to answer, in seconds. It answers in milliseconds, unless another caller's DISCONNECT
/// holds its lock because a server is stopped.
const ANSWER_TIMEOUT_S: i64 = 60;

/// A socket to the kernel's family `nbd`.
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    family: Family,
}

/// What the controller knows of the family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Family {
    /// Its number on this boot.
    pub(super) number: u16,
    /// The group for LINK_DEAD.
    pub(super) group: Option<u32>,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// The kernel said no.
    #[error("{errno}{}{text}", if text.is_empty() { "" } else { ": " })]
    Refused { errno: Errno, text: String },
    /// The socket failed.
    #[error(transparent)]
    Socket(#[from] io::Error),
    /// The answer makes no sense.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl CallError {
    /// The kernel's error number, if it is the kernel that refused.
    pub(super) fn errno(&self) -> Option<Errno> {
        match self {
            CallError::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// For people: what was tried.
    pub(super) fn into_kernel_error(self, what: &str) -> KernelError {
        let what = what.to_owned();
        match self {
            CallError::Refused { errno: Errno::EPERM, .. } => KernelError::NotPermitted { what },
            CallError::Refused { errno, text } if text.is_empty() => {
                KernelError::Netlink { what, source: errno.into() }
            }
            CallError::Refused { errno, text } => {
                KernelError::Netlink { what, source: io::Error::other(format!("{errno}: {text}")) }
            }
            CallError::Socket(source) => KernelError::Netlink { what, source },
            CallError::Malformed(source) => KernelError::Malformed { what, source },
        }
    }
}

impl Netlink {
    /// Opens the socket and finds the family. Where the family is missing, `modprobe nbd` is tried once.
    pub(super) fn open() -> Result<Self, KernelError> {
        let what = "talk to the kernel by generic netlink";
        let socket = open_socket().map_err(|source| KernelError::Netlink { what: what.to_owned(), source })?;
        let mut netlink = Netlink { socket, sequence: 0, family: Family::default() };
        let found = match netlink.find_family().map_err(|error| error.into_kernel_error(what))? {
            Some(family) => Some(family),
            None => {
                let modprobe = load_module();
                let found = netlink.find_family().map_err(|error| error.into_kernel_error(what))?;
                if found.is_none() {
                    return Err(KernelError::NoNbd { modprobe });
                }
                found
            }
        };
        netlink.family = found.unwrap_or_default();
        Ok(netlink)
    }

    /// The family that was found.
    pub(super) fn family(&self) -> Family {
        self.family
    }

    /// The socket itself.
    pub(super) fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Sends a request to the family and returns the attributes of each answer.
    pub(super) fn call(&mut self, command: u8, attributes: &Attributes) -> Result<Vec<Vec<u8>>, CallError> {
        self.exchange(self.family.number, command, message::NBD_VERSION, attributes)
    }

    fn find_family(&mut self) -> Result<Option<Family>, CallError> {
        let mut attributes = Attributes::new();
        attributes.string(controller::FAMILY_NAME, FAMILY);
        match self.exchange(controller::FAMILY, controller::GET_FAMILY, controller::VERSION, &attributes) {
            Ok(answers) => Ok(answers.first().map(|answer| decode_family(answer)).transpose()?),
            Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn exchange(
        &mut self,
        family: u16,
        command: u8,
        version: u8,
        attributes: &Attributes,
    ) -> Result<Vec<Vec<u8>>, CallError> {
        self.sequence += 1;
        let request = message::request(family, self.sequence, command, version, attributes);
        let kernel = NetlinkAddr::new(0, 0);
        retry(|| sendto(self.socket.as_raw_fd(), &request, &kernel, MsgFlags::empty()))?;
        let mut answers = Vec::new();
        let mut buffer = vec![0; RECEIVE_BUFFER];
        loop {
            let length = match retry(|| recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())) {
                Err(Errno::EAGAIN) => {
                    let text = "the kernel does not answer; is the server of another NBD device stopped?";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text).into());
                }
                other => other?,
            };
            for message in message::messages(&buffer[..length]) {
                match message? {
                    Message::End { sequence, errno: 0, .. } if sequence == self.sequence => return Ok(answers),
                    Message::End { sequence, errno, text } if sequence == self.sequence => {
                        return Err(CallError::Refused { errno: Errno::from_raw(errno), text });
                    }
                    Message::Data { sequence, attributes, .. } if sequence == self.sequence => {
                        answers.push(attributes.to_vec());
                    }
                    // An answer to somebody else's question: netlink has none for us, but it does no harm.
                    Message::End { .. } | Message::Data { .. } => {}
                }
            }
        }
    }
}

impl From<Errno> for CallError {
    fn from(errno: Errno) -> Self {
        CallError::Socket(errno.into())
    }
}

/// Opens the socket in the first process's network namespace: the family `nbd` is known in no other, and the node may
/// live in one of its own. The socket stays where it was opened.
fn open_socket() -> io::Result<OwnedFd> {
    let Some(first) = first_namespace() else { return open_socket_here() };
    let opened = thread::Builder::new().name("netlink".to_owned()).spawn(move || {
        setns(first, CloneFlags::CLONE_NEWNET)?;
        open_socket_here()
    })?;
    match opened.join() {
        // Without the right to change over there is none to attach a device either; the kernel will say so.
        Ok(Ok(socket)) => Ok(socket),
        Ok(Err(_)) | Err(_) => open_socket_here(),
    }
}

/// The first process's network namespace, if it is not our own and can be seen.
fn first_namespace() -> Option<File> {
    let first = File::open("/proc/1/ns/net").ok()?;
    let own = fs::metadata("/proc/thread-self/ns/net").ok()?;
    (first.metadata().ok()?.ino() != own.ino()).then_some(first)
}

fn open_socket_here() -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkGeneric)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER_TIMEOUT_S))?;
    Ok(socket)
}

/// Loads the module and returns what modprobe said, for the error if the family is still missing.
fn load_module() -> String {
    let output = Command::new("modprobe").arg("nbd").stdin(Stdio::null()).output();
    let text = match output {
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; "),
        Err(error) => format!("{error} (Debian package kmod)"),
    };
    if text.is_empty() { "nothing".to_owned() } else { text }
}

fn decode_family(answer: &[u8]) -> Result<Family, Malformed> {
    let number = message::find(answer, controller::FAMILY_ID)?.ok_or(Malformed::Missing("the family's number"))?;
    let mut family = Family { number: message::as_u16(number)?, group: None };
    let groups = message::find(answer, controller::MULTICAST_GROUPS)?.unwrap_or_default();
    for group in message::attributes(groups) {
        let (_, group) = group?;
        let name = message::find(group, controller::GROUP_NAME)?.map(message::as_string);
        if name.as_deref() == Some(GROUP) {
            family.group = message::find(group, controller::GROUP_ID)?.map(message::as_u32).transpose()?;
        }
    }
    Ok(family)
}

fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_family_and_its_group_are_found_in_the_controllers_answer() {
        let mut other = Attributes::new();
        other.string(controller::GROUP_NAME, "other").u32(controller::GROUP_ID, 3);
        let mut group = Attributes::new();
        group.string(controller::GROUP_NAME, GROUP).u32(controller::GROUP_ID, 9);
        let mut groups = Attributes::new();
        groups.nested(1, &other).nested(2, &group);
        let mut answer = Attributes::new();
        // The kernel's u16, padded like every attribute: length 6.
        answer.string(controller::FAMILY_NAME, FAMILY).nested(controller::MULTICAST_GROUPS, &groups);
        assert_eq!(decode_family(answer.as_bytes()), Err(Malformed::Missing("the family's number")));
        let mut bytes = answer.as_bytes().to_vec();
        bytes.extend_from_slice(&6u16.to_ne_bytes());
        bytes.extend_from_slice(&controller::FAMILY_ID.to_ne_bytes());
        bytes.extend_from_slice(&27u16.to_ne_bytes());
        bytes.extend_from_slice(&[0, 0]);
        assert_eq!(decode_family(&bytes), Ok(Family { number: 27, group: Some(9) }));
    }

    #[test]
    fn an_unknown_family_is_no_error_of_the_socket() {
        // The controller itself answers on every kernel that has generic netlink, without root.
        let mut netlink = Netlink { socket: open_socket().unwrap(), sequence: 0, family: Family::default() };
        let mut attributes = Attributes::new();
        attributes.string(controller::FAMILY_NAME, "lazymigr-none");
        let answer = netlink.exchange(controller::FAMILY, controller::GET_FAMILY, controller::VERSION, &attributes);
        assert_eq!(answer.unwrap_err().errno(), Some(Errno::ENOENT));
        let mut attributes = Attributes::new();
        attributes.string(controller::FAMILY_NAME, "nlctrl");
        let answer = netlink.exchange(controller::FAMILY, controller::GET_FAMILY, controller::VERSION, &attributes);
        assert_eq!(decode_family(&answer.unwrap()[0]).unwrap().number, controller::FAMILY);
    }
}
