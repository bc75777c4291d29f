//! Rows between any two processes.
//!
//! Each pair of processes that have rows for each other has one TCP connection. A thread reads what comes into memory,
//! up to a bound, so that two processes may both send before either receives; beyond the bound the sender waits until
//! the receiver takes something.

use std::collections::{BTreeMap, VecDeque};
use std::io::Read;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::addresses::connect;
use crate::control::{Control, Shared, register};
use crate::error::ClusterError;
use crate::frame::{FrameError, Kind, MAX_ROWS_BYTES, read_header, write_frame};
use crate::rendezvous::{Greeting, Options, accept_greetings, read_frame_before, wait_readable};
use crate::watch::{Abort, lock, wait};

/// Bytes of rows of one peer that may wait to be received; a single message may exceed it.
const MAX_WAITING_BYTES: usize = 256 << 20;
/// Buffers of one peer that are kept for the next rows.
const MAX_SPARE_BUFFERS: usize = 2;
/// What a call waits for, in an error.
const ROWS: &str = "the rows that are awaited";
const TAKER: &str = "a taker of these rows";
/// Time between attempts to connect, and between looks for connections.
const TURN: Duration = Duration::from_millis(20);

/// Rows between processes, in the order in which they are sent. Each message has a tag that both sides know, such as
/// the number of the step: one that is not the expected one is an error.
pub trait Wire: Send + Sync {
    /// Sends `rows`, at most 1 GiB, to `peer`. Returns when the system has them, or they wait for the receiver to take
    /// earlier ones.
    ///
    /// # Errors
    /// Where a process of the run has failed, or `peer` has left.
    fn send(&self, peer: usize, tag: u64, rows: &[u8]) -> Result<(), ClusterError>;

    /// Receives the next rows of `peer`, which have to be as many bytes as `rows` and have this tag.
    ///
    /// # Errors
    /// Where a process of the run has failed, `peer` has left, or it sent something else; the latter stays where it is.
    fn recv(&self, peer: usize, tag: u64, rows: &mut [u8]) -> Result<(), ClusterError>;
}

/// [`Wire`] over TCP. To be kept until [`Control::leave`] has returned, so that nobody misses what was sent last.
pub struct TcpWire {
    control: Arc<Shared>,
    ends: BTreeMap<usize, Arc<End>>,
    threads: Vec<JoinHandle<()>>,
}

/// This process's end of a connection.
struct End {
    stream: TcpStream,
    /// Sequence number of the next rows that are sent; held while they are.
    sequence: Mutex<u64>,
    inbox: Mutex<Inbox>,
    changed: Condvar,
    is_aborted: AtomicBool,
}

#[derive(Default)]
struct Inbox {
    waiting: VecDeque<(u64, Vec<u8>)>,
    num_bytes: usize,
    spare: Vec<Vec<u8>>,
    /// Why nothing more will come.
    ended: Option<String>,
}

/// What a data connection shows first.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DataHello {
    token: String,
    from: usize,
    to: usize,
}

impl Abort for End {
    fn abort(&self) {
        self.is_aborted.store(true, Ordering::SeqCst);
        drop(self.stream.shutdown(Shutdown::Both));
        self.changed.notify_all();
    }

    fn finish(&self) {
        // Sending returns when all is with the system, which delivers it before this end.
        let _sequence = lock(&self.sequence);
        drop(self.stream.shutdown(Shutdown::Write));
    }
}

impl TcpWire {
    /// A connection to each of `peers`: to those of lower rank this process goes, those of higher rank come.
    pub(crate) fn connect(
        control: &Control, listener: Option<TcpListener>, token: &str, peers: &[usize], options: &Options,
    ) -> Result<Self, ClusterError> {
        let shared = control.shared();
        let (rank, size) = (shared.rank(), shared.size());
        if let Some(&peer) = peers.iter().find(|peer| **peer == rank || **peer >= size) {
            return Err(ClusterError::NoPeer { rank, peer, size, kind: "data" });
        }
        let mut meeting =
            Meeting { control, token, options, deadline: Instant::now() + options.timeout, streams: BTreeMap::new() };
        let (lower, higher): (Vec<usize>, Vec<usize>) = peers.iter().partition(|peer| **peer < rank);
        for peer in lower {
            meeting.go(peer)?;
        }
        if let Some(listener) = listener {
            meeting.await_all(&listener, &higher)?;
        }
        let mut wire = Self { control: Arc::clone(shared), ends: BTreeMap::new(), threads: Vec::new() };
        for (peer, stream) in meeting.streams {
            let (sequence, inbox, changed) = (Mutex::new(0), Mutex::default(), Condvar::new());
            let end = Arc::new(End { stream, sequence, inbox, changed, is_aborted: AtomicBool::new(false) });
            let reader = Arc::clone(&end);
            let thread = std::thread::Builder::new().name(format!("rows-from-{peer}")).spawn(move || reader.read());
            wire.threads.push(thread.map_err(|error| ClusterError::system("cannot start a thread", &error))?);
            register(shared.watch(), &end);
            wire.ends.insert(peer, end);
        }
        Ok(wire)
    }

