//! Recorded sequences of launches (CUDA graphs).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
        Self::replay_together(&[self], key, operations)
    }

    /// [`replay`](Self::replay), of operations that launch on several devices: a graph for each of `all`.
    pub(crate) fn replay_together(
        all: &[&Self], key: u64, operations: &mut dyn FnMut() -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        let mut all_recorded: Vec<_> = all.iter().map(|graphs| graphs.lock()).collect();
        // All of them are always of one kind: those of the first say which.
        match all_recorded.first().and_then(|recorded| recorded.get(&key)) {
            None => {
                operations()?;
                for recorded in &mut all_recorded {
                    recorded.insert(key, Recording::Warm);
                }
                return Ok(());
            }
            Some(Recording::Warm) => match Self::record(all, operations) {
                Ok(graphs) => {
                    for (recorded, graph) in all_recorded.iter_mut().zip(graphs) {
                        recorded.insert(key, Recording::Graph(graph));
                    }
                }
                // Nothing of it ran. Where the device itself has failed, the launches say so again.
                Err(error) => {
                    tracing::warn!(%error, "a decode step cannot be recorded: launching it kernel by kernel");
                    for recorded in &mut all_recorded {
                        recorded.insert(key, Recording::Refused);
                    }
                    return operations();
                }
            },
            Some(Recording::Graph(_)) => {}
            Some(Recording::Refused) => return operations(),
        }
        for (graphs, recorded) in all.iter().zip(&all_recorded) {
            if let Some(Recording::Graph(graph)) = recorded.get(&key) {
                graphs.gpu.bind()?;
                // SAFETY: the graph is instantiated, and what its launches use lives as long as the caller runs it.
                graphs.gpu.check(unsafe { cu::cuGraphLaunch(*graph, graphs.gpu.stream) })?;
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Recording>> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(
        all: &[&Self], operations: &mut dyn FnMut() -> Result<(), BackendError>,
    ) -> Result<Vec<CUgraphExec>, BackendError> {
        let captures: Vec<Capture<'_>> =
            all.iter().map(|graphs| Capture::begin(&graphs.gpu)).collect::<Result<_, _>>()?;
        let outcome = operations();
        // Every capture is ended, whatever becomes of the others.
        let ended: Vec<_> = captures.into_iter().map(Capture::end).collect();
        // What an operation says explains more than that the capture failed for it.
        outcome?;
        let mut executables = Vec::new();
        for (graphs, ended) in all.iter().zip(ended) {
            let (gpu, graph) = (&graphs.gpu, ended?);
            let mut executable: CUgraphExec = std::ptr::null_mut();
            gpu.bind()?;
            // SAFETY: the graph was just captured; the executable keeps nothing of it. Where another one fails it is
            // never run, and freed with its context.
            gpu.check(unsafe { cu::cuGraphInstantiateWithFlags(&raw mut executable, graph.0, 0) })?;
            executables.push(executable);
        }
        Ok(executables)
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
        gpu.bind()?;
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
        self.gpu.bind()?;
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
