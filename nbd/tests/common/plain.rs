//! An export of which a test cares for reads and writes alone.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use bytes::Bytes;
use nbd::export::{Answer, Export, ExportInfo, Extent, Promise, ReadAnswer, ReadReply, Spliced, ZeroMode};
use nbd::wire::Errno;

/// What the test cares for.
pub trait Plain: Send + Sync + 'static {
    fn info(&self) -> ExportInfo;
    fn read(&self, offset: u64, buffer: &mut [u8]) -> ReadAnswer;
    fn promise(&self, _offset: u64, _length: usize, _reply: ReadReply) -> Promise {
        panic!("nothing was promised");
    }
    fn forget(&self, _promise: Promise) {}
    fn splice(&self, _offset: u64, _length: usize, _pipe: BorrowedFd<'_>) -> Spliced {
        Spliced::No
    }
    fn write(&self, _offset: u64, _data: Bytes) -> Answer<()> {
        Answer::Now(Err(Errno::EPERM))
    }
    fn write_pages(&self, _offset: u64, _length: usize, _pipe: BorrowedFd<'_>) -> Option<Answer<()>> {
        None
    }
}

/// The rest: all of it is data, nothing else can be changed, and there is nothing to make durable.
pub struct Served<P>(pub Arc<P>);

impl<P: Plain> Export for Served<P> {
    fn info(&self) -> ExportInfo {
        self.0.info()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> ReadAnswer {
        self.0.read(offset, buffer)
    }

    fn promise(&self, offset: u64, length: usize, reply: ReadReply) -> Promise {
        self.0.promise(offset, length, reply)
    }

    fn forget(&self, promise: Promise) {
        self.0.forget(promise);
    }

    fn splice(&self, offset: u64, length: usize, pipe: BorrowedFd<'_>) -> Spliced {
        self.0.splice(offset, length, pipe)
    }

    fn write(&self, offset: u64, data: Bytes, _: bool) -> Answer<()> {
        self.0.write(offset, data)
    }

    fn write_pages(&self, offset: u64, length: usize, pipe: BorrowedFd<'_>) -> Option<Answer<()>> {
        self.0.write_pages(offset, length, pipe)
    }

    fn flush(&self) -> Answer<()> {
        Answer::Now(Ok(()))
    }

    fn trim(&self, _: u64, _: u64, _: bool) -> Answer<()> {
        Answer::Now(Err(Errno::EPERM))
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroMode, _: bool) -> Answer<()> {
        Answer::Now(Err(Errno::EPERM))
    }

    fn cache(&self, _: u64, _: u64) -> Answer<()> {
        Answer::Now(Ok(()))
    }

    fn block_status(&self, _: &str, _: u64, length: u64, _: usize) -> Answer<Vec<Extent>> {
        Answer::Now(Ok(vec![Extent { length, flags: 0 }]))
    }

    fn client_entered(self: Arc<Self>) -> Box<dyn Send + Sync> {
        Box::new(())
    }
}