    fn end(&self, peer: usize) -> Result<&End, ClusterError> {
        let (rank, size) = (self.control.rank(), self.control.size());
        self.ends.get(&peer).map(|end| &**end).ok_or(ClusterError::NoPeer { rank, peer, size, kind: "data" })
    }
}

impl Wire for TcpWire {
    fn send(&self, peer: usize, tag: u64, rows: &[u8]) -> Result<(), ClusterError> {
        let end = self.end(peer)?;
        if rows.len() > MAX_ROWS_BYTES {
            return Err(ClusterError::TooLarge { peer, num_bytes: rows.len(), max_bytes: MAX_ROWS_BYTES });
        }
        self.control.watch().check()?;
        if self.control.watch().has_left(peer) {
            return Err(ClusterError::Left { rank: peer, waiting_for: TAKER });
        }
        let mut sequence = lock(&end.sequence);
        let sent = write_frame(&mut &end.stream, Kind::Rows, 0, tag, *sequence, rows);
        *sequence += 1;
        drop(sequence);
        sent.map_err(|error| self.control.explain_data_failure(peer, error.to_string(), TAKER))
    }

    fn recv(&self, peer: usize, tag: u64, rows: &mut [u8]) -> Result<(), ClusterError> {
        let end = self.end(peer)?;
        let mut inbox = lock(&end.inbox);
        loop {
            self.control.watch().check()?;
            if let Some((found_tag, found)) = inbox.waiting.front() {
                if *found_tag != tag || found.len() != rows.len() {
                    return Err(ClusterError::Unexpected {
                        rank: self.control.rank(),
                        peer,
                        expected_tag: tag,
                        expected_bytes: rows.len(),
                        found_tag: *found_tag,
                        found_bytes: found.len(),
                    });
                }
                break;
            }
            if let Some(detail) = inbox.ended.clone() {
                drop(inbox);
                return Err(self.control.explain_data_failure(peer, detail, ROWS));
            }
            // Whoever adds something or fails wakes this; the time is a second thought.
            inbox = wait(&end.changed, inbox, Duration::from_millis(500));
        }
        let Some((_, found)) = inbox.waiting.pop_front() else { return Ok(()) };
        inbox.num_bytes -= found.len();
        drop(inbox);
        rows.copy_from_slice(&found);
        let mut inbox = lock(&end.inbox);
        if inbox.spare.len() < MAX_SPARE_BUFFERS {
            inbox.spare.push(found);
        }
        drop(inbox);
        end.changed.notify_all();
        Ok(())
    }
}

