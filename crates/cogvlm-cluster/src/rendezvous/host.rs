//! Meeting at process 0.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::{GiveUp, Greeting, Hello, Member, Met, OpenData, Options, PROTOCOL, Roster, accept_greetings, port_of};
use crate::addresses::{listen, printable, random_token};
use crate::error::{ClusterError, ConfigDifference, ranks};
use crate::frame::{Kind, write_frame};
use crate::membership::Endpoint;

/// Time between looks for new connections.
const TURN: Duration = Duration::from_millis(20);
/// Refusals that the final error lists.
const MAX_REFUSALS: usize = 4;

/// A process that has come.
struct Guest {
    stream: TcpStream,
    from: SocketAddr,
    hello: Hello,
    /// It has been told to wait, which is the first frame that it gets.
    is_accepted: bool,
}

/// Everybody who has come so far.
struct Party<'a> {
    hello: &'a Hello,
    address: String,
    guests: BTreeMap<usize, Guest>,
    refused: Vec<String>,
}

pub(super) fn host(
    coordinator: &Endpoint, options: &Options, deadline: Instant, hello: &mut Hello, open_data: OpenData<'_>,
    progress: &dyn Fn(&str),
) -> Result<Met, ClusterError> {
    let listener = listen(coordinator, options.bind)?;
    let system = |what: &'static str| move |error: std::io::Error| ClusterError::system(what, &error);
    let own = listener.local_addr().map_err(system("cannot ask for the address of process 0"))?;
    listener.set_nonblocking(true).map_err(system("cannot listen without blocking"))?;
    let data_listener = open_data(own.ip())?;
    hello.data_port = port_of(&data_listener)?;
    let (strangers, (sender, greetings)) = (Arc::new(AtomicUsize::new(0)), mpsc::channel());
    let address = coordinator.to_string();
    let mut party = Party { hello, address, guests: BTreeMap::new(), refused: Vec::new() };
    let size = party.hello.size;
    let mut next_line = Instant::now() + options.progress_interval;
    while party.guests.len() + 1 < size {
        accept_greetings(&listener, Kind::Hello, options.hello_timeout, &strangers, &sender);
        if let Ok(greeting) = greetings.recv_timeout(TURN) {
            party.meet(greeting)?;
        }
        party.forget_the_gone();
        let now = Instant::now();
        if now >= deadline {
            return Err(party.give_up(options.timeout));
        }
        if now >= next_line {
            next_line = now + options.progress_interval;
            progress(&format!("waiting at {} for {} of {size}", party.address, ranks(&party.missing())));
        }
    }
    let roster = party.roster(own)?;
    let streams = party.begin(&roster)?;
    Ok(Met { streams, roster, listener: data_listener })
}

