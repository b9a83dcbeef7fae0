//! Error values as they stand on the wire (protocol document, "Error values").
//!
//! They are numbers of the protocol, not of this machine's C library.

use std::fmt;

/// An error value of a reply. Open: a peer may send a number that has no name here.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub u32);

impl Errno {
    /// Operation not permitted: a write to a read-only export.
    pub const EPERM: Errno = Errno(1);
    /// Input/output error.
    pub const EIO: Errno = Errno(5);
    /// Cannot allocate memory.
    pub const ENOMEM: Errno = Errno(12);
    /// Invalid argument.
    pub const EINVAL: Errno = Errno(22);
    /// No space left: a write past the end, or a full store.
    pub const ENOSPC: Errno = Errno(28);
    /// Value too large: only where the document names it.
    pub const EOVERFLOW: Errno = Errno(75);
    /// Operation not supported: only where the document names it.
    pub const ENOTSUP: Errno = Errno(95);
    /// The server is shutting down.
    pub const ESHUTDOWN: Errno = Errno(108);

    /// The name of the value, where it has one.
    pub fn name(self) -> Option<&'static str> {
        Some(match self {
            Errno::EPERM => "EPERM",
            Errno::EIO => "EIO",
            Errno::ENOMEM => "ENOMEM",
            Errno::EINVAL => "EINVAL",
            Errno::ENOSPC => "ENOSPC",
            Errno::EOVERFLOW => "EOVERFLOW",
            Errno::ENOTSUP => "ENOTSUP",
            Errno::ESHUTDOWN => "ESHUTDOWN",
            _ => return None,
        })
    }
}

impl Errno {
    /// The value as a server may send it: a number that the document does not know (a raw errno of this machine, or 0)
    /// becomes EIO.
    pub fn for_the_wire(self) -> Errno {
        if self.name().is_some() { self } else { Errno::EIO }
    }
}

/// The document's value for an error of this machine. EDQUOT and EFBIG become ENOSPC, EROFS becomes EPERM, and what has
/// no counterpart becomes EIO.
impl From<&std::io::Error> for Errno {
    fn from(error: &std::io::Error) -> Errno {
        use std::io::ErrorKind;
        match error.kind() {
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Errno::EPERM,
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => Errno::ENOSPC,
            ErrorKind::OutOfMemory => Errno::ENOMEM,
            ErrorKind::InvalidInput => Errno::EINVAL,
            ErrorKind::Unsupported => Errno::ENOTSUP,
            _ => Errno::EIO,
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "NBD error {}", self.0),
        }
    }
}

impl std::error::Error for Errno {}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn errors_of_this_machine_become_those_of_the_document() {
        // EROFS, EDQUOT, EFBIG, EOPNOTSUPP, ENXIO on Linux.
        for (raw, expected) in
            [(30, Errno::EPERM), (122, Errno::ENOSPC), (27, Errno::ENOSPC), (95, Errno::ENOTSUP), (6, Errno::EIO)]
        {
            assert_eq!(Errno::from(&io::Error::from_raw_os_error(raw)), expected, "errno {raw}");
        }
    }

    #[test]
    fn only_numbers_of_the_document_reach_the_wire() {
        assert_eq!(Errno(122).for_the_wire(), Errno::EIO);
        assert_eq!(Errno(0).for_the_wire(), Errno::EIO);
        assert_eq!(Errno::ENOSPC.for_the_wire(), Errno::ENOSPC);
    }
}
