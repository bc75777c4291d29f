//! Memory through which GPUs that compute one layer together exchange their sums, and how they are brought together.

use std::sync::Arc;

use cogvlm_backend::shape::unsupported;
use cogvlm_backend::{Backend, BackendError};
use cogvlm_core::DType;
use cogvlm_core::sharing::NUM_EXCHANGES;
use cudarc::driver::sys::CUdeviceptr;

use crate::backend::CudaBackend;
use crate::buffer::CudaBuffer;
use crate::device::Gpu;
use crate::host_copy::Pinned;
use crate::memory::Allocation;
use crate::ops::{add_partials, product_rows};

/// As in kernels/include/exchange.cuh.
pub(crate) const MAX_MEMBERS: usize = 8;
/// Most blocks of a launch: as many as keep a link busy.
pub(crate) const MAX_BLOCKS: usize = 256;
/// The same where members share a GPU: blocks that wait must leave room for those that they wait for.
const MAX_BLOCKS_OF_SHARED_GPU: usize = 16;
/// Words of a member beside its sums: flags of every other member for every block, an epoch for every block, whether
/// somebody did not come, and the number of the next exchange in each slot.
const NUM_WORDS: usize = MAX_BLOCKS * MAX_MEMBERS + MAX_BLOCKS + 1 + NUM_EXCHANGES;
const EPOCHS: usize = MAX_BLOCKS * MAX_MEMBERS;
const BROKEN: usize = EPOCHS + MAX_BLOCKS;
const NUMBERS: usize = BROKEN + 1;
/// How long a member waits for another.
pub(crate) const PATIENCE_S: u64 = 4;

/// One member's side of what GPUs exchange their sums through.
pub struct CudaExchange {
    pub(crate) member: usize,
    /// Of all members, in their order: the memory of each lives as long as any of them may read it.
    sides: Arc<Vec<Side>>,
    pub(crate) max_blocks: usize,
    /// Whether the sums of a slot were sent to the others as they were computed.
    is_pushed: [bool; NUM_EXCHANGES],
}

/// Where the sums of few rows go as they are computed (`Push` in kernels/include/exchange.cuh), passed by value.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Push {
    pub(crate) inboxes: [CUdeviceptr; MAX_MEMBERS - 1],
    pub(crate) exchange: CUdeviceptr,
    pub(crate) num_others: u32,
}

/// What a member has.
struct Side {
    sums: [CudaBuffer; NUM_EXCHANGES],
    words: Allocation,
    /// Sums of few rows from every member, each with a number: `[NUM_EXCHANGES][members][inbox_words]`.
    inbox: Allocation,
    inbox_words: usize,
    /// 1 + the member for which this one waited in vain.
    failure: Pinned,
    gpu: Arc<Gpu>,
}

/// Bytes of a member's inbox.
fn inbox_bytes(inbox_words: usize, num_members: usize) -> usize {
    NUM_EXCHANGES * num_members * inbox_words * size_of::<u64>()
}

impl Side {
    fn new(member: &CudaBackend, shape: [usize; 2], num_members: usize) -> Result<Self, BackendError> {
        let sums = || member.alloc("sums of the group", DType::F32, shape);
        let gpu = Arc::clone(&member.gpu);
        let words = Allocation::new(&gpu, "flags of the group", NUM_WORDS * size_of::<u32>())?;
        let inbox_words = shape[0].min(product_rows::MAX_ROWS) * shape[1];
        let inbox = Allocation::new(&gpu, "sums from the group", inbox_bytes(inbox_words, num_members))?;
        let mut failure = Pinned::new(&gpu, size_of::<u32>())?;
        failure.slice_mut().fill(0);
        let side = Self { sums: [sums()?, sums()?], words, inbox, inbox_words, failure, gpu };
        // SAFETY: the allocation has this length.
        unsafe { side.gpu.zero(side.words.address, NUM_WORDS * size_of::<u32>()) }?;
        side.begin_to_count(num_members)?;
        Ok(side)
    }

