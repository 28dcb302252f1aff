//! A node as a child process: started on ports of its own, stopped or killed, gone when dropped.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

const READY_PATIENCE: Duration = Duration::from_secs(60);
const STOP_PATIENCE: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(1);
const HTTP_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("start {bin}")]
    Start {
        bin: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("find free ports for the node")]
    Ports(#[source] io::Error),
    #[error("the node ended before it was ready ({status}); its last words:\n{log}")]
    Ended { status: std::process::ExitStatus, log: String },
    #[error("the node was not ready within {READY_PATIENCE:?}; its last words:\n{log}")]
    NotReady { log: String },
    #[error("wait for the node")]
    Wait(#[source] io::Error),
    #[error("the node did not stop within {STOP_PATIENCE:?} of SIGTERM")]
    NotStopped,
}

#[derive(Clone, Copy, Debug)]
pub struct Ports {
    pub listen: SocketAddr,
    pub admin: SocketAddr,
}

#[derive(Debug)]
pub struct Node {
    child: Child,
    pub ports: Ports,
    /// From the start of the process to its first answer that it is ready.
    pub ready_after: Duration,
}

impl Node {
    /// Starts `bin` on `data_dir` with `options` and waits until it is ready. Its log goes to `log`.
    pub fn start(bin: &Path, data_dir: &Path, shards: u16, options: &[&str], log: &Path) -> Result<Node, NodeError> {
        let ports = free_ports(shards).map_err(NodeError::Ports)?;
        let fail = |source| NodeError::Start { bin: bin.to_owned(), source };
        let output = File::options().create(true).append(true).open(log).map_err(fail)?;
        let began = Instant::now();
        let child = Command::new(bin)
            .arg("node")
            .arg("--data-dir")
            .arg(data_dir)
            .args(["--listen", &ports.listen.to_string()])
            .args(["--admin-listen", &ports.admin.to_string()])
            .args(["--shards", &shards.to_string()])
            .args(options)
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(fail)?)
            .stderr(output)
            .spawn()
            .map_err(fail)?;
        let mut node = Node { child, ports, ready_after: Duration::ZERO };
        while !is_ready(ports.admin) {
            if let Some(status) = node.child.try_wait().map_err(NodeError::Wait)? {
                return Err(NodeError::Ended { status, log: tail(log) });
            }
            if READY_PATIENCE < began.elapsed() {
                return Err(NodeError::NotReady { log: tail(log) });
            }
            std::thread::sleep(LOOK_EVERY);
        }
        node.ready_after = began.elapsed();
        Ok(node)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(mut self) -> Result<(), NodeError> {
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            kill_process(pid, Signal::TERM).map_err(|error| NodeError::Wait(error.into()))?;
        }
        let asked = Instant::now();
        while self.child.try_wait().map_err(NodeError::Wait)?.is_none() {
            if STOP_PATIENCE < asked.elapsed() {
                return Err(NodeError::NotStopped);
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) -> Result<(), NodeError> {
        self.child.kill().map_err(NodeError::Wait)?;
        self.child.wait().map_err(NodeError::Wait)?;
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // An error means that it has ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Whether GET /readyz answers 200.
fn is_ready(admin: SocketAddr) -> bool {
    let ask = || -> io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&admin, HTTP_TIMEOUT)?;
        stream.set_read_timeout(Some(HTTP_TIMEOUT))?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut status = [0; 12];
        stream.read_exact(&mut status)?;
        Ok(&status == b"HTTP/1.1 200")
    };
    ask().unwrap_or(false)
}

/// Ports that nobody listens on: one shared, one for each shard after it, one for the admin.
fn free_ports(shards: u16) -> io::Result<Ports> {
    const TRIES: u32 = 100;
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..TRIES {
        let first = rand::random_range(20_000..60_000u16);
        let bound: io::Result<Vec<TcpListener>> =
            (first..first + shards + 2).map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port))).collect();
        match bound {
            Ok(_) => {
                let address = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
                return Ok(Ports { listen: address(first), admin: address(first + shards + 1) });
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The end of the node's log.
fn tail(log: &Path) -> String {
    const LINES: usize = 15;
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
