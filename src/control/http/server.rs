//! Connections: accepted, bounded, served, drained.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::Request;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use drava_protocol::ErrorCode;
use drava_runtime::local::Notify;
use drava_runtime::net::{TcpListener, TcpStream};
use drava_runtime::task::Stop;
use futures_lite::future;
use futures_lite::io::{AsyncReadExt, AsyncWriteExt};
use futures_util::FutureExt;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use tower_service::Service;

use super::admin::Admin;
use super::io::{Clock, Io};
use super::problem::Problem;
use super::routes::{App, Shared, router};

/// The largest head of a request, in bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;
const HEADERS_MAX: usize = 64;
/// Connections above the limit that are being told so; more are closed without a word.
const REFUSING_MAX: usize = 64;
/// How long a refused client is listened to, so that the refusal reaches it before a reset does.
const REFUSED_LINGER: Duration = Duration::from_millis(100);
/// Pause after a failed accept: the process has too many open files, and asking at once would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Long enough for the executor to submit what it has for the kernel.
const CANCEL_PAUSE: Duration = Duration::from_millis(1);

/// How the HTTP admin listens and what it allows.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// An IP and a port; port 0: one that is free.
    pub listen: SocketAddr,
    /// Connections above this many are answered 503 and closed.
    pub connections_max: usize,
    /// From the start of a connection, or from the last answer, to the end of the next head; then it is closed.
    pub header_timeout: Duration,
    /// From the end of the head to the end of the body.
    pub body_timeout: Duration,
    /// The largest body of a request, in bytes.
    pub body_bytes_max: usize,
    /// The longest time that a handler may take. A change goes on after its answer says that it is unknown.
    pub request_timeout: Duration,
    /// A client that takes nothing of its answer for so long is cut.
    pub write_timeout: Duration,
    /// How long requests under way may take once the node stops.
    pub drain_timeout: Duration,
}

impl HttpConfig {
    pub fn new(listen: SocketAddr) -> Self {
        HttpConfig {
            listen,
            connections_max: 256,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(10),
            body_bytes_max: 64 * 1024,
            request_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(5),
        }
    }
}

/// What the HTTP admin counts of itself.
#[derive(Debug, Default)]
pub struct HttpCounters {
    /// Gauge.
    pub connections: Cell<u64>,
    pub connections_refused: Cell<u64>,
    pub requests: Cell<u64>,
    pub panics: Cell<u64>,
}

fn count(counter: &Cell<u64>) {
    counter.set(counter.get() + 1);
}

#[derive(Debug, thiserror::Error)]
#[error("cannot listen for HTTP on {address}")]
pub struct BindError {
    pub address: SocketAddr,
    #[source]
    pub source: io::Error,
}

/// A bound listener that does not serve yet. Lives on the control core's executor.
#[derive(Debug)]
pub struct HttpServer {
    listener: TcpListener,
    address: SocketAddr,
    config: HttpConfig,
}

impl HttpServer {
    /// Binds `config.listen`. To be called on the executor that will serve.
    ///
    /// The executor's listeners share their port with any other that asks for that: whether another process listens
    /// there is the boot's to find out (`node::ports`).
    pub fn bind(config: HttpConfig) -> Result<HttpServer, BindError> {
        let address = config.listen;
        let fail = |source| BindError { address, source };
        let listener = TcpListener::bind(address).map_err(|error| fail(drava_runtime::io_error(error)))?;
        let address = listener.local_addr().map_err(|error| fail(drava_runtime::io_error(error)))?;
        Ok(HttpServer { listener, address, config })
    }

