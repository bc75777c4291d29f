//! From logits to tokens.

use cogvlm_backend::shape::{expect, expect_rows, unsupported};
use cogvlm_backend::{BackendError, SampleRequest, sampling};
use cogvlm_core::DType;
use cudarc::driver::sys::CUdeviceptr;

use super::rows;
use crate::backend::CudaBackend;
use crate::buffer::CudaBuffer;
use crate::device::{Launch, arg};
use crate::memory::ALIGNMENT;
use crate::sampled::SampledTokens;

/// As in kernels/sample.cu.
const THREADS: u32 = 1024;
/// Words of a `RowRequest` of kernels/sample.cu.
const REQUEST_WORDS: usize = 8;
/// Bytes per token of a row that `sample_rows` works with: a mass and a score.
const SPACE_PER_TOKEN: usize = 12;

pub(crate) fn sample(
    cuda: &CudaBackend, logits: &CudaBuffer, requests: &[SampleRequest<'_>],
) -> Result<SampledTokens, BackendError> {
    const OP: &str = "sample";
    let vocab_size = logits.columns();
    expect_rows(OP, "logits", logits.shape(), [requests.len(), vocab_size])?;
    expect(OP, "logits", &logits.shape(), vocab_size > 0, || "at least one column".to_owned())?;
    logits.expect_dtype(OP, "logits", DType::F32)?;
    let sampled = cuda.tokens.take(requests.len(), vocab_size)?;
    if requests.iter().all(|request| is_greedy(request) && seen(request).is_empty()) {
        greedy(cuda, logits, requests.len(), sampled.address())?;
    } else {
        let (area, room) = rows::scratch(cuda);
        let mut first = 0;
        while first < requests.len() {
            let count = rows_that_fit(&requests[first..], vocab_size, room)?;
            choose(cuda, logits, first, &requests[first..first + count], area, sampled.address())?;
            first += count;
        }
    }
    cuda.tokens.bring(&sampled)?;
    Ok(sampled)
}

/// The best token of each row, written to `tokens`.
fn greedy(cuda: &CudaBackend, logits: &CudaBuffer, rows: usize, tokens: CUdeviceptr) -> Result<(), BackendError> {
    let (scores, vocab_size) = (logits.address(), logits.columns() as u32);
    let mut arguments = [arg(&scores), arg(&vocab_size), arg(&tokens)];
    let launch = Launch::blocks(rows as u32, THREADS);
    // SAFETY: arguments and THREADS are those of `sample_greedy`; the logits have `rows` rows, and at `tokens` is room
    // for as many.
    unsafe { cuda.gpu.launch("sample", "sample_greedy", launch, &mut arguments) }
}

/// A token for each of `requests`, about the rows from `first` on; all that it takes beside them lies at `area`, which
/// has room for it ([`rows_that_fit`]).
fn choose(
    cuda: &CudaBackend, logits: &CudaBuffer, first: usize, requests: &[SampleRequest<'_>], area: CUdeviceptr,
    tokens: CUdeviceptr,
) -> Result<(), BackendError> {
    let words = words(requests);
    cuda.uploader.upload(area, bytemuck::cast_slice(&words))?;
    let words_bytes = size_of_val(words.as_slice()).next_multiple_of(ALIGNMENT);
    let seen_tokens = area + (requests.len() * REQUEST_WORDS * size_of::<u32>()) as CUdeviceptr;
    let space = area + words_bytes as CUdeviceptr;
    let (scores, vocab_size) = (logits.row(first), logits.columns() as u32);
    let (space_bytes, unit) = (space_bytes(logits.columns()) as u64, unit(logits.columns()));
    let tokens = tokens + (first * size_of::<u32>()) as CUdeviceptr;
    let mut arguments = [
        arg(&scores),
        arg(&vocab_size),
        arg(&area),
        arg(&seen_tokens),
        arg(&space),
        arg(&space_bytes),
        arg(&unit),
        arg(&tokens),
    ];
    let launch = Launch::blocks(requests.len() as u32, THREADS);
    // SAFETY: arguments and THREADS are those of `sample_rows`; the requests and what they name lie in scratch memory
    // where they were just copied to, followed by `space_bytes` for each row.
    unsafe { cuda.gpu.launch("sample", "sample_rows", launch, &mut arguments) }
}

/// How many of `requests`, from the first on, have room for all that they take in `room` bytes.
fn rows_that_fit(requests: &[SampleRequest<'_>], vocab_size: usize, room: usize) -> Result<usize, BackendError> {
    // Words are aligned once, at their end.
    let mut needed = ALIGNMENT;
    for (index, request) in requests.iter().enumerate() {
        let words = REQUEST_WORDS + seen(request).len();
        needed += words * size_of::<u32>() + space_bytes(vocab_size);
        if needed > room {
            if index > 0 {
                return Ok(index);
            }
            let num_seen = seen(request).len();
            let reason = format!(
                "a row of {vocab_size} tokens and {num_seen} seen ones takes {needed} of {room} bytes of scratch memory"
            );
            return Err(unsupported("sample", reason));
        }
    }
    Ok(requests.len())
}

/// Whether `request` takes the best token, without a draw.
fn is_greedy(request: &SampleRequest<'_>) -> bool {
    let temperature = request.params.temperature;
    temperature.is_nan() || temperature <= 0.0
}

/// The tokens that `request` penalises.
fn seen<'a>(request: &SampleRequest<'a>) -> &'a [u32] {
    if request.params.repetition_penalty == 1.0 { &[] } else { request.seen }
}

/// A `RowRequest` for each of `requests`, then the tokens that they have seen.
fn words(requests: &[SampleRequest<'_>]) -> Vec<u32> {
    let (mut words, mut all_seen) = (Vec::with_capacity(requests.len() * REQUEST_WORDS), Vec::new());
    for request in requests {
        let params = request.params;
        // A multiple of 2^-53 below 1, as a multiple of 2^-64.
        let uniform = ((sampling::uniform(params.seed, request.index) * 2_f64.powi(53)) as u64) << 11;
        let seen = seen(request);
        words.extend([
            uniform as u32,
            (uniform >> 32) as u32,
            params.temperature.to_bits(),
            params.top_p.to_bits(),
            params.repetition_penalty.to_bits(),
            u32::try_from(params.top_k).unwrap_or(u32::MAX),
            all_seen.len() as u32,
            seen.len() as u32,
        ]);
        all_seen.extend_from_slice(seen);
    }
    words.extend(all_seen);
    words
}

/// Bytes that a row works with.
fn space_bytes(vocab_size: usize) -> usize {
    vocab_size.saturating_mul(SPACE_PER_TOKEN).next_multiple_of(ALIGNMENT)
}

/// The greatest power of two of which `vocab_size` are at most 2^62.
fn unit(vocab_size: usize) -> f64 {
    let bits = usize::BITS - (vocab_size - 1).leading_zeros();
    2_f64.powi(62 - bits as i32)
}

#[cfg(test)]
mod tests {
    use cogvlm_backend::SamplingParams;

    use super::*;

    #[test]
    fn requests_are_written_as_the_kernel_reads_them() {
        let params = SamplingParams { temperature: 0.5, top_k: 7, top_p: 0.25, repetition_penalty: 1.5, seed: 3 };
        let plain = SamplingParams { top_k: usize::MAX, ..SamplingParams::default() };
        let request = |params, seen, index| SampleRequest { params, seen, index };
        let words = words(&[request(&params, &[4, 5], 0), request(&plain, &[6], 1), request(&params, &[8], 2)]);
        let draw = (u64::from(words[1]) << 32 | u64::from(words[0])) as f64 / 2_f64.powi(64);
        assert_eq!(draw, sampling::uniform(3, 0));
        assert_eq!(words[2..8], [0.5_f32.to_bits(), 0.25_f32.to_bits(), 1.5_f32.to_bits(), 7, 0, 2]);
        assert_eq!(words[8 + 5..16], [u32::MAX, 2, 0], "nothing is penalised, nothing is taken along");
        assert_eq!(words[16 + 6..24], [2, 1]);
        assert_eq!(words[24..], [4, 5, 8]);
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn kernels_find_every_field_of_requests() {
        let params = SamplingParams { temperature: 0.5, top_k: 7, top_p: 0.25, repetition_penalty: 1.5, seed: 3 };
        let other = SamplingParams { temperature: 2.0, top_k: 9, top_p: 0.75, repetition_penalty: 1.25, seed: 4 };
        let request = |params, seen, index| SampleRequest { params, seen, index };
        let words = words(&[request(&params, &[4, 5], 11), request(&other, &[6, 7, 8], 12)]);
        let requests: [u32; 2 * REQUEST_WORDS] = words[..2 * REQUEST_WORDS].try_into().expect("two requests");
        #[repr(C, align(8))]
        struct TwoRequests([u32; 2 * REQUEST_WORDS]);
        let passed = TwoRequests(requests);
        // SAFETY: `sample_echo` takes two `RowRequest`, and writes a number for each of their fields.
        let found = unsafe { crate::echo::echo("sample", "sample_echo", &[arg(&passed)], 14) };
        for (index, (params, [first_seen, num_seen])) in [(params, [0, 2]), (other, [2, 3])].into_iter().enumerate() {
            let draw = (sampling::uniform(params.seed, 11 + index as u64) * 2_f64.powi(53)) as u64;
            let [temperature, top_p, penalty] = [params.temperature, params.top_p, params.repetition_penalty];
            let floats = [temperature, top_p, penalty].map(|value| u64::from(value.to_bits()));
            assert_eq!(found[7 * index], draw << 11);
            assert_eq!(found[7 * index + 1..][..3], floats);
            assert_eq!(found[7 * index + 4..][..3], [params.top_k as u64, first_seen, num_seen]);
        }
    }

    #[test]
    fn masses_of_all_tokens_fit_their_type() {
        for (vocab_size, log) in [(1, 62), (2, 61), (7, 59), (32_000, 47), (32_768, 47), (32_769, 46)] {
            assert_eq!(unit(vocab_size), 2_f64.powi(log), "{vocab_size}");
        }
    }

    #[test]
    fn rows_are_taken_as_long_as_they_fit() {
        let params = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
        let requests = vec![SampleRequest { params: &params, seen: &[], index: 0 }; 5];
        let row = 12_032 + 32;
        assert_eq!(rows_that_fit(&requests, 1000, 256 + 3 * row).unwrap(), 3);
        assert_eq!(rows_that_fit(&requests, 1000, 256 + 3 * row - 1).unwrap(), 2);
        assert_eq!(rows_that_fit(&requests, 1000, 1 << 20).unwrap(), 5);
        assert!(rows_that_fit(&requests, 1000, row).is_err());
    }
}
