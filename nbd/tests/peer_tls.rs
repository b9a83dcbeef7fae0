//! TLS with programs of others, in both roles, from one directory of certificates for both sides.

#[path = "common/certificates.rs"]
mod certificates;
mod common;
#[path = "common/peers.rs"]
mod peers;

use std::sync::Arc;

use bytes::Bytes;
use certificates::Certificates;
use common::within;
use nbd::address::Address;
use nbd::client::{Client, ClientError, ConnectOptions, Reconnect};
use nbd::memory::{MemoryDisk, SingleExport};
use nbd::proto::client::NegotiationError;
use nbd::server::{Listener, ServeOptions, TlsPolicy};
use nbd::uri::NbdUri;
use peers::{NbdServer, TheirServer, attempt, run};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tempfile::TempDir;
use tokio_util::sync::{CancellationToken, DropGuard};

const SIZE: usize = 24 << 20;

/// Random bytes with a hole of zeroes in the middle.
fn content() -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    StdRng::seed_from_u64(3).fill_bytes(&mut bytes);
    bytes[8 << 20..9 << 20].fill(0);
    bytes
}

/// Our server, which insists on TLS, on TCP or on a Unix socket.
struct OurTlsServer {
    certificates: Certificates,
    disk: Arc<MemoryDisk>,
    address: Address,
    place: TempDir,
    _shutdown: DropGuard,
}

impl OurTlsServer {
    async fn start(unix: bool) -> OurTlsServer {
        let (certificates, place) = (Certificates::new(), tempfile::tempdir().unwrap());
        let path = place.path().join("s");
        let address = if unix { Address::Unix(path) } else { "127.0.0.1:0".parse().unwrap() };
        let listener = Listener::bind(&address).await.unwrap();
        let address = listener.address().clone();
        let disk = Arc::new(MemoryDisk::new(content()));
        let shutdown = CancellationToken::new();
        let options = ServeOptions { tls: TlsPolicy::Required(certificates.server()), ..ServeOptions::default() };
        tokio::spawn(listener.run(Arc::new(SingleExport::new("disk", disk.clone())), options, shutdown.clone()));
        OurTlsServer { certificates, disk, address, place, _shutdown: shutdown.drop_guard() }
    }

    fn uri_with(&self, certificates: &Certificates) -> String {
        let tls_certificates = Some(certificates.path().to_owned());
        NbdUri { tls: true, tls_certificates, ..NbdUri::new(self.address.clone(), "disk") }.to_string()
    }

    fn uri(&self) -> String {
        self.uri_with(&self.certificates)
    }

    fn path(&self, name: &str) -> String {
        self.place.path().join(name).to_str().unwrap().to_owned()
    }

    /// The arguments with which QEMU's tools find certificates.
    fn qemu_credentials(&self) -> String {
        format!("tls-creds-x509,id=tls,endpoint=client,dir={}", self.certificates.path().display())
    }

