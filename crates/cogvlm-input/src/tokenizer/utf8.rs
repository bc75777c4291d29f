//! Bytes that arrive one by one, as text.

/// What invalid bytes become: how many U+FFFD, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Invalid {
    /// One for each byte (SentencePiece).
    EachByte,
    /// One for each broken sequence (`String::from_utf8_lossy`, byte-level tokenizers).
    EachSequence,
    /// One for each byte of the whole run, valid characters in it included, if anything in it is invalid (the byte
    /// fallback of the tokenizers library). The run is therefore held back until it ends.
    WholeRun,
}

/// Bytes that are not text yet.
#[derive(Debug)]
pub(super) struct Utf8Buffer {
    invalid: Invalid,
    pending: Vec<u8>,
}

const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

impl Utf8Buffer {
    pub(super) fn new(invalid: Invalid) -> Self {
        Self { invalid, pending: Vec::new() }
    }

    /// Takes a byte and appends to `out` what has become certain. An unfinished character stays.
    pub(super) fn push(&mut self, byte: u8, out: &mut String) {
        self.pending.push(byte);
        if self.invalid != Invalid::WholeRun {
            self.drain(false, out);
        }
    }

    /// Ends the run of bytes: what is still unfinished is invalid.
    pub(super) fn end_run(&mut self, out: &mut String) {
        if self.invalid == Invalid::WholeRun {
            match std::str::from_utf8(&self.pending) {
                Ok(text) => out.push_str(text),
                Err(_) => out.extend(self.pending.iter().map(|_| REPLACEMENT)),
            }
            self.pending.clear();
        } else {
            self.drain(true, out);
        }
    }

    fn drain(&mut self, run_ended: bool, out: &mut String) {
        let mut start = 0;
        while let Some(rest) = self.pending.get(start..).filter(|rest| !rest.is_empty()) {
            let error = match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    start = self.pending.len();
                    break;
                }
                Err(error) => error,
            };
            let (valid, broken) = rest.split_at(error.valid_up_to());
            out.push_str(std::str::from_utf8(valid).expect("from_utf8 found it valid up to here"));
            start += valid.len();
            let broken_len = match error.error_len() {
                None if !run_ended => break,
                None => broken.len(),
                Some(length) => length,
            };
            out.push(REPLACEMENT);
            start += if self.invalid == Invalid::EachByte { 1 } else { broken_len };
        }
        self.pending.drain(..start);
    }
}
