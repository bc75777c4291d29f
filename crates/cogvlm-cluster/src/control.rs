//! Messages between process 0 and the others, and how all processes end when one does.
//!
//! Every process has one connection to process 0, over which both sides send a heartbeat when they have nothing else to
//! say. A connection that closes without a goodbye, or that is silent for too long, is a failure of the process at its
//! other end. Process 0 tells the first failure to everyone; from then on every call of every process returns it.
//!
//! Heartbeats come from a thread of their own: they show that a process runs, not that it gets on with its work.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Cause, ClusterError, Failure};
use crate::frame::{Frame, FrameError, Kind, MAX_MESSAGE_BYTES, read_frame};
use crate::link::{Link, Outgoing};
use crate::rendezvous::Member;
use crate::watch::{Abort, Verdict, Watch, lock, wait};

/// Bytes of messages that may wait to be received. A process that lets more of them pile up has lost its way.
const MAX_WAITING_BYTES: usize = 1 << 30;
/// How long a process that has to end waits for its last words to be heard.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long one whose connection to another breaks waits for the word of process 0 on it.
const VERDICT: Duration = Duration::from_secs(2);
/// Longest text that a process says about its own failure.
const MAX_REPORT_CHARS: usize = 2000;

/// A message as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who sent it.
    pub from: usize,
    /// What kind of message it is: the sender's code.
    pub code: u16,
    /// Its bytes.
    pub payload: Vec<u8>,
}

/// This process's control connections: to process 0, or at process 0 to all others. Dropping it before
/// [`leave`](Self::leave) ends the run for everyone.
pub struct Control {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    has_left: AtomicBool,
}

/// What threads and data connections share with [`Control`].
pub(crate) struct Shared {
    rank: usize,
    members: Vec<Member>,
    links: BTreeMap<usize, Link>,
    inbox: Arc<Inbox>,
    watch: Arc<Watch>,
    silence: Duration,
    is_closing: Mutex<bool>,
    closing: Condvar,
}

#[derive(Default)]
struct Inbox {
    waiting: Mutex<VecDeque<Message>>,
    arrived: Condvar,
}

impl Abort for Inbox {
    fn abort(&self) {
        self.arrived.notify_all();
    }
}

/// What a process tells process 0 of a failure.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Report {
    rank: usize,
    cause: Cause,
}

impl Control {
    /// Starts the threads of the connections in `streams`, by rank.
    pub(crate) fn start(
        rank: usize, members: Vec<Member>, streams: BTreeMap<usize, std::net::TcpStream>, silence: Duration,
    ) -> Result<Self, ClusterError> {
        let inbox = Arc::new(Inbox::default());
        let watch = Watch::new();
        let part: Arc<dyn Abort> = Arc::clone(&inbox) as Arc<dyn Abort>;
        watch.register(Arc::downgrade(&part));
        let links = streams.into_iter().map(|(peer, stream)| (peer, Link::new(stream))).collect();
        let (is_closing, closing) = (Mutex::new(false), Condvar::new());
        let shared = Arc::new(Shared { rank, members, links, inbox, watch, silence, is_closing, closing });
        let mut control = Self { shared: Arc::clone(&shared), threads: Vec::new(), has_left: AtomicBool::new(false) };
        let mut spawn = |name: String, work: Box<dyn FnOnce(&Shared) + Send>| {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(name).spawn(move || work(&shared));
            control.threads.push(thread.map_err(|error| ClusterError::system("cannot start a thread", &error))?);
            Ok(())
        };
        for &peer in shared.links.keys() {
            spawn(format!("control-in-{peer}"), Box::new(move |shared| shared.read(peer)))?;
            spawn(format!("control-out-{peer}"), Box::new(move |shared| shared.links[&peer].write(shared.interval())))?;
        }
        if !shared.links.is_empty() {
            spawn("control-watch".to_owned(), Box::new(Shared::listen_for_silence))?;
        }
        Ok(control)
    }

    /// This process.
    pub fn rank(&self) -> usize {
        self.shared.rank
    }

    /// How many processes there are.
    pub fn size(&self) -> usize {
        self.shared.members.len()
    }

    /// All processes, by rank.
    pub fn members(&self) -> &[Member] {
        &self.shared.members
    }

    /// What is known of the run's failure, for others that may wait for a process.
    pub fn watch(&self) -> &Arc<Watch> {
        &self.shared.watch
    }

