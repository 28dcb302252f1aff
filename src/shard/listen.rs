//! Accepting connections, and ending those that break their time limits.

use std::rc::Rc;
use std::time::{Duration, Instant};

use drava_protocol::ErrorCode;
use drava_protocol::message::Error;
use drava_runtime::net::{TcpListener, TcpStream};
use drava_runtime::task::Stop;

use super::Shard;
use super::connection::{self, Connection, Overdue};

/// How often time limits are looked at: they are seconds, and the answer is a glance at each connection.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Free receive chunks that an idle shard keeps.
const CHUNKS_IDLE: usize = 4;
/// After a failed accept (out of file descriptors), so that it is not tried in a tight loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts until told to stop.
pub async fn accept(shard: Rc<Shard>, listener: TcpListener, stop: Stop) {
    loop {
        let stopped = async {
            stop.stopped().await;
            None
        };
        match futures_lite::future::or(stopped, async { Some(listener.accept().await) }).await {
            None => return,
            Some(Ok(stream)) => shard.connected(stream),
            Some(Err(error)) => {
                tracing::warn!(%error, shard = %shard.id, "a connection could not be accepted");
                drava_runtime::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Ends connections that break a time limit.
pub async fn sweep(shard: Rc<Shard>) {
    loop {
        drava_runtime::time::sleep(SWEEP_INTERVAL).await;
        if shard.chunks.bytes_lent() == 0 {
            // Nobody has sent anything just now: an idle node holds little.
            shard.chunks.trim(CHUNKS_IDLE);
        }
        let now = Instant::now();
        let connections: Vec<_> = shard.connections.borrow().values().cloned().collect();
        for connection in connections {
            connection.compact_if_slow(now, connection::COMPACT_AFTER);
            let Some(overdue) = connection.overdue(now, &shard.limits) else { continue };
            tracing::debug!(connection = connection.id, ?overdue, "connection ended");
            match overdue {
                Overdue::Hello => {
                    connection.push(0, &error(ErrorCode::HandshakeRequired, "Hello did not come in time"));
                    connection.close();
                }
                Overdue::Frame => {
                    connection.push(0, &error(ErrorCode::SlowClient, "a frame was begun and not finished in time"));
                    connection.close();
                }
                // It does not read: there is no way to tell it.
                Overdue::Write => connection.abort(),
            }
        }
    }
}

fn error(code: ErrorCode, text: &str) -> Error {
    Error { code: code as u16, retry_after_ms: 0, text: text.to_owned() }
}

impl Shard {
    /// Somebody waits for memory to receive with: soon, unfinished frames give back what they do not fill.
    pub(super) fn relieve_memory(self: &Rc<Self>) {
        if self.relieving.replace(true) {
            return;
        }
        let shard = self.clone();
        drava_runtime::spawn(async move {
            drava_runtime::time::sleep(connection::COMPACT_AFTER_PRESSED).await;
            shard.relieving.set(false);
            let now = Instant::now();
            for connection in shard.connections.borrow().values() {
                connection.compact_if_slow(now, connection::COMPACT_AFTER_PRESSED / 2);
            }
        });
    }

    fn connected(self: &Rc<Self>, stream: TcpStream) {
        let id = self.connection_next.get();
        self.connection_next.set(id + 1);
        let connection = Rc::new(Connection::new(id, self.out_total.clone()));
        // Answers are small and awaited; waiting for more to fill a packet would only delay them.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY");
        }
        if self.limits.connections_max <= self.connections.borrow().len() {
            self.counters.connections_refused.add(1);
            let text = format!("this shard holds {} connections, as many as it may", self.limits.connections_max);
            let body = Error { code: ErrorCode::TooManyConnections as u16, retry_after_ms: 1000, text };
            connection.push(0, &body);
            connection.close();
        } else {
            self.counters.connections_accepted.add(1);
            self.connections.borrow_mut().insert(id, connection.clone());
        }
        drava_runtime::spawn(connection::serve(self.clone(), connection, stream));
    }
}
