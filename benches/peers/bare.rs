//! Our own NBD server straight over a file: what everything between the two costs is measured against it. It is this
//! program again, in a process of its own.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use lazy_migrate::store::{FileStore, Store};
use lazy_migrate::units::ByteRange;
use nbd::export::{Answer, Export, ExportInfo, Extent, ReadAnswer, ZeroMode};
use nbd::memory::SingleExport;
use nbd::server::{Listener, ServeOptions};
use nbd::wire::Errno;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::support::{Background, wait_for_socket};

/// The first argument of the process that serves.
pub const ARGUMENT: &str = "--serve-bare";

/// The server in its process.
pub struct Bare {
    /// Where clients find it.
    pub uri: String,
    _process: Background,
    _place: TempDir,
}

impl Bare {
    /// Over this image, with the socket in `place`.
    pub fn start(place: TempDir, image: &Path) -> Bare {
        let own = std::env::current_exe().expect("this program's place");
        let socket = place.path().join("nbd.sock");
        let text = |path: &Path| path.to_str().expect("a path of text").to_owned();
        let arguments = [ARGUMENT, &text(image), &format!("unix:{}", text(&socket))];
        let process = Background::start(&text(&own), "this benchmark", &arguments);
        wait_for_socket(&socket);
        Bare { uri: format!("nbd+unix:///disk?socket={}", text(&socket)), _process: process, _place: place }
    }
}

/// Serves until it is ended.
pub fn serve(image: &str, address: &str) {
    let store = FileStore::open(Path::new(image), false).expect("the image");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let listener = Listener::bind(&address.parse().expect("an address")).await.expect("a socket");
        let exports = Arc::new(SingleExport::new("disk", Arc::new(BareFile(store))));
        listener.run(exports, ServeOptions::default(), CancellationToken::new()).await;
    });
}

struct BareFile(FileStore);

fn done(result: std::io::Result<()>) -> Answer<()> {
    Answer::Now(result.map_err(|_| Errno::EIO))
}

impl Export for BareFile {
    fn info(&self) -> ExportInfo {
        ExportInfo { size: self.0.size(), multi_conn: true, ..ExportInfo::default() }
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> ReadAnswer {
        ReadAnswer::Now(self.0.read_at(offset, buffer).map_err(|_| Errno::EIO))
    }

    fn write(&self, offset: u64, data: Bytes, fua: bool) -> Answer<()> {
        if fua { Answer::Now(Err(Errno::ENOTSUP)) } else { done(self.0.write_at(offset, &data)) }
    }

    fn flush(&self) -> Answer<()> {
        done(self.0.sync().map(|_| ()))
    }

    fn trim(&self, offset: u64, length: u64, _fua: bool) -> Answer<()> {
        done(self.0.discard(ByteRange::at(offset, length)))
    }

    fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode, _fua: bool) -> Answer<()> {
        done(self.0.write_zeroes(ByteRange::at(offset, length), mode.no_hole))
    }

    fn cache(&self, _offset: u64, _length: u64) -> Answer<()> {
        Answer::Now(Ok(()))
    }

    fn block_status(&self, _context: &str, _offset: u64, _length: u64, _max_extents: usize) -> Answer<Vec<Extent>> {
        Answer::Now(Err(Errno::EINVAL))
    }

    fn client_entered(self: Arc<Self>) -> Box<dyn Send + Sync> {
        Box::new(())
    }
}
