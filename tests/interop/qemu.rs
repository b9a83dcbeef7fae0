//! QEMU's clients: qemu-img and qemu-io.

use serde_json::Value;

use crate::support::run;
use crate::{KINDS, Kind, MIB, SIZE, Served, other_image};

fn qemu_img(arguments: &[&str]) -> String {
    run("qemu-img", "qemu-utils", arguments)
}

#[test]
fn qemu_img_shows_the_export_and_its_map() {
    for kind in KINDS {
        let served = Served::start(kind);
        let uri = served.uri();
        let info: Value = serde_json::from_str(&qemu_img(&["info", "--output=json", "-f", "raw", &uri])).unwrap();
        assert_eq!((&info["virtual-size"], &info["format"]), (&SIZE.into(), &"raw".into()), "{info}");
        if kind == Kind::Pulled {
            served.node.cli(&["wait", "disk", "--timeout", "60s"]);
        }
        let map: Vec<Value> = serde_json::from_str(&qemu_img(&["map", "--output=json", "-f", "raw", &uri])).unwrap();
        let covered: u64 = map.iter().map(|extent| extent["length"].as_u64().unwrap()).sum();
        assert_eq!(covered, SIZE);
        let zero: Vec<u64> = map.iter().filter(|e| e["zero"] == true).map(|e| e["start"].as_u64().unwrap()).collect();
        if kind == Kind::OnDemand {
            assert!(zero.is_empty(), "what is missing is not zero: {map:?}");
        } else {
            assert_eq!(zero[..2], [5 * MIB, 10 * MIB + 4096], "{map:?}");
        }
    }
}

#[test]
fn qemu_img_converts_both_ways_and_compares() {
    for kind in KINDS {
        let served = Served::start(kind);
        let uri = served.uri();
        let (source, copy, other) = (served.path("source.img"), served.path("copy.qcow2"), served.path("other"));
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &uri, &copy]);
        qemu_img(&["compare", "-f", "qcow2", "-F", "raw", &copy, &source]);
        qemu_img(&["compare", "-f", "raw", "-F", "raw", &uri, &source]);
        let wanted = other_image(&other);
        qemu_img(&["convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", &other, &uri]);
        qemu_img(&["compare", "-f", "raw", "-F", "raw", &uri, &other]);
        assert!(served.content() == wanted, "{kind:?}");
    }
}

#[test]
fn qemu_img_bench_runs_to_its_end() {
    for kind in KINDS {
        let served = Served::start(kind);
        let uri = served.uri();
        let read = qemu_img(&["bench", "-f", "raw", "-c", "3000", "-d", "32", "-s", "4096", "-S", "8192", &uri]);
        assert!(read.contains("Run completed"), "{read}");
        let write = ["bench", "-f", "raw", "-w", "-c", "1000", "-d", "16", "-s", "4096", "--pattern=90"];
        let write = qemu_img(&[&write[..], &["--flush-interval=50", &uri]].concat());
        assert!(write.contains("Run completed"), "{write}");
        let mut wanted = served.source();
        wanted[..1000 * 4096].fill(90);
        assert!(served.content() == wanted, "{kind:?}");
    }
}

#[test]
fn qemu_io_does_every_command() {
    for kind in KINDS {
        let served = Served::start(kind);
        let uri = served.uri();
        let mut wanted = served.source();
        let sector = |at: u64| (at * 512) as usize;
        // QEMU works in sectors, and reads those that it writes in part.
        for (command, range, byte) in [
            ("write -P 5 1M 1M", sector(2048)..sector(4096), 5),
            ("write -f -P 6 513 777", 513..1290, 6),
            ("write -z 8M 64k", sector(16384)..sector(16512), 0),
            ("write -z -u 4M 64k", sector(8192)..sector(8320), 0),
            ("write -z -f 4200000 3000", 4_200_000..4_203_000, 0),
            ("aio_write -P 9 21M 512k", sector(43008)..sector(44032), 9),
            ("discard 9M 256k", sector(18432)..sector(18944), 0),
        ] {
            let flush = if command.starts_with("aio") { "aio_flush" } else { "flush" };
            let said = run("qemu-io", "qemu-utils", &["-f", "raw", "-c", command, "-c", flush, &uri]);
            assert!(!said.contains("rror") && !said.contains("failed"), "{command}: {said}");
            if command.starts_with("discard") {
                // What stands there afterwards is the server's affair; it has only to stay so.
                let now = served.content();
                wanted[range.clone()].copy_from_slice(&now[range]);
            } else {
                wanted[range].fill(byte);
            }
        }
        let checks =
            ["read -P 5 1M 1M", "read -P 6 513 777", "read -P 0 8M 64k", "aio_read -P 9 21M 512k", "aio_flush"];
        let mut arguments = vec!["-f", "raw"];
        checks.iter().for_each(|check| arguments.extend(["-c", check]));
        let said = run("qemu-io", "qemu-utils", &[&arguments[..], &[&uri]].concat());
        assert!(!said.contains("rror") && !said.contains("failed"), "{said}");
        assert!(served.content() == wanted, "{kind:?}");
    }
}
