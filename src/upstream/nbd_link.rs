//! Connections by the NBD client.

use std::error::Error;
use std::fmt::Write;
use std::io;
use std::sync::Arc;

use futures::future::BoxFuture;
use nbd::address::Address;
use nbd::client::{Client, ClientError, ConnectOptions, Sink};
use nbd::export::Extent;
use nbd::tls::{ClientTls, TlsClient};
use nbd::uri::NbdUri;
use nbd::wire::Framing;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::{Connect, Connection, Dialer, Greeted, ReadDone, ReadError, Stream, StreamDone, UpstreamError};
use crate::limits::{CONNECT_TIMEOUT, GOODBYE_TIME};
use crate::pull::CONTEXTS;

/// Dials the server of an NBD URI.
struct UriDialer {
    uri: NbdUri,
}

impl Dialer for UriDialer {
    fn dial(&self) -> BoxFuture<'_, io::Result<Box<dyn Stream>>> {
        Box::pin(async {
            Ok(match &self.uri.address {
                Address::Unix(path) => {
                    let stream = UnixStream::connect(path).await?;
                    nbd::socket::tune_unix(&stream);
                    Box::new(stream) as Box<dyn Stream>
                }
                Address::Tcp { host, port } => {
                    let stream = TcpStream::connect((host.as_str(), *port)).await?;
                    nbd::socket::tune_tcp(&stream);
                    Box::new(stream)
                }
            })
        })
    }

    fn is_encrypted(&self) -> bool {
        false
    }

    fn describe(&self) -> String {
        self.uri.to_string()
    }
}

/// NBD over the streams of a dialer.
pub struct NbdConnect {
    dialer: Arc<dyn Dialer>,
    export: String,
    /// For STARTTLS; `None` where the stream needs none.
    tls: Option<ClientTls>,
}

impl NbdConnect {
    /// For one export; the dialer's streams are as secure as they have to be.
    pub fn new(dialer: Arc<dyn Dialer>, export: String) -> NbdConnect {
        NbdConnect { dialer, export, tls: None }
    }

    /// For the export of a URI. One with TLS uses the certificates that it names, or these.
    pub fn to_uri(uri: &str, certificates: Option<&TlsClient>) -> Result<NbdConnect, UpstreamError> {
        let bad = |reason: String| UpstreamError::Uri { uri: uri.to_owned(), reason };
        let parsed: NbdUri = uri.parse().map_err(|error| bad(reason(&error)))?;
        let ours = certificates.filter(|_| parsed.tls).map(|tls| ClientTls { tls: tls.clone(), host: None });
        let options = ConnectOptions { tls: ours, ..ConnectOptions::default() };
        let tls = options.for_uri(&parsed).map_err(|error| bad(reason(&error)))?.tls;
        let export = parsed.export.clone();
        Ok(NbdConnect { dialer: Arc::new(UriDialer { uri: parsed }), export, tls })
    }

    async fn with(&self, contexts: &[&str], greeted: Option<&Greeted>) -> Result<Arc<dyn Connection>, UpstreamError> {
        let dialled = self.dialer.dial().await;
        let stream = dialled.map_err(|source| UpstreamError::Dial { target: self.describe(), source })?;
        let options = ConnectOptions {
            // No request is so long that it needs extended headers, and to ask for them is another round trip.
            framing: Framing::Structured,
            contexts: contexts.iter().map(|name| (*name).to_owned()).collect(),
            time: CONNECT_TIMEOUT,
            tls: self.tls.clone(),
            greeted: greeted.cloned(),
            ..ConnectOptions::default()
        };
        match Client::handshake(stream, &self.export, &options).await {
            Ok(client) => Ok(Arc::new(NbdConnection { client }) as Arc<dyn Connection>),
            Err(error) => Err(UpstreamError::Handshake { target: self.describe(), reason: reason(&error) }),
        }
    }
}

impl Connect for NbdConnect {
    fn connect<'a>(&'a self, greeted: &'a Greeted) -> BoxFuture<'a, Result<Arc<dyn Connection>, UpstreamError>> {
        Box::pin(self.with(&CONTEXTS, Some(greeted)))
    }

    fn connect_to_read(&self) -> BoxFuture<'_, Result<Arc<dyn Connection>, UpstreamError>> {
        Box::pin(self.with(&[], None))
    }

    fn is_encrypted(&self) -> bool {
        self.tls.is_some() || self.dialer.is_encrypted()
    }

    fn describe(&self) -> String {
        self.dialer.describe()
    }
}

struct NbdConnection {
    client: Client,
}

impl Connection for NbdConnection {
    fn size(&self) -> u64 {
        self.client.info().size
    }

    fn has_context(&self, name: &str) -> bool {
        self.client.info().contexts.iter().any(|context| context.name == name)
    }

    fn read(&self, offset: u64, length: u32, done: ReadDone) {
        self.client.read_then(offset, length as usize, |result| done(result.map_err(read_error)));
    }

    fn gives_pages(&self) -> bool {
        self.client.gives_pages()
    }

    fn read_to(&self, offset: u64, length: u32, sink: Box<dyn Sink>, done: StreamDone) {
        if length > self.client.info().longest_request() {
            // A server of small requests: in pieces, put together.
            return self.read_whole_to(offset, length, sink, done);
        }
        self.client.read_to(offset, length, sink, |result| done(result.map_err(read_error)));
    }

    fn block_status(
        &self,
        context: &str,
        offset: u64,
        length: u32,
    ) -> BoxFuture<'static, Result<Vec<Extent>, ReadError>> {
        let (client, context) = (self.client.clone(), context.to_owned());
        Box::pin(async move { client.block_status(&context, offset, length.into()).await.map_err(read_error) })
    }

    fn closed(&self) -> BoxFuture<'static, String> {
        let client = self.client.clone();
        Box::pin(async move { reason(&client.closed().await) })
    }

    fn close(&self) -> BoxFuture<'static, ()> {
        let client = self.client.clone();
        Box::pin(async move {
            // Who does not take it in time is not waited for.
            let _ = timeout(GOODBYE_TIME, client.close()).await;
        })
    }
}

fn read_error(error: ClientError) -> ReadError {
    if error.is_closed() { ReadError::Lost(reason(&error)) } else { ReadError::Refused(reason(&error)) }
}

/// An error with its sources in one line.
fn reason(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        // Writing to a String does not fail.
        let _ = write!(text, ": {error}");
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_that_cannot_be_used_says_why() {
        for (uri, why) in [("disk", "scheme"), ("nbds://host/x", "certificates"), ("nbd+unix:///x", "socket")] {
            let error = NbdConnect::to_uri(uri, None).map(drop).unwrap_err();
            assert!(error.is_fatal() && error.to_string().contains(why), "{error}");
        }
        let connect = NbdConnect::to_uri("nbd://host:77/a%20b", None).unwrap();
        assert_eq!((connect.describe().as_str(), connect.export.as_str()), ("nbd://host:77/a%20b", "a b"));
    }
}
