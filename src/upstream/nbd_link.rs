//! Connections by the NBD client.

use std::io;
use std::sync::Arc;

use futures::future::BoxFuture;

use super::{Connect, Connection, Dialer, Stream, UpstreamError};

/// Dials the server of an NBD URI.
pub struct UriDialer {
    uri: String,
}

impl UriDialer {
    /// The dialer and the export's name.
    pub fn new(uri: &str) -> Result<(UriDialer, String), UpstreamError> {
        Ok((UriDialer { uri: uri.to_owned() }, String::new()))
    }
}

impl Dialer for UriDialer {
    fn dial(&self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
    }

    fn describe(&self) -> String {
        self.uri.clone()
    }
}

/// NBD over the streams of a dialer.
pub struct NbdConnect {
    dialer: Arc<dyn Dialer>,
    export: String,
}

impl NbdConnect {
    /// For one export.
    pub fn new(dialer: Arc<dyn Dialer>, export: String) -> NbdConnect {
        NbdConnect { dialer, export }
    }
}

impl Connect for NbdConnect {
    fn connect(&self) -> BoxFuture<'_, Result<Arc<dyn Connection>, UpstreamError>> {
        Box::pin(async {
            let failed = |source| UpstreamError::Dial { target: self.describe(), source };
            let _stream = self.dialer.dial().await.map_err(failed)?;
            Err(UpstreamError::Handshake { target: self.describe(), reason: self.export.clone() })
        })
    }

    fn describe(&self) -> String {
        self.dialer.describe()
    }
}
