//! TLS: who is let in and who is not, what each side sees of the other, and how an encrypted connection ends.
//!
//! TLS 1.1 and older need no test: the library that is used has no code for them.

#[path = "common/certificates.rs"]
mod certificates;
mod common;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use certificates::{Authority, Certificates, Kind};
use common::{Probe, Verdict, until, within};
use nbd::address::Address;
use nbd::client::{Client, ClientError, ConnectOptions, Reconnect, describe, list, list_contexts, negotiate};
use nbd::export::{Export, Exports};
use nbd::memory::{MemoryDisk, SingleExport};
use nbd::proto::client::NegotiationError;
use nbd::server::{Ended, Listener, ServeOptions, ServerError, TlsPolicy, serve_connection};
use nbd::tls::{Identity, TlsClient, TlsError, TlsServer};
use nbd::uri::NbdUri;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

const SIZE: usize = 40 << 20;

fn disk() -> Arc<dyn Exports> {
    Arc::new(SingleExport::new("disk", Arc::new(MemoryDisk::zeroed(SIZE))))
}

type Outcome = JoinHandle<Result<Ended, ServerError>>;

/// Serves one client over a stream in memory.
fn serve(exports: Arc<dyn Exports>, tls: TlsPolicy) -> (DuplexStream, Outcome) {
    let (near, far) = duplex(1 << 16);
    let options = ServeOptions { tls, ..ServeOptions::default() };
    let ended = tokio::spawn(async move { serve_connection(far, exports, &options, CancellationToken::new()).await });
    (near, ended)
}

async fn listen(address: &Address, tls: TlsPolicy) -> (NbdUri, DropGuard) {
    let listener = Listener::bind(address).await.unwrap();
    let uri = NbdUri { tls: true, ..NbdUri::new(listener.address().clone(), "disk") };
    let shutdown = CancellationToken::new();
    tokio::spawn(listener.run(disk(), ServeOptions { tls, ..ServeOptions::default() }, shutdown.clone()));
    (uri, shutdown.drop_guard())
}

async fn listen_tcp(tls: TlsPolicy) -> (NbdUri, DropGuard) {
    listen(&"127.0.0.1:0".parse().unwrap(), tls).await
}

/// Why a client with these options does not get in, and what the server says to it.
async fn refused(server: &Certificates, options: &ConnectOptions) -> (String, String) {
    let (near, ended) = serve(disk(), TlsPolicy::Required(server.server()));
    let Err(error) = within(Client::handshake(near, "disk", options)).await else { panic!("it was let in") };
    assert!(matches!(error, ClientError::Tls(TlsError::Handshake { .. })), "{error:?}");
    let ended = within(ended).await.unwrap().unwrap_err();
    assert!(matches!(ended, ServerError::Tls(TlsError::Handshake { .. })), "{ended:?}");
    (error.to_string(), ended.to_string())
}

#[tokio::test]
async fn everything_goes_over_tls() {
    let certificates = Certificates::new();
    let (mut uri, _server) = listen_tcp(TlsPolicy::Required(certificates.server())).await;
    uri.tls_certificates = Some(certificates.path().into());
    let uri: NbdUri = uri.to_string().parse().unwrap();
    let options = ConnectOptions { contexts: vec!["base:allocation".to_owned()], ..ConnectOptions::default() };
    let client = within(Client::connect(&uri, &options)).await.unwrap();
    let data: Bytes = (0..SIZE as u32 / 4).flat_map(u32::to_le_bytes).collect::<Vec<u8>>().into();
    within(client.write(0, data.clone(), true)).await.unwrap();
    within(client.flush()).await.unwrap();
    assert!(within(client.read(0, SIZE)).await.unwrap() == data);
    let small = futures::future::join_all((0..500).map(|index| client.read(index * 4096 + 1, 3000)));
    for (index, read) in within(small).await.into_iter().enumerate() {
        let start = index * 4096 + 1;
        assert!(read.unwrap() == data[start..start + 3000], "read {index}");
    }
    let extents = within(client.block_status("base:allocation", 0, SIZE as u64)).await.unwrap();
    assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), SIZE as u64);
    within(client.close()).await;

    let options = options.for_uri(&uri).unwrap();
    let Address::Tcp { host, port } = &uri.address else { panic!("not TCP") };
    let dial = || async { tokio::net::TcpStream::connect((host.as_str(), *port)).await.unwrap() };
    assert_eq!(within(list(dial().await, &options)).await.unwrap()[0].name, "disk");
    assert_eq!(within(describe(dial().await, "disk", &options)).await.unwrap().size, SIZE as u64);
    assert_eq!(within(list_contexts(dial().await, "disk", &options)).await.unwrap(), ["base:allocation"]);
}

