//! A small C library takes NCCL's place: it writes down its calls, and fails as it was compiled to.

use std::process::Command;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::error::{Cause, Failure};

/// What the stand-in is, but for what was defined when it was compiled.
const SOURCE: &str = r#"
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#ifndef VERSION
#define VERSION 22809
#endif
#ifndef INIT
#define INIT 0
#endif
#ifndef STATE
#define STATE 0
#endif
#ifndef SEND
#define SEND 0
#endif
#ifndef END
#define END 0
#endif
typedef struct { char bytes[128]; } id_t;
typedef struct {
    size_t size;
    unsigned magic, version;
    int blocking, cga, min, max;
    const char *net;
    int split;
} config_t;
static char calls[65536];
static int state = STATE;
static void note(const char *format, ...) {
    size_t used = strlen(calls);
    va_list rest;
    va_start(rest, format);
    vsnprintf(calls + used, sizeof calls - used, format, rest);
    va_end(rest);
}
const char *fake_calls(void) { return calls; }
void fake_state(int next) { state = next; }
int ncclGetVersion(int *version) { *version = VERSION; return 0; }
const char *ncclGetErrorString(int code) { return code == 2 ? "unhandled system error" : "internal error"; }
const char *ncclGetLastError(void *comm) { return comm ? "socket says no" : ""; }
int ncclGetUniqueId(id_t *id) { memset(id->bytes, 7, 128); return ID; }
int ncclCommInitRankConfig(void **comm, int size, id_t id, int rank, config_t *config) {
    note("init %d/%d id %d..%d size %zu magic %x version %u blocking %d ctas %d split %d;", rank, size, id.bytes[0],
         id.bytes[127], config->size, config->magic, config->version, config->blocking, config->max,
         config->split == -2147483647 - 1);
    *comm = (void *)0x1000;
    return INIT;
}
int ncclCommGetAsyncError(void *comm, int *result) { *result = state; return 0; }
int ncclCommFinalize(void *comm) { note("finalize;"); return 0; }
int ncclCommDestroy(void *comm) { note("destroy;"); return 0; }
int ncclCommAbort(void *comm) { note("abort %p;", comm); return 0; }
int ncclSend(const void *p, size_t n, int type, int peer, void *comm, void *stream) {
    note("send %p %zu type %d to %d on %p;", p, n, type, peer, stream);
    return SEND;
}
#ifndef LACKS_RECV
int ncclRecv(void *p, size_t n, int type, int peer, void *comm, void *stream) {
    note("recv %p %zu type %d from %d on %p;", p, n, type, peer, stream);
    return 0;
}
#endif
int ncclGroupStart(void) { note("{"); return 0; }
int ncclGroupEnd(void) { note("}"); return END; }
"#;

/// A stand-in, compiled with definitions such as `INIT=2`. `None`, with the reason printed, where there is no compiler.
struct Fake {
    path: PathBuf,
    library: Library,
    _dir: TempDir,
}

