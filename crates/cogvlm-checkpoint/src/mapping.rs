//! The only unsafe code here: a read-only shared mapping of a file.

use std::fs::File;
use std::io;
use std::ops::Range;

use memmap2::{Mmap, MmapOptions, UncheckedAdvice};

/// What the kernel is told about a range of a mapped file. Advice changes speed only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// Will be read once from start to end: read far ahead, drop behind.
    Sequential,
    /// Will be read soon: start reading it from disk now.
    WillNeed,
    /// Read it from disk now and map its pages, so that later reads fault no more (Linux 5.14 and later).
    Populate,
    /// Not needed for now: unmap its pages. Reading it later maps them again, from the page cache or from disk.
    DontNeed,
}

/// `MAP_SHARED`, `PROT_READ` mapping of the first `len` bytes of a file.
#[derive(Debug)]
pub(crate) struct Mapping(Mmap);

impl Mapping {
    pub(crate) fn new(file: &File, len: usize) -> io::Result<Self> {
        // SAFETY: the bytes of the mapping stay as they are, and readable, while nobody rewrites or truncates the file.
        // Code cannot check that; it is the invariant in the crate's documentation, and `verify_unchanged` finds most
        // breaches of it.
        unsafe { MmapOptions::new().len(len).map(file) }.map(Self)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn advise(&self, range: Range<usize>, advice: Advice) -> io::Result<()> {
        let (start, len) = (range.start, range.len());
        match advice {
            Advice::Sequential => self.0.advise_range(memmap2::Advice::Sequential, start, len),
            Advice::WillNeed => self.0.advise_range(memmap2::Advice::WillNeed, start, len),
            Advice::Populate => self.0.advise_range(memmap2::Advice::PopulateRead, start, len),
            // SAFETY: MADV_DONTNEED loses data of private and anonymous mappings only. This one is shared, read-only
            // and backed by a file, so the pages come back with the same contents, and references stay valid.
            Advice::DontNeed => unsafe { self.0.unchecked_advise_range(UncheckedAdvice::DontNeed, start, len) },
        }
    }
}
