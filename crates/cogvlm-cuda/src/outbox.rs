//! Rows on their way to another device.
//!
//! A parcel is made by the sender's compute stream and fetched by the receiver's: events order the two, and no thread of
//! the host waits for a device. Where the receiver cannot read the sender's memory, the parcel passes through pinned
//! memory of the host.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use cogvlm_backend::shape::{expect, expect_fit, expect_span};
use cogvlm_backend::{BackendError, HostRows};
use cogvlm_core::DType;
use cudarc::driver::sys::{self as cu, CUdeviceptr, CUstream};

use crate::backend::CudaBackend;
use crate::buffer::CudaBuffer;
use crate::device::{Event, Gpu};
use crate::host_copy::Pinned;
use crate::memory::{ALIGNMENT, Memory, Spans};

/// Memory that parcels are made of, shared with those under way.
#[derive(Clone)]
pub struct CudaOutbox {
    shelf: Arc<Shelf>,
}

struct Shelf {
    gpu: Arc<Gpu>,
    memory: Memory,
    length: usize,
    state: Mutex<State>,
    /// Some parcel was received.
    freed: Condvar,
}

struct State {
    spans: Spans,
    /// Events of parcels that were received, for those to come.
    tickets: Vec<Ticket>,
    /// Pinned memory for what has to pass through the host, with the event that comes when it was copied from.
    pinned: Vec<(Pinned, Option<Arc<Event>>)>,
    /// Offset and bytes of parcels that were received, though their copies may still be under way, with the events that
    /// come when these have ended; the oldest first.
    leaving: VecDeque<((usize, usize), Arc<Event>)>,
}

impl State {
    /// Room for `length` bytes, which `stream` may write to; `None` where parcels that nobody has received have all of
    /// it. Memory that is still copied from is taken last: the stream has to wait for that.
    fn take(&mut self, length: usize, stream: CUstream) -> Result<Option<usize>, BackendError> {
        while let Some((span, taken)) = self.leaving.front() {
            if !taken.has_come()? {
                break;
            }
            self.spans.give_back(span.0, span.1);
            self.leaving.pop_front();
        }
        loop {
            if let Some(offset) = self.spans.take(length) {
                return Ok(Some(offset));
            }
            let Some((span, taken)) = self.leaving.pop_front() else { return Ok(None) };
            self.spans.give_back(span.0, span.1);
            taken.hold(stream)?;
        }
    }
}

/// The events of a parcel.
struct Ticket {
    /// Comes when the rows are in the parcel.
    ready: Event,
    /// Comes when they are in pinned memory.
    staged: Event,
}

/// Rows copied out of a buffer, as the bytes they were, still on the device that sends them.
pub struct CudaParcel {
    shelf: Arc<Shelf>,
    /// Offset and bytes in the outbox.
    span: (usize, usize),
    /// There until it is dropped.
    ticket: Option<Ticket>,
    pinned: Option<Pinned>,
    /// Comes when the receiver has its copy.
    taken: Option<Arc<Event>>,
    dtype: DType,
    rows: usize,
    columns: usize,
}

impl CudaOutbox {
    pub(crate) fn new(cuda: &CudaBackend, bytes: usize) -> Result<Self, BackendError> {
        let memory = cuda.arena.take("rows on their way to other ranks", bytes)?;
        let length = bytes / ALIGNMENT * ALIGNMENT;
        let spans = Spans::of(length);
        let state = State { spans, tickets: Vec::new(), pinned: Vec::new(), leaving: VecDeque::new() };
        let (gpu, state, freed) = (Arc::clone(&cuda.gpu), Mutex::new(state), Condvar::new());
        Ok(Self { shelf: Arc::new(Shelf { gpu, memory, length, state, freed }) })
    }

    /// Copies `rows` of `buffer` into a parcel, in the order of the compute stream. Waits while there is no room.
    pub(crate) fn send(&self, buffer: &CudaBuffer, rows: Range<usize>) -> Result<CudaParcel, BackendError> {
        expect_span("send", &rows, buffer.rows())?;
        let Shelf { gpu, memory, length, state, freed } = &*self.shelf;
        let bytes = rows.len() * buffer.row_bytes();
        let room = bytes.max(1).next_multiple_of(ALIGNMENT);
        expect("send", "rows", &[rows.len(), buffer.columns()], room <= *length, || {
            format!("at most {length} bytes, which the outbox has room for")
        })?;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = loop {
            if let Some(offset) = state.take(room, gpu.stream)? {
                break offset;
            }
            state = freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        let ticket = state.tickets.pop();
        drop(state);
        let ticket = match ticket {
            Some(ticket) => ticket,
            None => Ticket { ready: Event::new(gpu, false)?, staged: Event::new(gpu, false)? },
        };
        let parcel = CudaParcel {
            shelf: Arc::clone(&self.shelf),
            span: (offset, room),
            ticket: Some(ticket),
            pinned: None,
            taken: None,
            dtype: buffer.dtype,
            rows: rows.len(),
            columns: buffer.columns(),
        };
        // SAFETY: the rows are in the buffer, and the outbox has room for them that nobody else has. A buffer that is
        // dropped now goes to an owner whose work comes after this copy on the same stream.
        unsafe { gpu.copy(buffer.row(rows.start), memory.address + offset as CUdeviceptr, bytes) }?;
        parcel.ticket().ready.record(gpu.stream)?;
        Ok(parcel)
    }
}

impl CudaParcel {
    fn ticket(&self) -> &Ticket {
        self.ticket.as_ref().expect("taken out on drop only")
    }

