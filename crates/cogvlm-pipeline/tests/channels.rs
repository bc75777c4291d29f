//! Rows between processes: by channels where both ends have them, else by TCP, with the same bits; and an end for all when
//! a channel breaks. The processes are threads of this one, and their channels queues in its memory.

mod common;

use std::collections::HashMap;
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cogvlm_backend::{BackendError, DeviceChannel, HostRows, RopeMode, RowsLayout};
use cogvlm_cluster::membership::Variables;
use cogvlm_cluster::{Config, Explicit, Options, Watch, join, membership};
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device};
use cogvlm_cpu::{CpuBackend, CpuParcel, Threads};
use cogvlm_pipeline::{
    Carrier, Engine, LoadError, OpenChannels, Processes, RankError, Ranks, Request, Transport, load_plan,
};
use cogvlm_plan::plan::{DevicePlan, Plan, Policy};

use common::{MIB, answers, engine, image, plan_for, plan_request, request, source};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Both ends of a queue, by the invitation to it.
type Queues = Mutex<HashMap<Vec<u8>, (Option<Sender<HostRows>>, Option<Receiver<HostRows>>)>>;

/// Where things go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Nowhere,
    Invite,
    Accept,
    /// At the sending end, or at the receiving one.
    Open(bool),
}

/// All channels of a run.
struct Fabric {
    queues: Queues,
    fault: Fault,
    num_invited: AtomicUsize,
    num_sent: AtomicUsize,
    num_closed: AtomicUsize,
    /// Ends of each channel that are open, and of these how many are being closed or are closed.
    ends: Mutex<HashMap<Vec<u8>, [usize; 2]>>,
    end_closes: Condvar,
    /// Ends that waited for the other one in vain.
    num_stuck: AtomicUsize,
    /// The channels are broken from now on.
    is_broken: AtomicBool,
}

/// One process's view of them.
struct Opener(Arc<Fabric>);

enum End {
    Sender(Mutex<Sender<HostRows>>),
    Receiver(Mutex<Receiver<HostRows>>),
}

struct QueueChannel {
    invitation: Vec<u8>,
    end: End,
    fabric: Arc<Fabric>,
    is_closed: AtomicBool,
}

fn error(reason: &str) -> BackendError {
    BackendError::Device { device: Device::Gpu(0), reason: reason.to_owned() }
}

impl Fabric {
    fn new(fault: Fault) -> Arc<Self> {
        Arc::new(Self {
            queues: Mutex::default(),
            fault,
            num_invited: AtomicUsize::new(0),
            num_sent: AtomicUsize::new(0),
            num_closed: AtomicUsize::new(0),
            ends: Mutex::default(),
            end_closes: Condvar::new(),
            num_stuck: AtomicUsize::new(0),
            is_broken: AtomicBool::new(false),
        })
    }

    fn fails(&self, fault: Fault) -> Result<(), String> {
        if self.fault == fault { Err(format!("no luck at {fault:?}")) } else { Ok(()) }
    }
}

impl OpenChannels<CpuBackend> for Opener {
    fn name(&self) -> String {
        "queues".to_owned()
    }

    fn invite(&self, _backend: &CpuBackend) -> Result<Vec<u8>, String> {
        self.0.fails(Fault::Invite)?;
        let invitation = self.0.num_invited.fetch_add(1, Ordering::SeqCst).to_le_bytes().to_vec();
        let (sender, receiver) = channel();
        self.0.queues.lock().unwrap().insert(invitation.clone(), (Some(sender), Some(receiver)));
        Ok(invitation)
    }

    fn accept(&self, _backend: &CpuBackend, invitation: &[u8]) -> Result<(), String> {
        assert!(self.0.queues.lock().unwrap().contains_key(invitation), "the sender's invitation arrives");
        self.0.fails(Fault::Accept)
    }