#[tokio::test]
async fn a_unix_socket_is_localhost_unless_the_uri_says_otherwise() {
    let (authority, place) = (Authority::new(), tempfile::tempdir().unwrap());
    let certificates = authority.directory();
    let other = authority.directory();
    authority.put(other.path(), "server", "other", &["other.example"], Kind::Good);
    for (server, name, fits) in [
        (&certificates, None, true),
        (&certificates, Some("other.example"), false),
        (&other, None, false),
        (&other, Some("other.example"), true),
        (&other, Some("OTHER.example"), true),
        (&other, Some("no name at all"), false),
    ] {
        let address = Address::Unix(place.path().join("s"));
        let (mut uri, guard) = listen(&address, TlsPolicy::Required(server.server())).await;
        uri.tls_certificates = Some(certificates.path().into());
        uri.tls_hostname = name.map(str::to_owned);
        let connected = within(Client::connect(&uri, &ConnectOptions::default())).await;
        assert_eq!(connected.is_ok(), fits, "{name:?}: {:?}", connected.err());
        drop((connected, guard));
        until("the listener is gone", || !place.path().join("s").exists()).await;
    }
}

#[tokio::test]
async fn a_client_of_another_ca_is_refused() {
    let (ours, theirs) = (Certificates::new(), Certificates::new());
    // It trusts our CA, so that it is the server that refuses.
    std::fs::copy(ours.file("ca-cert.pem"), theirs.file("ca-cert.pem")).unwrap();
    let (client, server) = refused(&ours, &theirs.options()).await;
    assert!(client.contains("refuses our certificate"), "{client}");
    assert!(server.contains("not of the CA"), "{server}");
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let (certificates, without) = (Certificates::new(), Certificates::new());
    std::fs::copy(certificates.file("ca-cert.pem"), without.file("ca-cert.pem")).unwrap();
    without.remove(&["client-cert.pem", "client-key.pem"]);
    let (client, server) = refused(&certificates, &without.options()).await;
    assert!(client.contains("client-cert.pem"), "{client}");
    assert!(server.contains("it has no certificate"), "{server}");
}

#[tokio::test]
async fn a_server_of_another_ca_is_refused() {
    let (client, _) = refused(&Certificates::new(), &Certificates::new().options()).await;
    assert!(client.contains("its certificate is not of the CA"), "{client}");
}

#[tokio::test]
async fn a_server_for_another_host_is_refused() {
    let authority = Authority::new();
    let certificates = authority.directory();
    let options = certificates.options();
    // A common name does not do, neither does a wildcard of another level.
    for names in [["other.example"].as_slice(), &["*.localhost"], &["127.0.0.1"], &[]] {
        authority.put(certificates.path(), "server", "localhost", names, Kind::Good);
        let (client, _) = refused(&certificates, &options).await;
        assert!(client.contains("for another host"), "{names:?}: {client}");
    }
    let mut tls = options.tls.clone().unwrap();
    tls.host = Some("10.0.0.1".to_owned());
    let (client, _) = refused(&certificates, &ConnectOptions { tls: Some(tls), ..options }).await;
    assert!(client.contains("\"10.0.0.1\""), "{client}");
}