    /// Forgets what came, and begins to count at 1: 0 is what nobody has sent.
    fn begin_to_count(&self, num_members: usize) -> Result<(), BackendError> {
        // SAFETY: the allocation has this length, and the words are part of theirs.
        unsafe {
            self.gpu.zero(self.inbox.address, inbox_bytes(self.inbox_words, num_members))?;
            self.gpu.fill_words(self.word(NUMBERS), 1, NUM_EXCHANGES)
        }
    }

    fn word(&self, index: usize) -> CUdeviceptr {
        self.words.address + (index * size_of::<u32>()) as CUdeviceptr
    }

    /// Address of what `member` tells this one in a slot.
    fn inbox(&self, slot: usize, member: usize, num_members: usize) -> CUdeviceptr {
        let words = (slot * num_members + member) * self.inbox_words;
        self.inbox.address + (words * size_of::<u64>()) as CUdeviceptr
    }
}

impl CudaExchange {
    /// Brings `members` together. See [`Shardable::join`](cogvlm_backend::Shardable::join).
    pub(crate) fn join(members: &[&CudaBackend], shape: [usize; 2]) -> Result<Vec<Self>, BackendError> {
        const OP: &str = "join";
        if members.len() > MAX_MEMBERS {
            let reason = format!("{} GPUs, but at most {MAX_MEMBERS} compute together", members.len());
            return Err(unsupported(OP, reason));
        }
        let mut is_shared = false;
        for (index, member) in members.iter().enumerate() {
            for (other_index, other) in members.iter().enumerate().filter(|(other, _)| *other != index) {
                let (gpu, peer) = (&member.gpu, &other.gpu);
                let is_alike = gpu.info.name == peer.info.name
                    && gpu.info.num_multiprocessors == peer.info.num_multiprocessors
                    && (member.activations, member.path) == (other.activations, other.path);
                if !is_alike {
                    let (name, peer_name) = (&gpu.info.name, &peer.info.name);
                    let reason = format!(
                        "GPUs that compute together are of one kind: `{}` is a {name}, `{}` a {peer_name}",
                        gpu.device, peer.device
                    );
                    return Err(unsupported(OP, reason));
                }
                if !gpu.reaches(peer) {
                    let reason = format!(
                        "`{}` cannot read the memory of `{}`, as GPUs that compute together must (NVLink, or PCIe with \
                         peer access); plan without `--tensor-parallel`",
                        gpu.device, peer.device
                    );
                    return Err(unsupported(OP, reason));
                }
                is_shared |= index < other_index && gpu.info.ordinal == peer.info.ordinal;
            }
        }
        if is_shared {
            // A kernel that is launched early would keep the place that another member's needs.
            members.iter().for_each(|member| member.gpu.forbid_overlap());
        }
        let max_blocks = if is_shared { MAX_BLOCKS_OF_SHARED_GPU } else { MAX_BLOCKS };
        let sides = members.iter().map(|member| Side::new(member, shape, members.len()));
        let sides = Arc::new(sides.collect::<Result<Vec<_>, _>>()?);
        let is_pushed = [false; NUM_EXCHANGES];
        let side = |member| Self { member, sides: Arc::clone(&sides), max_blocks, is_pushed };
        let exchanges: Vec<Self> = (0..members.len()).map(side).collect();
        // Loaded now: a driver that loads a kernel later may wait for what is running, and what is running may wait for
        // the kernel. And nobody is signalled before flags are zero.
        for (member, exchange) in members.iter().zip(&exchanges) {
            add_partials::load(member, exchange)?;
        }
        members.iter().try_for_each(|member| member.gpu.synchronize())?;
        Ok(exchanges)
    }

    pub(crate) fn num_members(&self) -> usize {
        self.sides.len()
    }

    /// The sums of this member in a slot.
    pub(crate) fn sums(&self, slot: usize) -> &CudaBuffer {
        &self.side().sums[slot]
    }