    fn open(
        &self, _backend: &CpuBackend, is_sender: bool, invitation: &[u8], _watch: &Arc<Watch>,
    ) -> Result<Arc<dyn DeviceChannel<CpuBackend>>, String> {
        self.0.fails(Fault::Open(is_sender))?;
        let mut queues = self.0.queues.lock().unwrap();
        let (sender, receiver) = queues.get_mut(invitation).expect("the invitation is known");
        let end = match is_sender {
            true => End::Sender(Mutex::new(sender.take().expect("one end sends"))),
            false => End::Receiver(Mutex::new(receiver.take().expect("one end receives"))),
        };
        self.0.ends.lock().unwrap().entry(invitation.to_vec()).or_default()[0] += 1;
        let (invitation, is_closed) = (invitation.to_vec(), AtomicBool::new(false));
        Ok(Arc::new(QueueChannel { invitation, end, fabric: Arc::clone(&self.0), is_closed }))
    }
}

impl DeviceChannel<CpuBackend> for QueueChannel {
    fn send(&self, parcel: CpuParcel) -> Result<RowsLayout, BackendError> {
        let End::Sender(sender) = &self.end else { panic!("the receiving end sends") };
        let rows = parcel.into_host_rows();
        let HostRows { dtype, columns, bytes } = &rows;
        let num_rows = bytes.len() / (columns * dtype.size_bytes());
        let layout = RowsLayout { dtype: *dtype, rows: num_rows, columns: *columns };
        self.fabric.num_sent.fetch_add(1, Ordering::SeqCst);
        sender.lock().unwrap().send(rows).map_err(|_| error("nobody receives"))?;
        Ok(layout)
    }

    fn receive(&self, layout: RowsLayout) -> Result<CpuParcel, BackendError> {
        let End::Receiver(receiver) = &self.end else { panic!("the sending end receives") };
        let rows = receiver.lock().unwrap().try_recv().expect("rows are sent before they are told of");
        assert_eq!((rows.dtype, rows.columns), (layout.dtype, layout.columns));
        assert_eq!(rows.bytes.len(), layout.num_bytes());
        CpuParcel::of_host_rows(rows)
    }

    fn check(&self) -> Result<(), BackendError> {
        if self.fabric.is_broken.load(Ordering::SeqCst) { Err(error("the queue is on fire")) } else { Ok(()) }
    }

    /// Waits for the other end to be closed, as NCCL does.
    fn close(&self) {
        if self.is_closed.swap(true, Ordering::SeqCst) {
            return;
        }
        self.fabric.num_closed.fetch_add(1, Ordering::SeqCst);
        let mut ends = self.fabric.ends.lock().unwrap();
        ends.get_mut(&self.invitation).expect("it was opened")[1] += 1;
        self.fabric.end_closes.notify_all();
        let is_alone = |ends: &mut HashMap<Vec<u8>, [usize; 2]>| {
            let [opened, closing] = ends[&self.invitation];
            closing < opened && !self.fabric.is_broken.load(Ordering::SeqCst)
        };
        let waited = self.fabric.end_closes.wait_timeout_while(ends, Duration::from_secs(2), is_alone).unwrap().1;
        self.fabric.num_stuck.fetch_add(usize::from(waited.timed_out()), Ordering::SeqCst);
    }
}

/// Stages in three processes, the first and the last in process 0.
fn plan_of_three() -> Plan {
    let device = |name: &str| Device::parse(name).unwrap();
    let budgets = [(device("2/0"), 14 * MIB), (device("0/0"), 14 * MIB), (device("1/0"), 14 * MIB)];
    let request = plan_request(&source(), &budgets, Policy::Auto, StepLimits::new(64, 3), DType::Bf16);
    // Back and forth, so that there are two channels between the same processes.
    let map = r#"{
        "model.vision": 0, "model.embed_tokens": 0, "model.layers.0": "1/0", "model.layers.1": 0,
        "model.layers.2": "1/0", "model.layers.3": "2/0", "model.norm": "1/0", "lm_head": "1/0"
    }"#;
    let plan = Plan::from_hugging_face(map, &request).unwrap_or_else(|error| panic!("{error}"));
    let stages: Vec<String> = plan.stages.iter().map(|stage| stage.device.to_string()).collect();
    assert_eq!(stages, ["0", "1/0", "0", "1/0", "2/0", "1/0"]);
    plan
}

