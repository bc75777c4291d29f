//! What operations are called with: as the host's backend takes it, and as CUDA's does.

use std::ops::Range;

use cogvlm_backend::shape::unsupported;
use cogvlm_backend::{
    Activation, Backend, BackendError, Batch, ExpertWeights, HeadGeometry, HostWeight, PatchGeometry, PatchWeights,
    RopeMode, SampleRequest, StagedSource,
};
use cogvlm_core::DType;
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::StepLimits;
use cogvlm_cpu::CpuBackend;
use cogvlm_cuda::CudaBackend;

/// Something of the host's backend or of CUDA's.
#[derive(Debug, Clone, Copy)]
pub enum Either<C, G> {
    /// The host's.
    Cpu(C),
    /// A GPU's.
    Cuda(G),
}

/// A weight.
pub type Weight = Either<<CpuBackend as Backend>::Weight, <CudaBackend as Backend>::Weight>;
/// A device's copy of a batch.
pub type Tables = Either<<CpuBackend as Backend>::Tables, <CudaBackend as Backend>::Tables>;
/// Staging slots.
pub type Ring = Either<<CpuBackend as Backend>::Ring, <CudaBackend as Backend>::Ring>;
/// Memory that parcels are made of.
pub type Outbox = Either<<CpuBackend as Backend>::Outbox, <CudaBackend as Backend>::Outbox>;
/// Tokens that a device chose.
pub type Sampled = Either<<CpuBackend as Backend>::Sampled, <CudaBackend as Backend>::Sampled>;
/// A point in a device's time.
pub type Moment = Either<<CpuBackend as Backend>::Moment, <CudaBackend as Backend>::Moment>;

/// A mutable array on a device.
pub struct Buffer {
    pub(crate) dtype: DType,
    pub(crate) columns: usize,
    pub(crate) on: Either<<CpuBackend as Backend>::Buffer, <CudaBackend as Backend>::Buffer>,
}

