// tests/run: timeout=900
//! The scripts in `examples/` as an operator types them, on real nodes. (`examples/drain.sh` is tried by `tests/node/drain.rs`,
//! and those that need containers in the guest; `tests/lab/rules` sees to it that none is left out.)
//!
//! Needs root and the Debian packages jq, python3-libnbd, libnbd-bin, fuse3, iproute2, nftables, iputils-arping,
//! openssh-server and openssh-client. What is missing makes a test fail, with its package.

#[path = "../support/mod.rs"]
mod support;

#[path = "../node/client.rs"]
#[allow(dead_code, reason = "a part of it is used here")]
mod client;
#[path = "../node/pair.rs"]
#[allow(dead_code, reason = "a part of it is used here")]
mod pair;

mod chain;
mod move_back;
mod script;
mod ssh;
mod switch;
mod traces;
