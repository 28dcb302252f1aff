//! Connections on a glommio executor, over the same [`Session`] as the tokio driver. For the load generator: it hands out
//! the session as it is and copies nothing that it need not.
//!
//! The way of the bytes:
//!
//! 1. [`Connection::connect`] opens the socket, says Hello and waits for Welcome.
//! 2. The caller appends requests through [`Connection::session`]; they gather in one outgoing buffer.
//! 3. [`Connection::turn`] writes what gathered and reads what came, whichever is possible first.
//! 4. [`Connection::received`] hands out one event at a time, its payload where it lies in the receive buffer.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use drava_runtime::net::TcpStream;
use futures_lite::{AsyncRead, AsyncWrite};

use crate::session::{Answer, Event, Limits, Received, Refusal, Request, RequestError, Session, SessionError};

/// The receive buffer at the start; it grows to the largest frame that came.
const RECEIVE_BYTES: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    #[error("connect to {address}")]
    Connect {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("the connection failed")]
    Io(#[source] io::Error),
    #[error("the node closed the connection")]
    Closed,
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error("the node refused: {0}")]
    Refused(Refusal),
}

/// What a turn did. Either way there may be more to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Bytes came: ask [`Connection::received`].
    Received,
    /// All that had gathered is with the socket.
    Sent,
}

/// One event and the payload that belongs to it, if any.
#[derive(Debug)]
pub struct Incoming<'a, T> {
    pub event: Event<T>,
    pub payload: &'a [u8],
}

/// One connection to one core. `T` is what the caller wants back with each answer.
#[derive(Debug)]
pub struct Connection<T> {
    stream: TcpStream,
    session: Session<T>,
    outgoing: Vec<u8>,
    /// Bytes of `outgoing` that are with the socket.
    sent: usize,
    incoming: Vec<u8>,
    /// What was received and not yet handed out.
    start: usize,
    end: usize,
    /// The next frame needs this many bytes from `start`.
    needed: usize,
}

impl<T> Connection<T> {
    /// Connects, and returns once the node has welcomed.
    pub async fn connect(address: SocketAddr, limits: Limits, client: &str) -> Result<Connection<T>, DriverError> {
        let stream = TcpStream::connect(address).await.and_then(|stream| {
            stream.set_nodelay(true)?;
            Ok(stream)
        });
        let stream =
            stream.map_err(|error| DriverError::Connect { address, source: drava_runtime::io_error(error) })?;
        let mut connection = Connection {
            stream,
            session: Session::new(limits),
            outgoing: Vec::new(),
            sent: 0,
            incoming: vec![0; RECEIVE_BYTES],
            start: 0,
            end: 0,
            needed: 1,
        };
        connection.session.hello(client, None, &mut connection.outgoing);
        loop {
            connection.turn().await?;
            match connection.received()?.map(|incoming| incoming.event) {
                Some(Event::Welcome(_)) => return Ok(connection),
                Some(Event::Refused(refusal)) => return Err(DriverError::Refused(refusal)),
                Some(Event::Answer { .. } | Event::Deliver { .. } | Event::Ignored) | None => {}
            }
        }
    }

    /// The session and the buffer to append frames to; the next turn sends them.
    pub fn session(&mut self) -> (&mut Session<T>, &mut Vec<u8>) {
        (&mut self.session, &mut self.outgoing)
    }

    /// Bytes that gathered and are not with the socket yet.
    pub fn unsent_bytes(&self) -> usize {
        self.outgoing.len() - self.sent
    }

    /// Writes and reads until something happened. Cancelling loses nothing.
    pub async fn turn(&mut self) -> Result<Turn, DriverError> {
        poll_fn(|cx| self.poll_turn(cx)).await
    }

    /// [`Connection::turn`], for callers that wait for other things, too.
    pub fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Result<Turn, DriverError>> {
        drava_runtime::executor::mark_active();
        let had_unsent = 0 < self.unsent_bytes();
        while 0 < self.unsent_bytes() {
            match Pin::new(&mut self.stream).poll_write(cx, &self.outgoing[self.sent..]) {
                Poll::Ready(written) => self.sent += written.map_err(DriverError::Io)?,
                Poll::Pending => break,
            }
        }
        if self.unsent_bytes() == 0 {
            self.outgoing.clear();
            self.sent = 0;
        } else if self.outgoing.len() / 2 < self.sent {
            self.outgoing.drain(..self.sent);
            self.sent = 0;
        }
        self.make_room();
        match Pin::new(&mut self.stream).poll_read(cx, &mut self.incoming[self.end..]) {
            Poll::Ready(Ok(0)) => Poll::Ready(Err(DriverError::Closed)),
            Poll::Ready(Ok(bytes)) => {
                self.end += bytes;
                Poll::Ready(Ok(Turn::Received))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(DriverError::Io(error))),
            Poll::Pending if had_unsent && self.unsent_bytes() == 0 => Poll::Ready(Ok(Turn::Sent)),
            Poll::Pending => Poll::Pending,
        }
    }

    /// The next event of the bytes that have come; none when it is not complete.
    pub fn received(&mut self) -> Result<Option<Incoming<'_, T>>, DriverError> {
        if self.end - self.start < self.needed {
            return Ok(None);
        }
        let input = &self.incoming[self.start..self.end];
        match self.session.receive(input)? {
            Received::NeedBytes(bytes) => {
                self.needed = bytes;
                Ok(None)
            }
            Received::Event { event, consumed } => {
                self.start += consumed;
                self.needed = 1;
                let payload = match &event {
                    Event::Deliver { payload, .. }
                    | Event::Answer { answer: Ok(Answer::Fetched { payload, .. }), .. } => &input[payload.clone()],
                    Event::Welcome(_) | Event::Answer { .. } | Event::Refused(_) | Event::Ignored => &[],
                };
                Ok(Some(Incoming { event, payload }))
            }
        }
    }

    /// Sends one request and waits for its answer, for setting up. Nothing else may be under way; deliveries that come
    /// meanwhile are lost.
    pub async fn call<M: Request>(&mut self, message: &M) -> Result<Answer, DriverError>
    where
        T: Default,
    {
        self.session.request(message, T::default(), &mut self.outgoing)?;
        self.answer().await
    }

    /// Waits for the answer to the one request that is under way.
    pub async fn answer(&mut self) -> Result<Answer, DriverError> {
        loop {
            match self.received()?.map(|incoming| incoming.event) {
                Some(Event::Answer { answer, .. }) => return answer.map_err(DriverError::Refused),
                Some(Event::Refused(refusal)) => return Err(DriverError::Refused(refusal)),
                Some(Event::Welcome(_) | Event::Deliver { .. } | Event::Ignored) => {}
                None => {
                    self.turn().await?;
                }
            }
        }
    }

    /// Makes room to read the frame that has begun.
    fn make_room(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        let spare = self.incoming.len() - self.end;
        let missing = self.needed.saturating_sub(self.end - self.start);
        if 0 < spare && missing <= spare {
            return;
        }
        self.incoming.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        if self.incoming.len() < self.needed.max(self.end + 1) {
            self.incoming.resize(self.needed.next_multiple_of(RECEIVE_BYTES), 0);
        }
    }
}
