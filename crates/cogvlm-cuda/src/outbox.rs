//! Rows on their way to another device.
//!
//! A parcel is made by the sender's compute stream and fetched by the receiver's: events order the two, and no thread of
//! the host waits for a device. Where the receiver cannot read the sender's memory, the parcel passes through pinned
//! memory of the host. Between processes it goes over a channel, where there is one.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use cogvlm_backend::shape::{expect, expect_fit, expect_span, unsupported};
use cogvlm_backend::{BackendError, HostRows, RowsLayout};
use cudarc::driver::sys::{self as cu, CUdeviceptr, CUstream};

use crate::backend::CudaBackend;
use crate::buffer::CudaBuffer;
use crate::channel::ComingRows;
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

/// Rows for a GPU.
pub enum CudaParcel {
    /// In an outbox of this process.
    Packed(PackedRows),
    /// Still with a GPU of another process, which sends them over a channel.
    Coming(ComingRows),
}

/// Rows copied out of a buffer, as the bytes they were, still on the device that sends them.
pub struct PackedRows {
    shelf: Arc<Shelf>,
    /// Offset and bytes in the outbox.
    span: (usize, usize),
    /// There until it is dropped.
    ticket: Option<Ticket>,
    pinned: Option<Pinned>,
    /// Comes when the receiver has its copy.
    taken: Option<Arc<Event>>,
    layout: RowsLayout,
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
        let parcel = PackedRows {
            shelf: Arc::clone(&self.shelf),
            span: (offset, room),
            ticket: Some(ticket),
            pinned: None,
            taken: None,
            layout: RowsLayout { dtype: buffer.dtype, rows: rows.len(), columns: buffer.columns() },
        };
        // SAFETY: the rows are in the buffer, and the outbox has room for them that nobody else has. A buffer that is
        // dropped now goes to an owner whose work comes after this copy on the same stream.
        unsafe { gpu.copy(buffer.row(rows.start), memory.address + offset as CUdeviceptr, bytes) }?;
        parcel.ticket().ready.record(gpu.stream)?;
        Ok(CudaParcel::Packed(parcel))
    }
}

impl CudaParcel {
    /// Brings the rows into `buffer` from `first_row` on, in the order of the compute stream of `cuda`.
    pub(crate) fn receive(
        self, cuda: &CudaBackend, buffer: &mut CudaBuffer, first_row: usize,
    ) -> Result<(), BackendError> {
        let RowsLayout { dtype, rows, columns } = match &self {
            Self::Packed(rows) => rows.layout,
            Self::Coming(rows) => rows.layout(),
        };
        expect_fit("receive", (dtype, [rows, columns]), (buffer.dtype, buffer.shape()), first_row)?;
        match self {
            _ if rows * columns == 0 => Ok(()),
            Self::Packed(rows) => rows.receive(cuda, buffer.row(first_row)),
            Self::Coming(rows) => rows.receive(cuda, buffer.row(first_row)),
        }
    }

    /// The rows, brought to the host: for a device of another kind, or another process.
    ///
    /// # Errors
    /// Where the device fails, or the rows are not of this process.
    pub fn into_host_rows(self) -> Result<HostRows, BackendError> {
        self.into_packed("pack")?.into_host_rows()
    }

    /// What is packed by this process.
    pub(crate) fn into_packed(self, op: &'static str) -> Result<PackedRows, BackendError> {
        match self {
            Self::Packed(rows) => Ok(rows),
            Self::Coming(_) => Err(unsupported(op, "rows that a GPU of another process sends are received by a GPU")),
        }
    }
}

impl PackedRows {
    fn ticket(&self) -> &Ticket {
        self.ticket.as_ref().expect("taken out on drop only")
    }

    fn address(&self) -> CUdeviceptr {
        self.shelf.memory.address + self.span.0 as CUdeviceptr
    }

    fn num_bytes(&self) -> usize {
        self.layout.num_bytes()
    }

    /// Copies the rows to `to`, where there is room for them, in the order of the compute stream of `cuda`.
    fn receive(mut self, cuda: &CudaBackend, to: CUdeviceptr) -> Result<(), BackendError> {
        let bytes = self.num_bytes();
        let (gpu, sender) = (&cuda.gpu, Arc::clone(&self.shelf.gpu));
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

    /// Lets `stream`, one of the sending GPU's, pass the rows on by `send`, which is given their address and how many
    /// bytes they are. The outbox has its room back once `stream` is past that.
    pub(crate) fn pass_on(
        mut self, stream: CUstream, send: impl FnOnce(CUdeviceptr, usize) -> Result<(), BackendError>,
    ) -> Result<RowsLayout, BackendError> {
        let (layout, bytes) = (self.layout, self.num_bytes());
        if bytes == 0 {
            return Ok(layout);
        }
        let taken = Arc::new(Event::new(&self.shelf.gpu, false)?);
        let outcome = self.ticket().ready.hold(stream).and_then(|()| send(self.address(), bytes));
        // Recorded also where something failed: whoever gets the memory next waits for what was begun.
        taken.record(stream)?;
        self.taken = Some(taken);
        outcome.map(|()| layout)
    }

    /// The GPU that the rows are on.
    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.shelf.gpu
    }

    fn into_host_rows(mut self) -> Result<HostRows, BackendError> {
        let RowsLayout { dtype, columns, .. } = self.layout;
        let num_bytes = self.num_bytes();
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

impl Drop for PackedRows {
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
