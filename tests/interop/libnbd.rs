//! libnbd: nbdinfo, nbdcopy, and every command with every flag from its Python shell.

use serde_json::Value;

use crate::support::{Background, run, wait_for_socket};
use crate::{KINDS, Kind, MIB, SIZE, Served, other_image};

fn nbdinfo(arguments: &[&str]) -> String {
    run("nbdinfo", "libnbd-bin", arguments)
}

/// The extents of one context: offset, length, flags.
fn map(uri: &str, context: &str) -> Vec<(u64, u64, u64)> {
    let json = nbdinfo(&["--json", &format!("--map={context}"), uri]);
    let extents: Vec<Value> = serde_json::from_str(&json).unwrap();
    let number = |extent: &Value, key: &str| extent[key].as_u64().unwrap();
    let extents: Vec<_> =
        extents.iter().map(|e| (number(e, "offset"), number(e, "length"), number(e, "type"))).collect();
    let mut at = 0;
    for (offset, length, _) in &extents {
        assert!(*offset == at && *length > 0, "{extents:?}");
        at += length;
    }
    assert_eq!(at, SIZE, "the whole disk");
    extents
}

#[test]
fn nbdinfo_shows_all_of_an_export() {
    for kind in KINDS {
        let served = Served::start(kind);
        let uri = served.uri();
        assert_eq!(nbdinfo(&["--size", &uri]), SIZE.to_string());
        for can in
            ["connect", "cache", "df", "fast-zero", "flush", "fua", "multi-conn", "read", "trim", "write", "zero"]
        {
            nbdinfo(&["--can", can, &uri]);
        }
        nbdinfo(&["--can", "structured-reply", &uri]);
        for not in ["read-only", "tls"] {
            // The exit status is the answer.
            let yes = std::process::Command::new("nbdinfo").args(["--is", not, &uri]).status().unwrap();
            assert_eq!(yes.code(), Some(2), "--is {not}");
        }
        let description = if kind == Kind::Local { "disk" } else { "disk, lazily filled" };
        for json in [vec!["--json", &uri], vec!["--list", "--json", &uri]] {
            let info: Value = serde_json::from_str(&nbdinfo(&json)).unwrap();
            assert_eq!(info["protocol"], "newstyle-fixed", "{info}");
            let exports = info["exports"].as_array().unwrap();
            assert_eq!(exports.len(), 1, "{info}");
            let export = &exports[0];
            assert_eq!((&export["export-name"], &export["description"]), (&"disk".into(), &description.into()));
            let contexts = ["base:allocation", "lazy-migrate:present", "lazy-migrate:heat"];
            assert_eq!(export["contexts"], serde_json::json!(contexts));
            for (key, value) in [
                ("export-size", SIZE.into()),
                ("is_read_only", false.into()),
                ("is_rotational", rotational().into()),
                ("can_cache", true.into()),
                ("can_df", true.into()),
                ("can_fast_zero", true.into()),
                ("can_flush", true.into()),
                ("can_fua", true.into()),
                ("can_multi_conn", true.into()),
                ("can_trim", true.into()),
                ("can_zero", true.into()),
                ("block_size_minimum", 1.into()),
                ("block_size_preferred", 4096.into()),
                ("block_size_maximum", (32 * MIB).into()),
            ] {
                assert_eq!(export[key], Value::clone(&value), "{key} of {info}");
            }
        }
        let list = nbdinfo(&["--list", &uri]);
        assert!(list.contains("export=\"disk\"") && list.contains("lazy-migrate:heat"), "{list}");
        let totals = nbdinfo(&["--map", "--totals", &uri]);
        assert!(totals.contains("data"), "{totals}");
    }
}