    /// Sends `payload`, at most 256 MiB, to process `to`; `code` is the caller's. Process 0 sends to all, all others
    /// only to process 0. Returns when the message is queued, which waits while 64 MiB are.
    ///
    /// # Errors
    /// Where a process has failed, or `to` has left.
    pub fn send(&self, to: usize, code: u16, payload: &[u8]) -> Result<(), ClusterError> {
        self.queue(to, code, payload.len(), || payload.into())
    }

    /// [`send`](Self::send)s one message to every other process, whose bytes exist once. At process 0 only.
    ///
    /// # Errors
    /// As [`send`](Self::send) says.
    pub fn broadcast(&self, code: u16, payload: &[u8]) -> Result<(), ClusterError> {
        if self.shared.rank != 0 {
            return Err(self.shared.no_peer(self.shared.rank));
        }
        let shared_payload: Arc<[u8]> = payload.into();
        (1..self.size()).try_for_each(|to| self.queue(to, code, payload.len(), || Arc::clone(&shared_payload)))
    }

    fn queue(
        &self, to: usize, code: u16, num_bytes: usize, payload: impl FnOnce() -> Arc<[u8]>,
    ) -> Result<(), ClusterError> {
        let Shared { links, watch, .. } = &*self.shared;
        watch.check()?;
        let link = links.get(&to).ok_or_else(|| self.shared.no_peer(to))?;
        if num_bytes > MAX_MESSAGE_BYTES {
            return Err(ClusterError::TooLarge { peer: to, num_bytes, max_bytes: MAX_MESSAGE_BYTES });
        }
        if watch.has_left(to) {
            return Err(ClusterError::Left { rank: to, waiting_for: "an answer" });
        }
        link.push(Outgoing { kind: Kind::Message, code, payload: payload() }, &|| watch.failure().is_none());
        watch.check()
    }

    /// The next message of process `from`; waits as long as it takes, or `timeout`.
    ///
    /// # Errors
    /// Where a process has failed, `from` has left, or the time is over.
    pub fn recv(&self, from: usize, timeout: Option<Duration>) -> Result<Message, ClusterError> {
        if !self.shared.links.contains_key(&from) {
            return Err(self.shared.no_peer(from));
        }
        self.next(&[from], timeout)
    }

    /// The next message of any process; waits as long as it takes, or `timeout`.
    ///
    /// # Errors
    /// Where a process has failed, all have left, or the time is over.
    pub fn recv_any(&self, timeout: Option<Duration>) -> Result<Message, ClusterError> {
        let from: Vec<usize> = self.shared.links.keys().copied().collect();
        if from.is_empty() {
            return Err(self.shared.no_peer(self.shared.rank));
        }
        self.next(&from, timeout)
    }

    fn next(&self, from: &[usize], timeout: Option<Duration>) -> Result<Message, ClusterError> {
        let Shared { inbox, watch, .. } = &*self.shared;
        let start = Instant::now();
        let mut waiting = lock(&inbox.waiting);
        loop {
            watch.check()?;
            // Asked before looking: a goodbye comes after all messages.
            let everybody_left = from.iter().all(|&rank| watch.has_left(rank));
            if let Some(index) = waiting.iter().position(|message| from.contains(&message.from))
                && let Some(message) = waiting.remove(index)
            {
                return Ok(message);
            }
            if everybody_left {
                return Err(ClusterError::Left { rank: from[0], waiting_for: "the message that is awaited" });
            }
            let remaining = timeout.map_or(Duration::MAX, |timeout| timeout.saturating_sub(start.elapsed()));
            if remaining.is_zero() {
                let from = if let [one] = from { format!("process {one}") } else { "any process".to_owned() };
                return Err(ClusterError::Timeout { from, timeout: timeout.unwrap_or_default() });
            }
            // A goodbye wakes nobody here, so it is looked for now and then.
            waiting = wait(&inbox.arrived, waiting, remaining.min(Duration::from_millis(50)));
        }
    }

    /// Gives everyone the bytes that process 0 has: `payload` there, ignored elsewhere. `code` marks the message.
    ///
    /// # Errors
    /// Where a process has failed, or something else came from process 0.
    pub fn share(&self, code: u16, payload: &[u8]) -> Result<Vec<u8>, ClusterError> {
        if self.shared.rank == 0 {
            self.broadcast(code, payload)?;
            return Ok(payload.to_vec());
        }
        let message = self.recv(0, None)?;
        if message.code == code {
            return Ok(message.payload);
        }
        Err(ClusterError::Unexpected {
            rank: self.shared.rank,
            peer: 0,
            expected_tag: code.into(),
            expected_bytes: payload.len(),
            found_tag: message.code.into(),
            found_bytes: message.payload.len(),
        })
    }

    /// The first failure of the run, where there was one.
    pub fn failure(&self) -> Option<Arc<Failure>> {
        self.shared.watch.failure()
    }

