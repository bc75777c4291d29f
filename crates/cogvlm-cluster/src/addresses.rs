//! Where to listen, where to connect, and what this host is called.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use crate::error::ClusterError;
use crate::membership::Endpoint;

/// Longest single attempt to connect.
const CONNECT_ATTEMPT: Duration = Duration::from_secs(2);
/// Shortest one.
const SHORTEST_ATTEMPT: Duration = Duration::from_millis(50);

/// This host's name, for messages.
pub(crate) fn host_name() -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    printable(&kernel.or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_default())
}

/// A host's name as it may be shown, whoever says that it is called so.
pub(crate) fn printable(name: &str) -> String {
    let name: String = name.trim().chars().filter(|c| !c.is_control()).take(255).collect();
    if name.is_empty() { "an unnamed host".to_owned() } else { name }
}

/// 128 bits that nobody guesses by accident: from the keys that the standard library draws for its hash maps.
pub(crate) fn random_token() -> String {
    let half = || RandomState::new().build_hasher().finish();
    format!("{:016x}{:016x}", half(), half())
}

/// Whether an endpoint means this host and no other, by what it is called.
pub(crate) fn names_loopback(endpoint: &Endpoint) -> bool {
    endpoint.host == "localhost" || endpoint.host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

pub(crate) fn resolve(endpoint: &Endpoint) -> std::io::Result<Vec<SocketAddr>> {
    Ok((endpoint.host.as_str(), endpoint.port).to_socket_addrs()?.collect())
}

/// Listens as process 0: at `bind`, else at the endpoint's own address where this host has it, else everywhere.
pub(crate) fn listen(endpoint: &Endpoint, bind: Option<IpAddr>) -> Result<TcpListener, ClusterError> {
    let failed = |address: String, error: &std::io::Error| ClusterError::Listen { address, reason: error.to_string() };
    if let Some(address) = bind {
        let address = SocketAddr::new(address, endpoint.port);
        return TcpListener::bind(address).map_err(|error| failed(address.to_string(), &error));
    }
    // Many hosts list their own name with a loopback address, where nobody else could connect.
    let is_usable = |address: &SocketAddr| names_loopback(endpoint) || !address.ip().is_loopback();
    for address in resolve(endpoint).unwrap_or_default().iter().filter(|address| is_usable(address)) {
        match TcpListener::bind(address) {
            Ok(listener) => return Ok(listener),
            // A name may stand for an address that is translated on the way.
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable => {}
            Err(error) => return Err(failed(address.to_string(), &error)),
        }
    }
    listen_everywhere(endpoint.port).map_err(|error| failed(format!("port {}", endpoint.port), &error))
}

/// Listens for data connections of a process that sees itself as `own` on its control connection.
pub(crate) fn listen_data(
    endpoint: &Endpoint, bind: Option<IpAddr>, own: IpAddr, port: u16,
) -> Result<TcpListener, ClusterError> {
    // A host that reaches its own process 0 over loopback may still be reached by others.
    let everywhere = own.is_unspecified() || (own.is_loopback() && !names_loopback(endpoint));
    let listener = match bind {
        Some(address) => TcpListener::bind((address, port)),
        None if everywhere => listen_everywhere(port),
        None => TcpListener::bind((own, port)),
    };
    listener.map_err(|error| ClusterError::System {
        what: format!("cannot listen for data connections at port {port} (COGVLM_DATA_PORT, COGVLM_BIND)"),
        reason: error.to_string(),
    })
}

/// All addresses of both families, or of IPv4 where there is no other.
fn listen_everywhere(port: u16) -> std::io::Result<TcpListener> {
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)) {
        Err(error) if error.kind() != ErrorKind::AddrInUse => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
        result => result,
    }
}

/// Tries each address once, until a little after `deadline` at most.
pub(crate) fn connect(addresses: &[SocketAddr], deadline: Instant) -> Result<TcpStream, String> {
    let mut reason = "its name has no address".to_owned();
    for address in addresses {
        // The last attempt is one too, however late it is.
        let remaining = deadline.saturating_duration_since(Instant::now());
        let remaining = remaining.clamp(SHORTEST_ATTEMPT, CONNECT_ATTEMPT);
        match TcpStream::connect_timeout(address, remaining) {
            // Connecting to a port of one's own that nobody listens at can meet itself.
            Ok(stream) if is_self(&stream) => reason = format!("{address}: nobody listens there"),
            Ok(stream) => {
                // Without it small messages wait for each other.
                stream.set_nodelay(true).map_err(|error| error.to_string())?;
                return Ok(stream);
            }
            Err(error) => reason = format!("{address}: {error}"),
        }
    }
    Err(reason)
}

fn is_self(stream: &TcpStream) -> bool {
    matches!((stream.local_addr(), stream.peer_addr()), (Ok(local), Ok(peer)) if local == peer)
}

/// The address of process `rank` as this process has to use it, which met process 0 at `coordinator`: process 0 cannot
/// know how others see its own host.
pub(crate) fn as_seen_from_here(rank: usize, address: SocketAddr, coordinator: IpAddr) -> SocketAddr {
    let is_on_host_of_0 = rank == 0 || address.ip().is_loopback();
    if is_on_host_of_0 { SocketAddr::new(coordinator, address.port()) } else { address }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(host: &str, port: u16) -> Endpoint {
        Endpoint { host: host.to_owned(), port }
    }

    #[test]
    fn process_0_listens_no_wider_than_its_name() {
        let listener = listen(&endpoint("127.0.0.1", 0), None).unwrap();
        assert!(listener.local_addr().unwrap().ip().is_loopback());
        assert!(listen(&endpoint("localhost", 0), None).unwrap().local_addr().unwrap().ip().is_loopback());
        // An address of documentation, which no host has: translated on the way, if at all.
        assert!(listen(&endpoint("192.0.2.1", 0), None).unwrap().local_addr().unwrap().ip().is_unspecified());
        let bound = listen(&endpoint("192.0.2.1", 0), Some(Ipv4Addr::LOCALHOST.into())).unwrap();
        assert!(bound.local_addr().unwrap().ip().is_loopback());
        let port = listener.local_addr().unwrap().port();
        let error = listen(&endpoint("127.0.0.1", port), None).unwrap_err();
        assert!(matches!(&error, ClusterError::Listen { .. }) && error.hint().is_some(), "{error}");
    }

    #[test]
    fn data_connections_are_awaited_where_others_can_reach() {
        let at = |host: &str, own: [u8; 4]| {
            let listener = listen_data(&endpoint(host, 1), None, IpAddr::from(own), 0).unwrap();
            listener.local_addr().unwrap().ip()
        };
        assert!(at("127.0.0.1", [127, 0, 0, 1]).is_loopback());
        assert!(at("node1", [127, 0, 0, 1]).is_unspecified());
        assert!(at("node1", [0, 0, 0, 0]).is_unspecified());
    }

    #[test]
    fn addresses_are_seen_from_here() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        let coordinator = IpAddr::from([10, 0, 0, 1]);
        assert_eq!(as_seen_from_here(0, address("0.0.0.0:5"), coordinator), address("10.0.0.1:5"));
        assert_eq!(as_seen_from_here(1, address("127.0.0.1:6"), coordinator), address("10.0.0.1:6"));
        assert_eq!(as_seen_from_here(2, address("10.0.0.2:7"), coordinator), address("10.0.0.2:7"));
    }

    #[test]
    fn tokens_differ() {
        assert_ne!(random_token(), random_token());
        assert_eq!(random_token().len(), 32);
    }
}