#[tokio::test]
async fn what_has_expired_or_is_for_another_use_is_refused() {
    let authority = Authority::new();
    let certificates = authority.directory();
    authority.put(certificates.path(), "client", "alice", &[], Kind::Expired);
    let (client, server) = refused(&certificates, &certificates.options()).await;
    assert!(server.contains("has expired"), "{server}");
    assert!(client.contains("refuses our certificate"), "{client}");

    authority.put(certificates.path(), "client", "alice", &[], Kind::Good);
    authority.put(certificates.path(), "server", "server", &["localhost"], Kind::Expired);
    let (client, _) = refused(&certificates, &certificates.options()).await;
    assert!(client.contains("has expired"), "{client}");

    // A client's certificate in the place of a server's, and the other way round.
    for (from, to) in [("client", "server"), ("server", "client")] {
        let certificates = authority.directory();
        authority.put(certificates.path(), from, "both", &["localhost"], Kind::Good);
        for part in ["cert", "key"] {
            let file = |side| certificates.file(&format!("{side}-{part}.pem"));
            std::fs::copy(file(from), file(to)).unwrap();
        }
        let (client, server) = refused(&certificates, &certificates.options()).await;
        assert!(client.contains("is not for this use") || server.contains("is not for this use"), "{client} {server}");
    }
}

#[tokio::test]
async fn who_is_on_the_revocation_list_is_refused() {
    let authority = Authority::new();
    let certificates = authority.directory();
    authority.put_revocations(certificates.path());
    let (near, _) = serve(disk(), TlsPolicy::Required(certificates.server()));
    within(Client::handshake(near, "disk", &certificates.options())).await.expect("the others are let in");
    authority.put(certificates.path(), "client", "mallory", &[], Kind::Revocable);
    let (_, server) = refused(&certificates, &certificates.options()).await;
    assert!(server.contains("revoked"), "{server}");
    authority.put(certificates.path(), "server", "server", &["localhost"], Kind::Revocable);
    let (client, _) = refused(&certificates, &certificates.options()).await;
    assert!(client.contains("revoked"), "{client}");
}

#[tokio::test]
async fn tls_1_2_is_spoken_too() {
    let certificates = Certificates::new();
    let (near, ended) = serve(disk(), TlsPolicy::Required(certificates.server()));
    let mut near = near;
    start_tls(&mut near).await;
    let config = old_client(&certificates);
    let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
    let mut stream = within(tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, near)).await.unwrap();
    assert_eq!(stream.get_ref().1.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_2));
    stream.write_all(&option(nbd::wire::OptionCode::ABORT, b"")).await.unwrap();
    let mut rest = Vec::new();
    // To the end, and in order: the server says goodbye.
    within(stream.read_to_end(&mut rest)).await.unwrap();
    assert!(!rest.is_empty());
    assert_eq!(within(ended).await.unwrap().unwrap(), Ended::DuringHandshake);
}

fn old_client(certificates: &Certificates) -> rustls::ClientConfig {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let certificate = |name| CertificateDer::from_pem_file(certificates.file(name)).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate("ca-cert.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(certificates.file("client-key.pem")).unwrap();
    rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate("client-cert.pem")], key)
        .unwrap()
}

fn option(code: nbd::wire::OptionCode, data: &[u8]) -> bytes::BytesMut {
    let mut out = bytes::BytesMut::new();
    nbd::wire::OptionHeader::encode(code, data, &mut out);
    out
}

/// Goes through the greeting and STARTTLS by hand.
async fn start_tls(stream: &mut DuplexStream) {
    let mut greeting = [0; 18];
    within(stream.read_exact(&mut greeting)).await.unwrap();
    stream.write_all(&3u32.to_be_bytes()).await.unwrap();
    stream.write_all(&option(nbd::wire::OptionCode::STARTTLS, b"")).await.unwrap();
    let mut reply = [0; 20];
    within(stream.read_exact(&mut reply)).await.unwrap();
    assert_eq!(reply[12..], [0, 0, 0, 1, 0, 0, 0, 0], "not acknowledged");
}

/// Shows `alice` the disk `hers`, others the disk `disk`, and counts who asks.
struct ByName {
    hers: Arc<dyn Exports>,
    disk: Arc<dyn Exports>,
    seen: std::sync::Mutex<Vec<Identity>>,
}

impl Exports for ByName {
    fn find(&self, name: &str) -> Option<Arc<dyn Export>> {
        self.disk.find(name)
    }

    fn list(&self) -> Vec<(String, String)> {
        self.disk.list()
    }

    fn seen_by(&self, client: &Identity) -> Option<Arc<dyn Exports>> {
        self.seen.lock().unwrap().push(client.clone());
        client.is("ALICE").then(|| self.hers.clone())
    }
}