    /// Ends the run for everyone: this process cannot go on. Returns what the run ends with, which is an earlier
    /// failure where there was one.
    pub fn fail(&self, message: &str) -> ClusterError {
        let message = message.chars().take(MAX_REPORT_CHARS).collect();
        self.shared.fail(self.shared.rank, Cause::Reported { message });
        let failure = self.shared.watch.failure();
        failure.map_or_else(|| self.shared.no_peer(self.shared.rank), ClusterError::Failed)
    }

    /// Ends this process's part of the run, and waits until all others have ended theirs.
    ///
    /// # Errors
    /// Where a process fails before that.
    pub fn leave(&self) -> Result<(), ClusterError> {
        let Shared { rank, links, watch, .. } = &*self.shared;
        watch.check()?;
        if self.has_left.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        watch.finish();
        let goodbye = Outgoing::new(Kind::Goodbye, []);
        if *rank > 0 {
            for link in links.values() {
                link.push(goodbye.clone(), &|| false);
            }
            return watch.wait_left(&[0]);
        }
        let others: Vec<usize> = links.keys().copied().collect();
        watch.wait_left(&others)?;
        for link in links.values() {
            link.last_words(Some(goodbye.clone()));
        }
        let deadline = Instant::now() + LAST_WORDS;
        links.values().for_each(|link| link.wait_ended(true, deadline));
        Ok(())
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let Shared { rank, links, watch, .. } = &*self.shared;
        if !self.has_left.load(Ordering::SeqCst) && watch.failure().is_none() && !links.is_empty() {
            let message = if std::thread::panicking() { "it panicked" } else { "it ended before the run was over" };
            self.shared.fail(*rank, Cause::Reported { message: message.to_owned() });
        }
        if let Some(failure) = watch.failure() {
            let deadline = Instant::now() + LAST_WORDS;
            // One that is silent does not answer, but may read it when it goes on.
            let answers = |peer: usize| peer != failure.rank || !matches!(failure.cause, Cause::Silent { .. });
            links.iter().for_each(|(peer, link)| link.wait_ended(answers(*peer), deadline));
        }
        *lock(&self.shared.is_closing) = true;
        self.shared.closing.notify_all();
        links.values().for_each(Link::shut_down);
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

impl Shared {
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn size(&self) -> usize {
        self.members.len()
    }

    pub(crate) fn watch(&self) -> &Arc<Watch> {
        &self.watch
    }

    fn no_peer(&self, peer: usize) -> ClusterError {
        ClusterError::NoPeer { rank: self.rank, peer, size: self.members.len(), kind: "control" }
    }

    /// Time between heartbeats.
    fn interval(&self) -> Duration {
        self.silence / 8
    }

    fn failure(&self, rank: usize, cause: Cause) -> Failure {
        let Member { host, pid, .. } = &self.members[rank];
        Failure { rank, size: self.members.len(), host: host.clone(), pid: *pid, cause }
    }

    /// Records a failure and tells it.
    fn fail(&self, rank: usize, cause: Cause) {
        let report = Report { rank, cause: cause.clone() };
        // Where process 0 is at fault, and its connection is: one that stands still reads it when it goes on.
        let ends_link = rank == 0 && !matches!(cause, Cause::DataLink { .. });
        let failure = self.failure(rank, cause);
        let words = serde_json::to_vec(&failure).unwrap_or_default();
        if !self.watch.fail(failure) {
            return;
        }
        let frame = match self.rank {
            0 => Outgoing::new(Kind::Failure, words),
            _ => Outgoing::new(Kind::Report, serde_json::to_vec(&report).unwrap_or_default()),
        };
        for link in self.links.values() {
            match self.rank {
                0 => link.last_words(Some(frame.clone())),
                _ if ends_link => link.last_words(Some(frame.clone())),
                _ => link.push(frame.clone(), &|| false),
            }
        }
    }

    /// What a broken data connection to `peer` means. Process 0 usually knows better what became of it.
    pub(crate) fn explain_data_failure(&self, peer: usize, detail: String, waiting_for: &'static str) -> ClusterError {
        match self.watch.verdict(peer, VERDICT) {
            Verdict::Failed(failure) => ClusterError::Failed(failure),
            Verdict::Left => ClusterError::Left { rank: peer, waiting_for },
            Verdict::Unknown => {
                self.fail(peer, Cause::DataLink { noticed_by: self.rank, detail });
                self.watch.failure().map_or(ClusterError::Left { rank: peer, waiting_for }, ClusterError::Failed)
            }
        }
    }

    /// Reads one connection until it ends.
    fn read(&self, peer: usize) {
        let link = &self.links[&peer];
        let mut reader = link.reader();
        let mut sequence = 0;
        let cause = loop {
            match read_frame(&mut reader, sequence, MAX_MESSAGE_BYTES) {
                Ok(frame) => match self.handle(peer, frame) {
                    Ok(true) => sequence += 1,
                    Ok(false) => break None,
                    Err(detail) => break Some(Cause::Garbled { detail }),
                },
                Err(FrameError::Ended(detail)) => break Some(Cause::Closed { detail }),
                Err(FrameError::Garbled(detail)) => break Some(Cause::Garbled { detail }),
            }
        };
        match cause {
            // Process 0 waits for the end of this connection; nothing more has to be said on it.
            None => link.shut_down(),
            Some(cause) if !self.watch.has_left(peer) && !*lock(&self.is_closing) => self.fail(peer, cause),
            Some(_) => {}
        }
        link.end_reading();
    }

    /// Whether more is to be read; an error if such a frame must not come.
    fn handle(&self, peer: usize, frame: Frame) -> Result<bool, String> {
        let Frame { kind, code, payload } = frame;
        match kind {
            Kind::Heartbeat => {}
            Kind::Message => {
                let mut waiting = lock(&self.inbox.waiting);
                waiting.push_back(Message { from: peer, code, payload });
                let num_bytes: usize = waiting.iter().map(|message| message.payload.len()).sum();
                drop(waiting);
                self.inbox.arrived.notify_all();
                if num_bytes > MAX_WAITING_BYTES {
                    let message = format!("{num_bytes} bytes of messages wait and it takes none of them");
                    self.fail(self.rank, Cause::Reported { message });
                }
            }
            Kind::Goodbye => {
                self.watch.leave(peer);
                if self.rank > 0 {
                    return Ok(false);
                }
                let left = Outgoing::new(Kind::Left, (peer as u32).to_le_bytes());
                for (_, link) in self.links.iter().filter(|(other, _)| **other != peer) {
                    link.push(left.clone(), &|| false);
                }
            }
            Kind::Left if self.rank > 0 => {
                let bytes = <[u8; 4]>::try_from(&payload[..]).map_err(|_| "a goodbye of nobody".to_owned())?;
                self.watch.leave(u32::from_le_bytes(bytes) as usize);
            }
            Kind::Failure if self.rank > 0 => {
                let failure = serde_json::from_slice(&payload).map_err(|error| format!("a failure: {error}"))?;
                self.watch.fail(failure);
                return Ok(false);
            }
            Kind::Report if self.rank == 0 => {
                let report: Report = serde_json::from_slice(&payload).map_err(|error| format!("a report: {error}"))?;
                if report.rank >= self.members.len() {
                    return Err(format!("a report about process {}", report.rank));
                }
                self.fail(report.rank, report.cause);
            }
            other => return Err(format!("a frame of kind {other:?}")),
        }
        Ok(true)
    }

    /// Fails whoever is silent for too long.
    fn listen_for_silence(&self) {
        // Looked for more often than heartbeats come, so that little is added to the time that is allowed.
        let interval = self.interval() / 4;
        let mut is_closing = lock(&self.is_closing);
        while !*is_closing && self.watch.failure().is_none() {
            let start = Instant::now();
            is_closing = wait(&self.closing, is_closing, interval);
            // It was this process that stood still: what others sent meanwhile is still to be read.
            if start.elapsed() > interval + self.silence / 2 {
                self.links.values().for_each(Link::mark_heard);
            }
            let is_silent = |link: &Link| link.silent_for() > self.silence && !link.has_ended();
            let silent = self.links.iter().find(|(peer, link)| is_silent(link) && !self.watch.has_left(**peer));
            if let Some((&peer, _)) = silent {
                drop(is_closing);
                self.fail(peer, Cause::Silent { limit_ms: self.silence.as_millis() as u64 });
                return;
            }
        }
    }
}

/// Registers a part that may wait for others.
pub(crate) fn register<T: Abort + 'static>(watch: &Watch, part: &Arc<T>) {
    let part: Arc<dyn Abort> = Arc::clone(part) as Arc<dyn Abort>;
    let part: Weak<dyn Abort> = Arc::downgrade(&part);
    watch.register(part);
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::frame::write_frame;

    const SILENCE: Duration = Duration::from_secs(30);

    fn members() -> Vec<Member> {
        let member = |rank| Member { rank, host: format!("host{rank}"), pid: 7, data: ([127, 0, 0, 1], 1).into() };
        (0..2).map(member).collect()
    }

    fn streams() -> [TcpStream; 2] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        [one, listener.accept().unwrap().0]
    }

