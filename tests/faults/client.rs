//! A small NBD client that knows when each answer came: blocking, one request at a time, written from the protocol's
//! text and sharing no code with the product.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub const EPERM: u32 = 1;
pub const EIO: u32 = 5;
pub const ENOSPC: u32 = 28;
pub const ESHUTDOWN: u32 = 108;

const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_ERROR: u32 = 1 << 31;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;

/// How often a waiting request looks whether it is to give up.
const LOOK: Duration = Duration::from_millis(50);

/// Why a request was not acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fail {
    /// The server answered an error.
    Errno(u32),
    /// The server has gone: whether it was done, nobody knows.
    Gone,
    /// The test did not want to wait any longer.
    GaveUp,
}

/// Nanoseconds of the clock by which the nodes count their leases.
pub fn boottime() -> i64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).unwrap();
    time.tv_sec() * 1_000_000_000 + time.tv_nsec()
}

/// One connection.
pub struct Connection {
    stream: UnixStream,
    give_up: Arc<AtomicBool>,
    cookie: u64,
}

impl Connection {
    /// Connects to an export; waits for answers until `give_up`.
    pub fn open(socket: &Path, export: &str, give_up: Arc<AtomicBool>) -> Result<Connection, Fail> {
        let stream = UnixStream::connect(socket).map_err(|_| Fail::Gone)?;
        stream.set_read_timeout(Some(LOOK)).unwrap();
        let mut connection = Connection { stream, give_up, cookie: 0 };
        let greeting: [u8; 18] = connection.receive()?;
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT", "an NBD server");
        // Fixed newstyle, no zeroes; then GO with a name and no wishes.
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend(OPTION_MAGIC.to_be_bytes());
        hello.extend(OPTION_GO.to_be_bytes());
        hello.extend((4 + export.len() as u32 + 2).to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        hello.extend([0; 2]);
        connection.send(&hello)?;
        loop {
            let head: [u8; 20] = connection.receive()?;
            assert_eq!(u64::from_be_bytes(head[..8].try_into().unwrap()), OPTION_REPLY);
            let (kind, length) = (number(&head[12..16]), number(&head[16..20]));
            connection.fill(&mut vec![0; length as usize])?;
            match kind {
                REPLY_ACK => return Ok(connection),
                // No such export, for one: it may be there a moment later.
                _ if kind & REPLY_ERROR != 0 => return Err(Fail::Gone),
                _ => {}
            }
        }
    }

    /// Reads.
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, Fail> {
        let mut bytes = vec![0; length as usize];
        self.request(READ, offset, length, &[])?;
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    /// Writes.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Fail> {
        self.request(WRITE, offset, bytes.len() as u32, bytes)
    }

    /// Flushes.
    pub fn flush(&mut self) -> Result<(), Fail> {
        self.request(FLUSH, 0, 0, &[])
    }

    fn request(&mut self, command: u16, offset: u64, length: u32, payload: &[u8]) -> Result<(), Fail> {
        self.cookie += 1;
        let mut request = REQUEST.to_be_bytes().to_vec();
        request.extend([0; 2]);
        request.extend(command.to_be_bytes());
        request.extend(self.cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(payload);
        self.send(&request)?;
        let reply: [u8; 16] = self.receive()?;
        assert_eq!(number(&reply[..4]), SIMPLE_REPLY);
        assert_eq!(reply[8..], self.cookie.to_be_bytes());
        match number(&reply[4..8]) {
            0 => Ok(()),
            errno => Err(Fail::Errno(errno)),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Fail> {
        self.stream.write_all(bytes).map_err(|_| Fail::Gone)
    }

    fn receive<const N: usize>(&mut self) -> Result<[u8; N], Fail> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, mut bytes: &mut [u8]) -> Result<(), Fail> {
        while !bytes.is_empty() {
            match self.stream.read(bytes) {
                Ok(0) => return Err(Fail::Gone),
                Ok(length) => bytes = &mut bytes[length..],
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if self.give_up.load(Ordering::SeqCst) {
                        return Err(Fail::GaveUp);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Fail::Gone),
            }
        }
        Ok(())
    }
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes.try_into().unwrap())
}