impl Drop for TcpWire {
    fn drop(&mut self) {
        self.ends.values().for_each(|end| end.abort());
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

impl End {
    /// Reads until the connection ends.
    fn read(&self) {
        let mut sequence = 0;
        let reason = loop {
            match self.read_one(sequence) {
                Ok(()) => sequence += 1,
                Err(reason) => break reason,
            }
        };
        lock(&self.inbox).ended = Some(reason);
        self.changed.notify_all();
    }

    fn read_one(&self, sequence: u64) -> Result<(), String> {
        let mut stream = &self.stream;
        let (header, _) = read_header(&mut stream, sequence, MAX_ROWS_BYTES).map_err(FrameError::text)?;
        if header.kind != Kind::Rows {
            return Err(format!("a frame of kind {:?} among rows", header.kind));
        }
        let mut inbox = lock(&self.inbox);
        while !inbox.waiting.is_empty() && inbox.num_bytes + header.num_bytes > MAX_WAITING_BYTES {
            if self.is_aborted.load(Ordering::SeqCst) {
                return Err("the run is over".to_owned());
            }
            inbox = wait(&self.changed, inbox, Duration::from_millis(500));
        }
        let mut rows = inbox.spare.pop().unwrap_or_default();
        drop(inbox);
        rows.resize(header.num_bytes, 0);
        stream.read_exact(&mut rows).map_err(|error| error.to_string())?;
        let mut inbox = lock(&self.inbox);
        inbox.num_bytes += rows.len();
        inbox.waiting.push_back((header.tag, rows));
        drop(inbox);
        self.changed.notify_all();
        Ok(())
    }
}

/// Connections that are being made.
struct Meeting<'a> {
    control: &'a Control,
    token: &'a str,
    options: &'a Options,
    deadline: Instant,
    streams: BTreeMap<usize, TcpStream>,
}

impl Meeting<'_> {
    fn failed(&self, peer: usize, reason: String) -> ClusterError {
        let (rank, address) = (self.control.rank(), self.control.members()[peer].data.to_string());
        ClusterError::DataConnect { rank, peer, address, timeout: self.options.timeout, reason }
    }

    /// Goes to a process of lower rank.
    fn go(&mut self, peer: usize) -> Result<(), ClusterError> {
        let hello = DataHello { token: self.token.to_owned(), from: self.control.rank(), to: peer };
        let words = serde_json::to_vec(&hello).unwrap_or_default();
        loop {
            self.control.watch().check()?;
            let attempt = connect(&[self.control.members()[peer].data], self.deadline).and_then(|stream| {
                write_frame(&mut &stream, Kind::DataHello, 0, 0, 0, &words).map_err(|error| error.to_string())?;
                // It answers once it looks for connections, which may be after it has found its own ways.
                while !wait_readable(&stream, Duration::from_millis(200)) {
                    if Instant::now() >= self.deadline || self.control.failure().is_some() {
                        return Err("it took the connection and did not answer".to_owned());
                    }
                }
                let answer_by = Instant::now() + self.options.hello_timeout;
                let answer = read_frame_before(&stream, 0, answer_by).map_err(FrameError::text)?;
                if answer.kind == Kind::DataAccepted { Ok(stream) } else { Err("something else answers".to_owned()) }
            });
            match attempt {
                Ok(stream) => {
                    self.streams.insert(peer, stream);
                    return Ok(());
                }
                Err(reason) if Instant::now() >= self.deadline => return Err(self.failed(peer, reason)),
                Err(_) => std::thread::sleep(TURN),
            }
        }
    }

    /// Awaits processes of higher rank.
    fn await_all(&mut self, listener: &TcpListener, peers: &[usize]) -> Result<(), ClusterError> {
        let prepared = listener.set_nonblocking(true);
        prepared.map_err(|error| ClusterError::system("cannot listen without blocking", &error))?;
        let (strangers, (sender, greetings)) = (Arc::new(AtomicUsize::new(0)), mpsc::channel());
        while let Some(&missing) = peers.iter().find(|peer| !self.streams.contains_key(*peer)) {
            self.control.watch().check()?;
            accept_greetings(listener, Kind::DataHello, self.options.hello_timeout, &strangers, &sender);
            if let Ok(greeting) = greetings.recv_timeout(TURN) {
                self.meet(greeting, peers);
            }
            if Instant::now() >= self.deadline {
                return Err(self.failed(missing, "it did not come".to_owned()));
            }
        }
        Ok(())
    }

    fn meet(&mut self, Greeting { from, hello }: Greeting, peers: &[usize]) {
        let (stream, frame) = match hello {
            Ok(hello) => hello,
            Err(reason) => {
                tracing::info!(%from, reason, "a stranger at the port for data");
                return;
            }
        };
        let hello = serde_json::from_slice::<DataHello>(&frame.payload);
        let is_ours = |hello: &DataHello| hello.token == self.token && hello.to == self.control.rank();
        let Some(hello) = hello.ok().filter(is_ours) else {
            tracing::info!(%from, "a data connection of another run");
            return;
        };
        let is_awaited = peers.contains(&hello.from) && !self.streams.contains_key(&hello.from);
        if is_awaited
            && write_frame(&mut &stream, Kind::DataAccepted, 0, 0, 0, &[]).is_ok()
            && stream.set_write_timeout(None).is_ok()
        {
            self.streams.insert(hello.from, stream);
        }
    }
}
