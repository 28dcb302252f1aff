//! TCP over loopback, through the executors.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use drava_runtime::net::{TcpListener, TcpStream};
use drava_runtime::{Executor, ExecutorHandle};
use futures_lite::{AsyncRead, AsyncReadExt, AsyncWriteExt};

use super::{LimitsError, Transfer, cores, executor, join};
use crate::cpu::ThreadId;
use crate::latency::{Latency, Quantiles};
use crate::measure::{Meter, Phase, Stretch, measure};

const WRITE_BYTES: [usize; 3] = [64 << 10, 256 << 10, 1 << 20];
const CONNECTIONS: [usize; 2] = [1, 4];
const READ_BYTES: usize = 1 << 20;
const REQUEST_BYTES: usize = 1 << 10;
const ANSWER_BYTES: usize = 64;

/// The client sends, the server receives, as in publishing.
pub fn one_way(stretch: Stretch) -> Result<Transfer, LimitsError> {
    let (server, client) = cores();
    best_transfer(client, server, stretch)
}

/// The server sends from memory, the client only receives, as in consuming.
pub fn sender(stretch: Stretch) -> Result<Transfer, LimitsError> {
    let (server, client) = cores();
    best_transfer(server, client, stretch)
}

/// Looks for the best shape in short runs, then measures that one.
fn best_transfer(sender_core: usize, receiver_core: usize, stretch: Stretch) -> Result<Transfer, LimitsError> {
    let short = Stretch { warm_up: stretch.warm_up / 4, measured: stretch.measured / 4 };
    let mut best: Option<Transfer> = None;
    for connections in CONNECTIONS {
        for write_bytes in WRITE_BYTES {
            let tried = transfer(sender_core, receiver_core, write_bytes, connections, short)?;
            if best.is_none_or(|best| best.mib_per_s < tried.mib_per_s) {
                best = Some(tried);
            }
        }
    }
    let best = best.expect("at least one shape was tried");
    transfer(sender_core, receiver_core, best.write_bytes, best.connections, stretch)
}

fn transfer(
    sender_core: usize,
    receiver_core: usize,
    write_bytes: usize,
    connections: usize,
    stretch: Stretch,
) -> Result<Transfer, LimitsError> {
    let meter = Arc::new(Meter::default());
    let (receiver, receiver_thread, port) = {
        let meter = meter.clone();
        listen("limits-receive", receiver_core, connections, move |mut stream| {
            let meter = meter.clone();
            async move {
                let mut buffer = vec![0; READ_BYTES];
                loop {
                    let bytes = read_some(&mut stream, &mut buffer).await?;
                    if bytes == 0 {
                        return Ok(());
                    }
                    meter.count(1, bytes as u64);
                }
            }
        })?
    };
    let (sender, sender_thread) = {
        let meter = meter.clone();
        connect("limits-send", sender_core, port, connections, move |mut stream| {
            let meter = meter.clone();
            async move {
                let buffer = vec![0xA5; write_bytes];
                while meter.phase() != Phase::Stopping {
                    drava_runtime::executor::mark_active();
                    stream.write_all(&buffer).await?;
                    drava_runtime::yield_if_needed().await;
                }
                Ok(())
            }
        })?
    };
    let measured = measure(&meter, stretch, &[sender_thread, receiver_thread]);
    join(sender)?;
    join(receiver)?;
    let measured = measured.map_err(LimitsError::io("read the CPU clocks"))?;
    Ok(Transfer {
        write_bytes,
        connections,
        mib_per_s: measured.mib_per_s(),
        sender_cpu_s_per_gib: measured.cpu_s_per_gib(0),
        receiver_cpu_s_per_gib: measured.cpu_s_per_gib(1),
    })
}

