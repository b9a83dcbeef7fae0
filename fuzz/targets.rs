//! What is fuzzed: functions that take any bytes, and panic where a promise is broken.
//!
//! They are called by the targets of cargo-fuzz beside this file, and by `tests/fuzz.rs` with the stable compiler.
//! Where a checksum stands before the content it is put right first: nobody who lies forgets it, and behind it lies what
//! has to be checked.

use bytes::BytesMut;
use lazy_migrate::block_map::codec::{self, Header, PAGE_BYTES};
use lazy_migrate::container::image_stream::{Frame, MAX_FRAME};
use lazy_migrate::limits::PEER_FRAME_BYTES;
use lazy_migrate::migration::record::{self, Record};
use lazy_migrate::peer::hello::{Hello, HelloAnswer};
use lazy_migrate::peer::{ImagesHead, Request, Response, codec as framing};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_util::codec::Decoder;

/// The head of a map file, and a page of it in its two slots.
pub fn map_file(data: &[u8]) {
    let mut page = [0; PAGE_BYTES];
    let length = data.len().min(PAGE_BYTES);
    page[..length].copy_from_slice(&data[..length]);
    for fixed in [false, true] {
        if fixed {
            let crc = crc32fast::hash(&page[..PAGE_BYTES - 4]);
            page[PAGE_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
        }
        if let Ok(header) = Header::check(&page) {
            assert_eq!(Header::check(&header.encode()), Ok(header), "a head does not survive its bytes");
        }
    }
    // The page's own checksum stands first, over the rest.
    let crc = crc32fast::hash(&page[4..]);
    page[..4].copy_from_slice(&crc.to_le_bytes());
    for (index, slots) in [(0, [&page, &[0; PAGE_BYTES]]), (1, [&[0; PAGE_BYTES], &page]), (7, [&page, &page])] {
        if let Ok(found) = codec::check_page(index, slots) {
            let again = codec::encode_page(index, found.generation, &found.words);
            let empty = [0; PAGE_BYTES];
            let slots = if codec::slot_for(found.generation) == 0 { [&again, &empty] } else { [&empty, &again] };
            let again = codec::check_page(index, slots);
            let same = again.is_ok_and(|again| again.generation == found.generation && again.words == found.words);
            assert!(same || found.generation == 0, "a page does not survive its bytes");
        }
    }
}

/// A journal: as it is, and each line of it with the checksum that it should have.
pub fn journal(data: &[u8]) {
    let fixed: Vec<u8> = data.split_inclusive(|&byte| byte == b'\n').flat_map(with_checksum).collect();
    for bytes in [data, &fixed] {
        let Ok(Some(found)) = record::decode("web", bytes) else { continue };
        assert!(found.whole_bytes <= bytes.len() as u64 && found.count > 0);
        let line = record::encode("web", 0, &found.record).expect("a record can be written");
        let again = record::decode("web", &line).expect("and read again").expect("whole");
        same(&again.record, &found.record);
    }
}

fn same(left: &Record, right: &Record) {
    assert_eq!(left, right, "a record does not survive its line");
}

fn with_checksum(line: &[u8]) -> Vec<u8> {
    let text = line.strip_suffix(b"\n").unwrap_or(line);
    let json = text.iter().position(|&byte| byte == b' ').map_or(text, |space| &text[space + 1..]);
    let mut fixed = format!("{:08x} ", crc32fast::hash(json)).into_bytes();
    fixed.extend_from_slice(json);
    fixed.extend_from_slice(&line[text.len()..]);
    fixed
}

/// What a peer sends on the peer port: frames, and in them questions, answers and heads.
pub fn peer_messages(data: &[u8]) {
    let (mut input, mut codec) = (BytesMut::from(data), framing());
    while let Ok(Some(frame)) = codec.decode(&mut input) {
        assert!(frame.len() <= PEER_FRAME_BYTES);
        message(&frame);
    }
    message(data);
}

fn message(json: &[u8]) {
    survives::<Request>(json);
    survives::<Response>(json);
    survives::<ImagesHead>(json);
    survives::<Hello>(json);
    survives::<HelloAnswer>(json);
}

fn survives<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(json: &[u8]) {
    let Ok(message) = serde_json::from_slice::<T>(json) else { return };
    let again = serde_json::to_vec(&message).expect("a message can be sent");
    let again: T = serde_json::from_slice(&again).unwrap_or_else(|error| panic!("{message:?} is not heard: {error}"));
    assert_eq!(again, message, "a message does not survive the link");
}

/// A checkpoint's frames. The first byte says how the bytes are cut.
pub fn image_frames(data: &[u8]) {
    let Some((step, data)) = data.split_first() else { return };
    let mut input = BytesMut::new();
    for piece in data.chunks(usize::from(*step) + 1) {
        input.extend_from_slice(piece);
        loop {
            match Frame::decode(&mut input) {
                Ok(Some(frame)) => {
                    let mut out = BytesMut::new();
                    frame.encode(&mut out);
                    assert_eq!(Frame::decode(&mut out), Ok(Some(frame)), "a frame does not survive its bytes");
                    assert!(out.is_empty());
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
        assert!(input.len() <= 4 + MAX_FRAME, "{} bytes are kept for one frame", input.len());
    }
}
