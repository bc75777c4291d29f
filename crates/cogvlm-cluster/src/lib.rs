//! Several processes of one run: one for each host, or for each GPU.
//!
//! [`membership()`] says who this process is, from what its launcher set; [`join`] meets the others at process 0;
//! [`Control`] carries messages between process 0 and the others and notices when one of them dies or stalls; [`Wire`]
//! carries rows between any two of them, and [`nccl`] does so between GPUs. When one process ends before its time,
//! every call of every other one returns within seconds with one [`Failure`] that names it.
//!
//! Nothing here is authenticated or encrypted: all of it belongs on a network that is trusted.
#![deny(unsafe_code)]

mod addresses;
pub mod control;
pub mod data;
mod error;
#[expect(unsafe_code, reason = "declares a function of the C library")]
mod exit;
mod frame;
mod link;
pub mod membership;
#[expect(unsafe_code, reason = "calls functions of a C library through pointers")]
pub mod nccl;
pub mod rendezvous;
mod watch;

pub use control::{Control, Message};
pub use data::{TcpWire, Wire};
pub use error::{Cause, ClusterError, ConfigDifference, Failure};
pub use exit::end_process;
pub use membership::{Explicit, Launcher, Membership, MembershipError, membership};
pub use rendezvous::{Cluster, Config, Member, Options, join};
pub use watch::{Abort, Watch};
