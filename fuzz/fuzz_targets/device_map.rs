#![no_main]

#[path = "../checks/device_map.rs"]
mod device_map;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| device_map::check(bytes));
