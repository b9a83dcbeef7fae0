// tests/run: timeout=600
//! What users and their tools see of the program: help, output, errors and exit codes as snapshots, `--json` against the
//! schemas, the metrics page with Prometheus' own checker, the log.
//!
//! `REWRITE=1 cargo test --test cli` takes what is said now as the new snapshots; read their difference before you commit it.
//!
//! Needs the Debian packages prometheus (promtool) and python3-jsonschema, and root with nbdfuse for the one test that
//! attaches a disk. What is missing makes a test fail, with its package.

#[path = "../node/client.rs"]
#[allow(dead_code, reason = "the other tests with a pair use all of it")]
mod client;
mod errors;
mod help;
mod logs;
mod metrics;
mod output;
#[path = "../node/pair.rs"]
#[allow(dead_code, reason = "the other tests with a pair use all of it")]
mod pair;
mod schemas;
mod snapshot;
#[path = "../support/mod.rs"]
mod support;