#[tokio::test]
async fn a_client_sees_only_the_exports_that_are_for_it() {
    let authority = Authority::new();
    let certificates = authority.directory();
    let hers = Arc::new(Probe::new(8192, |_| Verdict::Go));
    let exports =
        Arc::new(ByName { hers: Arc::new(SingleExport::new("hers", hers)), disk: disk(), seen: Default::default() });
    for (common, own, other) in [("alice", "hers", "disk"), ("bob", "disk", "hers")] {
        authority.put(certificates.path(), "client", common, &[], Kind::Good);
        let options = certificates.options();
        let dial = || serve(exports.clone(), TlsPolicy::Required(certificates.server())).0;
        let listed = within(list(dial(), &options)).await.unwrap();
        assert_eq!(listed.iter().map(|entry| entry.name.as_str()).collect::<Vec<_>>(), [own]);
        within(describe(dial(), own, &options)).await.unwrap();
        let client = within(Client::handshake(dial(), own, &options)).await.unwrap();
        within(client.read(0, 512)).await.unwrap();
        assert!(within(list_contexts(dial(), own, &options)).await.is_ok());
        // The words are those of an export that does not exist at all.
        for name in [other, "nothing"] {
            let no_such = |error| {
                assert!(
                    matches!(&error, ClientError::Negotiation(NegotiationError::NoSuchExport { message, .. })
                    if message == "there is no such export"),
                    "{name}: {error:?}"
                );
            };
            no_such(within(describe(dial(), name, &options)).await.unwrap_err());
            no_such(within(Client::handshake(dial(), name, &options)).await.err().unwrap());
            no_such(within(list_contexts(dial(), name, &options)).await.unwrap_err());
            // EXPORT_NAME has no answer but a hang-up.
            let (mut near, ended) = serve(exports.clone(), TlsPolicy::Required(certificates.server()));
            start_tls(&mut near).await;
            let mut stream = within(certificates.client().connect("localhost", near)).await.unwrap();
            stream.write_all(&option(nbd::wire::OptionCode::EXPORT_NAME, name.as_bytes())).await.unwrap();
            let ended = within(ended).await.unwrap().unwrap_err();
            assert!(matches!(ended, ServerError::Handshake(_)), "{ended:?}");
        }
    }
    let seen = exports.seen.lock().unwrap();
    assert!(seen.iter().all(|who| who.is("alice") || who.is("bob")), "{seen:?}");
}

#[tokio::test]
async fn both_sides_know_whom_they_talk_to() {
    let authority = Authority::new();
    let certificates = authority.directory();
    let names = ["db1.example", "10.1.2.3", "fe80::7", "*.wild.example", "localhost"];
    authority.put(certificates.path(), "server", "Host B", &names, Kind::Good);
    authority.put(certificates.path(), "client", "Host A", &["Host-A.example"], Kind::Good);
    let (near, far) = duplex(1 << 16);
    let (server, client) = (certificates.server(), certificates.client());
    let accepted = tokio::spawn(async move { server.accept(far).await.map(|stream| Identity::of_client(&stream)) });
    let stream = within(client.connect("fe80::7%eth0", near)).await.unwrap();
    let server = Identity::of_server(&stream);
    assert_eq!(server.names(), ["db1.example", "10.1.2.3", "fe80::7", "*.wild.example", "localhost", "Host B"]);
    for name in ["DB1.example", "10.1.2.3", "FE80:0::7", "host b"] {
        assert!(server.is(name), "{name}");
    }
    for name in ["db2.example", "db1", "db1.example.", "10.1.2.4", "a.wild.example", "*.wild.example", "", "Host"] {
        assert!(!server.is(name), "{name}");
    }
    let client = within(accepted).await.unwrap().unwrap();
    assert_eq!(client.names(), ["Host-A.example", "Host A"]);
}

