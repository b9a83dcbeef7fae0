//! Attaches a disk to the kernel by netlink and serves it with a minimal transmission loop, until stdin closes.
//!
//! ```text
//! kernel_attach [--file PATH] [--size BYTES] [--index N] [--readopt N] [--silent-after WRITES]
//! ```
//!
//! It prints the device once a direct read has succeeded, and detaches when stdin closes. The disk is a RAM disk, or
//! `--file`, which outlives the process: after a `kill -9`, another one with `--readopt N --file PATH` takes device N
//! over. `--silent-after` does every write from then on and never answers it, as a server that dies in between.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use std::{env, process, thread};

use nbd::kernel::{self, ConnectParams, IO_TIMEOUT_MS, ServerFlags};

const BACKEND: &str = "lazy-migrate-example";
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const LIMIT: Duration = Duration::from_secs(10);

fn main() {
    if let Err(error) = run() {
        eprintln!("kernel_attach: {error}");
        process::exit(1);
    }
}

#[derive(Default)]
struct Options {
    file: Option<String>,
    size: Option<u64>,
    index: Option<u32>,
    readopt: Option<u32>,
    silent_after: Option<u64>,
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options::default();
    let mut arguments = env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} wants a value"))?;
        match name.as_str() {
            "--file" => options.file = Some(value),
            "--size" => options.size = Some(value.parse()?),
            "--index" => options.index = Some(value.parse()?),
            "--readopt" => options.readopt = Some(value.parse()?),
            "--silent-after" => options.silent_after = Some(value.parse()?),
            _ => return Err(format!("{name} is not known").into()),
        }
    }
    Ok(options)
}

fn run() -> Result<(), Box<dyn Error>> {
    let options = options()?;
    let size = options.size.unwrap_or(64 << 20);
    let disk = match &options.file {
        Some(path) => OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?,
        None => ram_disk()?,
    };
    disk.set_len(size)?;
    let (kernel_end, server_end) = UnixStream::pair()?;
    let witness = server_end.try_clone()?;
    let silent_after = options.silent_after.unwrap_or(u64::MAX);
    let server = thread::spawn(move || {
        let ended = serve(&server_end, &disk, silent_after);
        let _ = server_end.shutdown(Shutdown::Both);
        ended
    });
    let index = match options.readopt {
        Some(index) => {
            kernel::reconfigure(index, kernel_end.into(), witness.as_fd(), BACKEND, None)?;
            index
        }
        None => {
            let flags = ServerFlags::WRITABLE;
            let backend_identifier = BACKEND.to_owned();
            kernel::connect(
                kernel_end.as_fd(),
                &ConnectParams { index: options.index, size, flags, backend_identifier },
            )?
        }
    };
    kernel::set_io_timeout(index, IO_TIMEOUT_MS)?;
    kernel::wait_for_size(index, size, LIMIT)?;
    direct_read(index)?;
    println!("{}", kernel::device_path(index).display());
    io::copy(&mut io::stdin(), &mut io::sink())?;
    witness.shutdown(Shutdown::Both)?;
    kernel::disconnect(index)?;
    kernel::wait_for_size(index, 0, LIMIT)?;
    server.join().map_err(|_| "the server thread panicked")??;
    Ok(())
}

/// A file that vanishes with the process.
fn ram_disk() -> io::Result<File> {
    let path = format!("/dev/shm/kernel_attach.{}", process::id());
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(path)?;
    Ok(file)
}

/// The first 4 KiB, past the page cache. The buffer must lie on a block's boundary.
fn direct_read(index: u32) -> io::Result<()> {
    const BLOCK: usize = 4096;
    let device = OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECT).open(kernel::device_path(index))?;
    let mut buffer = vec![0; 2 * BLOCK];
    let start = buffer.as_ptr().align_offset(BLOCK);
    device.read_exact_at(&mut buffer[start..start + BLOCK], 0)
}

/// The transmission phase with simple replies, one request after the other.
fn serve(mut socket: &UnixStream, disk: &File, silent_after: u64) -> io::Result<()> {
    let mut writes = 0;
    let mut header = [0; 28];
    loop {
        match socket.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        }
        let number = |range: std::ops::Range<usize>| header[range].iter().fold(0, |n, &b| n << 8 | u64::from(b));
        if number(0..4) != u64::from(REQUEST_MAGIC) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a request"));
        }
        let (command, offset, length) = (number(6..8), number(16..24), number(24..28) as usize);
        let mut data = Vec::new();
        match command {
            0 => {
                data.resize(length, 0);
                disk.read_exact_at(&mut data, offset)?;
            }
            1 => {
                let mut payload = vec![0; length];
                socket.read_exact(&mut payload)?;
                disk.write_all_at(&payload, offset)?;
                writes += 1;
            }
            2 => return Ok(()),
            // FLUSH covers FUA too: the file outlives the process, and nothing here survives the machine.
            _ => {}
        }
        if writes > silent_after {
            continue;
        }
        let mut reply = Vec::with_capacity(16 + data.len());
        reply.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        reply.extend_from_slice(&0u32.to_be_bytes());
        reply.extend_from_slice(&header[8..16]);
        reply.extend_from_slice(&data);
        socket.write_all(&reply)?;
    }
}