    fn control(rank: usize, stream: TcpStream, silence: Duration) -> Control {
        Control::start(rank, members(), BTreeMap::from([(1 - rank, stream)]), silence).unwrap()
    }

    /// Process 0, and the bare other end of its connection to process 1.
    fn zero_and_raw(silence: Duration) -> (Control, TcpStream) {
        let [zero, raw] = streams();
        (control(0, zero, silence), raw)
    }

    #[test]
    fn messages_go_both_ways_in_order() {
        let [a, b] = streams();
        let (zero, one) = (control(0, a, SILENCE), control(1, b, SILENCE));
        for number in 0..100_u16 {
            zero.send(1, number, &vec![number as u8; usize::from(number) * 100]).unwrap();
            one.send(0, number, &[]).unwrap();
        }
        for number in 0..100_u16 {
            let expected = vec![number as u8; usize::from(number) * 100];
            assert_eq!(one.recv(0, None).unwrap(), Message { from: 0, code: number, payload: expected });
            assert_eq!(zero.recv_any(None).unwrap(), Message { from: 1, code: number, payload: Vec::new() });
        }
        assert!(matches!(one.send(1, 0, b""), Err(ClusterError::NoPeer { peer: 1, kind: "control", .. })));
        assert!(matches!(one.broadcast(0, b""), Err(ClusterError::NoPeer { .. })));
        let leaving = std::thread::spawn(move || one.leave());
        zero.leave().unwrap();
        leaving.join().unwrap().unwrap();
        zero.leave().unwrap();
    }

