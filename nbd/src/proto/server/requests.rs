//! Cuts the byte stream of the transmission phase into requests.

use bytes::{Buf, Bytes, BytesMut};

use crate::limits::{MAX_CONTEXTS, MAX_PAYLOAD};
use crate::wire::{Command, CommandFlags, Framing, Request, StatusQuery, WireError};

/// A request with its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// The head.
    pub request: Request,
    /// The payload, a part of the receive buffer. Empty for a request that has none, and for one that has to be refused
    /// because of it (its payload has been thrown away).
    pub payload: Bytes,
}

/// The decoder. It keeps the stream in step whatever the requests are: a payload that is not to be kept is skipped
/// before the request is handed out to be refused.
///
/// With compact requests, only a WRITE has a payload; with extended headers, what has the flag PAYLOAD_LEN, and also a
/// WRITE without it: the document wants the flag, but QEMU's client (10.0) leaves it out and sends the data.
#[derive(Debug)]
pub struct Requests {
    extended: bool,
    skipping: Option<(Request, u64)>,
}

/// What is done with a payload.
enum Payload {
    None,
    Keep(usize),
    Skip,
}

impl Requests {
    /// A decoder at the start of the transmission phase.
    pub fn new(framing: Framing) -> Requests {
        Requests { extended: framing == Framing::Extended, skipping: None }
    }