    /// Addresses of the sums of all members in a slot.
    pub(crate) fn all_sums(&self, slot: usize) -> [CUdeviceptr; MAX_MEMBERS] {
        self.of_all(|side| side.sums[slot].address())
    }

    /// Addresses of the flags of all members: `[MAX_BLOCKS][MAX_MEMBERS]`, by whom they are written.
    pub(crate) fn all_flags(&self) -> [CUdeviceptr; MAX_MEMBERS] {
        self.of_all(|side| side.words.address)
    }

    /// Address of this member's epochs: `[MAX_BLOCKS]`.
    pub(crate) fn epochs(&self) -> CUdeviceptr {
        self.side().word(EPOCHS)
    }

    /// Address of whether somebody did not come.
    pub(crate) fn broken(&self) -> CUdeviceptr {
        self.side().word(BROKEN)
    }

    /// Address of the number of this member's next exchange in a slot.
    pub(crate) fn number(&self, slot: usize) -> CUdeviceptr {
        self.side().word(NUMBERS + slot)
    }

    /// Addresses of what every member tells this one in a slot.
    pub(crate) fn inboxes(&self, slot: usize) -> [CUdeviceptr; MAX_MEMBERS] {
        std::array::from_fn(|member| match member < self.num_members() {
            true => self.side().inbox(slot, member, self.num_members()),
            false => 0,
        })
    }

    /// Where a product sends its sums in a slot.
    pub(crate) fn push(&self, slot: usize) -> Push {
        let others = self.sides.iter().enumerate().filter(|(other, _)| *other != self.member);
        let mut inboxes = [0; MAX_MEMBERS - 1];
        for (inbox, (_, other)) in inboxes.iter_mut().zip(others) {
            *inbox = other.inbox(slot, self.member, self.num_members());
        }
        Push { inboxes, exchange: self.number(slot), num_others: self.num_members() as u32 - 1 }
    }

    /// Says how the sums of a slot came about.
    pub(crate) fn set_pushed(&mut self, slot: usize, is_pushed: bool) {
        self.is_pushed[slot] = is_pushed;
    }

    /// Whether the sums of a slot were sent to the others, as is to be known once.
    pub(crate) fn take_pushed(&mut self, slot: usize) -> bool {
        std::mem::take(&mut self.is_pushed[slot])
    }

    /// Forgets what was sent. To be called of all members while nothing runs on any, and before anything does.
    pub(crate) fn reset(&mut self) -> Result<(), BackendError> {
        self.is_pushed = [false; NUM_EXCHANGES];
        self.side().begin_to_count(self.num_members())?;
        self.side().gpu.synchronize()
    }

    /// Address of who did not come: memory of the host, which this process's devices reach at the same address.
    pub(crate) fn failure(&self) -> CUdeviceptr {
        self.side().failure.address.addr() as CUdeviceptr
    }

    fn side(&self) -> &Side {
        &self.sides[self.member]
    }

    fn of_all(&self, address: impl Fn(&Side) -> CUdeviceptr) -> [CUdeviceptr; MAX_MEMBERS] {
        std::array::from_fn(|member| self.sides.get(member).map_or(0, &address))
    }

    /// Whether everybody came to what this member's stream is past.
    pub(crate) fn check(&self) -> Result<(), BackendError> {
        let Side { failure, gpu, .. } = self.side();
        // SAFETY: the word is there as long as this; the device may write it meanwhile, which a volatile read allows
        // for.
        let waited_for = unsafe { failure.address.cast::<u32>().read_volatile() };
        let Some(peer) = (waited_for as usize).checked_sub(1).and_then(|peer| self.sides.get(peer)) else {
            return Ok(());
        };
        let reason = format!(
            "waited {PATIENCE_S} s in vain for device {} ({}), with which it computes every layer: load the model \
             again",
            peer.gpu.device, peer.gpu.info.name
        );
        Err(gpu.error(reason))
    }
}

impl Drop for CudaExchange {
    fn drop(&mut self) {
        // What this member still reads of the others is freed after the last of these.
        drop(self.side().gpu.synchronize());
    }
}