/// A request there and an answer back, one at a time.
pub fn round_trip(stretch: Stretch) -> Result<Quantiles, LimitsError> {
    let (server_core, client_core) = cores();
    let (server, _, port) = listen("limits-answer", server_core, 1, |mut stream| async move {
        let mut request = [0; REQUEST_BYTES];
        let mut filled = 0;
        loop {
            let bytes = read_some(&mut stream, &mut request[filled..]).await?;
            if bytes == 0 {
                return Ok(());
            }
            filled += bytes;
            if filled == REQUEST_BYTES {
                filled = 0;
                stream.write_all(&[1; ANSWER_BYTES]).await?;
            }
        }
    })?;
    let (result, quantiles) = mpsc::channel();
    let (client, _) = connect("limits-ask", client_core, port, 1, move |mut stream| {
        let result = result.clone();
        async move {
            let mut latency = Latency::default();
            let from = Instant::now() + stretch.warm_up;
            let until = from + stretch.measured;
            let mut answer = [0; ANSWER_BYTES];
            loop {
                drava_runtime::executor::mark_active();
                let began = Instant::now();
                stream.write_all(&[2; REQUEST_BYTES]).await?;
                stream.read_exact(&mut answer).await?;
                let ended = Instant::now();
                if until <= ended {
                    break;
                }
                if from <= began {
                    latency.record(ended - began);
                }
            }
            // The receiver waits for this, or has gone with an error of its own.
            result.send(latency.quantiles()).map_err(io::Error::other)
        }
    })?;
    join(client)?;
    join(server)?;
    quantiles.recv().map_err(|gone| LimitsError::Io { what: "hear from the client", source: io::Error::other(gone) })
}

pub(crate) type Running = ExecutorHandle<Result<(), LimitsError>>;

/// Starts an executor that takes `connections` and does `serve` for each until all are done. Says on which thread and
/// port.
pub(crate) fn listen<S, F>(
    name: &'static str,
    core: usize,
    connections: usize,
    serve: S,
) -> Result<(Running, ThreadId, u16), LimitsError>
where
    S: Fn(TcpStream) -> F + Send + 'static,
    F: Future<Output = io::Result<()>> + 'static,
{
    let (ready, address) = mpsc::channel();
    let running = Executor::start(executor(name, core), move || async move {
        let listening = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| {
            let port = listener.local_addr()?.port();
            Ok((listener, port))
        });
        let (listener, port) = listening.map_err(drava_runtime::io_error).map_err(LimitsError::io("listen"))?;
        // Whoever started this waits for the message.
        ready.send((ThreadId::current(), port)).expect("the starter waits");
        let mut serving = Vec::new();
        for _ in 0..connections {
            let stream = listener.accept().await.map_err(drava_runtime::io_error).map_err(LimitsError::io("accept"))?;
            stream.set_nodelay(true).map_err(drava_runtime::io_error).map_err(LimitsError::io("set TCP_NODELAY"))?;
            serving.push(drava_runtime::spawn(serve(stream)));
        }
        for served in serving {
            served.await.expect("the executor runs on").map_err(LimitsError::io("serve"))?;
        }
        Ok(())
    })
    .map_err(LimitsError::io("start an executor"))?;
    match address.recv() {
        Ok((thread, port)) => Ok((running, thread, port)),
        // It ended before it said where it listens, so it has an error to tell.
        Err(_) => join(running).and(Err(LimitsError::Io { what: "listen", source: io::ErrorKind::Other.into() })),
    }
}

/// Starts an executor that opens `connections` and does `work` on each.
pub(crate) fn connect<W, F>(
    name: &'static str,
    core: usize,
    port: u16,
    connections: usize,
    work: W,
) -> Result<(Running, ThreadId), LimitsError>
where
    W: Fn(TcpStream) -> F + Send + 'static,
    F: Future<Output = io::Result<()>> + 'static,
{
    let (started, thread) = mpsc::channel();
    let running = Executor::start(executor(name, core), move || async move {
        started.send(ThreadId::current()).expect("the starter waits");
        let mut working = Vec::new();
        for _ in 0..connections {
            let stream = TcpStream::connect(("127.0.0.1", port)).await;
            let stream = stream.map_err(drava_runtime::io_error).map_err(LimitsError::io("connect"))?;
            stream.set_nodelay(true).map_err(drava_runtime::io_error).map_err(LimitsError::io("set TCP_NODELAY"))?;
            working.push(drava_runtime::spawn(work(stream)));
        }
        for done in working {
            done.await.expect("the executor runs on").map_err(LimitsError::io("work on a connection"))?;
        }
        Ok(())
    })
    .map_err(LimitsError::io("start an executor"))?;
    let thread = thread.recv().map_err(|gone| LimitsError::Io { what: "start", source: io::Error::other(gone) })?;
    Ok((running, thread))
}

/// One read; 0 at the end of the stream.
pub(crate) async fn read_some(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    drava_runtime::executor::mark_active();
    poll_fn(|cx| Pin::new(&mut *stream).poll_read(cx, buffer)).await
}
