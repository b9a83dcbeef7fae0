//! Netlink messages as bytes: encode and decode, nothing else.
//!
//! A message is a netlink header, a generic netlink header and attributes; an attribute is a length, a type and a value,
//! padded to 4 bytes, and may hold attributes itself. All numbers are in the machine's byte order.

/// Commands of the family `nbd`.
pub mod command {
    /// Connects a device.
    pub const CONNECT: u8 = 1;
    /// Ends a connection.
    pub const DISCONNECT: u8 = 2;
    /// Gives a device new sockets or another size.
    pub const RECONFIGURE: u8 = 3;
    /// Sent to the multicast group when a socket has died.
    pub const LINK_DEAD: u8 = 4;
    /// Lists devices.
    pub const STATUS: u8 = 5;
}

/// Attributes of the family `nbd`.
pub mod attribute {
    /// The device's number, u32.
    pub const INDEX: u16 = 1;
    /// Size in bytes, u64.
    pub const SIZE_BYTES: u16 = 2;
    /// Block size in bytes, u64.
    pub const BLOCK_SIZE_BYTES: u16 = 3;
    /// Seconds until a slow socket is taken for dead, u64; 0: never.
    pub const TIMEOUT: u16 = 4;
    /// Transmission flags of the protocol document, u64.
    pub const SERVER_FLAGS: u16 = 5;
    /// Flags for the device itself, u64.
    pub const CLIENT_FLAGS: u16 = 6;
    /// List of sockets.
    pub const SOCKETS: u16 = 7;
    /// Seconds for which I/O is held without a live socket, u64.
    pub const DEAD_CONN_TIMEOUT: u16 = 8;
    /// List of devices in an answer to STATUS.
    pub const DEVICE_LIST: u16 = 9;
    /// Whose device it is, a string that ends with NUL.
    pub const BACKEND_IDENTIFIER: u16 = 10;
}

/// Attributes inside [`attribute::SOCKETS`].
pub mod socket_attribute {
    /// One entry of the list.
    pub const ITEM: u16 = 1;
    /// File descriptor inside an entry, u32.
    pub const FD: u16 = 1;
}

/// Attributes inside an entry of [`attribute::DEVICE_LIST`].
pub mod device_attribute {
    /// The device's number, u32.
    pub const INDEX: u16 = 1;
    /// Whether it is connected, u8.
    pub const CONNECTED: u16 = 2;
}

/// The controller, which knows the families: its fixed number, command, and attributes.
pub mod controller {
    /// Its family number.
    pub const FAMILY: u16 = 16;
    /// Its multicast and request version.
    pub const VERSION: u8 = 1;
    /// Asks for a family by its name.
    pub const GET_FAMILY: u8 = 3;
    /// The number that the family got, u16.
    pub const FAMILY_ID: u16 = 1;
    /// The family's name, a string.
    pub const FAMILY_NAME: u16 = 2;
    /// List of the family's multicast groups.
    pub const MULTICAST_GROUPS: u16 = 7;
    /// Name of a group, a string.
    pub const GROUP_NAME: u16 = 1;
    /// Number of a group, u32.
    pub const GROUP_ID: u16 = 2;
}

/// The version of the family `nbd`.
pub const NBD_VERSION: u8 = 1;

const MESSAGE_HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;
const ATTRIBUTE_HEADER: usize = 4;
const KIND_ERROR: u16 = 2;
const FLAG_REQUEST: u16 = 1;
const FLAG_ACK: u16 = 4;
const FLAG_NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;
const FLAG_CAPPED: u16 = 0x100;
const FLAG_EXTENDED_ACK: u16 = 0x200;
const EXTENDED_ACK_TEXT: u16 = 1;

/// Bytes that are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A length points beyond the end, or is shorter than its own header.
    #[error("a length of {length} where {available} bytes are left")]
    Length {
        /// The length that was found.
        length: usize,
        /// What is there.
        available: usize,
    },
    /// A value does not have the size of its type.
    #[error("a value of {0} bytes has the wrong size")]
    Value(usize),
    /// Something that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
}

/// Attributes being put together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a byte.
    pub fn u8(&mut self, kind: u16, value: u8) -> &mut Self {
        self.push(kind, &[value])
    }

    /// Adds a number of 4 bytes.
    pub fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.push(kind, &value.to_ne_bytes())
    }

    /// Adds a number of 8 bytes.
    pub fn u64(&mut self, kind: u16, value: u64) -> &mut Self {
        self.push(kind, &value.to_ne_bytes())
    }

    /// Adds a string, with the NUL that the kernel expects.
    pub fn string(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.push(kind, &bytes)
    }

    /// Adds attributes inside an attribute.
    pub fn nested(&mut self, kind: u16, inner: &Attributes) -> &mut Self {
        self.push(kind | FLAG_NESTED, &inner.0)
    }

    /// The bytes so far.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The callers bound the values (a backend identifier of 1 KiB is the longest): a length always fits.
    fn push(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = (ATTRIBUTE_HEADER + value.len()) as u16;
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
}

