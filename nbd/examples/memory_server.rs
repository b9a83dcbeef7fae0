//! Serves a disk in memory: `memory_server unix:/tmp/ram.sock 64` (MiB), until interrupted.
//!
//! It prints the address once it can be connected to, with the real port where port 0 was asked for.

use std::error::Error;
use std::sync::Arc;

use nbd::address::Address;
use nbd::memory::{MemoryDisk, SingleExport};
use nbd::server::{Listener, ServeOptions};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let address: Address = arguments.next().ok_or("usage: memory_server ADDRESS [MIB]")?.parse()?;
    let mib: usize = arguments.next().map_or(Ok(64), |mib| mib.parse())?;

    let disk = Arc::new(MemoryDisk::zeroed(mib << 20));
    let listener = Listener::bind(&address).await?;
    println!("{}", listener.address());

    let shutdown = CancellationToken::new();
    let serving =
        tokio::spawn(listener.run(Arc::new(SingleExport::new("ram", disk)), ServeOptions::default(), shutdown.clone()));
    tokio::signal::ctrl_c().await?;
    shutdown.cancel();
    serving.await?;
    Ok(())
}