    /// The next request at the front of `input`, or `None` if it has not arrived as a whole.
    ///
    /// # Errors
    /// [`WireError::Magic`]: the stream is out of step. [`WireError::Malformed`]: an extended request announces a payload
    /// beyond [`MAX_PAYLOAD`]. The connection cannot go on.
    pub fn next(&mut self, input: &mut BytesMut) -> Result<Option<Incoming>, WireError> {
        if let Some((request, left)) = &mut self.skipping {
            let count = usize::try_from(*left).unwrap_or(usize::MAX).min(input.len());
            input.advance(count);
            *left -= count as u64;
            if *left > 0 {
                return Ok(None);
            }
            let request = *request;
            self.skipping = None;
            return Ok(Some(Incoming { request, payload: Bytes::new() }));
        }
        let request = match self.head(input) {
            Ok(request) => request,
            Err(WireError::NotEnough { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let head = self.head_length();
        match self.payload(&request) {
            Payload::None => {
                input.advance(head);
                Ok(Some(Incoming { request, payload: Bytes::new() }))
            }
            Payload::Skip if self.extended && request.length > u64::from(MAX_PAYLOAD) => {
                Err(WireError::Malformed { what: "a payload is longer than the server allows" })
            }
            Payload::Skip => {
                input.advance(head);
                self.skipping = Some((request, request.length));
                self.next(input)
            }
            Payload::Keep(length) if input.len() < head + length => Ok(None),
            Payload::Keep(length) => {
                input.advance(head);
                let payload = input.split_to(length).freeze();
                Ok(Some(Incoming { request, payload }))
            }
        }
    }

    /// Takes the head of a WRITE of at least `long` bytes that is at the front of `input` and has not arrived as a whole:
    /// its payload, of which `input` may hold the beginning, is then for the caller to take, before the next call of
    /// [`Requests::next`]. `None`: what is at the front is something else, or `accept` says no.
    pub fn begin_write(
        &mut self,
        input: &mut BytesMut,
        long: u64,
        accept: impl FnOnce(&Request) -> bool,
    ) -> Option<Request> {
        if self.skipping.is_some() {
            return None;
        }
        let request = self.head(input).ok()?;
        let kept = matches!(self.payload(&request), Payload::Keep(_));
        if request.command != Command::WRITE || request.length < long || !kept || !accept(&request) {
            return None;
        }
        input.advance(self.head_length());
        Some(request)
    }

    /// How many bytes the buffer has to hold in all before [`Requests::next`] can hand out the request at its front:
    /// at least one head, and at most one head and [`MAX_PAYLOAD`].
    pub fn wanted(&self, input: &BytesMut) -> usize {
        let head = self.head_length();
        match self.head(input).map(|request| self.payload(&request)) {
            Ok(Payload::Keep(length)) if self.skipping.is_none() => head + length,
            _ => head,
        }
    }

    fn head_length(&self) -> usize {
        if self.extended { Request::EXTENDED_LENGTH } else { Request::LENGTH }
    }

    fn head(&self, input: &[u8]) -> Result<Request, WireError> {
        if self.extended { Request::decode_extended(input) } else { Request::decode(input) }
    }

    fn payload(&self, request: &Request) -> Payload {
        let flagged = self.extended && request.flags.contains(CommandFlags::PAYLOAD_LEN);
        let has_payload = flagged || request.command == Command::WRITE;
        let kept = match request.command {
            _ if !has_payload => return Payload::None,
            Command::WRITE => u64::from(MAX_PAYLOAD),
            Command::BLOCK_STATUS => StatusQuery::encoded_length(MAX_CONTEXTS) as u64,
            _ => 0,
        };
        if request.length <= kept { Payload::Keep(request.length as usize) } else { Payload::Skip }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(command: Command, length: u64) -> Request {
        Request { flags: CommandFlags::NONE, command, cookie: length, offset: 0, length }
    }

    #[test]
    fn only_a_write_has_a_payload() {
        let mut input = BytesMut::new();
        input.extend_from_slice(&head(Command::TRIM, 4096).encode());
        input.extend_from_slice(&head(Command::WRITE, 3).encode());
        input.extend_from_slice(b"abc");
        input.extend_from_slice(&head(Command(55), 70_000).encode());
        let mut requests = Requests::new(Framing::Simple);
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
        let incoming = Requests::new(Framing::Simple).next(&mut input).unwrap().unwrap();
        assert_eq!(incoming.payload.as_ptr(), place);
    }

    #[test]
    fn a_payload_that_is_too_long_is_skipped_in_step() {
        let mut requests = Requests::new(Framing::Simple);
        let mut input = BytesMut::new();
        input.extend_from_slice(&head(Command::WRITE, u64::from(MAX_PAYLOAD) + 5).encode());
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
        assert!(Requests::new(Framing::Simple).next(&mut BytesMut::from(&[0u8; 28][..])).is_err());
    }

    fn extended(command: Command, flags: CommandFlags, length: u64) -> [u8; 32] {
        Request { flags, command, cookie: length, offset: 0, length }.encode_extended()
    }

    #[test]
    fn with_extended_headers_the_flag_says_what_has_a_payload() {
        let payload = CommandFlags::PAYLOAD_LEN;
        let query = StatusQuery { length: 1 << 40, contexts: vec![1] }.encode();
        let mut input = BytesMut::new();
        input.extend_from_slice(&extended(Command::TRIM, CommandFlags::NONE, 1 << 40));
        // A WRITE without the flag has a payload all the same; a TRIM with it has one, which is skipped.
        input.extend_from_slice(&extended(Command::WRITE, CommandFlags::NONE, 3));
        input.extend_from_slice(b"xyz");
        input.extend_from_slice(&extended(Command::TRIM, payload, 5));
        input.extend_from_slice(b"trash");
        input.extend_from_slice(&extended(Command::WRITE, payload, 3));
        input.extend_from_slice(b"abc");
        input.extend_from_slice(&extended(Command::BLOCK_STATUS, payload, query.len() as u64));
        input.extend_from_slice(&query);
        let whole = input.clone();
        for step in [1, 7, usize::MAX] {
            let mut requests = Requests::new(Framing::Extended);
            let (mut input, mut seen) = (BytesMut::new(), Vec::new());
            for piece in whole.chunks(step.min(whole.len())) {
                input.extend_from_slice(piece);
                while let Some(incoming) = requests.next(&mut input).unwrap() {
                    seen.push((incoming.request.command, incoming.payload));
                }
            }
            let expected = [
                (Command::TRIM, Bytes::new()),
                (Command::WRITE, Bytes::from_static(b"xyz")),
                (Command::TRIM, Bytes::new()),
                (Command::WRITE, Bytes::from_static(b"abc")),
                (Command::BLOCK_STATUS, query.clone()),
            ];
            assert_eq!(seen, expected, "in pieces of {step}");
        }
    }

    #[test]
    fn an_extended_payload_beyond_the_limit_ends_the_connection() {
        for (command, length) in [(Command::WRITE, u64::from(MAX_PAYLOAD) + 1), (Command::READ, u64::MAX)] {
            let mut input = BytesMut::from(&extended(command, CommandFlags::PAYLOAD_LEN, length)[..]);
            let next = Requests::new(Framing::Extended).next(&mut input);
            assert!(matches!(next, Err(WireError::Malformed { .. })), "{command}: {next:?}");
        }
        let status = extended(Command::BLOCK_STATUS, CommandFlags::PAYLOAD_LEN, 1 << 20);
        let requests = Requests::new(Framing::Extended);
        assert_eq!(requests.wanted(&BytesMut::from(&status[..])), 32, "a list of contexts that is too long is skipped");
    }
}