    #[test]
    fn what_is_no_message_ends_the_run() {
        let frame = |kind, payload: &[u8]| {
            let mut bytes = Vec::new();
            write_frame(&mut bytes, kind, 0, 0, 0, payload).unwrap();
            bytes
        };
        for (bytes, words) in [
            (b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n".to_vec(), "it begins with `GET"),
            (frame(Kind::Roster, b"[]"), "a frame of kind Roster"),
            (frame(Kind::Failure, b"{}"), "a frame of kind Failure"),
            (frame(Kind::Report, b"{}"), "a report: missing field"),
            (frame(Kind::Report, br#"{"rank":9,"cause":{"silent":{"limit_ms":1}}}"#), "a report about process 9"),
            ([frame(Kind::Heartbeat, b""), frame(Kind::Heartbeat, b"")].concat(), "frame 0 where frame 1 was expected"),
        ] {
            let (zero, mut raw) = zero_and_raw(SILENCE);
            raw.write_all(&bytes).unwrap();
            let error = zero.recv(1, Some(Duration::from_secs(5))).unwrap_err().to_string();
            let begins = "process 1 of 2 (pid 7 on host1) sent what is no message of this program: ";
            assert!(error.starts_with(begins) && error.contains(words), "{error}");
            drop(raw);
        }
    }

    #[test]
    fn silence_counts_from_the_last_byte() {
        let (zero, mut raw) = zero_and_raw(Duration::from_millis(800));
        let mut bytes = Vec::new();
        write_frame(&mut bytes, Kind::Message, 5, 0, 0, b"slow").unwrap();
        let start = Instant::now();
        for byte in &bytes {
            raw.write_all(&[*byte]).unwrap();
            std::thread::sleep(Duration::from_millis(40));
        }
        assert!(start.elapsed() > Duration::from_millis(1200), "longer than silence is allowed");
        assert_eq!(zero.recv(1, None).unwrap().payload, b"slow");
        let error = zero.recv(1, None).unwrap_err();
        assert_eq!(error.rank(), Some(1));
        assert!(error.hint().unwrap().contains("COGVLM_CLUSTER_SILENCE_S"));
        let expected = "process 1 of 2 (pid 7 on host1) has been silent for 0.8 s";
        assert!(error.to_string().starts_with(expected), "{error}");
    }

    #[test]
    fn the_first_failure_counts() {
        let [a, b] = streams();
        let (zero, one) = (control(0, a, SILENCE), control(1, b, SILENCE));
        let first = one.fail("no room").to_string();
        assert_eq!(first, "process 1 of 2 (pid 7 on host1) failed: no room");
        assert_eq!(one.fail("again").to_string(), first);
        assert_eq!(zero.recv(1, None).unwrap_err().to_string(), first);
        assert_eq!(zero.fail("me too").to_string(), first);
        assert_eq!(zero.leave().unwrap_err().to_string(), first);
        let start = Instant::now();
        drop(zero);
        drop(one);
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    }
}
