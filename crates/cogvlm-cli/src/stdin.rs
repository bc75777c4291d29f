//! Lines from stdin, none of them endless.

use std::io::{self, BufRead, Read, StdinLock};

/// Most bytes of a line.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// Lines without their ends. One that is too long is an error of kind `InvalidData`, and the next one follows.
pub(crate) type StdinLines = Lines<StdinLock<'static>>;

/// See [`StdinLines`].
pub(crate) struct Lines<R> {
    reader: R,
    max_bytes: u64,
    /// The rest of a line that was too long is still to be read.
    in_long_line: bool,
}

impl StdinLines {
    pub(crate) fn lock() -> Self {
        Self::new(io::stdin().lock(), MAX_LINE_BYTES)
    }
}

impl<R: BufRead> Lines<R> {
    fn new(reader: R, max_bytes: u64) -> Self {
        Self { reader, max_bytes, in_long_line: false }
    }

    fn read(&mut self) -> io::Result<Option<Vec<u8>>> {
        if std::mem::take(&mut self.in_long_line) {
            self.reader.skip_until(b'\n')?;
        }
        let mut line = Vec::new();
        if self.reader.by_ref().take(self.max_bytes + 1).read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        } else if line.len() as u64 > self.max_bytes {
            self.in_long_line = true;
            let problem = format!("it is longer than {} MiB", self.max_bytes >> 20);
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        Ok(Some(line))
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_at_the_limit() {
        let text: &[u8] = b"abcd\n\nabcde\nx\nabcdef";
        let lines: Vec<_> = Lines::new(text, 4).map(|line| line.map_err(|error| error.kind())).collect();
        let too_long = || Err(io::ErrorKind::InvalidData);
        let text = |text: &str| Ok(text.as_bytes().to_vec());
        assert_eq!(lines, [text("abcd"), text(""), too_long(), text("x"), too_long()]);
    }
}
