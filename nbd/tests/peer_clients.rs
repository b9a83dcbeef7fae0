//! Clients of others on our server: libnbd's tools, its Python shell with every command, QEMU's.

mod common;
#[path = "common/peers.rs"]
mod peers;

use std::sync::Arc;

use bytes::Bytes;
use common::{Probe, Verdict};
use nbd::client::ConnectOptions;
use nbd::export::Extent;
use nbd::memory::MemoryDisk;
use nbd::wire::{Command, Errno};
use peers::{OurServer, TheirServer, attempt, run, tool};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Random bytes with a hole of zeroes in the middle; no multiple of a block.
fn content() -> Vec<u8> {
    let mut bytes = vec![0; (8 << 20) + 777];
    StdRng::seed_from_u64(1).fill_bytes(&mut bytes);
    bytes[2 << 20..5 << 20].fill(0);
    bytes
}

async fn serve(content: Vec<u8>) -> (Arc<MemoryDisk>, OurServer) {
    let disk = Arc::new(MemoryDisk::new(content));
    (disk.clone(), OurServer::start(disk).await)
}

/// A Python script in nbdsh with `h` connected to the server, its own checks off.
async fn nbdsh(server: &OurServer, script: &str) {
    let prelude = format!(
        "import errno\n\
         def refused(number, call):\n\
         \x20   try:\n\
         \x20       call()\n\
         \x20   except nbd.Error as error:\n\
         \x20       assert error.errnum == number, (error.errnum, number, error.string)\n\
         \x20   else:\n\
         \x20       raise AssertionError('not refused')\n\
         h.set_strict_mode(0)\n\
         h.add_meta_context('base:allocation')\n\
         uri = '{}'\n",
        server.uri()
    );
    run("nbdsh", &["-c", &prelude, "-c", script]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nbdinfo_shows_the_export() {
    let (_, server) = serve(content()).await;
    let uri = server.uri();
    assert_eq!(run("nbdinfo", &["--size", &uri]).await.trim(), content().len().to_string());
    let always = ["connect", "read", "write", "structured-reply"];
    for can in [&always[..], &["flush", "fua", "trim", "zero", "fast-zero", "df", "multi-conn", "cache"]].concat() {
        run("nbdinfo", &["--can", can, &uri]).await;
    }
    let info = run("nbdinfo", &[&uri]).await;
    for line in ["block_size_minimum: 1", "block_size_preferred: 4096", "block_size_maximum: 33554432"] {
        assert!(info.contains(line), "{info}");
    }
    let json = run("nbdinfo", &["--json", &uri]).await;
    for part in [
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"block_size_preferred\": 4096",
        "\"can_fast_zero\": true",
    ] {
        assert!(json.contains(part), "{part} in {json}");
    }
    let json = run("nbdinfo", &["--map", "--json", &uri]).await;
    assert!(json.contains("\"description\": \"hole,zero\""), "{json}");
    for not in ["read-only", "rotational", "tls"] {
        let (yes, _, error) = attempt("nbdinfo", &["--is", not, &uri]).await;
        assert!(!yes && error.is_empty(), "{not}: {error}");
    }
    let totals = run("nbdinfo", &["--map", "--totals", &uri]).await;
    assert!(totals.lines().any(|line| line.contains("hole,zero") && line.contains(&(3 << 20).to_string())), "{totals}");
    let list = run("nbdinfo", &["--list", "--json", &uri]).await;
    assert!(list.contains("\"export-name\": \"disk\"") && list.contains("\"base:allocation\""), "{list}");
    let list = run("nbdinfo", &["--list", &uri]).await;
    assert!(list.contains("export=\"disk\":") && list.contains("base:allocation"), "{list}");
    let map = run("nbdinfo", &["--map", &uri]).await;
    let lines: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    let hole = (3 << 20).to_string();
    assert_eq!(lines[1][..3], [&(2 << 20).to_string(), &hole, "3"], "{map}");
    assert_eq!(lines.len(), 3, "{map}");
    let (success, _, error) = attempt("nbdinfo", &[&uri.replace("disk", "nope")]).await;
    assert!(!success && error.contains("No such file or directory for export: nope"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nbdcopy_copies_both_ways() {
    let (_, source) = serve(content()).await;
    let (copy, target) = serve(vec![0xff; content().len()]).await;
    let file = source.path("file");
    run("nbdcopy", &[&source.uri(), &file]).await;
    assert!(std::fs::read(&file).unwrap() == content());
    run("nbdcopy", &["--flush", &file, &target.uri()]).await;
    assert!(copy.content() == content());
    let (copy, target) = serve(vec![0xff; content().len()]).await;
    run("nbdcopy", &["--connections=4", "--requests=64", &source.uri(), &target.uri()]).await;
    assert!(copy.content() == content());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn qemu_reads_writes_and_compares() {
    let (disk, server) = serve(content()).await;
    let uri = server.uri();
    let file = server.path("file");
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, &file]).await;
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &file]).await;
    let commands = [
        "write -P 5 0 1M",
        "write -f -P 6 513 777",
        "write -z 64k 64k",
        "write -z -u 256k 64k",
        "discard 512k 4k",
        "aio_write -P 9 1M 512k",
        "aio_read -P 5 128k 64k",
        "aio_flush",
        "flush",
        "read -P 6 513 777",
        "read -P 0 64k 64k",
    ];
    let mut arguments = vec!["-f", "raw", uri.as_str()];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    let out = run("qemu-io", &arguments).await;
    assert!(!out.contains("failed") && !out.contains("rror"), "{out}");
    let disk = disk.content();
    assert!(disk[513..513 + 777].iter().all(|byte| *byte == 6));
    assert!(disk[64 << 10..128 << 10].iter().all(|byte| *byte == 0));
    assert!(disk[1 << 20..(1 << 20) + (512 << 10)].iter().all(|byte| *byte == 9));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn libnbd_sends_every_command() {
    for structured in ["True", "False"] {
        let (disk, server) = serve(vec![1; 100_000]).await;
        let script = "
h.set_request_structured_replies(STRUCTURED)
h.connect_uri(uri)
assert h.get_structured_replies_negotiated() == STRUCTURED
assert h.get_size() == 100000
h.pwrite(b'hello', 4094, nbd.CMD_FLAG_FUA)
assert h.pread(7, 4093) == b'\\x01hello\\x01'
if STRUCTURED:
    assert h.pread(5, 4094, nbd.CMD_FLAG_DF) == b'hello'
    seen = []
    h.pread_structured(10, 0, lambda data, offset, status, error: seen.append((offset, status)))
    assert seen == [(0, nbd.READ_DATA)], seen
h.zero(8192, 12288, nbd.CMD_FLAG_NO_HOLE)
h.zero(8192, 12288, nbd.CMD_FLAG_FUA)
h.trim(4096, 40960, nbd.CMD_FLAG_FUA)
h.cache(100000, 0)
h.flush()
assert h.pread(8192, 12288) == bytearray(8192)
if STRUCTURED:
    extents = []
    h.block_status(100000, 0, lambda context, offset, entries, error: extents.extend(entries))
    assert extents == [12288, 0, 8192, 3, 20480, 0, 4096, 3, 54944, 0], extents
    extents = []
    one = nbd.CMD_FLAG_REQ_ONE
    h.block_status(99995, 5, lambda context, offset, entries, error: extents.extend(entries), one)
    assert extents == [12283, 0], extents
else:
    refused(errno.EINVAL, lambda: h.block_status(100000, 0, lambda *arguments: 0))
    refused(errno.EINVAL, lambda: h.pread(5, 0, nbd.CMD_FLAG_DF))
refused(errno.EINVAL, lambda: h.pread(2, 99999))
refused(errno.EINVAL, lambda: h.pread(2, 2**63))
refused(errno.ENOSPC, lambda: h.pwrite(b'ab', 99999))
refused(errno.ENOSPC, lambda: h.zero(2, 99999))
refused(errno.EINVAL, lambda: h.trim(2, 99999))
refused(errno.EINVAL, lambda: h.cache(2, 99999))
h.zero(2, 0, nbd.CMD_FLAG_FAST_ZERO)
h.zero(2, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
refused(errno.EINVAL, lambda: h.flush(nbd.CMD_FLAG_REQ_ONE))
assert h.pread(5, 4094) == b'hello'
h.shutdown()
";
        nbdsh(&server, &script.replace("STRUCTURED", structured)).await;
        assert_eq!(&disk.content()[4094..4099], b"hello");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn libnbd_negotiates_step_by_step() {
    let (_, server) = serve(vec![0; 4096]).await;
    let script = "
h.set_opt_mode(True)
h.connect_uri(uri)
names = []
h.opt_list(lambda name, description: names.append((name, description)))
assert names == [('disk', 'a disk in memory')], names
contexts = []
h.opt_list_meta_context(lambda name: contexts.append(name))
assert contexts == ['base:allocation'], contexts
h.set_export_name('nope')
refused(errno.ENOENT, h.opt_info)
h.set_export_name('disk')
h.opt_info()
assert h.get_size() == 4096
h.opt_go()
assert h.can_meta_context('base:allocation')
h.shutdown()
g = nbd.NBD()
g.set_opt_mode(True)
g.connect_uri(uri)
g.opt_abort()
";
    nbdsh(&server, script).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn libnbd_is_told_of_errors_and_goes_on() {
    let export = Probe::new(1 << 20, |call| match call {
        (Command::READ, 4096, ..) => Verdict::Fail(Errno::EIO),
        (Command::WRITE, ..) => Verdict::Fail(Errno::ENOSPC),
        (Command::FLUSH, ..) => Verdict::Fail(Errno::EIO),
        _ => Verdict::Go,
    });
    let server = OurServer::start(Arc::new(export)).await;
    let script = "
h.connect_uri(uri)
refused(errno.EIO, lambda: h.pread(512, 4096))
refused(errno.ENOSPC, lambda: h.pwrite(bytearray(100000), 0))
refused(errno.EIO, h.flush)
assert h.pread(512, 0) == bytearray(512)
# Longer than a payload may be: skipped and refused, and the connection goes on.
refused(errno.EINVAL, lambda: h.pwrite(bytearray((32 << 20) + 1), 0))
assert h.pread(512, 0) == bytearray(512)
h.shutdown()
";
    nbdsh(&server, script).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_read_only_export_is_read_only() {
    let server = OurServer::start(Arc::new(MemoryDisk::new(content()).read_only())).await;
    run("nbdinfo", &["--is", "readonly", &server.uri()]).await;
    let script = "
h.connect_uri(uri)
refused(errno.EPERM, lambda: h.pwrite(b'x', 0))
refused(errno.EPERM, lambda: h.zero(1, 0))
refused(errno.EPERM, lambda: h.trim(1, 0))
h.flush()
h.shutdown()
";
    nbdsh(&server, script).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn qemu_shows_the_export_and_its_map() {
    let (_, server) = serve(content()).await;
    let info = run("qemu-img", &["info", "--output=json", "-f", "raw", &server.uri()]).await;
    // In whole sectors.
    let size = content().len().next_multiple_of(512);
    assert!(info.contains(&format!("\"virtual-size\": {size}")), "{info}");
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &server.uri()]).await;
    let hole = format!("\"start\": {}, \"length\": {}", 2 << 20, 3 << 20);
    assert!(map.lines().any(|line| line.contains(&hole) && line.contains("\"zero\": true")), "{map}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn qemu_writes_an_image_into_the_export_and_measures_it() {
    // Whole sectors: QEMU knows nothing less.
    let size = content().len() / 512 * 512;
    let (disk, server) = serve(vec![0xff; size]).await;
    let (uri, file) = (server.uri(), server.path("file"));
    let mut wanted = content();
    wanted.truncate(size);
    std::fs::write(&file, &wanted).unwrap();
    run("qemu-img", &["convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", &file, &uri]).await;
    assert!(disk.content() == wanted);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &file]).await;
    let job = ["bench", "-f", "raw", "-w", "-c", "500", "-d", "16", "-s", "4096", "--pattern=90"];
    let said = run("qemu-img", &[&job[..], &["--flush-interval=50", &uri]].concat()).await;
    assert!(said.contains("Run completed"), "{said}");
    wanted[..500 * 4096].fill(90);
    assert!(disk.content() == wanted);
    let said = run("qemu-img", &["bench", "-f", "raw", "-c", "100", "-d", "32", "-s", "65536", &uri]).await;
    assert!(said.contains("Run completed"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nbdfuse_shows_the_export_as_a_file() {
    assert!(std::path::Path::new("/dev/fuse").exists(), "/dev/fuse is missing: modprobe fuse");
    let (disk, server) = serve(content()).await;
    let directory = server.path("mount");
    std::fs::create_dir(&directory).unwrap();
    let name = format!("{directory}/disk");
    let mut nbdfuse = tool("nbdfuse").args([&name, &server.uri()]).spawn().unwrap();
    common::until("the file of nbdfuse", || std::path::Path::new(&name).exists()).await;
    let worked = tokio::task::spawn_blocking(move || {
        let same = std::fs::read(&name)? == content();
        let file = std::fs::File::options().write(true).open(&name)?;
        std::os::unix::fs::FileExt::write_all_at(&file, b"through a file", 4090)?;
        file.sync_all()?;
        std::io::Result::Ok(same)
    });
    let worked = worked.await.unwrap();
    // Unmounted whatever came of it.
    run("fusermount3", &["-u", &directory]).await;
    common::within(nbdfuse.wait()).await.unwrap();
    assert!(worked.unwrap());
    assert_eq!(&disk.content()[4090..4104], b"through a file");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn holes_arrive_as_holes_at_libnbd() {
    let (_, server) = serve(content()).await;
    let script = "
h.connect_uri(uri)
seen = []
def chunk(data, offset, status, error):
    seen.append((offset, len(data), status))
data = h.pread_structured(4 << 20, 1 << 20, chunk)
assert seen == [(1 << 20, 1 << 20, nbd.READ_DATA), (2 << 20, 3 << 20, nbd.READ_HOLE)], seen
assert data == h.pread(4 << 20, 1 << 20, nbd.CMD_FLAG_DF)
h.shutdown()
";
    nbdsh(&server, script).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn fio_verifies_what_it_wrote() {
    let (_, server) = serve(vec![0; 16 << 20]).await;
    let uri = format!("--uri={}", server.uri());
    let job = ["--name=x", "--ioengine=nbd", "--rw=randrw", "--bs=4k", "--size=16m", "--iodepth=32", "--fsync=64"];
    let verify = ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=1", "--output-format=terse"];
    run("fio", &[&job[..], &verify, &[&uri]].concat()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nbdkit_proxies_the_export() {
    let (disk, server) = serve(content()).await;
    let socket = format!("socket={}", server.path("s"));
    let mut proxy = TheirServer::nbdkit(&["nbd", &socket, "export=disk"]);
    let options = ConnectOptions { contexts: vec!["base:allocation".to_owned()], ..ConnectOptions::default() };
    let client = proxy.connect(&options).await;
    assert!(client.read(0, content().len()).await.unwrap() == content());
    client.write(5, Bytes::from_static(b"through two servers"), true).await.unwrap();
    assert_eq!(&disk.content()[5..24], b"through two servers");
    let extents = client.block_status("base:allocation", 2 << 20, 3 << 20).await.unwrap();
    assert_eq!(extents, [Extent { length: 3 << 20, flags: 3 }]);
}