#[test]
fn nbdinfo_shows_every_map() {
    for kind in KINDS {
        let served = Served::start(kind);
        let uri = served.uri();
        if kind == Kind::Pulled {
            served.node.cli(&["wait", "disk", "--timeout", "60s"]);
        }
        let allocation = map(&uri, "base:allocation");
        let present = map(&uri, "lazy-migrate:present");
        if kind == Kind::OnDemand {
            // What is missing is neither a hole nor zero: that is for the source to say.
            assert_eq!(allocation, [(0, SIZE, 0)]);
            assert_eq!(present, [(0, SIZE, 0)]);
        } else {
            assert_eq!(present, [(0, SIZE, 1)]);
            let hole = allocation.iter().any(|(at, length, flags)| (*at, *length, *flags) == (5 * MIB, 4 * MIB, 3));
            assert!(hole, "{allocation:?}");
        }
        assert_eq!(map(&uri, "lazy-migrate:heat"), [(0, SIZE, 0)]);
        run("qemu-io", "qemu-utils", &["-f", "raw", "-c", "write 2M 4k", "-c", "read 12k 4k", &uri]);
        let heat = map(&uri, "lazy-migrate:heat");
        assert!(heat.len() == 3 && (heat[1].0, heat[1].1) == (2 * MIB, MIB) && heat[1].2 > 0, "{heat:?}");
        let rest = u64::from(kind != Kind::OnDemand);
        let present: Vec<_> =
            map(&uri, "lazy-migrate:present").into_iter().filter(|(_, _, flags)| *flags != rest).collect();
        let mut wanted = vec![(2 * MIB, 4096, 3)];
        if kind == Kind::OnDemand {
            wanted.insert(0, (12288, 4096, 1));
        }
        assert_eq!(present, wanted, "{kind:?}");
    }
}

#[test]
fn nbdcopy_copies_both_ways() {
    for kind in KINDS {
        let served = Served::start(kind);
        assert!(served.content() == served.source(), "{kind:?}: out of it");
        let file = served.path("other");
        let wanted = other_image(&file);
        run("nbdcopy", "libnbd-bin", &["--flush", &file, &served.uri()]);
        assert!(served.content() == wanted, "{kind:?}: into it");
        // From server to server, over several connections, and onto zeroes.
        let target = Served::start(kind);
        run("nbdcopy", "libnbd-bin", &["--connections=4", "--requests=64", &served.uri(), &target.uri()]);
        assert!(target.content() == wanted, "{kind:?}: from one to the other");
        let socket = target.path("memory.sock");
        let size = SIZE.to_string();
        let _memory = Background::start("nbdkit", "nbdkit", &["-f", "-U", &socket, "memory", &size]);
        wait_for_socket(socket.as_ref());
        let memory = format!("nbd+unix:///?socket={socket}");
        run("nbdcopy", "libnbd-bin", &["--destination-is-zero", &served.uri(), &memory]);
        run("qemu-img", "qemu-utils", &["compare", "-f", "raw", "-F", "raw", &memory, &file]);
    }
}

#[test]
fn holes_arrive_as_holes() {
    // The first BLOCK_STATUS has the holes of the store found; then reads tell them, and DF has none.
    let script = r"
import nbd, sys
h = nbd.NBD()
h.add_meta_context('base:allocation')
h.connect_uri(sys.argv[1])
h.block_status(1, 0, lambda *arguments: 0)
MIB = 1 << 20
def chunks(flags):
    seen = []
    data = h.pread_structured(6 * MIB, 4 * MIB, lambda data, at, kind, error: seen.append((at, len(data), kind)), flags)
    assert data == open(sys.argv[2], 'rb').read()[4 * MIB:10 * MIB]
    return seen
data, hole = nbd.READ_DATA, nbd.READ_HOLE
assert chunks(0) == [(4 * MIB, MIB, data), (5 * MIB, 4 * MIB, hole), (9 * MIB, MIB, data)], chunks(0)
assert chunks(nbd.CMD_FLAG_DF) == [(4 * MIB, 6 * MIB, data)]
";
    for kind in [Kind::Local, Kind::Pulled] {
        let served = Served::start(kind);
        if kind == Kind::Pulled {
            served.node.cli(&["wait", "disk", "--timeout", "60s"]);
        }
        let image = served.path("source.img");
        run("/usr/bin/python3", "python3-libnbd", &["-c", script, &served.uri(), &image]);
    }
}

