//! Requests whose answer comes later.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::future::BoxFuture;

use crate::export::{Extent, LateRead};
use crate::wire::{Errno, Request};

/// The extents of each context, by the context's id.
pub(super) type Status = Vec<(u32, Vec<Extent>)>;

/// What is awaited.
pub(super) enum Work {
    /// A request without data in its answer.
    Plain(BoxFuture<'static, Result<(), Errno>>),
    /// A READ.
    Read(BoxFuture<'static, Result<LateRead, Errno>>),
    /// A BLOCK_STATUS.
    Status(BoxFuture<'static, Result<Status, Errno>>),
}

/// What it came to.
pub(super) enum Done {
    Plain(Result<(), Errno>),
    Read(Result<LateRead, Errno>),
    Status(Result<Status, Errno>),
}

/// A request that an export is working on. As a future, it gives the request back with what it came to.
pub(super) struct InFlight {
    pub(super) request: Request,
    pub(super) work: Work,
}

impl Future for InFlight {
    type Output = (Request, Done);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<(Request, Done)> {
        let done = match &mut self.work {
            Work::Plain(work) => Done::Plain(ready!(work.as_mut().poll(cx))),
            Work::Read(work) => Done::Read(ready!(work.as_mut().poll(cx))),
            Work::Status(work) => Done::Status(ready!(work.as_mut().poll(cx))),
        };
        Poll::Ready((self.request, done))
    }
}

/// How many bytes a request holds while it is in flight: its payload, or the data of its answer.
pub(super) fn cost(request: &Request) -> usize {
    use crate::wire::Command;
    match request.command {
        Command::READ | Command::WRITE => request.length as usize,
        _ => 0,
    }
}