/// A whole request, which asks for an acknowledgement.
pub fn request(family: u16, sequence: u32, command: u8, version: u8, attributes: &Attributes) -> Vec<u8> {
    let length = (MESSAGE_HEADER + GENERIC_HEADER + attributes.0.len()) as u32;
    let mut bytes = Vec::with_capacity(length as usize);
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&family.to_ne_bytes());
    bytes.extend_from_slice(&(FLAG_REQUEST | FLAG_ACK).to_ne_bytes());
    bytes.extend_from_slice(&sequence.to_ne_bytes());
    bytes.extend_from_slice(&0u32.to_ne_bytes());
    bytes.extend_from_slice(&[command, version, 0, 0]);
    bytes.extend_from_slice(&attributes.0);
    bytes
}

/// A message from the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// The end of a request: an error number of this system (0: done), and what the kernel had to say about it.
    End {
        /// Echoed from the request.
        sequence: u32,
        /// 0, or a positive errno.
        errno: i32,
        /// The kernel's own words; often empty.
        text: String,
    },
    /// An answer or an event.
    Data {
        /// Echoed from the request; 0 for an event.
        sequence: u32,
        /// The family that speaks.
        family: u16,
        /// The family's command.
        command: u8,
        /// The attributes.
        attributes: &'a [u8],
    },
}

/// The messages of one datagram.
pub fn messages(datagram: &[u8]) -> impl Iterator<Item = Result<Message<'_>, Malformed>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let result = split_message(rest);
        rest = result.as_ref().map_or(&[][..], |(_, rest)| rest);
        Some(result.map(|(message, _)| message))
    })
}

/// The attributes of a message or of an attribute: type without its flag bits, and value. Ends after the first fault.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8]), Malformed>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let result = split_attribute(rest);
        rest = result.as_ref().map_or(&[][..], |(_, _, rest)| rest);
        Some(result.map(|(kind, value, _)| (kind, value)))
    })
}