/// A script for libnbd's shell that keeps a model of the disk.
const EVERY_COMMAND: &str = r"
import errno, nbd, sys
uri, image = sys.argv[1:]
h = nbd.NBD()
# What it would not let through shall reach the server.
h.set_strict_mode(0)
contexts = ['base:allocation', 'lazy-migrate:present', 'lazy-migrate:heat']
for context in contexts:
    h.add_meta_context(context)
h.connect_uri(uri)
model = bytearray(open(image, 'rb').read())
size = h.get_size()
assert size == len(model)
assert h.get_structured_replies_negotiated()
KIB, MIB = 1 << 10, 1 << 20

def refused(numbers, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum in numbers, (error.errnum, error.string)
        return True
    assert None in numbers, 'not refused'
    return False

def check(offset, length, flags=0):
    assert h.pread(length, offset, flags) == model[offset:offset + length], (offset, length)

def put(data, offset, flags=0):
    h.pwrite(data, offset, flags)
    model[offset:offset + len(data)] = data
    check(max(offset - 10, 0), min(len(data) + 20, size - max(offset - 10, 0)))

def zero(offset, length, flags=0):
    h.zero(length, offset, flags)
    model[offset:offset + length] = bytearray(length)
    check(max(offset - 10, 0), min(length + 20, size - max(offset - 10, 0)))

def status(length, offset, flags=0):
    seen = {}
    h.block_status(length, offset, lambda name, at, entries, error: seen.update({name: (at, entries)}), flags)
    assert sorted(seen) == sorted(contexts), seen
    for at, entries in seen.values():
        lengths = entries[::2]
        assert at == offset and all(lengths) and sum(lengths) <= length, (at, entries)
        assert flags != nbd.CMD_FLAG_REQ_ONE or len(lengths) == 1, entries
    return {name: list(zip(entries[::2], entries[1::2])) for name, (at, entries) in seen.items()}

# READ, in one piece and in several.
check(0, 1)
check(4095, 2)
check(size - 700, 700)
check(3 * MIB + 17, MIB, nbd.CMD_FLAG_DF)
for flags in 0, nbd.CMD_FLAG_DF:
    chunks = []
    data = h.pread_structured(6 * MIB, 4 * MIB, lambda data, at, kind, error: chunks.append((at, len(data), kind)), flags)
    assert data == model[4 * MIB:10 * MIB]
    assert sum(length for at, length, kind in chunks) == 6 * MIB, chunks
    assert not flags or len(chunks) == 1, chunks

# WRITE, with FUA, within blocks, over many, at the end.
put(b'hello', 8190)
put(b'durable', 9 * MIB + 4094, nbd.CMD_FLAG_FUA)
put(bytes(range(256)) * 300, MIB + 3)
put(b'the end', size - 7, nbd.CMD_FLAG_FUA)
put(b'\0' * 20000, 2 * MIB)

# WRITE_ZEROES with every flag; over whole blocks and not. FAST_ZERO may be refused, and then nothing is changed.
for number, flags in enumerate([
    0, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA
]):
    zero(3 * MIB + number * 64 * KIB, 16 * KIB, flags)
    zero(3 * MIB + number * 64 * KIB + 20000, 20000, flags)
    for offset, length in (20 * MIB + number * 64 * KIB, 16 * KIB), (20 * MIB + number * 64 * KIB + 20000, 20000):
        call = lambda: h.zero(length, offset, flags | nbd.CMD_FLAG_FAST_ZERO)
        if not refused([None, errno.ENOTSUP, errno.EOPNOTSUPP], call):
            model[offset:offset + length] = bytearray(length)
        check(offset - 10, length + 20)
# The first pieces are present by now, so there it is fast.
zero(3 * MIB, 16 * KIB, nbd.CMD_FLAG_FAST_ZERO)

# TRIM: what is left is up to the server, but it stays as it is, and nothing else changes.
for offset, length, flags in (MIB, 256 * KIB, 0), (9 * MIB + 100, 70000, nbd.CMD_FLAG_FUA):
    h.trim(length, offset, flags)
    model[offset:offset + length] = h.pread(length, offset)
    check(offset - 5000, length + 10000)
    check(offset, length)

# CACHE: the blocks are here afterwards.
h.cache(MIB, 21 * MIB)
assert all(flags & 1 for length, flags in status(MIB, 21 * MIB)['lazy-migrate:present'])
h.flush()

# BLOCK_STATUS.
for offset, length in (0, size), (123, 7), (4 * MIB + 1, 6 * MIB), (size - 1, 1):
    whole = status(length, offset)
    one = status(length, offset, nbd.CMD_FLAG_REQ_ONE)
    for name in contexts:
        assert one[name][0][1] == whole[name][0][1] and one[name][0][0] <= length
    assert sum(length for length, flags in whole['lazy-migrate:heat']) == length
# What is told to be zero is zero.
at = 0
for length, flags in status(size, 0)['base:allocation']:
    assert not flags & 2 or model[at:at + length] == bytearray(length), (at, length)
    at += length

# What is refused, and the connection goes on.
refused([errno.EINVAL], lambda: h.pread(2, size - 1))
refused([errno.EINVAL], lambda: h.pread(2, 2**63 - 1))
refused([errno.ENOSPC], lambda: h.pwrite(b'ab', size - 1))
refused([errno.ENOSPC], lambda: h.zero(2, size - 1))
refused([errno.EINVAL], lambda: h.trim(2, size - 1))
refused([errno.EINVAL], lambda: h.cache(2, size - 1))
refused([errno.EINVAL], lambda: h.block_status(2, size - 1, lambda *arguments: 0))
refused([errno.EINVAL], lambda: h.flush(nbd.CMD_FLAG_REQ_ONE))
refused([errno.EINVAL], lambda: h.pread(1, 0, nbd.CMD_FLAG_FAST_ZERO))
refused([errno.EINVAL], lambda: h.pwrite(bytearray((32 << 20) + 1), 0))

# Many at once, answered in any order.
cookies = [(h.aio_pread(nbd.Buffer(4096), at * 40960), None) for at in range(500)]
while h.aio_in_flight():
    h.poll(-1)
for cookie, _ in cookies:
    assert h.aio_command_completed(cookie)

# A second connection sees what was answered on the first, and its flush covers it.
assert h.can_multi_conn()
other = nbd.NBD()
other.connect_uri(uri)
put(b'for the other', 5000)
other.flush()
assert other.pread(13, 5000) == b'for the other'
other.shutdown()

check(0, size)
# Longer than any payload: the whole disk.
h.zero(size, 0)
assert h.pread(size, 0) == bytearray(size)
h.flush()
h.shutdown()

# And for a client that knows no structured replies.
plain = nbd.NBD()
plain.set_strict_mode(0)
plain.set_request_structured_replies(False)
plain.connect_uri(uri)
plain.pwrite(b'plain', 4094, nbd.CMD_FLAG_FUA)
assert plain.pread(20, 4090) == b'\0\0\0\0plain' + b'\0' * 11
assert plain.pread(size - 4096, 4096) == b'ain' + bytearray(size - 4099)
refused([errno.EINVAL], lambda: plain.pread(5, 0, nbd.CMD_FLAG_DF))
refused([errno.EINVAL], lambda: plain.block_status(5, 0, lambda *arguments: 0))
plain.flush()
plain.shutdown()
";

#[test]
fn libnbd_sends_every_command_with_every_flag() {
    for kind in KINDS {
        let served = Served::start(kind);
        let image = served.path("source.img");
        run("/usr/bin/python3", "python3-libnbd", &["-c", EVERY_COMMAND, &served.uri(), &image]);
        let mut wanted = vec![0; SIZE as usize];
        wanted[4094..4099].copy_from_slice(b"plain");
        assert!(served.content() == wanted, "{kind:?}");
    }
}

/// What this machine says of the disk that the exports lie on.
fn rotational() -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = std::env::temp_dir().metadata().unwrap().dev();
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    ["", "../"].iter().any(|up| {
        let path = format!("/sys/dev/block/{major}:{minor}/{up}queue/rotational");
        std::fs::read_to_string(path).is_ok_and(|text| text.trim() == "1")
    })
}