    fn address(&self) -> CUdeviceptr {
        self.shelf.memory.address + self.span.0 as CUdeviceptr
    }

    fn num_bytes(&self) -> usize {
        self.rows * self.columns * self.dtype.size_bytes()
    }

    /// Copies the rows into `buffer` from `first_row` on, in the order of the compute stream of `cuda`.
    pub(crate) fn receive(
        mut self, cuda: &CudaBackend, buffer: &mut CudaBuffer, first_row: usize,
    ) -> Result<(), BackendError> {
        let given = (self.dtype, [self.rows, self.columns]);
        expect_fit("receive", given, (buffer.dtype, buffer.shape()), first_row)?;
        let bytes = self.num_bytes();
        if bytes == 0 {
            return Ok(());
        }
        let (gpu, sender) = (&cuda.gpu, Arc::clone(&self.shelf.gpu));
        let to = buffer.row(first_row);
        // Recorded also where something fails below: whoever gets the memory next waits for what was begun.
        let taken = Arc::new(Event::new(gpu, false)?);
        let outcome = if gpu.reaches(&sender) {
            // SAFETY: the parcel holds these bytes until `taken` has come, and the buffer has room for them.
            self.ticket()
                .ready
                .hold(gpu.stream)
                .and_then(|()| unsafe { gpu.copy_from_peer(&sender, self.address(), to, bytes, gpu.stream) })
        } else {
            self.stage().and_then(|from| {
                self.ticket().staged.hold(gpu.stream)?;
                gpu.bind()?;
                // SAFETY: the pinned memory holds these bytes until `taken` has come, and the buffer has room for them.
                gpu.check(unsafe { cu::cuMemcpyHtoDAsync_v2(to, from.cast_const().cast(), bytes, gpu.stream) })
            })
        };
        taken.record(gpu.stream)?;
        self.taken = Some(taken);
        outcome
    }

    /// Sends the rows on their way to pinned memory; gives its address.
    fn stage(&mut self) -> Result<*mut u8, BackendError> {
        let gpu = &self.shelf.gpu;
        let bytes = self.num_bytes();
        let mut state = self.shelf.state.lock().unwrap_or_else(PoisonError::into_inner);
        let known = state.pinned.iter().position(|(pinned, _)| pinned.length >= bytes);
        let pinned = known.map(|index| state.pinned.remove(index));
        drop(state);
        let pinned = match pinned {
            Some((pinned, taken)) => {
                taken.map_or(Ok(()), |taken| taken.hold(gpu.link_stream))?;
                pinned
            }
            None => Pinned::new(gpu, bytes.next_power_of_two())?,
        };
        let (from, to) = (self.address(), pinned.address);
        self.pinned = Some(pinned);
        self.ticket().ready.hold(gpu.link_stream)?;
        gpu.bind()?;
        // SAFETY: the parcel holds these bytes, and the pinned memory has room for them; both are kept until the copy
        // has ended: whoever waits for `staged` has the parcel.
        gpu.check(unsafe { cu::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, gpu.link_stream) })?;
        self.ticket().staged.record(gpu.link_stream)?;
        Ok(to)
    }

    /// The rows, brought to the host: for a device of another kind, or another process.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn into_host_rows(mut self) -> Result<HostRows, BackendError> {
        let (dtype, columns, num_bytes) = (self.dtype, self.columns, self.num_bytes());
        if num_bytes == 0 {
            return Ok(HostRows { dtype, columns, bytes: Vec::new() });
        }
        let from = self.stage()?;
        self.ticket().staged.wait()?;
        // SAFETY: the copy to the pinned memory has ended, which is that long and this parcel's own.
        let bytes = unsafe { std::slice::from_raw_parts(from.cast_const(), num_bytes) }.to_vec();
        Ok(HostRows { dtype, columns, bytes })
    }
}

impl Drop for CudaParcel {
    fn drop(&mut self) {
        let mut state = self.shelf.state.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = self.taken.take();
        state.pinned.extend(self.pinned.take().map(|pinned| (pinned, taken.clone())));
        state.tickets.extend(self.ticket.take());
        match taken {
            Some(taken) => state.leaving.push_back((self.span, taken)),
            None => state.spans.give_back(self.span.0, self.span.1),
        }
        self.shelf.freed.notify_all();
    }
}

impl Drop for Shelf {
    /// All parcels are gone: what is still copied from their memory ends before others get it.
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let leaving = state.leaving.iter().map(|(_, taken)| taken);
        let pinned = state.pinned.iter().filter_map(|(_, taken)| taken.as_ref());
        for taken in leaving.chain(pinned) {
            drop(taken.wait());
        }
    }
}
