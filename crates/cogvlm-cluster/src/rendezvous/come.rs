//! Meeting at the other processes.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::{GiveUp, Hello, Met, OpenData, Options, PROTOCOL, Roster, port_of, read_frame_before, wait_readable};
use crate::addresses::{as_seen_from_here, connect, resolve};
use crate::error::ClusterError;
use crate::frame::{FrameError, Kind, write_frame};
use crate::membership::Endpoint;

/// Time between attempts.
const RETRY: Duration = Duration::from_millis(200);

/// How an attempt ended that may be made again.
enum Attempt {
    Again(String),
    Never(ClusterError),
}

impl From<ClusterError> for Attempt {
    fn from(error: ClusterError) -> Self {
        Self::Never(error)
    }
}

pub(super) fn come(
    coordinator: &Endpoint, options: &Options, deadline: Instant, hello: &mut Hello, open_data: OpenData<'_>,
    progress: &dyn Fn(&str),
) -> Result<Met, ClusterError> {
    let mut next_line = Instant::now() + options.progress_interval;
    loop {
        let mut say = |what: &str| {
            if Instant::now() >= next_line {
                next_line = Instant::now() + options.progress_interval;
                progress(what);
            }
        };
        let reason = match attempt(coordinator, options, deadline, hello, open_data, &mut say) {
            Ok(met) => return Ok(met),
            Err(Attempt::Never(error)) => return Err(error),
            Err(Attempt::Again(reason)) => reason,
        };
        say(&format!("process {} of {} waits for process 0 at {coordinator}: {reason}", hello.rank, hello.size));
        let remaining = deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            let (rank, size, timeout) = (hello.rank, hello.size, options.timeout);
            return Err(ClusterError::NoCoordinator { rank, size, address: coordinator.to_string(), timeout, reason });
        }
        std::thread::sleep(RETRY.min(remaining));
    }
}

fn attempt(
    coordinator: &Endpoint, options: &Options, deadline: Instant, hello: &mut Hello, open_data: OpenData<'_>,
    say: &mut dyn FnMut(&str),
) -> Result<Met, Attempt> {
    let again = |error: std::io::Error| Attempt::Again(error.to_string());
    let addresses =
        resolve(coordinator).map_err(|error| Attempt::Again(format!("its name does not resolve: {error}")))?;
    let stream = connect(&addresses, deadline).map_err(Attempt::Again)?;
    stream.set_write_timeout(Some(options.hello_timeout)).map_err(again)?;
    let (own, seen) = (stream.local_addr().map_err(again)?.ip(), stream.peer_addr().map_err(again)?.ip());
    let listener = open_data(own.to_canonical())?;
    hello.data_port = port_of(&listener)?;
    let words = serde_json::to_vec(hello).map_err(|error| Attempt::Again(error.to_string()))?;
    write_frame(&mut &stream, Kind::Hello, PROTOCOL, 0, 0, &words).map_err(again)?;
    let answer_by = deadline.min(Instant::now() + 2 * options.hello_timeout);
    next_frame(&stream, 0, answer_by, coordinator, hello)?;
    let mut roster: Roster = loop {
        say(&format!("process {} of {} is at {coordinator} and waits for the others", hello.rank, hello.size));
        // Process 0 says when it gives up, which it does a little after this process would where it started later.
        let is_late = Instant::now() >= deadline + options.hello_timeout;
        match wait_readable(&stream, Duration::from_secs(1)) {
            false if is_late => {
                let reason = "it did not begin the run in time".to_owned();
                return Err(Attempt::Again(reason));
            }
            false => continue,
            true => {}
        }
        let payload = next_frame(&stream, 1, Instant::now() + options.hello_timeout, coordinator, hello)?;
        let not_ours = |error| Attempt::Again(format!("it sent a list of processes that cannot be read: {error}"));
        break serde_json::from_slice(&payload).map_err(not_ours)?;
    };
    let is_whole = roster.members.len() == hello.size
        && roster.members.iter().enumerate().all(|(rank, member)| member.rank == rank);
    if !is_whole {
        return Err(Attempt::Again("it sent a list of processes with gaps".to_owned()));
    }
    for member in &mut roster.members {
        member.data = as_seen_from_here(member.rank, member.data, seen.to_canonical());
    }
    stream.set_write_timeout(None).map_err(again)?;
    stream.set_read_timeout(None).map_err(again)?;
    Ok(Met { streams: BTreeMap::from([(0, stream)]), roster, listener })
}

/// The payload of frame `sequence`: the first accepts this process, the second lists all.
fn next_frame(
    stream: &TcpStream, sequence: u64, deadline: Instant, coordinator: &Endpoint, hello: &Hello,
) -> Result<Vec<u8>, Attempt> {
    let address = coordinator.to_string();
    let frame = read_frame_before(stream, sequence, deadline).map_err(|error| {
        Attempt::Again(match error {
            FrameError::Garbled(text) => format!("what answers there is no process 0 of this program: {text}"),
            ended @ FrameError::Ended(_) => format!("it took the connection and said nothing: {}", ended.text()),
        })
    })?;
    match frame.kind {
        Kind::Accepted | Kind::Roster => Ok(frame.payload),
        Kind::Refused => {
            let reason = String::from_utf8_lossy(&frame.payload).into_owned();
            Err(Attempt::Never(ClusterError::Refused { rank: hello.rank, address, reason }))
        }
        Kind::GiveUp => Err(Attempt::Never(match serde_json::from_slice::<GiveUp>(&frame.payload) {
            Ok(reason) => reason.error(&address),
            Err(error) => ClusterError::GaveUp { address, reason: error.to_string() },
        })),
        other => Err(Attempt::Again(format!("it answered with a frame of kind {other:?}"))),
    }
}
