//! What carries rows between ranks of different processes: a channel from device to device where both ends can have one,
//! else host memory and TCP.
//!
//! The two processes of a pair of ranks settle it between them before the first step: the sender's invites, the receiver's
//! accepts, both open their end, and each tells how that went. All processes take their pairs in the same order, so that
//! nobody waits for one that waits for another.

use std::collections::BTreeMap;
use std::sync::Arc;

use cogvlm_backend::{Backend, DeviceChannel};
use cogvlm_cluster::{ClusterError, Watch};
use cogvlm_core::Device;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::ranks::{Doors, Routes};
use crate::remote::Shared;

/// What may carry rows between GPUs of different processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Transport {
    /// Channels where there can be one, else TCP.
    #[default]
    Auto,
    /// Channels, or the run does not begin.
    Channels,
    /// TCP alone.
    Tcp,
}

/// Opens channels of one kind between devices of this process and those of others. Reasons are told to whoever runs this.
pub trait OpenChannels<B: Backend>: Send + Sync {
    /// What carries rows, as it is called where runs are described.
    fn name(&self) -> String;

    /// What the receiving end needs to know of the sending one.
    ///
    /// # Errors
    /// Why `backend` can send over no channel.
    fn invite(&self, backend: &B) -> Result<Vec<u8>, String>;

    /// Whether the receiving end can follow an invitation.
    ///
    /// # Errors
    /// Why `backend` can receive over no channel, or not from that one.
    fn accept(&self, backend: &B, invitation: &[u8]) -> Result<(), String>;

    /// This process's end, `is_sender` or not. Both ends are opened at the same time, and wait for each other. It is
    /// aborted when `watch` learns of a failure.
    ///
    /// # Errors
    /// Why there is no channel.
    fn open(
        &self, backend: &B, is_sender: bool, invitation: &[u8], watch: &Arc<Watch>,
    ) -> Result<Arc<dyn DeviceChannel<B>>, String>;
}

/// How rows get from one rank to another one of a different process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    /// The rank that sends.
    pub from: Device,
    /// The rank that receives.
    pub to: Device,
    /// What carries them.
    pub carrier: Carrier,
}

/// What carries rows between two processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Carrier {
    /// A channel from device to device: what it is called.
    Channel(String),
    /// Host memory and TCP: why there is no channel.
    Tcp(String),
}

/// Open channels, by the indices of the ranks that send and receive. In this order they are closed: each end may wait for
/// the other, which must not be waiting at another one meanwhile.
pub(crate) type Channels<B> = BTreeMap<(usize, usize), Arc<dyn DeviceChannel<B>>>;

/// A [`Way`], by the indices of its ranks.
pub(crate) type KnownWay = (usize, usize, Carrier);

/// What settles the ways of this process.
pub(crate) struct Settling<'a, B: Backend> {
    pub(crate) shared: &'a Shared,
    pub(crate) doors: &'a Doors<B>,
    pub(crate) transport: Transport,
    pub(crate) opener: Option<&'a dyn OpenChannels<B>>,
}

