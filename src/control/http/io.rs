//! The executor's streams and timers as hyper wants them.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use drava_runtime::time::Timer;
use futures_lite::io::{AsyncRead, AsyncWrite};
use hyper::rt::ReadBufCursor;
use send_wrapper::SendWrapper;

/// Bytes read from a stream at once.
const READ_BYTES: usize = 4096;

/// A stream for hyper. Reading copies once through `buffer`: hyper's own buffer can only be lent by unsafe code, and the
/// admin's requests are small.
pub struct Io<S> {
    stream: S,
    buffer: Box<[u8; READ_BYTES]>,
}

impl<S> Io<S> {
    pub fn new(stream: S) -> Self {
        Io { stream, buffer: Box::new([0; READ_BYTES]) }
    }
}

impl<S: AsyncRead + Unpin> hyper::rt::Read for Io<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, mut out: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let Io { stream, buffer } = &mut *self;
        let want = out.remaining().min(READ_BYTES);
        let read_bytes = ready!(Pin::new(stream).poll_read(cx, &mut buffer[..want]))?;
        out.put_slice(&buffer[..read_bytes]);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> hyper::rt::Write for Io<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}

/// hyper's clock. It wants sleeps that are `Send`; these never leave the executor's thread, and the wrapper checks that.
#[derive(Clone, Copy, Debug)]
pub struct Clock;

struct Sleep(SendWrapper<Timer>);

impl hyper::rt::Sleep for Sleep {}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut *self.0).poll(cx)
    }
}

impl hyper::rt::Timer for Clock {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn hyper::rt::Sleep>> {
        Box::pin(Sleep(SendWrapper::new(Timer::new(duration))))
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn hyper::rt::Sleep>> {
        self.sleep(deadline.saturating_duration_since(Instant::now()))
    }
}
