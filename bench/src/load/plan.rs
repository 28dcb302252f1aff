//! Which connection carries which partitions.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use drava_client::glommio_driver::{Connection, DriverError};
use drava_client::session::{Answer, Event, Limits};
use drava_protocol::message::{CreateTopic, Lookup, PartitionPlace, Topic, TopicPolicy};

use super::options::LoadOptions;

/// Topics that are made at once.
const CREATED_AT_ONCE: u32 = 64;

/// How every connection of the load generator introduces itself.
pub const CLIENT: &str = concat!("drava-bench ", env!("CARGO_PKG_VERSION"));

/// One connection and the partitions that it carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub address: SocketAddr,
    pub partitions: Vec<u64>,
}

/// Where a partition lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Home {
    pub partition: u64,
    pub address: SocketAddr,
}

/// Makes the topics that are missing, or only looks them up, and says where all partitions live.
pub async fn homes(options: &LoadOptions, create: bool) -> Result<Vec<Home>, DriverError> {
    let limits = Limits { in_flight_max: CREATED_AT_ONCE, ..Limits::default() };
    let mut connection: Connection<u32> = Connection::connect(options.addr, limits, CLIENT).await?;
    let mut topics: Vec<Option<Box<Topic>>> = vec![None; options.topics as usize];
    let (mut asked, mut answered) = (0, 0);
    while answered < options.topics {
        let (session, out) = connection.session();
        while asked < options.topics && session.has_room() {
            let name = options.topic_name(asked);
            if create {
                let create = CreateTopic { name, policy: policy(options), exists_ok: true };
                session.request(&create, asked, out)?;
            } else {
                session.request(&Lookup { name }, asked, out)?;
            }
            asked += 1;
        }
        connection.turn().await?;
        while let Some(incoming) = connection.received()? {
            match incoming.event {
                Event::Answer { tag, answer, .. } => {
                    answered += 1;
                    if let Answer::Topic(topic) = answer.map_err(DriverError::Refused)? {
                        topics[tag as usize] = Some(topic);
                    }
                }
                Event::Refused(refusal) => return Err(DriverError::Refused(refusal)),
                Event::Welcome(_) | Event::Deliver { .. } | Event::Damaged { .. } | Event::Ignored => {}
            }
        }
    }
    let places = topics.iter().flatten().flat_map(|topic| &topic.partitions);
    Ok(places.map(|place| home(place, options.addr)).collect())
}

fn policy(options: &LoadOptions) -> TopicPolicy {
    TopicPolicy {
        partitions: options.partitions,
        durability: options.durability(),
        retention_bytes: options.retention_bytes,
        ..TopicPolicy::default()
    }
}

fn home(place: &PartitionPlace, asked: SocketAddr) -> Home {
    // Names are not resolved here: the node of a load test is named by its address.
    let host = place.host.parse::<IpAddr>().unwrap_or(asked.ip());
    Home { partition: place.partition, address: SocketAddr::new(host, place.port) }
}

/// Whether several connections may carry one partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    Allowed,
    /// For exclusive subscriptions: there are at most as many connections as partitions.
    Excluded,
}

/// Spreads partitions over `connections`, each of which goes to one core; at least one a core that has partitions.
pub fn routes(homes: &[Home], connections: usize, sharing: Sharing) -> Vec<Route> {
    let mut cores: BTreeMap<SocketAddr, Vec<u64>> = BTreeMap::new();
    for home in homes {
        cores.entry(home.address).or_default().push(home.partition);
    }
    let mut routes = Vec::new();
    let core_count = cores.len();
    for (index, (address, partitions)) in cores.into_iter().enumerate() {
        let share = connections / core_count + usize::from(index < connections % core_count);
        let share = match sharing {
            Sharing::Allowed => share.max(1),
            Sharing::Excluded => share.clamp(1, partitions.len()),
        };
        routes.extend((0..share).map(|connection| Route {
            address,
            partitions: if share <= partitions.len() {
                partitions.iter().copied().skip(connection).step_by(share).collect()
            } else {
                vec![partitions[connection % partitions.len()]]
            },
        }));
    }
    routes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn homes_on(ports: &[u16]) -> Vec<Home> {
        let home = |(i, port): (usize, &u16)| Home { partition: i as u64, address: ([127, 0, 0, 1], *port).into() };
        ports.iter().enumerate().map(home).collect()
    }

    #[test]
    fn every_partition_is_carried_to_its_own_core() {
        let homes = homes_on(&[1, 2, 1, 2, 1, 1]);
        for connections in 1..8 {
            for sharing in [Sharing::Allowed, Sharing::Excluded] {
                let routes = routes(&homes, connections, sharing);
                let carried: BTreeSet<(u64, SocketAddr)> = routes
                    .iter()
                    .flat_map(|route| route.partitions.iter().map(|partition| (*partition, route.address)))
                    .collect();
                let expected = homes.iter().map(|home| (home.partition, home.address)).collect();
                assert_eq!(carried, expected, "{connections} connections, {sharing:?}");
                assert!(routes.iter().all(|route| !route.partitions.is_empty()));
            }
        }
    }

    #[test]
    fn connections_share_a_partition_only_where_they_may() {
        let homes = homes_on(&[1]);
        assert_eq!(routes(&homes, 4, Sharing::Allowed).len(), 4);
        assert_eq!(routes(&homes, 4, Sharing::Excluded).len(), 1);
    }

    #[test]
    fn an_exclusive_partition_has_one_connection() {
        let routes = routes(&homes_on(&[1, 1, 1, 2, 2]), 4, Sharing::Excluded);
        let carried: Vec<u64> = routes.iter().flat_map(|route| route.partitions.clone()).collect();
        let distinct: BTreeSet<u64> = carried.iter().copied().collect();
        assert_eq!((carried.len(), distinct.len(), routes.len()), (5, 5, 4));
    }
}
