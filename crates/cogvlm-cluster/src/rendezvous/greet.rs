//! Accepting connections from anyone: each introduces itself on a thread of its own, in time and in few bytes, or goes.

use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use crate::frame::{Frame, FrameError, Kind, MAX_HELLO_BYTES, read_frame};

/// Connections that may be introducing themselves at a time; more are closed, and may come again.
const MAX_STRANGERS: usize = 256;

/// A connection that has said something.
pub(crate) struct Greeting {
    pub(crate) from: SocketAddr,
    /// The stream and its first frame, or what came instead.
    pub(crate) hello: Result<(TcpStream, Frame), String>,
}

/// Reads with one deadline for all of it, however slowly it comes.
struct Before<'a> {
    stream: &'a TcpStream,
    deadline: Instant,
}

impl Read for Before<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let remaining = self.deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(remaining))?;
        (&*self.stream).read(buffer)
    }
}

/// Reads frame `sequence` of a stream that is being introduced.
pub(crate) fn read_frame_before(stream: &TcpStream, sequence: u64, deadline: Instant) -> Result<Frame, FrameError> {
    let frame = read_frame(&mut Before { stream, deadline }, sequence, MAX_HELLO_BYTES)?;
    drop(stream.set_read_timeout(None));
    Ok(frame)
}

/// Takes the connections that wait at `listener`, which does not block, and sends what they say to `greetings`.
pub(crate) fn accept_greetings(
    listener: &TcpListener, expected: Kind, timeout: Duration, strangers: &Arc<AtomicUsize>,
    greetings: &mpsc::Sender<Greeting>,
) {
    // What fails to be accepted is gone, or comes again.
    while let Ok((stream, from)) = listener.accept() {
        if strangers.fetch_add(1, Ordering::SeqCst) >= MAX_STRANGERS {
            strangers.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        let (greetings, counter) = (greetings.clone(), Arc::clone(strangers));
        let greet = move || {
            let hello = introduce(stream, expected, timeout);
            counter.fetch_sub(1, Ordering::SeqCst);
            // Nobody listens any more once all are there.
            drop(greetings.send(Greeting { from, hello }));
        };
        if std::thread::Builder::new().name("greeting".to_owned()).spawn(greet).is_err() {
            strangers.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Whether something comes, or the connection ends, within `patience`.
pub(crate) fn wait_readable(stream: &TcpStream, patience: Duration) -> bool {
    let patience = patience.max(Duration::from_millis(1));
    let peek = stream.set_read_timeout(Some(patience)).and_then(|()| stream.peek(&mut [0]));
    use ErrorKind::{Interrupted, TimedOut, WouldBlock};
    !matches!(peek, Err(error) if matches!(error.kind(), WouldBlock | TimedOut | Interrupted))
}

fn introduce(stream: TcpStream, expected: Kind, timeout: Duration) -> Result<(TcpStream, Frame), String> {
    let prepared = stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_nodelay(true))
        .and_then(|()| stream.set_write_timeout(Some(timeout)));
    prepared.map_err(|error| error.to_string())?;
    let frame = read_frame_before(&stream, 0, Instant::now() + timeout).map_err(FrameError::text)?;
    if frame.kind != expected {
        return Err(format!("it introduces itself with a frame of kind {:?}", frame.kind));
    }
    Ok((stream, frame))
}
