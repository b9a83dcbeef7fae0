//! Messages of the transmission phase against a naive model: fields written one after the other.

use nbd::wire::{
    ChunkFlags, ChunkHeader, ChunkType, Command, CommandFlags, Errno, ErrorChunk, ExtendedChunkHeader, Framing,
    Request, SimpleReply, StatusQuery, WireError,
};
use proptest::prelude::*;

/// Numbers with their width in bytes, as the document lists them.
fn naive(fields: &[(u64, usize)]) -> Vec<u8> {
    fields.iter().flat_map(|(number, width)| number.to_be_bytes()[8 - width..].to_vec()).collect()
}

/// Every shorter piece of a message is too short by what is missing of the field in which it ends, or of the head.
fn refuses_less<T: std::fmt::Debug>(bytes: &[u8], decode: impl Fn(&[u8]) -> Result<T, WireError>) {
    for end in 0..bytes.len() {
        assert!(matches!(decode(&bytes[..end]), Err(WireError::NotEnough { .. })), "{end} of {} bytes", bytes.len());
    }
}

proptest! {
    #[test]
    fn requests(flags: u16, command: u16, cookie: u64, offset: u64, length: u64) {
        let request = |length| {
            Request { flags: CommandFlags(flags), command: Command(command), cookie, offset, length }
        };
        let fields = |magic, length| {
            [(magic, 4), (flags.into(), 2), (command.into(), 2), (cookie, 8), (offset, 8), length]
        };
        let short = length & 0xffff_ffff;
        let bytes = naive(&fields(0x2560_9513, (short, 4)));
        prop_assert_eq!(&request(short).encode()[..], &bytes[..]);
        prop_assert_eq!(&request(short).encode_as(Framing::Structured)[..], &bytes[..]);
        prop_assert_eq!(Request::decode(&bytes), Ok(request(short)));
        refuses_less(&bytes, Request::decode);
        let bytes = naive(&fields(0x21e4_1c71, (length, 8)));
        prop_assert_eq!(&request(length).encode_as(Framing::Extended)[..], &bytes[..]);
        prop_assert_eq!(Request::decode_extended(&bytes), Ok(request(length)));
        refuses_less(&bytes, Request::decode_extended);
    }

    #[test]
    fn replies(flags: u16, kind: u16, cookie: u64, offset: u64, length: u64, error: u32) {
        let bytes = naive(&[(0x6744_6698, 4), (error.into(), 4), (cookie, 8)]);
        prop_assert_eq!(&SimpleReply { error, cookie }.encode()[..], &bytes[..]);
        prop_assert_eq!(SimpleReply::decode(&bytes), Ok(SimpleReply { error, cookie }));
        refuses_less(&bytes, SimpleReply::decode);
        let (chunk_flags, chunk_kind, short) = (ChunkFlags(flags), ChunkType(kind), length as u32);
        let chunk = ChunkHeader { flags: chunk_flags, kind: chunk_kind, cookie, length: short };
        let front = |magic| [(magic, 4), (flags.into(), 2), (kind.into(), 2), (cookie, 8)];
        let bytes = naive(&[&front(0x668e_33ef)[..], &[(short.into(), 4)]].concat());
        prop_assert_eq!(&chunk.encode()[..], &bytes[..]);
        prop_assert_eq!(ChunkHeader::decode(&bytes), Ok(chunk));
        refuses_less(&bytes, ChunkHeader::decode);
        let chunk = ExtendedChunkHeader { flags: chunk_flags, kind: chunk_kind, cookie, offset, length };
        let bytes = naive(&[&front(0x6e8a_278c)[..], &[(offset, 8), (length, 8)]].concat());
        prop_assert_eq!(&chunk.encode()[..], &bytes[..]);
        prop_assert_eq!(ExtendedChunkHeader::decode(&bytes), Ok(chunk));
        refuses_less(&bytes, ExtendedChunkHeader::decode);
    }

    #[test]
    fn payloads(length: u64, ids in proptest::collection::vec(any::<u32>(), 0..9), error: u32, text in "\\PC{0,40}") {
        let fields: Vec<(u64, usize)> = ids.iter().map(|id| (u64::from(*id), 4)).collect();
        let bytes = naive(&[&[(length, 8)][..], &fields].concat());
        let query = StatusQuery { length, contexts: ids.clone() };
        prop_assert_eq!(&query.encode()[..], &bytes[..]);
        prop_assert_eq!(bytes.len(), StatusQuery::encoded_length(ids.len()));
        prop_assert_eq!(StatusQuery::decode(&bytes), Ok(query));
        for (kind, offset) in [(ChunkType::ERROR, None), (ChunkType::ERROR_OFFSET, Some(length))] {
            let head = naive(&[(error.into(), 4), (text.len() as u64, 2)]);
            let tail = naive(&offset.map_or(vec![], |offset| vec![(offset, 8)]));
            let bytes = [&head, text.as_bytes(), &tail].concat();
            let chunk = ErrorChunk { error: Errno(error), message: text.clone(), offset };
            let mut out = Vec::new();
            chunk.encode(&mut out);
            prop_assert_eq!(&out, &bytes);
            prop_assert_eq!(ErrorChunk::decode(kind, &bytes), Ok(chunk));
            refuses_less(&bytes, |bytes| ErrorChunk::decode(kind, bytes));
        }
    }
}