/// Pairs of ranks between which rows cross in [`plan_of_three`].
const NUM_CROSSINGS: usize = 4;

fn requests() -> Vec<Request> {
    let source = source();
    vec![
        request(&source, &[1000, 2000, 3000], Some(image(&source, 1)), 5),
        request(&source, &[17, 18, 19, 20, 21, 22, 23, 24, 25], None, 7),
        request(&source, &[], Some(image(&source, 2)), 3),
    ]
}

/// Loads process `rank` of three.
fn load(
    plan: &Plan, rank: usize, address: &str, transport: Transport, opener: Option<Opener>,
) -> Result<Ranks<CpuBackend>, LoadError> {
    let source = source();
    let explicit = Explicit { rank: Some(rank), size: Some(3), coordinator: Some(address.to_owned()) };
    let place = membership(&explicit, &Variables::new()).unwrap();
    let options = Options { timeout: PATIENCE, ..Options::default() };
    let cluster = join(&place, &options, &Config::new(), &|_| ()).unwrap();
    let opener = opener.map(|opener| Box::new(opener) as Box<dyn OpenChannels<CpuBackend>>);
    let processes = Processes::connect(cluster).unwrap().with_channels(transport, opener);
    let threads = Arc::new(Threads::new(1).unwrap());
    let make = |device: &DevicePlan| {
        let capacity = device.used_bytes() - device.reserved_bytes;
        CpuBackend::new(device.device, capacity, DType::Bf16, Arc::clone(&threads))
    };
    load_plan(plan, source.spec(), &source, RopeMode::Float32, &make, &|_, _| (), Some(processes))
}

/// How process 1 or 2 ended.
type Served = Result<(), String>;

struct Run {
    zero: Result<Ranks<CpuBackend>, LoadError>,
    others: Vec<JoinHandle<Served>>,
}

impl Run {
    /// Starts all three; those of `with_opener` can have channels.
    fn start(plan: &Plan, fabric: &Arc<Fabric>, transport: Transport, with_opener: [bool; 3]) -> Self {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let opener = |rank: usize| with_opener[rank].then(|| Opener(Arc::clone(fabric)));
        let other = |rank: usize| {
            let (plan, address, opener) = (plan.clone(), address.clone(), opener(rank));
            std::thread::spawn(move || {
                let ranks = load(&plan, rank, &address, transport, opener).map_err(|error| error.to_string())?;
                ranks.serve().map_err(|error| error.to_string())
            })
        };
        let others = vec![other(1), other(2)];
        Self { zero: load(plan, 0, &address, transport, opener(0)), others }
    }