fn fake(definitions: &[&str]) -> Option<Fake> {
    let dir = TempDir::new().unwrap();
    let (source, path) = (dir.path().join("nccl.c"), dir.path().join("libnccl.so.2"));
    std::fs::write(
        &source,
        SOURCE.replace("return ID;", if definitions.contains(&"ID=3") { "return 3;" } else { "return 0;" }),
    )
    .unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-w", "-Wl,-soname,libnccl.so.2", "-o"]).arg(&path).arg(&source);
    compiler.args(definitions.iter().map(|definition| format!("-D{definition}")));
    let output = match compiler.output() {
        Ok(output) => output,
        Err(error) => {
            // Rust itself links with it, so that this is rare.
            tracing::warn!(%error, "skipped: there is no `cc` to compile a stand-in for NCCL with");
            return None;
        }
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // SAFETY: the library was just compiled from the source above, and has no initialisers.
    let library = unsafe { Library::new(&path) }.unwrap();
    Some(Fake { path, library, _dir: dir })
}

impl Fake {
    fn nccl(&self) -> Arc<Nccl> {
        Nccl::load_file(&self.path).unwrap()
    }

    fn calls(&self) -> String {
        // SAFETY: the type is that of the function in the source above.
        let calls = unsafe { self.library.get::<unsafe extern "C" fn() -> *const c_char>(b"fake_calls") }.unwrap();
        // SAFETY: it gives a buffer that ends in zeros and lives as long as the library.
        unsafe { CStr::from_ptr(calls()) }.to_string_lossy().into_owned()
    }

    fn set_state(&self, state: c_int) {
        // SAFETY: the type is that of the function in the source above.
        let set = unsafe { self.library.get::<unsafe extern "C" fn(c_int)>(b"fake_state") }.unwrap();
        // SAFETY: sets a number.
        unsafe { set(state) };
    }

    fn init(&self, timeout_ms: u64) -> (Arc<Watch>, Result<Communicator, NcclError>) {
        let watch = Watch::new();
        let nccl = self.nccl();
        let id = nccl.unique_id().unwrap();
        let timeout = Duration::from_millis(timeout_ms);
        let communicator = Communicator::init(&nccl, id, 1, 3, &watch, timeout);
        (watch, communicator)
    }
}

fn failure() -> Failure {
    Failure { rank: 2, size: 3, host: "node3".to_owned(), pid: 1, cause: Cause::Closed { detail: String::new() } }
}

const INIT: &str = "init 1/3 id 7..7 size 48 magic cafebeef version 21800 blocking 0 ctas 4 split 1;";

#[test]
fn rows_are_exchanged_in_one_group_and_all_is_ended_in_order() {
    let Some(fake) = fake(&[]) else { return };
    assert_eq!(fake.nccl().version_text(), "2.28.9");
    let (_watch, communicator) = fake.init(1000);
    let communicator = communicator.unwrap();
    let transfers = [
        Transfer::Recv { address: 0x10, num_bytes: 64, peer: 0 },
        Transfer::Send { address: 0x20, num_bytes: 32, peer: 2 },
    ];
    // SAFETY: the stand-in reads and writes no address.
    unsafe { communicator.exchange(&transfers, 0x30) }.unwrap();
    communicator.check().unwrap();
    for peer in [1, 3] {
        // SAFETY: as above.
        let result = unsafe { communicator.exchange(&[Transfer::Send { address: 0, num_bytes: 0, peer }], 0) };
        assert_eq!(result, Err(NcclError::Peer { rank: 1, size: 3, peer }));
    }
    communicator.close();
    assert_eq!(communicator.check(), Err(NcclError::Closed { rank: 1, size: 3 }));
    drop(communicator);
    let exchange = "{recv 0x10 64 type 0 from 0 on 0x30;send 0x20 32 type 0 to 2 on 0x30;}";
    assert_eq!(fake.calls(), format!("{INIT}{exchange}finalize;destroy;"));
}

#[test]
fn a_failing_process_aborts_what_waits() {
    let Some(fake) = fake(&["INIT=7", "STATE=7"]) else { return };
    // Making a communicator waits for the others; one of them dies.
    let watch = Watch::new();
    let nccl = fake.nccl();
    let id = nccl.unique_id().unwrap();
    let dying = Arc::clone(&watch);
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        dying.fail(failure());
    });
    let start = Instant::now();
    let result = Communicator::init(&nccl, id, 1, 3, &watch, Duration::from_secs(60));
    thread.join().unwrap();
    let expected = NcclError::Cluster(ClusterError::Failed(Arc::new(failure())));
    assert_eq!(result.err(), Some(expected.clone()));
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(fake.calls(), format!("{INIT}abort 0x1000;"));
    // So does an exchange, from another thread than the one that waits.
    fake.set_state(SUCCESS);
    let watch = Watch::new();
    let communicator = Communicator::init(&nccl, id, 1, 3, &watch, Duration::from_secs(60)).unwrap();
    fake.set_state(IN_PROGRESS);
    let dying = Arc::clone(&watch);
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        dying.fail(failure());
    });
    // SAFETY: the stand-in reads and writes no address.
    let result = unsafe { communicator.exchange(&[Transfer::Send { address: 1, num_bytes: 1, peer: 0 }], 0) };
    thread.join().unwrap();
    assert_eq!(result, Err(expected.clone()));
    assert_eq!(communicator.check(), Err(expected));
    drop(communicator);
    assert_eq!(fake.calls().matches("abort").count(), 2, "{}", fake.calls());
    assert!(!fake.calls().contains("finalize"), "{}", fake.calls());
}

