//! The frames that carry a checkpoint's image directory, and their bytes. Pure: no file, no socket.
//!
//! A frame is a 4-byte length (of what follows), a 1-byte kind and the fields, all big endian. Frames are small: one
//! carries at most [`MAX_DATA`] bytes of a file, so that other messages get between them.

use std::fmt;

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The unit in which files are compared and sent, in bytes; also the most that a frame carries of a file.
pub const MAX_DATA: usize = 256 * 1024;
/// The longest path of an image, in bytes.
pub const MAX_PATH: usize = 255;
/// How deep below the image directory an image may lie: the number of names in its path.
pub const MAX_DEPTH: usize = 8;
/// The longest frame, without its length field, in bytes.
pub const MAX_FRAME: usize = 1 + 4 + 8 + MAX_DATA;
/// How many frames wait between a follower or receiver and the link: 4 MiB of data.
pub const QUEUE: usize = 16;

const FILE: u8 = 1;
const DATA: u8 = 2;
const TRUNCATE: u8 = 3;
const SUM: u8 = 4;
const END: u8 = 5;
const ROUND: u8 = 6;

/// A file's path below the image directory: relative, `/` between names, none of them empty, `.` or `..`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImagePath(String);

impl ImagePath {
    /// Checks a path that somebody else has chosen.
    pub fn new(path: &str) -> Result<Self, BadFrame> {
        let bad = |why| Err(BadFrame::Path { path: path.chars().take(80).collect(), why });
        if path.is_empty() || path.len() > MAX_PATH {
            return bad("its length is not 1 to 255 bytes");
        }
        if path.chars().any(char::is_control) {
            return bad("it holds control characters");
        }
        if path.split('/').any(|name| matches!(name, "" | "." | "..")) {
            return bad("it is absolute, or a name in it is empty, '.' or '..'");
        }
        if path.split('/').count() > MAX_DEPTH {
            return bad("it is too deep");
        }
        Ok(Self(path.to_owned()))
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The directories above it, the outermost first.
    pub fn parents(&self) -> impl Iterator<Item = &str> {
        self.0.match_indices('/').map(|(at, _)| &self.0[..at])
    }
}

impl fmt::Display for ImagePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One step of an image directory's transfer. Files are named once, and by number from then on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A file was seen; it is made, empty. Numbers begin at 0 and rise by 1.
    File {
        /// Its number.
        id: u32,
        /// Where it goes.
        path: ImagePath,
    },
    /// Bytes of a file, 1 to [`MAX_DATA`] of them. They replace what an earlier frame put there.
    Data {
        /// The file's number.
        id: u32,
        /// Where they begin, in bytes.
        offset: u64,
        /// The bytes.
        bytes: Bytes,
    },
    /// The file has become shorter.
    Truncate {
        /// The file's number.
        id: u32,
        /// Its size, in bytes.
        size: u64,
    },
    /// The file is whole. A file without one was removed while the dump was written.
    Sum {
        /// The file's number.
        id: u32,
        /// Its size, in bytes.
        size: u64,
        /// The CRC-32 (IEEE) of its content.
        crc32: u32,
    },
    /// The directory is whole.
    End {
        /// How many [`Frame::Sum`] were sent.
        files: u32,
    },
    /// A round of a pre-dump begins: its directory is made, with its link to the round before. Numbers begin at 1 and rise
    /// by 1.
    Round {
        /// Its number.
        number: u32,
    },
}

/// Bytes that are no frame, or a frame that may not be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    /// Longer than any frame is.
    #[error(
        "the peer sent a checkpoint frame of {0} bytes, more than {MAX_FRAME}: are both sides of the same version?"
    )]
    TooLong(usize),
    /// A kind that is not known.
    #[error("the peer sent a checkpoint frame of kind {0}, which is not known: are both sides of the same version?")]
    Kind(u8),
    /// The fields do not fill the frame, or do not fit in it.
    #[error("the peer sent a checkpoint frame of kind {kind} with {len} bytes, which is not its size")]
    Size {
        /// The kind.
        kind: u8,
        /// The bytes after the kind.
        len: usize,
    },
    /// A path that leads elsewhere.
    #[error("the peer sent a checkpoint file with the path {path:?}, which is refused: {why}")]
    Path {
        /// The path, cut to a printable length.
        path: String,
        /// Why.
        why: &'static str,
    },
}

impl Frame {
    /// Appends the frame's bytes.
    pub fn encode(&self, out: &mut BytesMut) {
        let (kind, len) = match self {
            Frame::File { path, .. } => (FILE, 4 + path.0.len()),
            Frame::Data { bytes, .. } => (DATA, 12 + bytes.len()),
            Frame::Truncate { .. } => (TRUNCATE, 12),
            Frame::Sum { .. } => (SUM, 16),
            Frame::End { .. } => (END, 4),
            Frame::Round { .. } => (ROUND, 4),
        };
        out.reserve(5 + len);
        out.put_u32(len as u32 + 1);
        out.put_u8(kind);
        match self {
            Frame::File { id, path } => {
                out.put_u32(*id);
                out.put_slice(path.0.as_bytes());
            }
            Frame::Data { id, offset, bytes } => {
                out.put_u32(*id);
                out.put_u64(*offset);
                out.put_slice(bytes);
            }
            Frame::Truncate { id, size } => {
                out.put_u32(*id);
                out.put_u64(*size);
            }
            Frame::Sum { id, size, crc32 } => {
                out.put_u32(*id);
                out.put_u64(*size);
                out.put_u32(*crc32);
            }
            Frame::End { files } => out.put_u32(*files),
            Frame::Round { number } => out.put_u32(*number),
        }
    }

