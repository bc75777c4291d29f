//! What goes over a connection: frames of a fixed header and a payload, strictly checked.
//!
//! Header, 32 bytes, little-endian: magic `CGVf`, kind u8, 0 u8, code u16, sequence u64, tag u64, payload bytes u32,
//! CRC-32 u32. The checksum covers the header before it and the payload; of rows it covers the header alone, since they
//! are large and TCP has a checksum of its own.

use std::io::{ErrorKind, IoSlice, Read, Write};

/// Bytes of a header.
pub(crate) const HEADER_BYTES: usize = 32;
/// Most payload bytes of a control message.
pub(crate) const MAX_MESSAGE_BYTES: usize = 256 << 20;
/// Most payload bytes before both sides know each other.
pub(crate) const MAX_HELLO_BYTES: usize = 256 << 10;
/// Most bytes of rows in one call.
pub(crate) const MAX_ROWS_BYTES: usize = 1 << 30;

const MAGIC: [u8; 4] = *b"CGVf";

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A process introduces itself; the code is the protocol's version.
    Hello = 1,
    /// It is expected; the others are awaited.
    Accepted = 2,
    /// It is not, for the reason given.
    Refused = 3,
    /// Everybody is there: the members.
    Roster = 4,
    /// The run will not begin, for the reason given.
    GiveUp = 5,
    /// Still there.
    Heartbeat = 6,
    /// A message of the caller, with the caller's code.
    Message = 7,
    /// To process 0: this or another process failed.
    Report = 8,
    /// From process 0: the run is over, for the reason given.
    Failure = 9,
    /// The sender has ended its part.
    Goodbye = 10,
    /// From process 0: another process has ended its part.
    Left = 11,
    /// A data connection introduces itself.
    DataHello = 12,
    /// It is expected.
    DataAccepted = 13,
    /// Rows of the caller, with the caller's tag.
    Rows = 14,
}

impl Kind {
    const ALL: [Self; 14] = [
        Self::Hello,
        Self::Accepted,
        Self::Refused,
        Self::Roster,
        Self::GiveUp,
        Self::Heartbeat,
        Self::Message,
        Self::Report,
        Self::Failure,
        Self::Goodbye,
        Self::Left,
        Self::DataHello,
        Self::DataAccepted,
        Self::Rows,
    ];
}

/// A checked header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) code: u16,
    pub(crate) sequence: u64,
    pub(crate) tag: u64,
    pub(crate) num_bytes: usize,
}

/// A frame, whole.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    pub(crate) code: u16,
    pub(crate) payload: Vec<u8>,
}

/// Why a frame could not be read.
#[derive(Debug)]
pub(crate) enum FrameError {
    /// The connection ended, between frames or within one. The text is empty where the other side just closed it, in
    /// whichever way the system reports that.
    Ended(String),
    /// It is no frame, or not the next one.
    Garbled(String),
}

impl FrameError {
    pub(crate) fn text(self) -> String {
        match self {
            Self::Ended(text) if text.is_empty() => "the connection was closed".to_owned(),
            Self::Ended(text) | Self::Garbled(text) => text,
        }
    }

    fn io(error: &std::io::Error) -> Self {
        use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, TimedOut, UnexpectedEof, WouldBlock};
        Self::Ended(match error.kind() {
            UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe => String::new(),
            TimedOut | WouldBlock => "nothing came in time".to_owned(),
            _ => error.to_string(),
        })
    }
}

impl Header {
    fn bytes(&self, payload: &[u8]) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = self.kind as u8;
        bytes[6..8].copy_from_slice(&self.code.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.tag.to_le_bytes());
        bytes[24..28].copy_from_slice(&(self.num_bytes as u32).to_le_bytes());
        let checksum = checksum(self.kind, &bytes[..28], payload);
        bytes[28..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Checks all of a header but its checksum, which is given back.
    fn parse(bytes: &[u8; HEADER_BYTES], sequence: u64, max_bytes: usize) -> Result<(Self, u32), String> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if bytes[..4] != MAGIC {
            return Err(format!("it begins with `{}`", bytes[..16].escape_ascii()));
        }
        let kind = Kind::ALL.into_iter().find(|kind| *kind as u8 == bytes[4]);
        let kind = kind.filter(|_| bytes[5] == 0).ok_or_else(|| format!("a frame of unknown kind {}", u16_at(4)))?;
        let num_bytes = u32_at(24) as usize;
        if num_bytes > max_bytes {
            return Err(format!("a frame of {num_bytes} bytes, where {max_bytes} are the most"));
        }
        let header = Self { kind, code: u16_at(6), sequence: u64_at(8), tag: u64_at(16), num_bytes };
        if header.sequence != sequence {
            return Err(format!("frame {} where frame {sequence} was expected", header.sequence));
        }
        Ok((header, u32_at(28)))
    }
}

fn checksum(kind: Kind, header: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    if kind != Kind::Rows {
        hasher.update(payload);
    }
    hasher.finalize()
}