#[tokio::test]
async fn certificates_that_cannot_be_used_are_named() {
    let complete = Certificates::new;
    type Damage = fn(&Certificates);
    let cases: [(Damage, &str); 7] = [
        (|them| them.remove(&["ca-cert.pem"]), "ca-cert.pem"),
        (|them| them.remove(&["server-cert.pem", "client-cert.pem"]), "-cert.pem"),
        (|them| them.remove(&["server-key.pem", "client-key.pem"]), "-key.pem"),
        (|them| std::fs::write(them.file("ca-cert.pem"), "nothing").unwrap(), "ca-cert.pem has no certificate"),
        (
            |them| std::fs::write(them.file("ca-crl.pem"), "nothing").unwrap(),
            "ca-crl.pem has no certificate revocation",
        ),
        (
            |them| {
                for side in ["server", "client"] {
                    std::fs::write(them.file(&format!("{side}-key.pem")), "nothing").unwrap();
                }
            },
            "-key.pem has no private key",
        ),
        (
            |them| {
                let other = Certificates::new();
                for key in ["server-key.pem", "client-key.pem"] {
                    std::fs::copy(other.file(key), them.file(key)).unwrap();
                }
            },
            "the key beside it",
        ),
    ];
    for (damage, words) in cases {
        let certificates = complete();
        damage(&certificates);
        let server = TlsServer::load(certificates.path()).unwrap_err();
        let client = TlsClient::load(certificates.path()).unwrap_err();
        for error in [server, client] {
            let text = error.to_string();
            assert!(text.contains(words) && text.contains(&*certificates.path().to_string_lossy()), "{text}");
            assert!(std::error::Error::source(&error).is_some());
        }
    }
    let certificates = complete();
    certificates.remove(&["server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem"]);
    let error = TlsServer::load(certificates.path()).unwrap_err().to_string();
    assert!(error.contains("server-cert.pem"), "{error}");
    TlsClient::load(certificates.path()).expect("a client can do without");
}

#[tokio::test]
async fn a_connection_that_is_made_anew_is_encrypted_again() {
    let (certificates, place) = (Certificates::new(), tempfile::tempdir().unwrap());
    let address = Address::Unix(place.path().join("s"));
    let (uri, first) = listen(&address, TlsPolicy::Required(certificates.server())).await;
    let reconnect = Reconnect { first_pause: Duration::from_millis(1), ..Reconnect::default() };
    let options = ConnectOptions { reconnect: Some(reconnect), ..certificates.options() };
    let client = within(Client::connect(&uri, &options)).await.unwrap();
    drop(first);
    until("the first server is gone", || !place.path().join("s").exists()).await;
    // One without TLS has the place for a while: it is not used.
    let (_, plain) = listen(&address, TlsPolicy::Off).await;
    let read = tokio::spawn({
        let client = client.clone();
        async move { client.read(0, 512).await }
    });
    assert!(tokio::time::timeout(Duration::from_millis(100), client.closed()).await.is_err());
    assert!(!read.is_finished());
    drop(plain);
    until("the server without TLS is gone", || !place.path().join("s").exists()).await;
    let (_, _second) = listen(&address, TlsPolicy::Required(certificates.server())).await;
    assert_eq!(within(read).await.unwrap().unwrap(), vec![0; 512]);
}

#[tokio::test]
async fn a_stream_that_breaks_off_is_an_ordinary_loss() {
    let certificates = Certificates::new();
    let (near, ended) = serve(disk(), TlsPolicy::Required(certificates.server()));
    let client = within(Client::handshake(near, "disk", &certificates.options())).await.unwrap();
    within(client.close()).await;
    assert_eq!(within(ended).await.unwrap().unwrap(), Ended::Disconnected);

    let (mut near, ended) = serve(disk(), TlsPolicy::Required(certificates.server()));
    start_tls(&mut near).await;
    let mut stream = within(certificates.client().connect("localhost", near)).await.unwrap();
    let request = nbd::wire::ExportRequest { name: "disk".to_owned(), infos: Vec::new() };
    let mut data = bytes::BytesMut::new();
    request.encode(&mut data);
    stream.write_all(&option(nbd::wire::OptionCode::GO, &data)).await.unwrap();
    within(stream.read_u64()).await.unwrap();
    // Without close_notify.
    drop(stream.into_inner().0);
    assert_eq!(within(ended).await.unwrap().unwrap(), Ended::Closed);
}

#[tokio::test]
async fn the_kernel_is_not_given_an_encrypted_stream() {
    let (near, _ended) = serve(disk(), TlsPolicy::Off);
    let error = within(negotiate(near, "disk", &Certificates::new().options())).await.err().unwrap();
    assert!(matches!(error, ClientError::Tls(TlsError::Kernel)), "{error:?}");
}