    fn end(others: Vec<JoinHandle<Served>>) -> Vec<Served> {
        let start = Instant::now();
        while others.iter().any(|other| !other.is_finished()) {
            assert!(start.elapsed() < PATIENCE, "a process does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        others.into_iter().map(|other| other.join().unwrap()).collect()
    }
}

#[test]
fn rows_go_by_channels_where_both_ends_have_them_and_keep_their_bits() {
    use Fault::{Accept, Invite, Nowhere, Open};
    let plan = plan_of_three();
    let alone = plan_for(&source(), &[(Device::Gpu(0), 64 * MIB)], Policy::Auto, plan.limits, DType::Bf16);
    let expected = answers(&mut engine(&source(), &alone, DType::Bf16, 1), requests());
    for (fault, transport, with_opener, reason) in [
        (Nowhere, Transport::Auto, [true; 3], None),
        (Nowhere, Transport::Channels, [true; 3], None),
        (Nowhere, Transport::Tcp, [true; 3], Some("asked for")),
        (Nowhere, Transport::Auto, [false; 3], Some("virtual rank")),
        (Invite, Transport::Auto, [true; 3], Some("Invite")),
        (Accept, Transport::Auto, [true; 3], Some("Accept")),
        (Open(true), Transport::Auto, [true; 3], Some("Open(true)")),
        (Open(false), Transport::Auto, [true; 3], Some("Open(false)")),
    ] {
        let name = format!("{fault:?}, {transport:?}, {with_opener:?}");
        let fabric = Fabric::new(fault);
        let Run { zero, others } = Run::start(&plan, &fabric, transport, with_opener);
        let ranks = zero.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(ranks.ways().len(), NUM_CROSSINGS, "{name}");
        for way in ranks.ways() {
            assert_ne!(way.from.process(), way.to.process(), "{name}");
            match (&way.carrier, reason) {
                (Carrier::Channel(carrier), None) => assert_eq!(carrier, "queues"),
                (Carrier::Tcp(found), Some(reason)) => assert!(found.contains(reason), "{name}: {found}"),
                (carrier, _) => panic!("{name}: {carrier:?}"),
            }
        }
        let mut engine = Engine::new(source().spec().clone(), plan.limits, ranks);
        assert!(answers(&mut engine, requests()) == expected, "{name}: other logits");
        let num_sent = fabric.num_sent.load(Ordering::SeqCst);
        assert_eq!(num_sent > 0, reason.is_none(), "{name}: {num_sent} parcels by channels");
        drop(engine);
        assert_eq!(Run::end(others), [Ok(()), Ok(())], "{name}");
        if reason.is_none() {
            assert_eq!(fabric.num_closed.load(Ordering::SeqCst), 2 * NUM_CROSSINGS, "{name}: both ends are closed");
            assert_eq!(fabric.num_stuck.load(Ordering::SeqCst), 0, "{name}: ends wait for each other");
        }
    }
}

#[test]
fn where_channels_are_asked_for_nothing_else_will_do() {
    let plan = plan_of_three();
    for (fault, with_opener, reason) in [
        (Fault::Accept, [true; 3], "no luck at Accept"),
        (Fault::Open(false), [true; 3], "no luck at Open(false)"),
        (Fault::Nowhere, [true, false, false], "is a virtual rank, not a GPU"),
    ] {
        let Run { zero, others } = Run::start(&plan, &Fabric::new(fault), Transport::Channels, with_opener);
        let error = zero.err().expect("the run does not begin").to_string();
        for error in Run::end(others).into_iter().map(Result::unwrap_err).chain([error]) {
            assert!(error.contains("rows cannot go from") && error.contains(reason), "{error}");
        }
    }
}

#[test]
fn a_broken_channel_ends_the_run_for_everyone() {
    let plan = plan_of_three();
    let fabric = Fabric::new(Fault::Nowhere);
    let Run { zero, others } = Run::start(&plan, &fabric, Transport::Auto, [true; 3]);
    let mut engine = Engine::new(source().spec().clone(), plan.limits, zero.unwrap());
    assert!(answers(&mut engine, requests()).iter().all(|answer| !answer.is_empty()));
    fabric.is_broken.store(true, Ordering::SeqCst);
    let start = Instant::now();
    let failed = loop {
        engine.submit(request(&source(), &[5, 6], None, 40)).unwrap();
        if let Err(error) = (0..50).try_for_each(|_| engine.step().map(drop)) {
            break error;
        }
        assert!(start.elapsed() < PATIENCE, "nobody notices");
    };
    let cogvlm_pipeline::EngineError::Rank(RankError::Cluster(failed)) = failed else { panic!("{failed}") };
    assert!(failed.to_string().contains("on fire"), "{failed}");
    for served in Run::end(others) {
        assert!(served.unwrap_err().contains("on fire"));
    }
}