impl<B: Backend> Settling<'_, B> {
    /// The channels of this process, and the ways that lead to it; at process 0 all ways of the run.
    ///
    /// # Errors
    /// Where a process fails, or there is no channel and there has to be.
    pub(crate) fn settle_all(&self) -> Result<(Channels<B>, Vec<Way>), ClusterError> {
        let Self { shared, doors, .. } = self;
        let (here, size) = (shared.rank(), shared.size());
        let (mut channels, mut ways) = (Channels::new(), Vec::<KnownWay>::new());
        let crossings = crossings(&doors.routes, &doors.devices);
        for &(from, to) in &crossings {
            let [sender, receiver] = [from, to].map(|rank| doors.devices[rank]);
            if sender.process() != here && receiver.process() != here {
                continue;
            }
            let carrier = match self.settle(from, to)? {
                Ok((name, channel)) => {
                    channels.insert((from, to), channel);
                    Carrier::Channel(name)
                }
                Err(reason) => self.without_channel(sender, receiver, reason)?,
            };
            tracing::info!(from = %sender, to = %receiver, ?carrier, "rows to another process");
            if receiver.process() == here {
                ways.push((from, to, carrier));
            }
        }
        if here > 0 {
            shared.report_ways(&ways)?;
        } else {
            for process in 1..size {
                ways.extend(shared.await_ways(process)?);
            }
        }
        ways.sort_by_key(|(from, to, _)| crossings.iter().position(|pair| *pair == (*from, *to)));
        let device = |rank: usize| doors.devices.get(rank).copied();
        let known = |(from, to, carrier)| Some(Way { from: device(from)?, to: device(to)?, carrier });
        Ok((channels, ways.into_iter().filter_map(known).collect()))
    }

    /// TCP, unless there has to be a channel.
    fn without_channel(&self, from: Device, to: Device, reason: String) -> Result<Carrier, ClusterError> {
        let is_between_gpus = [from, to].iter().all(|device| device.ordinal().is_some());
        match self.transport {
            Transport::Channels if is_between_gpus => {
                let message =
                    format!("rows cannot go from `{from}` to `{to}` without passing through the host: {reason}");
                return Err(self.shared.fail(&message));
            }
            // Whoever has GPUs expects more.
            Transport::Auto if is_between_gpus && self.opener.is_some() => {
                tracing::warn!("rows go from `{from}` to `{to}` through host memory and TCP: {reason}");
            }
            _ => {}
        }
        Ok(Carrier::Tcp(reason))
    }

    /// The channel of two ranks, one of which is this process's, if both ends can have it; else why not.
    #[expect(clippy::type_complexity, reason = "a channel and its name, or a reason")]
    fn settle(
        &self, from: usize, to: usize,
    ) -> Result<Result<(String, Arc<dyn DeviceChannel<B>>), String>, ClusterError> {
        let Self { shared, doors, transport, opener } = self;
        // Both ends know this much of each other.
        if *transport == Transport::Tcp {
            return Ok(Err("that is what was asked for".to_owned()));
        }
        if let Some(host) = [from, to].map(|rank| doors.devices[rank]).iter().find(|device| device.ordinal().is_none())
        {
            return Ok(Err(format!("`{host}` is no GPU")));
        }
        let is_sender = doors.devices[from].process() == shared.rank();
        let (rank, peer) = if is_sender { (from, to) } else { (to, from) };
        let peer = doors.devices[peer].process();
        let backend = doors.backends[rank].as_deref().expect("ranks of this process are loaded");
        let opener = opener.ok_or_else(|| format!("`{}` is a virtual rank, not a GPU", doors.devices[rank]));
        let agreed: Result<Vec<u8>, String> = if is_sender {
            let invitation = opener.clone().and_then(|opener| opener.invite(backend));
            shared.tell(peer, &invitation)?;
            let answer: Result<(), String> = shared.hear(peer)?;
            invitation.and_then(|invitation| answer.map(|()| invitation))
        } else {
            let invitation: Result<Vec<u8>, String> = shared.hear(peer)?;
            let accepted = invitation.and_then(|invitation| {
                opener.clone().and_then(|opener| opener.accept(backend, &invitation)).map(|()| invitation)
            });
            shared.tell(peer, &accepted.as_ref().map(|_| ()))?;
            accepted
        };
        let (opener, invitation) = match (opener, agreed) {
            (Ok(opener), Ok(invitation)) => (opener, invitation),
            (Err(reason), _) | (_, Err(reason)) => return Ok(Err(reason)),
        };
        let opened = opener.open(backend, is_sender, &invitation, shared.watch());
        shared.tell(peer, &opened.as_ref().map(|_| ()))?;
        let other: Result<(), String> = shared.hear(peer)?;
        Ok(match (opened, other) {
            (Ok(channel), Ok(())) => Ok((opener.name(), channel)),
            (Ok(channel), Err(reason)) => {
                channel.close();
                Err(reason)
            }
            (Err(reason), _) => Err(reason),
        })
    }
}

/// Pairs of ranks of different processes between which rows cross, in the order of the stages.
fn crossings(routes: &Routes, devices: &[Device]) -> Vec<(usize, usize)> {
    let mut pairs = Vec::new();
    for (from, to) in routes.all().flat_map(|routes| routes.windows(2)).map(|pair| (pair[0].rank, pair[1].rank)) {
        if devices[from].process() != devices[to].process() && !pairs.contains(&(from, to)) {
            pairs.push((from, to));
        }
    }
    pairs
}

impl Shared {
    /// Sends a message to process `peer`, which awaits it by [`hear`](Self::hear).
    fn tell<T: Serialize>(&self, peer: usize, message: &T) -> Result<(), ClusterError> {
        let bytes = postcard::to_stdvec(message).map_err(|error| self.fail(&format!("a message: {error}")))?;
        self.send_sized(peer, &bytes, bytes.len())
    }

    fn hear<T: DeserializeOwned>(&self, peer: usize) -> Result<T, ClusterError> {
        let (bytes, _) = self.recv_sized(peer)?;
        postcard::from_bytes(&bytes).map_err(|error| self.fail(&format!("a message from process {peer}: {error}")))
    }
}