    /// Takes one frame from the front of `buffer`, or nothing while it is not whole.
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Frame>, BadFrame> {
        let Some(head) = buffer.first_chunk::<4>() else { return Ok(None) };
        let len = u32::from_be_bytes(*head) as usize;
        if len > MAX_FRAME {
            return Err(BadFrame::TooLong(len));
        }
        if buffer.len() < 4 + len {
            return Ok(None);
        }
        buffer.advance(4);
        let mut body = buffer.split_to(len).freeze();
        if body.is_empty() {
            return Err(BadFrame::Size { kind: 0, len: 0 });
        }
        let kind = body.get_u8();
        let len = body.len();
        let fits = match kind {
            FILE => (5..=4 + MAX_PATH).contains(&len),
            DATA => (13..=12 + MAX_DATA).contains(&len),
            TRUNCATE => len == 12,
            SUM => len == 16,
            END | ROUND => len == 4,
            other => return Err(BadFrame::Kind(other)),
        };
        if !fits {
            return Err(BadFrame::Size { kind, len });
        }
        let id = body.get_u32();
        Ok(Some(match kind {
            FILE => {
                let path = std::str::from_utf8(&body).map_err(|_| BadFrame::Path {
                    path: String::from_utf8_lossy(&body).chars().take(80).collect(),
                    why: "it is not UTF-8",
                })?;
                Frame::File { id, path: ImagePath::new(path)? }
            }
            DATA => Frame::Data { id, offset: body.get_u64(), bytes: body },
            TRUNCATE => Frame::Truncate { id, size: body.get_u64() },
            SUM => Frame::Sum { id, size: body.get_u64(), crc32: body.get_u32() },
            ROUND => Frame::Round { number: id },
            _ => Frame::End { files: id },
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames() -> impl Strategy<Value = Frame> {
        let bytes = proptest::collection::vec(any::<u8>(), 1..2000).prop_map(Bytes::from);
        prop_oneof![
            (any::<u32>(), "[a-z0-9.-]{1,20}x(/[a-z]{1,9}){0,3}")
                .prop_map(|(id, path)| Frame::File { id, path: ImagePath::new(&path).unwrap() }),
            (any::<u32>(), any::<u64>(), bytes).prop_map(|(id, offset, bytes)| Frame::Data { id, offset, bytes }),
            (any::<u32>(), any::<u64>()).prop_map(|(id, size)| Frame::Truncate { id, size }),
            (any::<u32>(), any::<u64>(), any::<u32>()).prop_map(|(id, size, crc32)| Frame::Sum { id, size, crc32 }),
            any::<u32>().prop_map(|files| Frame::End { files }),
            any::<u32>().prop_map(|number| Frame::Round { number }),
        ]
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in(sent in proptest::collection::vec(frames(), 0..12), step in 1usize..700) {
            let mut wire = BytesMut::new();
            sent.iter().for_each(|f| f.encode(&mut wire));
            let (mut buffer, mut got) = (BytesMut::new(), Vec::new());
            for piece in wire.chunks(step) {
                buffer.extend_from_slice(piece);
                while let Some(frame) = Frame::decode(&mut buffer).unwrap() {
                    got.push(frame);
                }
            }
            prop_assert_eq!(got, sent);
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn any_bytes_are_a_frame_an_error_or_too_few(bytes in proptest::collection::vec(any::<u8>(), 0..64), kind in 0u8..8) {
            let mut buffer = BytesMut::new();
            buffer.put_u32(bytes.len() as u32 + 1);
            buffer.put_u8(kind);
            buffer.put_slice(&bytes);
            if let Ok(Some(frame)) = Frame::decode(&mut buffer.clone()) {
                let mut again = BytesMut::new();
                frame.encode(&mut again);
                prop_assert_eq!(again, buffer);
            }
        }
    }

    #[test]
    fn the_largest_frame_fits_and_no_larger_one_is_waited_for() {
        let frame = Frame::Data { id: 1, offset: 2, bytes: vec![7; MAX_DATA].into() };
        let mut wire = BytesMut::new();
        frame.encode(&mut wire);
        assert_eq!(wire.len(), 4 + MAX_FRAME);
        assert_eq!(Frame::decode(&mut wire), Ok(Some(frame)));
        let mut wire = BytesMut::from(&(MAX_FRAME as u32 + 1).to_be_bytes()[..]);
        assert_eq!(Frame::decode(&mut wire), Err(BadFrame::TooLong(MAX_FRAME + 1)));
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for bad in
            ["", "/etc/passwd", "..", "../x", "a/../b", "a//b", "a/", "./a", "a/.", "a\0b", "a\nb", "1/2/3/4/5/6/7/8/9"]
        {
            assert!(ImagePath::new(bad).is_err(), "{bad:?} was taken");
        }
        assert!(ImagePath::new(&"x".repeat(256)).is_err());
        let deep = ImagePath::new("a/b/c.img").unwrap();
        assert_eq!(deep.parents().collect::<Vec<_>>(), ["a", "a/b"]);
    }
}
