//! Constants and messages of the NBD protocol document (`doc/proto.md`).
//!
//! Numbers are open newtypes: a peer may send one that has no name here, and it survives decode and encode. Messages
//! are plain structs with `encode` and `decode`; `decode` takes the whole message and refuses one that is too short or
//! too long. All integers on the wire are big-endian. Nothing here decides anything: that is [`crate::proto`].

/// An integer of the protocol with names for the values that the document knows.
macro_rules! open_newtype {
    ($(#[$meta:meta])* $name:ident($int:ty) { $($(#[$value_meta:meta])* $value:ident = $number:expr,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub $int);

        impl $name {
            $($(#[$value_meta])* pub const $value: $name = $name($number);)*

            /// The document's name for the value, where it has one.
            pub fn name(self) -> Option<&'static str> {
                match self {
                    $($name::$value => Some(stringify!($value)),)*
                    _ => None,
                }
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(self, f)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, "{}({:#x})", stringify!($name), self.0),
                }
            }
        }
    };
}

/// A set of bits of the protocol with names for those that the document knows.
macro_rules! open_flags {
    ($(#[$meta:meta])* $name:ident($int:ty) { $($(#[$value_meta:meta])* $value:ident = $bit:expr,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
        pub struct $name(pub $int);

        impl $name {
            /// No bit set.
            pub const NONE: $name = $name(0);
            $($(#[$value_meta])* pub const $value: $name = $name(1 << $bit);)*

            /// Whether every bit of `other` is set.
            pub fn contains(self, other: $name) -> bool {
                self.0 & other.0 == other.0
            }

            /// The bits that are set here and not in `known`.
            pub fn without(self, known: $name) -> $name {
                $name(self.0 & !known.0)
            }

            /// This set with the bits of `other`, if `condition` holds.
            pub fn with_if(self, other: $name, condition: bool) -> $name {
                if condition { self | other } else { self }
            }
        }

        impl std::ops::BitOr for $name {
            type Output = $name;
            fn bitor(self, other: $name) -> $name {
                $name(self.0 | other.0)
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let mut rest = *self;
                let mut separator = "";
                $(if rest.contains($name::$value) {
                    write!(f, "{separator}{}", stringify!($value))?;
                    separator = "|";
                    rest = rest.without($name::$value);
                })*
                if rest.0 != 0 || separator.is_empty() {
                    write!(f, "{separator}{:#x}", rest.0)?;
                }
                Ok(())
            }
        }
    };
}

pub mod errno;
pub mod flags;
pub mod option;
pub mod reply;
pub mod request;

pub use errno::Errno;
pub use flags::{ChunkFlags, ClientFlags, CommandFlags, HandshakeFlags, TransmissionFlags};
pub use option::{
    ExportRequest, Info, InfoType, MetaContext, MetaQuery, OptionCode, OptionHeader, OptionReply, OptionReplyHeader,
    ServerEntry,
};
pub use reply::{ChunkHeader, ChunkType, ErrorChunk, ExtendedChunkHeader, SimpleReply};
pub use request::{Command, Request, RequestHead, StatusQuery};

/// First eight bytes of every server's greeting: `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: follows [`INIT_MAGIC`] in the newstyle greeting, and begins every option that a client sends.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Follows [`INIT_MAGIC`] in the greeting of an oldstyle server, which is not supported.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Begins every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins every request with extended headers.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Begins a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Begins a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;
/// Begins every chunk of a reply with extended headers.
pub const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;
/// Longest string (export name, context name, text) in bytes.
pub const MAX_STRING: usize = 4096;
/// Zero bytes after the reply to EXPORT_NAME, unless both sides set NO_ZEROES.
pub const EXPORT_NAME_PADDING: usize = 124;
/// The meta context that says what is allocated and what reads as zeroes.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// The form of requests and replies in the transmission phase (document: "Transmission"). Later ones can do more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Framing {
    /// Compact requests and simple replies only.
    #[default]
    Simple,
    /// Compact requests; a READ and a BLOCK_STATUS are answered in chunks (STRUCTURED_REPLY).
    Structured,
    /// Requests with 64-bit lengths; everything is answered in chunks (EXTENDED_HEADERS).
    Extended,
}

impl Framing {
    /// Whether replies may come in chunks.
    pub fn has_chunks(self) -> bool {
        self >= Framing::Structured
    }

    /// Length of a request's head in bytes.
    pub fn request_length(self) -> usize {
        if self == Framing::Extended { Request::EXTENDED_LENGTH } else { Request::LENGTH }
    }
}

/// Why bytes are not the message that was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The message ends before its last field.
    #[error("the message is {missing} bytes too short")]
    NotEnough {
        /// Bytes missing for the field that was being read.
        missing: usize,
    },
    /// The magic number is another one.
    #[error("{what} begins with {found:#x} instead of its magic number {expected:#x}")]
    Magic {
        /// The message that was expected.
        what: &'static str,
        /// Its magic number.
        expected: u64,
        /// What stood there.
        found: u64,
    },
    /// A field contradicts another, or bytes are left over.
    #[error("{what}")]
    Malformed {
        /// What is wrong.
        what: &'static str,
    },
}

/// Reads the fields of a message, front to back.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn of(bytes: &'a [u8]) -> Fields<'a> {
        Fields(bytes)
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        match self.0.split_at_checked(count) {
            Some((front, rest)) => {
                self.0 = rest;
                Ok(front)
            }
            None => Err(WireError::NotEnough { missing: count - self.0.len() }),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string of `length` bytes, which must be UTF-8 of at most [`MAX_STRING`] bytes without NUL.
    pub(crate) fn string(&mut self, length: usize) -> Result<String, WireError> {
        if length > MAX_STRING {
            return Err(WireError::Malformed { what: "a string is longer than 4096 bytes" });
        }
        let bytes = self.take(length)?;
        match std::str::from_utf8(bytes) {
            Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
            _ => Err(WireError::Malformed { what: "a string is not UTF-8" }),
        }
    }

    pub(crate) fn remaining(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn end(self) -> Result<(), WireError> {
        if self.0.is_empty() { Ok(()) } else { Err(WireError::Malformed { what: "the message is too long" }) }
    }

    pub(crate) fn magic32(&mut self, what: &'static str, expected: u32) -> Result<(), WireError> {
        let found = self.u32()?;
        if found == expected {
            return Ok(());
        }
        Err(WireError::Magic { what, expected: expected.into(), found: found.into() })
    }

    pub(crate) fn magic64(&mut self, what: &'static str, expected: u64) -> Result<(), WireError> {
        let found = self.u64()?;
        if found == expected { Ok(()) } else { Err(WireError::Magic { what, expected, found }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_numbers_keep_their_value_in_text() {
        assert_eq!(format!("{:?}", Command(77)), "Command(0x4d)");
        assert_eq!(format!("{}", Command::WRITE_ZEROES), "WRITE_ZEROES");
        assert_eq!(format!("{:?}", CommandFlags::FUA | CommandFlags(1 << 9)), "FUA|0x200");
        assert_eq!(format!("{:?}", CommandFlags::NONE), "0x0");
    }

    #[test]
    fn a_short_message_says_how_much_is_missing() {
        assert_eq!(Fields::of(&[1, 2, 3]).u64(), Err(WireError::NotEnough { missing: 5 }));
    }

    #[test]
    fn a_string_is_utf8_without_nul_and_not_too_long() {
        assert!(Fields::of(&[0xff, 0xfe]).string(2).is_err());
        assert!(Fields::of(b"a\0b").string(3).is_err());
        assert!(Fields::of(&[b'a'; MAX_STRING + 1]).string(MAX_STRING + 1).is_err());
        assert_eq!(Fields::of(&[b'a'; MAX_STRING]).string(MAX_STRING).map(|s| s.len()), Ok(MAX_STRING));
    }
}
