//! Over real NBD: our server on one end of an in-memory stream, our client on the other.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use nbd::export::{Answer, Export, Exports, ReadAnswer};
use nbd::server::{ServeOptions, serve_connection};
use tokio_util::sync::CancellationToken;

use super::{Dialer, Greeted, Stream, Upstream, UpstreamError};
use crate::export::{ExportConfig, LazyExport, PullState};
use crate::store::{FileStore, Store};

struct One(Arc<LazyExport>);

impl Exports for One {
    fn find(&self, name: &str) -> Option<Arc<dyn Export>> {
        (name == "disk").then(|| self.0.clone() as Arc<dyn Export>)
    }

    fn list(&self) -> Vec<(String, String)> {
        vec![("disk".into(), String::new())]
    }
}

struct Memory(Arc<One>);

impl Dialer for Memory {
    fn dial(&self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        let exports = self.0.clone();
        Box::pin(async move {
            let (near, far) = tokio::io::duplex(1 << 20);
            tokio::spawn(async move {
                serve_connection(far, exports, &ServeOptions::default(), CancellationToken::new()).await
            });
            Ok(Box::new(near) as Box<dyn Stream>)
        })
    }

    fn is_encrypted(&self) -> bool {
        false
    }

    fn describe(&self) -> String {
        "the source".into()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_fills_itself_from_another_with_its_heat_and_its_holes() {
    let directory = tempfile::tempdir().unwrap();
    let (size, path) = ((5 << 20) + 777, directory.path().join("image"));
    let image = FileStore::open_or_create(&path, size).unwrap();
    image.write_at(0, &vec![3; 1 << 20]).unwrap();
    image.write_at(size - 100, &[4; 100]).unwrap();
    let source = Arc::new(LazyExport::local("disk", &path, false).unwrap());
    match source.write(3 << 20, Bytes::from(vec![5; 70_000]), false) {
        Answer::Now(result) => result.unwrap(),
        Answer::Later(_) => panic!("a local write is answered at once"),
    }
    let dialer = Arc::new(Memory(Arc::new(One(source.clone()))));
    let unknown =
        Upstream::dialed(dialer.clone(), "nothing").connect(None, &Greeted::default()).await.map(drop).unwrap_err();
    assert!(matches!(unknown, UpstreamError::Handshake { .. }), "{unknown}");
    let upstream = Upstream::dialed(dialer, "disk");
    let config = ExportConfig::new("disk", directory.path().join("lazy"), "disk@source");
    let export = LazyExport::lazy(config, upstream).await.unwrap();
    export.start();
    let mut state = export.complete();
    let complete = state.wait_for(|state| *state == PullState::Complete);
    tokio::time::timeout(Duration::from_secs(20), complete).await.expect("the pull must end").unwrap();
    let mut found = vec![0; size as usize];
    // The holes of the store are found in the background: they are told when they are known.
    assert!(matches!(export.read(0, &mut found), ReadAnswer::Now(Ok(())) | ReadAnswer::Sparse(_)));
    assert!(found == std::fs::read(&path).unwrap());
    let status = export.status();
    assert!(status.skipped_bytes > 2 << 20 && status.pulled_bytes < 3 << 20, "holes are not sent: {status:?}");
    export.shutdown().await.unwrap();
}
