//! One session over a blocking socket: for checks that need no speed and no executor.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use drava_client::session::{Answer, Event, Limits, Received, Refusal, Request, RequestError, Session, SessionError};

/// How long an answer may take. Generous: the node may be recovering, its disk may be frozen.
const PATIENCE: Duration = Duration::from_secs(60);
const READ_BYTES: usize = 64 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum BlockingError {
    #[error("the connection broke")]
    Connection(#[from] io::Error),
    #[error("the node was silent for {PATIENCE:?}")]
    Silent,
    #[error("the node broke the protocol")]
    Session(#[from] SessionError),
    #[error("the request cannot be sent")]
    Request(#[from] RequestError),
    #[error("the node refused")]
    Refused(#[from] Refusal),
    #[error("the node answered {0:?}, which answers nothing that was asked")]
    Unexpected(Box<Answer>),
}

/// `T` comes back with the answer of the request that it was given with.
pub struct Blocking<T> {
    stream: TcpStream,
    session: Session<T>,
    input: Vec<u8>,
    output: Vec<u8>,
}

/// What a fetch gave.
#[derive(Debug)]
pub struct Batches {
    pub next_offset: u64,
    pub end_offset: u64,
    /// Batches, each padded to 16 bytes.
    pub payload: Vec<u8>,
}

impl<T> Blocking<T> {
    /// Connects and waits for the node's welcome.
    pub fn connect(address: SocketAddr) -> Result<Blocking<T>, BlockingError> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let session = Session::new(Limits::default());
        let mut blocking = Blocking { stream, session, input: Vec::new(), output: Vec::new() };
        blocking.session.hello("drava-bench", None, &mut blocking.output);
        blocking.send()?;
        while blocking.session.welcome().is_none() {
            blocking.event()?;
        }
        Ok(blocking)
    }

    /// Sends a batch; its answer comes with [`Blocking::answer`].
    pub fn publish(&mut self, partition: u64, batch: &[u8], tag: T) -> Result<(), BlockingError> {
        self.session.publish(partition, batch, tag, &mut self.output)?;
        self.send()
    }

    /// The next answer, with its tag and payload. A refusal is an error.
    pub fn answer(&mut self) -> Result<(T, Answer, Vec<u8>), BlockingError> {
        loop {
            if let Some(answer) = self.event()? {
                return Ok(answer);
            }
        }
    }

    /// Sends a request and waits for its answer. Nothing else may be in flight.
    pub fn call<M: Request>(&mut self, message: &M, tag: T) -> Result<(Answer, Vec<u8>), BlockingError> {
        self.session.request(message, tag, &mut self.output)?;
        self.send()?;
        let (_, answer, payload) = self.answer()?;
        Ok((answer, payload))
    }

    fn send(&mut self) -> Result<(), BlockingError> {
        self.stream.write_all(&self.output)?;
        self.output.clear();
        Ok(())
    }

    /// Takes one event: an answer, or nothing that somebody waits for.
    fn event(&mut self) -> Result<Option<(T, Answer, Vec<u8>)>, BlockingError> {
        loop {
            match self.session.receive(&self.input)? {
                Received::NeedBytes(_) => self.read()?,
                Received::Event { event, consumed } => {
                    let answer = match event {
                        Event::Answer { tag, answer, .. } => {
                            let answer = answer?;
                            let payload = match &answer {
                                Answer::Fetched { payload, .. } => self.input[payload.clone()].to_vec(),
                                _ => Vec::new(),
                            };
                            Some((tag, answer, payload))
                        }
                        Event::Refused(refusal) => return Err(refusal.into()),
                        Event::Welcome(_) | Event::Deliver { .. } | Event::Damaged { .. } | Event::Ignored => None,
                    };
                    self.input.drain(..consumed);
                    return Ok(answer);
                }
            }
        }
    }

    fn read(&mut self) -> Result<(), BlockingError> {
        let mut chunk = [0; READ_BYTES];
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(bytes) => {
                self.input.extend_from_slice(&chunk[..bytes]);
                Ok(())
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Err(BlockingError::Silent)
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl<T: Default> Blocking<T> {
    /// Batches from `offset` on, without waiting for any.
    pub fn fetch(&mut self, partition: u64, offset: u64) -> Result<Batches, BlockingError> {
        let fetch = drava_protocol::message::Fetch { partition, offset, bytes_max: 1 << 20, wait_ms: 0 };
        match self.call(&fetch, T::default())? {
            (Answer::Fetched { next_offset, end_offset, .. }, payload) => {
                Ok(Batches { next_offset, end_offset, payload })
            }
            (other, _) => Err(BlockingError::Unexpected(Box::new(other))),
        }
    }
}
