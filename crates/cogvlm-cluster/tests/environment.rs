//! NVLink multicast is switched off unless the user says otherwise, and only while nobody else can see the environment
//! change. The harness of other tests has threads, so this is a program of its own.

use std::sync::mpsc::channel;

use cogvlm_cluster::nccl::prepare_environment;

const VARIABLE: &str = "NCCL_NVLS_ENABLE";

fn main() {
    let value = || std::env::var(VARIABLE).ok();
    // SAFETY: there is no other thread yet.
    unsafe { std::env::remove_var(VARIABLE) };
    prepare_environment().expect("there is one thread");
    assert_eq!(value().as_deref(), Some("0"));

    // SAFETY: as above.
    unsafe { std::env::set_var(VARIABLE, "2") };
    prepare_environment().expect("it is set");
    assert_eq!(value().as_deref(), Some("2"), "the user's word counts");

    // SAFETY: as above.
    unsafe { std::env::remove_var(VARIABLE) };
    let (stop, stopped) = channel::<()>();
    let other = std::thread::spawn(move || stopped.recv());
    let error = prepare_environment().expect_err("another thread may be reading the environment");
    assert_eq!(error.to_string(), "NCCL_NVLS_ENABLE is not set, and it is too late to set it");
    assert_eq!(value(), None);
    drop(stop);
    assert!(other.join().expect("it only waits").is_err());
}
