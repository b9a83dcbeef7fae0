//! Who asks: fio's NBD engine, and what it measured.

use serde_json::Value;

use crate::servers::{NOBODY, home_of_nobody};
use crate::support::run;

/// What one job does.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// `randread`, `randwrite`, `read`, `write`.
    pub pattern: &'static str,
    /// Bytes of one request.
    pub block: u64,
    /// Requests in flight.
    pub depth: u32,
    /// When it ends.
    pub until: Until,
    /// The same seed asks for the same blocks in the same order.
    pub seed: u64,
}

/// When a job ends.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// After this many seconds.
    Seconds(u32),
    /// After this many bytes, each block once at most, or after the limit of a minute.
    Bytes(u64),
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Requests a second.
    pub iops: f64,
    /// MiB a second.
    pub mib_s: f64,
    /// Half of the requests took at most this many microseconds.
    pub p50_us: f64,
    /// 99 of 100 requests took at most this many microseconds.
    pub p99_us: f64,
}

impl Job {
    /// Runs it against a server.
    pub fn run(&self, uri: &str) -> Measured {
        let uri = uri.split("?tls-certificates=").next().unwrap_or(uri);
        let mut arguments = vec![
            "--name=job".to_owned(),
            "--ioengine=nbd".to_owned(),
            format!("--uri={uri}"),
            format!("--rw={}", self.pattern),
            format!("--bs={}", self.block),
            format!("--iodepth={}", self.depth),
            format!("--randseed={}", self.seed),
            "--allrandrepeat=1".to_owned(),
            // From submission to completion: the engine sends while it submits, and at depth 1 the answer may be there by then.
            "--lat_percentiles=1".to_owned(),
            "--clat_percentiles=0".to_owned(),
            "--thread".to_owned(),
            "--output-format=json".to_owned(),
        ];
        match self.until {
            Until::Seconds(seconds) => arguments.extend(["--time_based".to_owned(), format!("--runtime={seconds}")]),
            Until::Bytes(bytes) => arguments.extend([format!("--io_size={bytes}"), "--runtime=60".to_owned()]),
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        // fio's engine may not read files that a URI names; libnbd finds certificates at home.
        let output = if uri.starts_with("nbds:") {
            let home = format!("HOME={}", home_of_nobody().display());
            let nobody = [format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")];
            let start = [nobody[0].as_str(), &nobody[1], "--clear-groups", "env", &home, "fio"];
            run("setpriv", "fio", &[&start[..], &arguments[..]].concat())
        } else {
            run("fio", "fio", &arguments)
        };
        // It may say something before the document.
        let start = output.find('{').unwrap_or_else(|| panic!("fio's answer is not JSON: {output}"));
        let document: Value =
            serde_json::from_str(&output[start..]).unwrap_or_else(|error| panic!("fio's answer ({error}): {output}"));
        let side = if self.pattern.contains("write") { "write" } else { "read" };
        let result = &document["jobs"][0][side];
        let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("fio measured nothing: {output}"));
        let percentile = |name: &str| number(&result["lat_ns"]["percentile"][name]) / 1000.0;
        assert_eq!(document["jobs"][0]["error"], 0, "fio failed: {output}");
        Measured {
            iops: number(&result["iops"]),
            mib_s: number(&result["bw_bytes"]) / (1 << 20) as f64,
            p50_us: percentile("50.000000"),
            p99_us: percentile("99.000000"),
        }
    }
}
