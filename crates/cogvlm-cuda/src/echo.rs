//! What kernels find in the structs that they are passed: for tests that every field arrives.

use std::ffi::c_void;
use std::sync::Arc;

use cogvlm_core::Device;

use crate::device::{Gpu, Launch, arg};
use crate::memory::Allocation;

/// The `count` numbers that one thread of `kernel` writes to its last argument, an address; `arguments` are the others.
///
/// # Safety
/// `arguments` are addresses of values of the size of the kernel's parameters, and it writes no more than that.
pub(crate) unsafe fn echo(
    module: &'static str, kernel: &'static str, arguments: &[*mut c_void], count: usize,
) -> Vec<u64> {
    let gpu = Arc::new(Gpu::open(Device::Gpu(0), 0).unwrap_or_else(|error| panic!("{error}")));
    let found = Allocation::new(&gpu, "fields", count * size_of::<u64>()).unwrap_or_else(|error| panic!("{error}"));
    let mut arguments = arguments.to_vec();
    arguments.push(arg(&found.address));
    let launch = Launch { overlap: false, ..Launch::blocks(1, 1) };
    // SAFETY: the caller vouches for the arguments; the last one has room for `count` numbers until the download is done.
    unsafe { gpu.launch(module, kernel, launch, &mut arguments) }.unwrap_or_else(|error| panic!("{error}"));
    let mut fields = vec![0_u64; count];
    let bytes = bytemuck::cast_slice_mut(&mut fields);
    gpu.download(found.address, bytes).unwrap_or_else(|error| panic!("{error}"));
    fields
}

/// Numbers from 1 on, each given out once, and in all bytes of a u64 other than the next.
#[derive(Default)]
pub(crate) struct Numbers {
    given: Vec<u64>,
}

impl Numbers {
    /// For a field of 64 bits.
    pub(crate) fn wide(&mut self) -> u64 {
        let number = (self.given.len() as u64 + 1) * 0x0000_0101_0000_0001;
        self.given.push(number);
        number
    }

    /// For a field of 32 bits.
    pub(crate) fn narrow(&mut self) -> u32 {
        let number = (self.given.len() as u32 + 1) * 0x0001_0001;
        self.given.push(u64::from(number));
        number
    }

    /// All of them, in order.
    pub(crate) fn given(self) -> Vec<u64> {
        self.given
    }
}
