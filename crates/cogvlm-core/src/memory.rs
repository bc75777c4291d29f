//! Byte sizes as people write and read them.

/// One binary gigabyte.
pub const GIB: u64 = 1 << 30;
/// One binary megabyte.
pub const MIB: u64 = 1 << 20;

/// `19.09 GiB`, `12.3 MiB`, `512 B`: three significant digits or so, for people; JSON carries bytes.
pub fn format_bytes(bytes: u64) -> String {
    let value = bytes as f64;
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..MIB => format!("{:.1} KiB", value / 1024.0),
        MIB..GIB => format!("{:.1} MiB", value / MIB as f64),
        _ => format!("{:.2} GiB", value / GIB as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(format_bytes(0), "0 B");
        assert_eq!(format_bytes(1023), "1023 B");
        assert_eq!(format_bytes(8192), "8.0 KiB");
        assert_eq!(format_bytes(35_279_374_848), "32.86 GiB");
    }
}
