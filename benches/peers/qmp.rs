//! QEMU as a lazily filled disk: a qcow2 image over an NBD server, filled by its block-stream job, or by what is read.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Background, run, wait_for_socket};

/// A `qemu-storage-daemon` whose disk is missing in the beginning.
pub struct Streamer {
    /// Where clients find it.
    pub uri: String,
    /// Its process.
    pub pid: u32,
    /// The image that is filled.
    pub image: PathBuf,
    monitor: BufReader<UnixStream>,
    _process: Background,
    _place: TempDir,
}

impl Streamer {
    /// With its image in `place`. What clients read is kept only if `on_read`.
    pub fn start(place: TempDir, port: u16, size: u64, on_read: bool) -> Streamer {
        let path = |name: &str| place.path().join(name).to_str().expect("a path of text").to_owned();
        let (image, socket, monitor) = (path("overlay.qcow2"), path("nbd.sock"), path("qmp.sock"));
        run("qemu-img", "qemu-utils", &["create", "-q", "-f", "qcow2", &image, &size.to_string()]);
        let source = format!("driver=nbd,node-name=source,server.type=inet,server.host=127.0.0.1,server.port={port}");
        let file = format!("driver=file,node-name=file,filename={image}");
        let reading = "driver=copy-on-read,node-name=reading,file=overlay";
        let served = if on_read { "reading" } else { "overlay" };
        let mut arguments = vec!["--blockdev", &source, "--blockdev", &file];
        arguments.extend(["--blockdev", "driver=qcow2,node-name=overlay,file=file,backing=source"]);
        if on_read {
            arguments.extend(["--blockdev", reading]);
        }
        let (server, control) =
            (format!("addr.type=unix,addr.path={socket}"), format!("socket,path={monitor},server=on,wait=off,id=qmp"));
        let export = format!("type=nbd,id=disk,node-name={served},name=disk,writable=on");
        arguments.extend([
            "--nbd-server",
            &server,
            "--export",
            &export,
            "--chardev",
            &control,
            "--monitor",
            "chardev=qmp",
        ]);
        let process = Background::start("qemu-storage-daemon", "qemu-system-common", &arguments);
        wait_for_socket(Path::new(&socket));
        wait_for_socket(Path::new(&monitor));
        let stream = UnixStream::connect(&monitor).expect("QEMU's monitor");
        stream.set_read_timeout(Some(Duration::from_secs(300))).expect("a timeout");
        let mut streamer = Streamer {
            uri: format!("nbd+unix:///disk?socket={socket}"),
            pid: process.pid(),
            image: image.into(),
            monitor: BufReader::new(stream),
            _process: process,
            _place: place,
        };
        streamer.heard(|message| message.get("QMP").is_some());
        streamer.tell(&json!({ "execute": "qmp_capabilities" }));
        streamer
    }

    /// Begins to fill it.
    pub fn stream(&mut self) {
        self.tell(&json!({ "execute": "block-stream", "arguments": { "job-id": "fill", "device": "overlay" } }));
    }

    /// Waits until it is full.
    pub fn wait(&mut self) {
        let end = self.heard(|message| message["event"] == "BLOCK_JOB_COMPLETED");
        assert!(end["data"]["error"].is_null(), "block-stream failed: {end}");
    }

    fn tell(&mut self, request: &Value) {
        writeln!(self.monitor.get_mut(), "{request}").expect("QEMU's monitor");
        let answer = self.heard(|message| message.get("return").is_some() || message.get("error").is_some());
        assert!(answer.get("error").is_none(), "QEMU refuses {request}: {answer}");
    }

    fn heard(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        loop {
            let mut line = String::new();
            let length = self.monitor.read_line(&mut line).expect("QEMU's monitor");
            assert!(length > 0, "QEMU has ended");
            let message: Value = serde_json::from_str(&line).expect("QEMU's monitor speaks JSON");
            if wanted(&message) {
                return message;
            }
        }
    }
}
