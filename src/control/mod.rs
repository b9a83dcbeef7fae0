//! The control API: HTTP with JSON on a Unix socket (`curl --unix-socket` works), Prometheus text at `/metrics`.

pub mod api;
pub mod client;
mod metrics;
pub mod report;
pub mod server;
pub mod status;
pub mod summary;
