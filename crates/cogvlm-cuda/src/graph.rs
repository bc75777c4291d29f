//! Recorded sequences of launches (CUDA graphs).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cogvlm_backend::BackendError;
use cudarc::driver::sys::{self as cu, CUgraph, CUgraphExec};

use crate::device::Gpu;

/// Recordings by key.
pub(crate) struct Graphs {
    gpu: Arc<Gpu>,
    recorded: Mutex<HashMap<u64, Recording>>,
}

enum Recording {
    /// Was run once, launch by launch, so that everything is loaded that it needs.
    Warm,
    Graph(CUgraphExec),
    /// Could not be recorded: is run launch by launch for good.
    Refused,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Recording {}

impl Graphs {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Self {
        Self { gpu: Arc::clone(gpu), recorded: Mutex::default() }
    }

    /// See [`Backend::replay`](cogvlm_backend::Backend::replay): the first run is launch by launch, the second is
    /// recorded, the others launch what was recorded; what cannot be recorded is always run launch by launch.
    pub(crate) fn replay(
        &self, key: u64, operations: &mut dyn FnMut() -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        self.gpu.bind()?;
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        let graph = match recorded.get(&key) {
            None => {
                operations()?;
                recorded.insert(key, Recording::Warm);
                return Ok(());
            }
            Some(Recording::Warm) => match self.record(operations) {
                Ok(graph) => {
                    recorded.insert(key, Recording::Graph(graph));
                    graph
                }
                // Nothing of it ran. Where the device itself has failed, the launches say so again.
                Err(error) => {
                    tracing::warn!(%error, "a decode step cannot be recorded: launching it kernel by kernel");
                    recorded.insert(key, Recording::Refused);
                    return operations();
                }
            },
            Some(Recording::Graph(graph)) => *graph,
            Some(Recording::Refused) => return operations(),
        };
        // SAFETY: the graph is instantiated, and what its launches use lives as long as the caller runs it.
        self.gpu.check(unsafe { cu::cuGraphLaunch(graph, self.gpu.stream) })
    }

    fn record(&self, operations: &mut dyn FnMut() -> Result<(), BackendError>) -> Result<CUgraphExec, BackendError> {
        let gpu = &self.gpu;
        let capture = Capture::begin(gpu)?;
        let outcome = operations();
        let ended = capture.end();
        // What an operation says explains more than that the capture failed for it.
        outcome?;
        let graph = ended?;
        let mut executable: CUgraphExec = std::ptr::null_mut();
        // SAFETY: the graph was just captured; the executable keeps nothing of it.
        gpu.check(unsafe { cu::cuGraphInstantiateWithFlags(&raw mut executable, graph.0, 0) })?;
        Ok(executable)
    }
}

/// A capture of the compute stream under way. Dropping it ends it, whatever came of the operations: until then the
/// stream would refuse to be waited for.
struct Capture<'a> {
    gpu: &'a Gpu,
    is_ended: bool,
}

/// What was captured.
struct Graph(CUgraph);

impl<'a> Capture<'a> {
    fn begin(gpu: &'a Gpu) -> Result<Self, BackendError> {
        let mode = cu::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is this GPU's.
        gpu.check(unsafe { cu::cuStreamBeginCapture_v2(gpu.stream, mode) })?;
        Ok(Self { gpu, is_ended: false })
    }

    fn end(mut self) -> Result<Graph, BackendError> {
        self.end_once()
    }

    fn end_once(&mut self) -> Result<Graph, BackendError> {
        self.is_ended = true;
        let mut graph = Graph(std::ptr::null_mut());
        // SAFETY: ends what `begin` began, on the same thread; the pointer is to a local variable.
        self.gpu.check(unsafe { cu::cuStreamEndCapture(self.gpu.stream, &raw mut graph.0) })?;
        Ok(graph)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if !self.is_ended {
            // Only where an operation panicked, which says more.
            drop(self.end_once());
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: captured, and used by nobody after this.
            let _ = unsafe { cu::cuGraphDestroy(self.0) };
        }
    }
}

impl Drop for Graphs {
    fn drop(&mut self) {
        if self.gpu.synchronize().is_err() {
            return;
        }
        for recording in self.recorded.get_mut().unwrap_or_else(PoisonError::into_inner).values() {
            if let Recording::Graph(graph) = recording {
                // SAFETY: nothing runs any more.
                let _ = unsafe { cu::cuGraphExecDestroy(*graph) };
            }
        }
    }
}