    /// The address that was bound, with its real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop`, then finishes the requests under way, at most for `drain_timeout`.
    pub async fn serve(self, admin: Rc<dyn Admin>, stop: Stop) {
        let counters = Rc::new(HttpCounters::default());
        let app = App { admin, config: self.config.clone(), counters: counters.clone(), started_at: Instant::now() };
        let router = router(Shared::new(app));
        let connections = Rc::new(Connections { counters, ..Connections::default() });
        while let Some(accepted) = accept(&self.listener, &stop).await {
            match accepted {
                Ok(stream) => connections.take(stream, &router, &self.config),
                Err(error) => {
                    tracing::warn!(%error, "could not accept an HTTP connection");
                    drava_runtime::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(self.listener);
        // The accept that was pending holds the socket until the executor has told the kernel to cancel it.
        drava_runtime::time::sleep(CANCEL_PAUSE).await;
        connections.drain(self.config.drain_timeout).await;
    }
}

/// `None` once it is time to stop.
async fn accept(listener: &TcpListener, stop: &Stop) -> Option<io::Result<TcpStream>> {
    let stopped = async {
        stop.stopped().await;
        None
    };
    future::or(stopped, async { Some(listener.accept().await.map_err(drava_runtime::io_error)) }).await
}

/// The connections that are open.
#[derive(Debug, Default)]
struct Connections {
    open: RefCell<BTreeMap<u64, Rc<Link>>>,
    next: Cell<u64>,
    refusing: Cell<usize>,
    closed: Notify,
    counters: Rc<HttpCounters>,
}

/// How the server tells a connection's task what to do.
#[derive(Debug, Default)]
struct Link {
    phase: Cell<Phase>,
    changed: Notify,
}

#[derive(Clone, Copy, Debug, Default)]
enum Phase {
    #[default]
    Serve,
    /// Answer what has been asked, then close.
    Finish,
    /// Close now.
    Abort,
}

impl Link {
    fn enter(&self, phase: Phase) {
        self.phase.set(phase);
        self.changed.notify();
    }
}

impl Connections {
    fn take(self: &Rc<Self>, stream: TcpStream, router: &Router, config: &HttpConfig) {
        if config.connections_max <= self.open.borrow().len() {
            count(&self.counters.connections_refused);
            if self.refusing.get() < REFUSING_MAX {
                self.refusing.set(self.refusing.get() + 1);
                let connections = self.clone();
                drava_runtime::spawn(async move {
                    refuse(stream).await;
                    connections.refusing.set(connections.refusing.get() - 1);
                });
            }
            return;
        }
        // Without these the connection works, only later or longer.
        for result in [stream.set_nodelay(true), stream.set_write_timeout(Some(config.write_timeout))] {
            if let Err(error) = result {
                tracing::debug!(%error, "an HTTP connection's option was refused");
            }
        }
        let id = self.next.get();
        self.next.set(id + 1);
        let link = Rc::new(Link::default());
        self.open.borrow_mut().insert(id, link.clone());
        self.counters.connections.set(self.open.borrow().len() as u64);
        let connection = serve(stream, router.clone(), config.clone(), self.counters.clone(), link);
        let connections = self.clone();
        drava_runtime::spawn(async move {
            connection.await;
            connections.open.borrow_mut().remove(&id);
            connections.counters.connections.set(connections.open.borrow().len() as u64);
            connections.closed.notify();
        });
    }

    async fn drain(&self, timeout: Duration) {
        self.tell(Phase::Finish);
        let late = async {
            drava_runtime::time::sleep(timeout).await;
            self.tell(Phase::Abort);
            self.none_left().await;
        };
        future::or(self.none_left(), late).await;
    }

    fn tell(&self, phase: Phase) {
        for link in self.open.borrow().values() {
            link.enter(phase);
        }
    }

    async fn none_left(&self) {
        future::poll_fn(|cx| {
            while self.closed.poll_notified(cx).is_ready() {}
            if self.open.borrow().is_empty() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await
    }
}

/// Serves one connection until it ends or `link` says so.
async fn serve(stream: TcpStream, router: Router, config: HttpConfig, counters: Rc<HttpCounters>, link: Rc<Link>) {
    let header_timeout = config.header_timeout;
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        answer(request.map(axum::body::Body::new), router.clone(), config.request_timeout, counters.clone())
    });
    let mut builder = http1::Builder::new();
    builder.timer(Clock).header_read_timeout(header_timeout).max_buf_size(HEAD_BYTES_MAX).max_headers(HEADERS_MAX);
    let mut connection = pin!(builder.serve_connection(Io::new(stream), service));
    let ended = future::poll_fn(|cx| {
        while link.changed.poll_notified(cx).is_ready() {
            match link.phase.get() {
                Phase::Serve => {}
                Phase::Finish => connection.as_mut().graceful_shutdown(),
                Phase::Abort => return Poll::Ready(Ok(())),
            }
        }
        connection.as_mut().poll(cx)
    })
    .await;
    if let Err(error) = ended {
        // The client's doing: it went away, was too slow, or does not speak HTTP.
        tracing::debug!(%error, "an HTTP connection ended early");
    }
}

/// Answers one request. What a handler does, also a panic, stays within it.
async fn answer(
    request: Request,
    mut router: Router,
    timeout: Duration,
    counters: Rc<HttpCounters>,
) -> Result<Response, Infallible> {
    drava_runtime::executor::mark_active();
    count(&counters.requests);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let call = AssertUnwindSafe(async move { router.call(request).await }).catch_unwind().map(Some);
    let late = async {
        drava_runtime::time::sleep(timeout).await;
        None
    };
    let response = match future::or(call, late).await {
        Some(Ok(Ok(response))) => response,
        Some(Err(_panic)) => {
            count(&counters.panics);
            tracing::error!(%method, path, "a handler panicked");
            Problem::new(ErrorCode::Internal, "the node failed to answer; its log says more").into_response()
        }
        None => {
            tracing::warn!(%method, path, "a request took too long");
            let text = format!("no answer within {} ms; whether a change was made is unknown", timeout.as_millis());
            Problem::new(ErrorCode::Busy, text).into_response()
        }
    };
    if response.status().is_server_error() {
        tracing::debug!(%method, path, status = response.status().as_u16(), "a request failed");
    }
    Ok(response)
}

/// Tells a client that there are too many, and closes.
async fn refuse(mut stream: TcpStream) {
    let told = async {
        stream.write_all(&refusal().await).await?;
        stream.close().await?;
        // Closing a socket with unread bytes resets it, and the reset may overtake the answer.
        let mut unread = [0; 1024];
        while 0 < stream.read(&mut unread).await? {}
        io::Result::Ok(())
    };
    let late = async {
        drava_runtime::time::sleep(REFUSED_LINGER).await;
        Ok(())
    };
    if let Err(error) = future::or(told, late).await {
        tracing::debug!(%error, "a refused HTTP connection did not hear why");
    }
}

async fn refusal() -> Vec<u8> {
    let problem = Problem::new(ErrorCode::TooManyConnections, "the node has as many HTTP connections as it may hold");
    let (head, body) = problem.into_response().into_parts();
    let body = body.collect().await.expect("it is in memory").to_bytes();
    let content_type = head.headers[header::CONTENT_TYPE].to_str().expect("ours");
    let mut answer = format!(
        "HTTP/1.1 {}\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\nretry-after: 1\r\nconnection: close\r\n\r\n",
        head.status,
        body.len()
    )
    .into_bytes();
    answer.extend_from_slice(&body);
    answer
}