/// Writes one frame, whose payload has at most `u32::MAX` bytes.
pub(crate) fn write_frame(
    stream: &mut impl Write, kind: Kind, code: u16, tag: u64, sequence: u64, payload: &[u8],
) -> std::io::Result<()> {
    let header = Header { kind, code, sequence, tag, num_bytes: payload.len() }.bytes(payload);
    // Both in one call, so that a small frame is one packet.
    let mut written = 0;
    while written < header.len() {
        let parts = [IoSlice::new(&header[written..]), IoSlice::new(payload)];
        match stream.write_vectored(&parts) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => written += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    stream.write_all(&payload[written - header.len()..])
}

/// Reads the header of frame `sequence`. The checksum of rows is checked here; that of others with their payload.
pub(crate) fn read_header(
    reader: &mut impl Read, sequence: u64, max_bytes: usize,
) -> Result<(Header, [u8; HEADER_BYTES]), FrameError> {
    let mut bytes = [0; HEADER_BYTES];
    reader.read_exact(&mut bytes).map_err(|error| FrameError::io(&error))?;
    let (header, found) = Header::parse(&bytes, sequence, max_bytes).map_err(FrameError::Garbled)?;
    if header.kind == Kind::Rows && checksum(header.kind, &bytes[..28], &[]) != found {
        return Err(FrameError::Garbled("a header with a wrong checksum".to_owned()));
    }
    Ok((header, bytes))
}

/// Reads frame `sequence`, whole. Memory grows with what comes, not with what a header claims.
pub(crate) fn read_frame(reader: &mut impl Read, sequence: u64, max_bytes: usize) -> Result<Frame, FrameError> {
    let (Header { kind, code, num_bytes, .. }, bytes) = read_header(reader, sequence, max_bytes)?;
    let mut payload = Vec::new();
    reader.take(num_bytes as u64).read_to_end(&mut payload).map_err(|error| FrameError::io(&error))?;
    if payload.len() < num_bytes {
        return Err(FrameError::Ended(String::new()));
    }
    let found = u32::from_le_bytes([bytes[28], bytes[29], bytes[30], bytes[31]]);
    if checksum(kind, &bytes[..28], &payload) != found {
        return Err(FrameError::Garbled("a message with a wrong checksum".to_owned()));
    }
    Ok(Frame { kind, code, payload })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(kind: Kind, sequence: u64, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, kind, 7, 9, sequence, payload).unwrap();
        bytes
    }

    #[test]
    fn frames_survive() {
        let bytes = written(Kind::Message, 3, b"abc");
        assert_eq!(bytes.len(), HEADER_BYTES + 3);
        let frame = read_frame(&mut &bytes[..], 3, 3).unwrap();
        assert_eq!((frame.kind, frame.code, &frame.payload[..]), (Kind::Message, 7, &b"abc"[..]));
        assert!(
            matches!(read_frame(&mut &bytes[..], 4, 3), Err(FrameError::Garbled(text)) if text.contains("frame 3"))
        );
        assert!(
            matches!(read_frame(&mut &bytes[..], 3, 2), Err(FrameError::Garbled(text)) if text.contains("the most"))
        );
        let rows = written(Kind::Rows, 0, &[5; 10]);
        let (header, _) = read_header(&mut &rows[..], 0, 10).unwrap();
        assert_eq!((header.tag, header.num_bytes), (9, 10));
    }

    #[test]
    fn strangers_are_quoted() {
        let request = b"GET / HTTP/1.1\r\nHost: node1:29650\r\n\r\n";
        let error = read_frame(&mut &request[..], 0, 100).unwrap_err().text();
        assert_eq!(error, "it begins with `GET / HTTP/1.1\\r\\n`");
    }

    /// A writer that takes a few bytes at a time.
    struct Slow(Vec<u8>, usize);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let count = bytes.len().min(self.1);
            self.0.extend(&bytes[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn payloads() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(any::<u8>(), 0..50)
    }

    proptest! {
        #[test]
        fn a_flipped_bit_is_noticed(payload in payloads(), at in any::<prop::sample::Index>(), bit in 0..8) {
            let mut bytes = written(Kind::Message, 0, &payload);
            let at = at.index(bytes.len());
            bytes[at] ^= 1_u8 << bit;
            prop_assert!(read_frame(&mut &bytes[..], 0, 1000).is_err());
        }

        #[test]
        fn a_cut_is_noticed(payload in payloads(), at in any::<prop::sample::Index>()) {
            let bytes = written(Kind::Message, 0, &payload);
            let cut = &bytes[..at.index(bytes.len())];
            prop_assert!(matches!(read_frame(&mut &*cut, 0, 1000), Err(FrameError::Ended(_))));
        }

        #[test]
        fn garbage_is_no_frame(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(read_frame(&mut &bytes[..], 0, 1000).is_err());
        }

        #[test]
        fn short_writes_lose_nothing(payload in proptest::collection::vec(any::<u8>(), 0..100), step in 1_usize..40) {
            let mut slow = Slow(Vec::new(), step);
            write_frame(&mut slow, Kind::Message, 7, 9, 1, &payload).unwrap();
            prop_assert_eq!(slow.0, written(Kind::Message, 1, &payload));
        }
    }
}
