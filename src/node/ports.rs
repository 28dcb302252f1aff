//! The ports of a node, settled before the shards start.
//!
//! Each port is held by a socket that is bound with SO_REUSEPORT and never listens: it keeps others
//! away and takes no connection, until the shards listen on the same port.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with, sockopt};
use serde::{Deserialize, Serialize};

use crate::config::NodeConfig;

/// A process on this host answers at once.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);

/// Where a node listens. Written to `ports.json` in the data directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    /// Shared by all shards.
    pub listen: SocketAddr,
    /// By shard.
    pub shards: Vec<u16>,
    pub admin: SocketAddr,
}

/// Keeps chosen ports from others. Drop it once the shards listen.
#[derive(Debug)]
pub struct Held(#[expect(dead_code, reason = "closed when dropped")] Vec<OwnedFd>);

impl Ports {
    /// Settles the ports of `config`, letting the system choose those that are 0.
    ///
    /// Errors: an address that cannot be bound: no address of this host, or taken by a socket without SO_REUSEPORT.
    pub fn settle(config: &NodeConfig) -> Result<(Ports, Held), PortError> {
        let mut held = Vec::new();
        let mut settle = |ip: IpAddr, port: u16| {
            let (address, socket) = hold(SocketAddr::new(ip, port))
                .map_err(|source| PortError { address: SocketAddr::new(ip, port), source })?;
            held.push(socket);
            Ok(address)
        };
        let ip = config.listen.ip();
        let listen = settle(ip, config.listen.port())?;
        let shards = (0..config.shards)
            .map(|shard| settle(ip, config.shard_port(shard)).map(|address| address.port()))
            .collect::<Result<_, _>>()?;
        let admin = settle(config.admin_listen.ip(), config.admin_listen.port())?;
        Ok((Ports { listen, shards, admin }, Held(held)))
    }
}

#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}; choose another address or port, or stop what has it")]
pub struct PortError {
    pub address: SocketAddr,
    pub source: io::Error,
}

/// Why nobody should listen on `address`; `None`: it is free.
///
/// Binding alone does not tell: another node binds with SO_REUSEPORT, too, and would share the port. Binding without it
/// tells too much: it fails on connections that a node left behind which is gone.
pub fn why_taken(address: SocketAddr) -> Option<String> {
    let _held = match hold(address) {
        Ok((_, held)) => held,
        Err(error) => return Some(error.to_string()),
    };
    let mut reached = address;
    if address.ip().is_unspecified() {
        reached.set_ip(if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
    }
    TcpStream::connect_timeout(&reached, ANSWER_TIMEOUT).is_ok().then(|| "another process answers there".to_owned())
}

fn hold(address: SocketAddr) -> io::Result<(SocketAddr, OwnedFd)> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    bind(&socket, &address)?;
    let bound = SocketAddr::try_from(getsockname(&socket)?).map_err(|_| io::Error::other("no IP address"))?;
    Ok((bound, socket))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn ports_that_the_system_chooses_are_distinct_and_kept_from_others() {
        let loopback: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let config = NodeConfig { listen: loopback, admin_listen: loopback, shards: 3, ..NodeConfig::default() };
        let (ports, held) = Ports::settle(&config).unwrap();
        let all: BTreeSet<u16> =
            ports.shards.iter().copied().chain([ports.listen.port(), ports.admin.port()]).collect();
        assert_eq!(all.len(), 5);
        assert!(!all.contains(&0));
        assert!(TcpListener::bind(ports.listen).is_err());
        drop(held);
        TcpListener::bind(ports.listen).unwrap();
    }

    #[test]
    fn a_port_that_others_share_is_taken_and_one_that_is_only_held_is_not() {
        let loopback: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let (address, held) = hold(loopback).unwrap();
        assert_eq!(why_taken(address), None);
        rustix::net::listen(&held, 8).unwrap();
        assert_eq!(why_taken(address).as_deref(), Some("another process answers there"));
    }

    #[test]
    fn a_taken_port_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let listen = taken.local_addr().unwrap();
        let error = Ports::settle(&NodeConfig { listen, shards: 1, ..NodeConfig::default() }).unwrap_err();
        assert_eq!(error.address, listen);
    }
}