/// An argument of an operation. What is of no kind passes as it is.
pub(crate) trait Argument {
    type Cpu;
    type Cuda;
    /// For the host's backend.
    fn for_cpu(self, op: &'static str) -> Result<Self::Cpu, BackendError>;
    /// For CUDA's backend.
    fn for_cuda(self, op: &'static str) -> Result<Self::Cuda, BackendError>;
}

fn is_on_a_gpu(op: &'static str) -> BackendError {
    unsupported(op, "an argument is in a GPU's memory, the operation runs on the host")
}

fn is_on_the_host(op: &'static str) -> BackendError {
    unsupported(op, "an argument belongs to the host's backend, the operation runs on a GPU")
}

impl<C, G> Argument for Either<C, G> {
    type Cpu = C;
    type Cuda = G;

    fn for_cpu(self, op: &'static str) -> Result<C, BackendError> {
        match self {
            Self::Cpu(argument) => Ok(argument),
            Self::Cuda(_) => Err(is_on_a_gpu(op)),
        }
    }

    fn for_cuda(self, op: &'static str) -> Result<G, BackendError> {
        match self {
            Self::Cpu(_) => Err(is_on_the_host(op)),
            Self::Cuda(argument) => Ok(argument),
        }
    }
}

impl<C, G> Either<C, G> {
    fn as_ref(&self) -> Either<&C, &G> {
        match self {
            Self::Cpu(it) => Either::Cpu(it),
            Self::Cuda(it) => Either::Cuda(it),
        }
    }

    fn as_mut(&mut self) -> Either<&mut C, &mut G> {
        match self {
            Self::Cpu(it) => Either::Cpu(it),
            Self::Cuda(it) => Either::Cuda(it),
        }
    }
}

impl<'a, C, G> Argument for &'a Either<C, G> {
    type Cpu = &'a C;
    type Cuda = &'a G;

    fn for_cpu(self, op: &'static str) -> Result<&'a C, BackendError> {
        self.as_ref().for_cpu(op)
    }

    fn for_cuda(self, op: &'static str) -> Result<&'a G, BackendError> {
        self.as_ref().for_cuda(op)
    }
}

impl<'a, C, G> Argument for &'a mut Either<C, G> {
    type Cpu = &'a mut C;
    type Cuda = &'a mut G;

    fn for_cpu(self, op: &'static str) -> Result<&'a mut C, BackendError> {
        self.as_mut().for_cpu(op)
    }

    fn for_cuda(self, op: &'static str) -> Result<&'a mut G, BackendError> {
        self.as_mut().for_cuda(op)
    }
}

impl<'a> Argument for &'a Buffer {
    type Cpu = &'a <CpuBackend as Backend>::Buffer;
    type Cuda = &'a <CudaBackend as Backend>::Buffer;

    fn for_cpu(self, op: &'static str) -> Result<Self::Cpu, BackendError> {
        self.on.as_ref().for_cpu(op)
    }

    fn for_cuda(self, op: &'static str) -> Result<Self::Cuda, BackendError> {
        self.on.as_ref().for_cuda(op)
    }
}

impl<'a> Argument for &'a mut Buffer {
    type Cpu = &'a mut <CpuBackend as Backend>::Buffer;
    type Cuda = &'a mut <CudaBackend as Backend>::Buffer;

    fn for_cpu(self, op: &'static str) -> Result<Self::Cpu, BackendError> {
        self.on.as_mut().for_cpu(op)
    }

    fn for_cuda(self, op: &'static str) -> Result<Self::Cuda, BackendError> {
        self.on.as_mut().for_cuda(op)
    }
}

impl<A: Argument> Argument for Option<A> {
    type Cpu = Option<A::Cpu>;
    type Cuda = Option<A::Cuda>;

    fn for_cpu(self, op: &'static str) -> Result<Self::Cpu, BackendError> {
        self.map(|argument| argument.for_cpu(op)).transpose()
    }

    fn for_cuda(self, op: &'static str) -> Result<Self::Cuda, BackendError> {
        self.map(|argument| argument.for_cuda(op)).transpose()
    }
}

impl<'a, C, G> Argument for ExpertWeights<'a, Either<C, G>> {
    type Cpu = ExpertWeights<'a, C>;
    type Cuda = ExpertWeights<'a, G>;

    fn for_cpu(self, op: &'static str) -> Result<Self::Cpu, BackendError> {
        Ok(ExpertWeights { language: self.language.for_cpu(op)?, vision: self.vision.for_cpu(op)? })
    }

    fn for_cuda(self, op: &'static str) -> Result<Self::Cuda, BackendError> {
        Ok(ExpertWeights { language: self.language.for_cuda(op)?, vision: self.vision.for_cuda(op)? })
    }
}

impl<'a, C, G> Argument for PatchWeights<'a, Either<C, G>> {
    type Cpu = PatchWeights<'a, C>;
    type Cuda = PatchWeights<'a, G>;

    fn for_cpu(self, op: &'static str) -> Result<Self::Cpu, BackendError> {
        let Self { projection, bias, class, position } = self;
        let (projection, bias) = (projection.for_cpu(op)?, bias.for_cpu(op)?);
        Ok(PatchWeights { projection, bias, class: class.for_cpu(op)?, position: position.for_cpu(op)? })
    }

    fn for_cuda(self, op: &'static str) -> Result<Self::Cuda, BackendError> {
        let Self { projection, bias, class, position } = self;
        let (projection, bias) = (projection.for_cuda(op)?, bias.for_cuda(op)?);
        Ok(PatchWeights { projection, bias, class: class.for_cuda(op)?, position: position.for_cuda(op)? })
    }
}

impl<C, G> Argument for Vec<StagedSource<Either<C, G>>> {
    type Cpu = Vec<StagedSource<C>>;
    type Cuda = Vec<StagedSource<G>>;

    fn for_cpu(self, op: &'static str) -> Result<Self::Cpu, BackendError> {
        let source = |source| match source {
            StagedSource::Host(weight) => Ok(StagedSource::Host(weight)),
            StagedSource::Peer(Either::Cpu(weight)) => Ok(StagedSource::Peer(weight)),
            StagedSource::Peer(Either::Cuda(_)) => {
                Err(unsupported(op, "the host cannot stream a weight from a GPU: let it rest in host memory"))
            }
        };
        self.into_iter().map(source).collect()
    }

    fn for_cuda(self, op: &'static str) -> Result<Self::Cuda, BackendError> {
        let source = |source| match source {
            StagedSource::Host(weight) => Ok(StagedSource::Host(weight)),
            StagedSource::Peer(Either::Cuda(weight)) => Ok(StagedSource::Peer(weight)),
            StagedSource::Peer(Either::Cpu(_)) => Err(unsupported(
                op,
                "a GPU streams weights from host memory or from other GPUs, not from the arena of the host's backend",
            )),
        };
        self.into_iter().map(source).collect()
    }
}

/// Arguments of no kind.
macro_rules! plain {
    ($($type:ty),* $(,)?) => {
        $(impl Argument for $type {
            type Cpu = Self;
            type Cuda = Self;

            fn for_cpu(self, _op: &'static str) -> Result<Self, BackendError> {
                Ok(self)
            }

            fn for_cuda(self, _op: &'static str) -> Result<Self, BackendError> {
                Ok(self)
            }
        })*
    };
}

plain!(
    usize,
    u64,
    f32,
    &'static str,
    DType,
    [usize; 2],
    Range<usize>,
    &[f32],
    &[u32],
    &HostWeight,
    &StepLimits,
    &Batch,
    &[ExpertRange],
    &[SampleRequest<'_>],
    &mut dyn FnMut() -> Result<(), BackendError>,
    Activation,
    HeadGeometry,
    PatchGeometry,
    RopeMode,
);