/// The value of the first attribute of a type.
pub fn find(bytes: &[u8], kind: u16) -> Result<Option<&[u8]>, Malformed> {
    for found in attributes(bytes) {
        let (found, value) = found?;
        if found == kind {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// A value as a number of 4 bytes.
pub fn as_u32(value: &[u8]) -> Result<u32, Malformed> {
    value.try_into().map(u32::from_ne_bytes).map_err(|_| Malformed::Value(value.len()))
}

/// A value as a number of 2 bytes.
pub fn as_u16(value: &[u8]) -> Result<u16, Malformed> {
    value.try_into().map(u16::from_ne_bytes).map_err(|_| Malformed::Value(value.len()))
}

/// A value as a string without its NUL.
pub fn as_string(value: &[u8]) -> String {
    String::from_utf8_lossy(value.split(|&byte| byte == 0).next().unwrap_or_default()).into_owned()
}

fn split_message(bytes: &[u8]) -> Result<(Message<'_>, &[u8]), Malformed> {
    let wrong = |length| Malformed::Length { length, available: bytes.len() };
    let header = bytes.get(..MESSAGE_HEADER).ok_or(wrong(MESSAGE_HEADER))?;
    let length = as_u32(&header[..4])? as usize;
    let body = bytes.get(MESSAGE_HEADER..length).ok_or(wrong(length))?;
    let kind = as_u16(&header[4..6])?;
    let flags = as_u16(&header[6..8])?;
    let sequence = as_u32(&header[8..12])?;
    let rest = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    let short = Malformed::Length { length: GENERIC_HEADER, available: body.len() };
    let (head, data) = body.split_at_checked(GENERIC_HEADER).ok_or(short)?;
    if kind == KIND_ERROR {
        // Negative, so that it can be told from a count.
        let errno = (as_u32(head)? as i32).wrapping_neg();
        return Ok((Message::End { sequence, errno, text: extended_text(flags, data) }, rest));
    }
    Ok((Message::Data { sequence, family: kind, command: head[0], attributes: data }, rest))
}

/// The text of an extended acknowledgement, which follows the (possibly capped) copy of the request. Only a help for
/// people: where it cannot be read there is none.
fn extended_text(flags: u16, data: &[u8]) -> String {
    if flags & FLAG_EXTENDED_ACK == 0 {
        return String::new();
    }
    let copied = match data.get(..4).map(as_u32) {
        Some(Ok(length)) if flags & FLAG_CAPPED == 0 => (length as usize).next_multiple_of(4),
        _ => MESSAGE_HEADER,
    };
    let text = find(data.get(copied..).unwrap_or_default(), EXTENDED_ACK_TEXT);
    text.ok().flatten().map(as_string).unwrap_or_default()
}

fn split_attribute(bytes: &[u8]) -> Result<(u16, &[u8], &[u8]), Malformed> {
    let wrong = |length| Malformed::Length { length, available: bytes.len() };
    let header = bytes.get(..ATTRIBUTE_HEADER).ok_or(wrong(ATTRIBUTE_HEADER))?;
    let length = usize::from(as_u16(&header[..2])?);
    let value = bytes.get(ATTRIBUTE_HEADER..length).ok_or(wrong(length))?;
    let kind = as_u16(&header[2..])? & TYPE_MASK;
    Ok((kind, value, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn a_request_has_these_bytes() {
        let mut item = Attributes::new();
        item.u32(socket_attribute::FD, 9);
        let mut list = Attributes::new();
        list.nested(socket_attribute::ITEM, &item);
        let mut attributes = Attributes::new();
        attributes.u32(1, 3).u64(2, 0x0102_0304).string(10, "ab").nested(7, &list);
        let expected: Vec<u8> = [
            &[64, 0, 0, 0, 27, 0, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0][..], // length, family, REQUEST|ACK, sequence, port
            &[1, 1, 0, 0],                                           // command, version, reserved
            &[8, 0, 1, 0, 3, 0, 0, 0],
            &[12, 0, 2, 0, 4, 3, 2, 1, 0, 0, 0, 0],
            &[7, 0, 10, 0, b'a', b'b', 0, 0], // length without the padding
            &[16, 0, 7, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, 9, 0, 0, 0],
        ]
        .concat();
        assert_eq!(request(27, 7, command::CONNECT, NBD_VERSION, &attributes), expected);
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn an_acknowledgement_with_text_is_understood() {
        let datagram: Vec<u8> = [
            &[52, 0, 0, 0, 2, 0, 0, 3, 5, 0, 0, 0, 0, 0, 0, 0][..], // NLMSG_ERROR, CAPPED|ACK_TLVS
            &(-22i32).to_le_bytes(),
            &[200, 0, 0, 0, 27, 0, 5, 0, 5, 0, 0, 0, 0, 0, 0, 0], // the request's header only: capped
            &[13, 0, 1, 0, b'b', b'a', b'd', b' ', b's', b'i', b'z', b'e', 0, 0, 0, 0],
        ]
        .concat();
        let found: Vec<_> = messages(&datagram).collect();
        assert_eq!(found, vec![Ok(Message::End { sequence: 5, errno: 22, text: "bad size".to_owned() })]);
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn an_answer_and_its_end_in_one_datagram() {
        let datagram: Vec<u8> = [
            &[28, 0, 0, 0, 27, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 8, 0, 1, 0, 2, 0, 0, 0][..],
            &[36, 0, 0, 0, 2, 0, 0, 1, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[0; 16],
        ]
        .concat();
        let found: Result<Vec<_>, _> = messages(&datagram).collect();
        let found = found.unwrap();
        let Message::Data { sequence: 5, family: 27, command: 1, attributes } = found[0] else { panic!("{found:?}") };
        assert_eq!(as_u32(find(attributes, attribute::INDEX).unwrap().unwrap()), Ok(2));
        assert_eq!(found[1], Message::End { sequence: 5, errno: 0, text: String::new() });
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        assert_eq!(find(&[3, 0, 1, 0], 1), Err(Malformed::Length { length: 3, available: 4 }));
        assert_eq!(find(&[9, 0, 1, 0, 0, 0, 0, 0], 1), Err(Malformed::Length { length: 9, available: 8 }));
        assert_eq!(find(&[1, 0], 1), Err(Malformed::Length { length: 4, available: 2 }));
        assert_eq!(as_u32(&[1, 2]), Err(Malformed::Value(2)));
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(values in prop::collection::vec((1u16..100, prop::collection::vec(any::<u8>(), 0..40)), 0..8)) {
            let mut built = Attributes::new();
            for (kind, value) in &values {
                built.push(*kind, value);
            }
            let read: Result<Vec<_>, _> = attributes(built.as_bytes()).map(|a| a.map(|(k, v)| (k, v.to_vec()))).collect();
            prop_assert_eq!(read.unwrap(), values);
        }

        #[test]
        fn no_bytes_make_it_panic_or_loop(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(messages(&bytes).count() <= bytes.len());
            prop_assert!(attributes(&bytes).count() <= bytes.len());
        }
    }
}
