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
                Some(Event::Answer { .. } | Event::Deliver { .. } | Event::Damaged { .. } | Event::Ignored) | None => {}
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
                    Event::Welcome(_)
                    | Event::Answer { .. }
                    | Event::Damaged { .. }
                    | Event::Refused(_)
                    | Event::Ignored => &[],
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
                Some(Event::Welcome(_) | Event::Deliver { .. } | Event::Damaged { .. } | Event::Ignored) => {}
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

#[cfg(test)]
mod tests {
    use super::*;
    use drava_protocol::frame::{self, Decoded};
    use drava_protocol::message::{Fetch, Fetched, Kind, Ping, Pong, Welcome};
    use drava_runtime::{Executor, ExecutorConfig};
    use std::io::{Read, Write};
    use std::net::TcpListener;

    /// Answers until the client goes, in writes of at most `write_bytes`.
    fn serve(write_bytes: usize, fetched: Vec<u8>) -> SocketAddr {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut input, mut buffer) = (Vec::new(), [0; 4096]);
            loop {
                match stream.read(&mut buffer) {
                    Ok(0) | Err(_) => return,
                    Ok(bytes) => input.extend_from_slice(&buffer[..bytes]),
                }
                let (mut consumed, mut out) = (0, Vec::new());
                while let Decoded::Frame(frame, bytes) = frame::decode(&input[consumed..], 0).unwrap() {
                    let correlation = frame.header.correlation;
                    match frame.header.kind {
                        Kind::Hello => {
                            let welcome = Welcome {
                                version: 1,
                                node: 1,
                                shard: 0,
                                shard_count: 1,
                                payload_bytes_max: 1 << 20,
                                in_flight_max: 16,
                                features: 0,
                            };
                            frame::encode(&welcome, 0, correlation, 0, &mut out);
                        }
                        Kind::Ping => frame::encode(&Pong {}, 0, correlation, 0, &mut out),
                        Kind::Fetch => {
                            let body = Fetched { next_offset: 1, start_offset: 0, end_offset: 1 };
                            frame::encode(&body, 0, correlation, fetched.len() as u32, &mut out);
                            out.extend_from_slice(&fetched);
                            out.extend_from_slice(frame::padding(fetched.len()));
                        }
                        other => panic!("{other:?} was not expected"),
                    }
                    consumed += bytes;
                }
                input.drain(..consumed);
                for piece in out.chunks(write_bytes) {
                    stream.write_all(piece).unwrap();
                }
            }
        });
        address
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        Executor::run(ExecutorConfig::new("driver-test", None), future).unwrap()
    }

    #[test]
    fn answers_that_come_in_pieces_are_put_together() {
        let address = serve(7, vec![]);
        run(async {
            let mut connection: Connection<u32> =
                Connection::connect(address, Limits::default(), "test").await.unwrap();
            let (session, out) = connection.session();
            for tag in 0..5 {
                session.request(&Ping {}, tag, out).unwrap();
            }
            let mut tags = Vec::new();
            while tags.len() < 5 {
                connection.turn().await.unwrap();
                while let Some(incoming) = connection.received().unwrap() {
                    let Event::Answer { tag, answer: Ok(Answer::Pong), .. } = incoming.event else {
                        panic!("{incoming:?}");
                    };
                    tags.push(tag);
                }
            }
            assert_eq!(tags, [0, 1, 2, 3, 4]);
        });
    }

    #[test]
    fn a_payload_larger_than_the_buffer_comes_whole() {
        let sent: Vec<u8> = (0..3 * RECEIVE_BYTES + 5).map(|i| (i % 251) as u8).collect();
        let address = serve(1 << 16, sent.clone());
        run(async {
            let mut connection: Connection<u32> =
                Connection::connect(address, Limits::default(), "test").await.unwrap();
            for _ in 0..2 {
                let (session, out) = connection.session();
                let fetch = Fetch { partition: 1, offset: 0, bytes_max: 0, wait_ms: 0 };
                session.request(&fetch, 9, out).unwrap();
                loop {
                    if let Some(incoming) = connection.received().unwrap() {
                        assert!(incoming.payload == sent, "{} bytes came", incoming.payload.len());
                        break;
                    }
                    connection.turn().await.unwrap();
                }
            }
        });
    }

    #[test]
    fn a_node_that_goes_is_told_as_such() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || drop(listener.accept()));
        let error = run(Connection::<u32>::connect(address, Limits::default(), "test")).unwrap_err();
        assert!(matches!(error, DriverError::Closed | DriverError::Io(_)), "{error:?}");
    }
}