impl Party<'_> {
    fn missing(&self) -> Vec<usize> {
        (1..self.hello.size).filter(|rank| !self.guests.contains_key(rank)).collect()
    }

    /// Lets a process in, refuses it, or gives up because it would run something else.
    fn meet(&mut self, Greeting { from, hello }: Greeting) -> Result<(), ClusterError> {
        let (stream, frame) = match hello {
            Ok(hello) => hello,
            Err(reason) => {
                tracing::info!(%from, reason, "a stranger");
                return Ok(());
            }
        };
        let parsed = if frame.code == PROTOCOL { serde_json::from_slice::<Hello>(&frame.payload).ok() } else { None };
        let Some(mut hello) = parsed else {
            let reason = format!(
                "it speaks version {} of the protocol between processes, and process 0 version {PROTOCOL}; start the \
                 same program everywhere",
                frame.code
            );
            self.refuse(&stream, from, None, reason);
            return Ok(());
        };
        hello.host = printable(&hello.host);
        if let Some(reason) = self.objection(&hello) {
            self.refuse(&stream, from, Some(&hello), reason);
            return Ok(());
        }
        if let Some((part, own, other)) = self.hello.config.difference(&hello.config) {
            let hosts = [self.hello.host.clone(), hello.host.clone()];
            let difference = ConfigDifference { part, ranks: [0, hello.rank], hosts, values: [own, other] };
            let reason = GiveUp::Differs(Box::new(difference));
            self.guests.insert(hello.rank, Guest { stream, from, hello, is_accepted: false });
            self.dismiss(&reason);
            return Err(reason.error(&self.address));
        }
        if write_frame(&mut &stream, Kind::Accepted, 0, 0, 0, &[]).is_ok() {
            tracing::debug!(rank = hello.rank, host = hello.host, %from, "a process came");
            self.guests.insert(hello.rank, Guest { stream, from, hello, is_accepted: true });
        }
        Ok(())
    }

    /// Why a process is not one of this run.
    fn objection(&self, hello: &Hello) -> Option<String> {
        let own = self.hello;
        let Hello { rank, size, run, version, .. } = hello;
        if *run != own.run {
            return Some(format!("it belongs to run `{run}`, and process 0 to run `{}`", own.run));
        }
        if *version != own.version {
            return Some(format!("it is version {version}, and process 0 version {}", own.version));
        }
        if *size != own.size {
            return Some(format!("it is one of {size} processes, and process 0 one of {}", own.size));
        }
        if *rank == 0 || rank >= size {
            return Some(format!(
                "there is another process {rank}: each needs a rank of its own, from 0 to {}",
                size - 1
            ));
        }
        let other = self.guests.get(rank)?;
        let (Hello { pid, host, .. }, from) = (&other.hello, other.from.ip());
        Some(format!("there is another process {rank} (pid {pid} on {host}, {from}): each needs a rank of its own"))
    }

    fn refuse(&mut self, mut stream: &TcpStream, from: SocketAddr, hello: Option<&Hello>, reason: String) {
        // It learns why, unless it has gone.
        drop(write_frame(&mut stream, Kind::Refused, 0, 0, 0, reason.as_bytes()));
        let who = hello.map_or_else(
            || from.to_string(),
            |Hello { rank, pid, host, .. }| format!("process {rank} (pid {pid} on {host})"),
        );
        tracing::info!(%from, who, reason, "refused");
        if self.refused.len() < MAX_REFUSALS {
            self.refused.push(format!("{who}, since {}", reason.escape_debug()));
        }
    }

    /// Processes that died while waiting may be started again.
    fn forget_the_gone(&mut self) {
        self.guests.retain(|rank, guest| {
            let is_there = is_open(&guest.stream);
            if !is_there {
                tracing::info!(rank, "a process went away before the run began");
            }
            is_there
        });
    }

    fn give_up(&self, timeout: Duration) -> ClusterError {
        let Self { hello, address, refused, .. } = self;
        let error = ClusterError::Missing {
            size: hello.size,
            missing: self.missing(),
            address: address.clone(),
            timeout,
            refused: refused.clone(),
        };
        self.dismiss(&GiveUp::Other(error.to_string()));
        error
    }

    /// Tells all who have come that the run does not begin.
    fn dismiss(&self, reason: &GiveUp) {
        let words = serde_json::to_vec(reason).unwrap_or_default();
        for guest in self.guests.values() {
            drop(write_frame(&mut &guest.stream, Kind::GiveUp, 0, 0, u64::from(guest.is_accepted), &words));
        }
    }

    fn roster(&self, own: SocketAddr) -> Result<Roster, ClusterError> {
        let Hello { host, pid, data_port, .. } = self.hello.clone();
        let mut members = vec![Member { rank: 0, host, pid, data: SocketAddr::new(own.ip(), data_port) }];
        for (&rank, guest) in &self.guests {
            let Hello { host, pid, data_port, .. } = guest.hello.clone();
            members.push(Member { rank, host, pid, data: SocketAddr::new(guest.from.ip().to_canonical(), data_port) });
        }
        Ok(Roster { members, token: random_token() })
    }

    /// Tells everyone who all are.
    fn begin(self, roster: &Roster) -> Result<BTreeMap<usize, TcpStream>, ClusterError> {
        let words = serde_json::to_vec(roster).unwrap_or_default();
        let mut streams = BTreeMap::new();
        for (rank, Guest { stream, .. }) in self.guests {
            // One that is gone by now is noticed by its control connection.
            drop(write_frame(&mut &stream, Kind::Roster, 0, 0, 1, &words));
            stream
                .set_write_timeout(None)
                .and_then(|()| stream.set_nonblocking(false))
                .map_err(|error| ClusterError::system("cannot set up a control connection", &error))?;
            streams.insert(rank, stream);
        }
        Ok(streams)
    }
}

/// Whether the other side is still there; it has nothing to say yet.
fn is_open(stream: &TcpStream) -> bool {
    let peek = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
    let blocking = stream.set_nonblocking(false);
    blocking.is_ok() && matches!(peek, Err(error) if error.kind() == ErrorKind::WouldBlock)
}