    fn qemu_image(&self) -> String {
        match &self.address {
            Address::Tcp { host, port } => {
                format!("driver=nbd,host={host},port={port},export=disk,tls-creds=tls")
            }
            Address::Unix(path) => format!(
                "driver=nbd,server.type=unix,server.path={},export=disk,tls-creds=tls,tls-hostname=localhost",
                path.display()
            ),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn libnbd_connects_from_the_same_directory() {
    for unix in [false, true] {
        let server = OurTlsServer::start(unix).await;
        let uri = server.uri();
        let info = run("nbdinfo", &[&uri]).await;
        assert!(info.contains("protocol: newstyle-fixed with TLS") && info.contains("block_size_maximum"), "{info}");
        let list = run("nbdinfo", &["--list", &uri]).await;
        assert!(list.contains("export=\"disk\":"), "{list}");
        let map = run("nbdinfo", &["--map", &uri]).await;
        assert!(map.contains("hole"), "{map}");
        let file = server.path("file");
        run("nbdcopy", &["--connections=4", &uri, &file]).await;
        assert!(std::fs::read(&file).unwrap() == content());
        std::fs::write(&file, vec![0xa5; SIZE]).unwrap();
        run("nbdcopy", &["--flush", &file, &uri]).await;
        assert!(server.disk.content() == vec![0xa5; SIZE]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn libnbd_without_the_right_certificates_stays_outside() {
    let server = OurTlsServer::start(false).await;
    let plain = NbdUri::new(server.address.clone(), "disk").to_string();
    let (success, _, error) = attempt("nbdinfo", &[&plain]).await;
    // Its words for TLS_REQD.
    assert!(!success && error.contains("Operation not supported"), "{error}");
    let (success, _, error) = attempt("nbdinfo", &["--list", &plain]).await;
    assert!(!success && !error.contains("disk:"), "{error}");
    let others = Certificates::new();
    let (success, _, error) = attempt("nbdinfo", &[&server.uri_with(&others)]).await;
    assert!(!success && error.contains("certificate"), "{error}");
    // It trusts us, and we do not trust it: a certificate of another CA, and none.
    std::fs::copy(server.certificates.file("ca-cert.pem"), others.file("ca-cert.pem")).unwrap();
    assert!(!attempt("nbdinfo", &[&server.uri_with(&others)]).await.0);
    others.remove(&["client-cert.pem", "client-key.pem"]);
    assert!(!attempt("nbdinfo", &[&server.uri_with(&others)]).await.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nbdsh_does_every_command() {
    let server = OurTlsServer::start(false).await;
    let script = "h.set_uri_allow_local_file(True)\n\
         h.add_meta_context('base:allocation')\n\
         h.connect_uri(uri)\n\
         assert h.get_tls_negotiated() and h.get_structured_replies_negotiated()\n\
         h.pwrite(b'x' * 1000000, 12345, nbd.CMD_FLAG_FUA)\n\
         assert h.pread(1000000, 12345) == bytearray(b'x' * 1000000)\n\
         chunks = []\n\
         see = lambda data, offset, status, error: chunks.append(offset)\n\
         assert h.pread_structured(8192, (8 << 20) - 4096, see, nbd.CMD_FLAG_DF)[4096:] == bytearray(4096)\n\
         assert chunks == [(8 << 20) - 4096], chunks\n\
         h.zero(65536, 65536)\n\
         h.trim(65536, 1 << 20)\n\
         h.cache(65536, 0)\n\
         h.flush()\n\
         extents = []\n\
         h.block_status(1 << 20, 8 << 20, lambda *a: extents.append(a[2]), nbd.CMD_FLAG_REQ_ONE)\n\
         assert extents == [[1 << 20, 3]], extents\n\
         h.shutdown()\n";
    let uri = format!("uri = '{}'", server.uri());
    run("nbdsh", &["-c", &uri, "-c", script]).await;
    let disk = server.disk.content();
    assert!(disk[12345..65536].iter().all(|byte| *byte == b'x') && disk[65536..131072].iter().all(|byte| *byte == 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn qemu_connects_from_the_same_directory() {
    for unix in [false, true] {
        let server = OurTlsServer::start(unix).await;
        let (credentials, image, file) = (server.qemu_credentials(), server.qemu_image(), server.path("file"));
        let with = ["--object", &credentials, "--image-opts"];
        let info = run("qemu-img", &[&["info"], &with[..], &[&image]].concat()).await;
        assert!(info.contains("virtual size: 24 MiB"), "{info}");
        run("qemu-img", &[&["convert"], &with[..], &["-O", "raw", &image, &file]].concat()).await;
        assert!(std::fs::read(&file).unwrap() == content());
        let commands =
            ["-c", "write -f -P 6 513 777", "-c", "write -z 64k 64k", "-c", "read -P 6 513 777", "-c", "flush"];
        let out = run("qemu-io", &[&with[..], &commands[..], &[&image]].concat()).await;
        assert!(!out.contains("failed") && !out.contains("rror"), "{out}");
        assert!(server.disk.content()[513..513 + 777].iter().all(|byte| *byte == 6));
        let plain = image.replace(",tls-creds=tls", "").replace(",tls-hostname=localhost", "");
        let (success, _, error) = attempt("qemu-img", &["info", "--image-opts", &plain]).await;
        assert!(!success && error.contains("TLS"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nbdkit_reads_from_us() {
    let server = OurTlsServer::start(false).await;
    let Address::Tcp { host, port } = &server.address else { panic!("not TCP") };
    let file = server.path("file");
    let (host, port) = (format!("hostname={host}"), format!("port={port}"));
    let certificates = format!("tls-certificates={}", server.certificates.path().display());
    let copy = format!("nbdcopy \"$uri\" {file}");
    let plugin = ["-U", "-", "nbd", &host, &port, "export=disk", "tls=require", &certificates, "--run", &copy];
    run("nbdkit", &plugin).await;
    assert!(std::fs::read(&file).unwrap() == content());
}

/// What a client of a server that wants TLS has to get: everything with it, and a word about it without.
async fn exercise(client: &Client) {
    let data: Bytes = content()[..20 << 20].to_vec().into();
    within(client.write(0, data.clone(), false)).await.unwrap();
    within(client.write(21 << 20, data.slice(..5000), true)).await.unwrap();
    within(client.flush()).await.unwrap();
    assert!(within(client.read(0, data.len())).await.unwrap() == data);
    let many = (0..100u64).map(|index| client.read(index * 12345, 4096));
    for (index, piece) in within(futures::future::try_join_all(many)).await.unwrap().into_iter().enumerate() {
        assert!(piece == data[index * 12345..][..4096], "read {index}");
    }
    within(client.close()).await;
}

fn wants_tls(connected: Result<Client, ClientError>) {
    let error = connected.err().expect("it was let in without TLS");
    assert!(matches!(&error, ClientError::Negotiation(NegotiationError::TlsRequired(_))), "{error:?}");
}

#[tokio::test]
async fn our_client_on_nbdkit() {
    let certificates = Certificates::new();
    let directory = format!("--tls-certificates={}", certificates.path().display());
    let tls = ["--tls=require", &directory, "--tls-verify-peer", "memory", "24M"];
    let mut server = TheirServer::nbdkit(&tls);
    exercise(&server.connect(&certificates.options()).await).await;
    let without = server.try_connect("disk", &ConnectOptions::default()).await;
    let error = without.err().expect("it was let in without TLS");
    assert!(matches!(&error, ClientError::Negotiation(NegotiationError::TlsRequired(_))), "{error:?}");
    // A client that it does not know.
    let others = Certificates::new();
    std::fs::copy(certificates.file("ca-cert.pem"), others.file("ca-cert.pem")).unwrap();
    assert!(server.try_connect("disk", &others.options()).await.is_err());
    // A server that we do not know.
    let error = server.try_connect("disk", &Certificates::new().options()).await.err().unwrap();
    assert!(error.to_string().contains("not of the CA"), "{error}");

    let reconnect = Some(Reconnect::default());
    let client = server.connect(&ConnectOptions { reconnect, ..certificates.options() }).await;
    within(client.write(0, vec![1; 4096].into(), true)).await.unwrap();
    server.kill();
    let read = client.read(0, 512);
    let fixed = ["-f", "--exit-with-parent", "-U"];
    let path = server.directory.path().join("s").to_str().unwrap().to_owned();
    let _again = server.again("nbdkit", &[&fixed[..], &[&path], &tls[..]].concat());
    assert_eq!(within(read).await.unwrap(), vec![0; 512], "the memory of another server");
}

#[tokio::test]
async fn our_client_on_qemu_nbd() {
    let certificates = Certificates::new();
    let credentials =
        format!("tls-creds-x509,id=tls,endpoint=server,verify-peer=yes,dir={}", certificates.path().display());
    let fixed = ["-f", "raw", "-t", "-x", "disk", "-k", "DIR/s", "--tls-creds", "tls", "--object", &credentials];
    let mut server = TheirServer::start("qemu-nbd", &fixed, &["DIR/image"], Some(&vec![0; SIZE]));
    exercise(&server.connect(&certificates.options()).await).await;
    wants_tls(server.try_connect("disk", &ConnectOptions::default()).await);
    assert!(std::fs::read(server.image()).unwrap()[..20 << 20] == content()[..20 << 20]);
}

#[tokio::test]
async fn our_client_on_nbd_server() {
    let certificates = Certificates::new();
    let file = |name| certificates.file(name).display().to_string();
    let generic = format!(
        "certfile = {}\nkeyfile = {}\ncacertfile = {}\nforce_tls = true\n",
        file("server-cert.pem"),
        file("server-key.pem"),
        file("ca-cert.pem"),
    );
    let server = NbdServer::start_with(&vec![0; SIZE], &generic).await;
    exercise(&server.connect("disk", &certificates.options()).await.unwrap()).await;
    wants_tls(server.connect("disk", &ConnectOptions::default()).await);
}

#[tokio::test]
async fn a_server_without_tls_is_left() {
    let certificates = Certificates::new();
    for mut server in [TheirServer::nbdkit(&["memory", "1M"]), TheirServer::qemu_nbd(&vec![0; 4096])] {
        let error = server.try_connect("disk", &certificates.options()).await.err().expect("let in without TLS");
        assert!(matches!(error, ClientError::Negotiation(NegotiationError::TlsRefused { .. })), "{error:?}");
    }
}
