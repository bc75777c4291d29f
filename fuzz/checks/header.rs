//! Headers of safetensors files: what is accepted covers its file to the last byte, in order, without gaps.

use cogvlm_checkpoint::parse_header;

/// Panics where the code under test is wrong.
pub(crate) fn check(bytes: &[u8]) {
    // The length of the file is said apart from its beginning: the last two bytes stand for data behind the header.
    let Some((file, data)) = bytes.split_last_chunk::<2>() else { return };
    let file_bytes = file.len() as u64 + u64::from(u16::from_le_bytes(*data));
    for file_bytes in [file.len() as u64, file_bytes] {
        let Ok(header) = parse_header(file, file_bytes) else { continue };
        let mut end = None;
        let mut tensors: Vec<_> = header.tensors.iter().collect();
        tensors.sort_by_key(|tensor| (tensor.file_range.start, tensor.file_range.end));
        for tensor in tensors {
            let bytes = tensor.shape.iter().product::<usize>() * tensor.dtype.size_bytes();
            assert_eq!(tensor.file_range.end - tensor.file_range.start, bytes as u64);
            assert!(end.is_none_or(|end| end == tensor.file_range.start));
            end = Some(tensor.file_range.end);
        }
        assert!(end.is_none_or(|end| end == file_bytes));
    }
}
