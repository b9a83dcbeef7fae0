//! Cuts the byte stream of the transmission phase into requests.

use bytes::{Buf, Bytes, BytesMut};

use crate::limits::MAX_PAYLOAD;
use crate::wire::{Command, Request, WireError};

/// A request with its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// The head.
    pub request: Request,
    /// The payload of a WRITE, a part of the receive buffer; empty for all other commands, and for a WRITE that is too
    /// long (its payload has been thrown away).
    pub payload: Bytes,
}

/// The decoder. It keeps the stream in step whatever the requests are: only a WRITE has a payload, and a payload that
/// is too long to be kept is skipped before the request is handed out to be refused.
#[derive(Debug, Default)]
pub struct Requests {
    skipping: Option<(Request, usize)>,
}

impl Requests {
    /// A decoder at the start of the transmission phase.
    pub fn new() -> Requests {
        Requests::default()
    }

    /// The next request at the front of `input`, or `None` if it has not arrived as a whole.
    ///
    /// # Errors
    /// [`WireError::Magic`]: the stream is out of step, and the connection cannot go on.
    pub fn next(&mut self, input: &mut BytesMut) -> Result<Option<Incoming>, WireError> {
        if let Some((request, left)) = &mut self.skipping {
            let count = input.len().min(*left);
            input.advance(count);
            *left -= count;
            if *left > 0 {
                return Ok(None);
            }
            let request = *request;
            self.skipping = None;
            return Ok(Some(Incoming { request, payload: Bytes::new() }));
        }
        let request = match Request::decode(input) {
            Ok(request) => request,
            Err(WireError::NotEnough { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        if request.command != Command::WRITE {
            input.advance(Request::LENGTH);
            return Ok(Some(Incoming { request, payload: Bytes::new() }));
        }
        let length = request.length as usize;
        if request.length > MAX_PAYLOAD {
            input.advance(Request::LENGTH);
            self.skipping = Some((request, length));
            return self.next(input);
        }
        if input.len() < Request::LENGTH + length {
            return Ok(None);
        }
        input.advance(Request::LENGTH);
        let payload = input.split_to(length).freeze();
        Ok(Some(Incoming { request, payload }))
    }

    /// How many bytes the buffer has to hold in all before [`Requests::next`] can hand out the request at its front:
    /// at least one head, and at most one head and [`MAX_PAYLOAD`].
    pub fn wanted(&self, input: &BytesMut) -> usize {
        match Request::decode(input) {
            Ok(request) if request.command == Command::WRITE && request.length <= MAX_PAYLOAD => {
                Request::LENGTH + request.length as usize
            }
            _ => Request::LENGTH,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::CommandFlags;

    fn head(command: Command, length: u32) -> Request {
        Request { flags: CommandFlags::NONE, command, cookie: u64::from(length), offset: 0, length }
    }

    #[test]
    fn only_a_write_has_a_payload() {
        let mut input = BytesMut::new();
        input.extend_from_slice(&head(Command::TRIM, 4096).encode());
        input.extend_from_slice(&head(Command::WRITE, 3).encode());
        input.extend_from_slice(b"abc");
        input.extend_from_slice(&head(Command(55), 70_000).encode());
        let mut requests = Requests::new();
        let mut next = || requests.next(&mut input).unwrap().map(|r| (r.request.command, r.payload));
        assert_eq!(next(), Some((Command::TRIM, Bytes::new())));
        assert_eq!(next(), Some((Command::WRITE, Bytes::from_static(b"abc"))));
        assert_eq!(next(), Some((Command(55), Bytes::new())));
        assert_eq!(next(), None);
    }

    #[test]
    fn a_payload_is_not_copied() {
        let mut input = BytesMut::new();
        input.extend_from_slice(&head(Command::WRITE, 100).encode());
        input.extend_from_slice(&[7; 100]);
        let place = input[Request::LENGTH..].as_ptr();
        let incoming = Requests::new().next(&mut input).unwrap().unwrap();
        assert_eq!(incoming.payload.as_ptr(), place);
    }

    #[test]
    fn a_payload_that_is_too_long_is_skipped_in_step() {
        let mut requests = Requests::new();
        let mut input = BytesMut::new();
        input.extend_from_slice(&head(Command::WRITE, MAX_PAYLOAD + 5).encode());
        assert_eq!(requests.next(&mut input), Ok(None));
        let mut left = MAX_PAYLOAD as usize + 5;
        let piece = vec![1; 1 << 20];
        while left > 0 {
            let count = left.min(piece.len());
            input.extend_from_slice(&piece[..count]);
            left -= count;
            if left == 0 {
                input.extend_from_slice(&head(Command::FLUSH, 0).encode());
            }
            let next = requests.next(&mut input).unwrap();
            assert_eq!(next.is_some(), left == 0);
        }
        assert_eq!(requests.next(&mut input).unwrap().unwrap().request.command, Command::FLUSH);
    }

    #[test]
    fn a_stream_out_of_step_is_an_error() {
        assert!(Requests::new().next(&mut BytesMut::from(&[0u8; 28][..])).is_err());
    }
}