#[test]
fn failures_are_errors_in_its_own_words() {
    let Some(failing) = fake(&["INIT=2"]) else { return };
    let (_, communicator) = failing.init(1000);
    let error = communicator.err().unwrap();
    assert_eq!(
        error.to_string(),
        format!(
            "ncclCommInitRankConfig of {} (2.28.9) failed at rank 1 of 3: unhandled system error (NCCL error 2)",
            failing.path.display()
        )
    );
    assert!(error.hint().unwrap().contains("NCCL_DEBUG"));
    assert_eq!(failing.calls(), INIT, "what failed at once is not ended");

    let (_, communicator) = fake(&["INIT=7", "STATE=2"]).unwrap().init(1000);
    let text = communicator.err().unwrap().to_string();
    assert!(text.ends_with("unhandled system error (NCCL error 2): socket says no"), "{text}");

    let slow = fake(&["INIT=7", "STATE=7"]).unwrap();
    let (_, communicator) = slow.init(20);
    assert_eq!(
        communicator.err().unwrap().to_string(),
        format!("ncclCommInitRankConfig of {} (2.28.9) did not end within 0.02 s at rank 1 of 3", slow.path.display())
    );
    assert_eq!(slow.calls(), format!("{INIT}abort 0x1000;"), "what failed is not ended in order");

    let sending = fake(&["SEND=5"]).unwrap();
    let (_, communicator) = sending.init(1000);
    let communicator = communicator.unwrap();
    let transfer =
        [Transfer::Send { address: 1, num_bytes: 1, peer: 0 }, Transfer::Recv { address: 1, num_bytes: 1, peer: 0 }];
    // SAFETY: the stand-in reads and writes no address.
    let error = unsafe { communicator.exchange(&transfer, 0) }.unwrap_err();
    assert!(error.to_string().starts_with("ncclSend of "), "{error}");
    drop(communicator);
    assert!(sending.calls().contains("{send 0x1 1 type 0 to 0 on (nil);}"), "a group is ended: {}", sending.calls());

    let error = fake(&["ID=3"]).unwrap().nccl().unique_id().unwrap_err();
    assert!(error.to_string().contains("ncclGetUniqueId"), "{error}");
}

#[test]
fn libraries_that_will_not_do_are_refused() {
    let Some(old) = fake(&["VERSION=21705"]) else { return };
    let error = Nccl::load_file(&old.path).unwrap_err();
    assert!(error.to_string().ends_with("is NCCL 2.17.5, and 2.18.0 is the oldest that is used"), "{error}");
    let lacking = fake(&["LACKS_RECV"]).unwrap();
    let error = Nccl::load_file(&lacking.path).unwrap_err();
    assert!(error.to_string().ends_with("has no `ncclRecv`: it is not NCCL, or one that is too old"), "{error}");
    let text = lacking.path.with_file_name("text");
    std::fs::write(&text, "no library").unwrap();
    let error = Nccl::load_file(&text).unwrap_err();
    assert!(matches!(&error, NcclError::NotFound { reason } if reason.contains("text")), "{error}");
    // The first that will do is taken; else the first that was found is complained of.
    let good = fake(&[]).unwrap();
    let paths = [&text, &old.path, &lacking.path, &good.path].map(Clone::clone);
    assert_eq!(Nccl::load_first(&paths).unwrap().path(), good.path);
    assert!(matches!(Nccl::load_first(&paths[..3]), Err(NcclError::TooOld { .. })));
    assert!(matches!(Nccl::load_first(&paths[..1]), Err(NcclError::NotFound { .. })));
    assert!(matches!(Nccl::load_first(&[]), Err(NcclError::NotFound { .. })));
    for path in &paths[..3] {
        assert!(Nccl::load_file(path).unwrap_err().hint().unwrap().contains("COGVLM_NCCL_LIBRARY"));
    }
}

#[test]
fn the_environment_is_left_alone_where_others_may_read_it() {
    // Tests have threads; whether the variable is set is the user's affair.
    let result = prepare_environment();
    let is_set = std::env::var_os("NCCL_NVLS_ENABLE").is_some();
    assert_eq!(result.is_ok(), is_set);
    if let Err(error) = result {
        assert!(error.hint().unwrap().contains("NCCL_NVLS_ENABLE=0"));
    }
}

proptest! {
    #[test]
    fn ids_survive(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let id = UniqueId::from_bytes(&bytes);
        prop_assert_eq!(id.map(|id| id.as_bytes().to_vec()), (bytes.len() == UNIQUE_ID_BYTES).then_some(bytes));
    }
}
