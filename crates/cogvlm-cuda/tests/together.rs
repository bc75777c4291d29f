//! GPUs that compute one layer together: two of them where there are, else two members on one.

use cogvlm_backend::conformance::VecTensor;
use cogvlm_backend::{Backend, ExpertWeights, FollowingNorm, Shardable};
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::{DType, Device, Expert};
use cogvlm_cuda::{CudaBackend, KernelPath};

const ARENA_BYTES: u64 = 1 << 30;

fn members(activations: DType, path: KernelPath) -> [CudaBackend; 2] {
    let num_gpus = cogvlm_cuda::usable_devices().unwrap_or_else(|error| panic!("{error}")).len() as u32;
    [0, 1].map(|index| {
        let backend = CudaBackend::new(Device::Gpu(index), index % num_gpus, ARENA_BYTES, activations);
        backend.unwrap_or_else(|error| panic!("{error}")).with_path(path)
    })
}

/// Numbers in [-1, 1) that bf16 holds.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 57) as f32 - 64.0) / 64.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// Columns `first..first + count` of every row.
fn columns(values: &[f32], width: usize, first: usize, count: usize) -> Vec<f32> {
    values.chunks_exact(width).flat_map(|row| row[first..first + count].iter().copied()).collect()
}

struct Case {
    rows: usize,
    /// Of each member.
    depth: usize,
    width: usize,
}

impl Case {
    fn ranges(&self) -> Vec<ExpertRange> {
        let cut = if self.rows > 2 { self.rows / 3 } else { 0 };
        let parts = [(0..cut, Expert::Vision), (cut..self.rows, Expert::Language)];
        let parts = parts.into_iter().filter(|(rows, _)| !rows.is_empty());
        parts.map(|(rows, expert)| ExpertRange { rows, expert }).collect()
    }

    fn run(&self, members: &[CudaBackend; 2], activations: DType) {
        let Self { rows, depth, width } = *self;
        let name = format!("{activations}, {rows} rows, {depth} columns each, width {width}");
        let exchanges = CudaBackend::join(&members.each_ref(), [rows + 1, width]);
        let mut exchanges = exchanges.unwrap_or_else(|error| panic!("{name}: {error}"));
        let x = numbers(1, rows * 2 * depth);
        let weights = [2, 3].map(|seed| numbers(seed, width * 2 * depth));
        let (before, norm) = (numbers(4, rows * width), numbers(5, width));
        let load = |member: &CudaBackend, shape: &[usize], values: &[f32]| {
            member.load(&VecTensor::new("w", DType::Bf16, shape, values).shared()).unwrap()
        };
        let part = |index: usize, values: &[f32]| columns(values, 2 * depth, index * depth, depth);
        let filled = |member: &CudaBackend, values: &[f32], columns: usize| {
            let mut buffer = member.alloc("test", activations, [rows, columns]).unwrap();
            member.write(values, &mut buffer, 0).unwrap();
            buffer
        };
        let mut sides: Vec<_> = members
            .iter()
            .enumerate()
            .map(|(index, member)| {
                let weights = weights.each_ref().map(|values| load(member, &[width, depth], &part(index, values)));
                let residuals = [(); 2].map(|()| filled(member, &before, width));
                let outs = [(); 2].map(|()| filled(member, &before, width));
                (filled(member, &part(index, &x), depth), weights, residuals, outs, load(member, &[width], &norm))
            })
            .collect();
        // In the first slot the sum alone and the norm by itself, in the second both at once.
        for slot in [0, 1] {
            for ((member, side), exchange) in members.iter().zip(&sides).zip(&mut exchanges) {
                let (x, [language, vision], ..) = side;
                let weights = ExpertWeights { language: Some(language), vision: Some(vision) };
                member.linear_partial(x, weights, &self.ranges(), slot, exchange).unwrap();
            }
            for ((member, side), exchange) in members.iter().zip(&mut sides).zip(&mut exchanges) {
                let (_, _, residuals, outs, weight) = side;
                let following = FollowingNorm { weight, eps: 1e-5, out: &mut outs[slot] };
                let following = (slot == 1).then_some(following);
                member.add_partials(exchange, slot, rows, &mut residuals[slot], following).unwrap();
            }
        }
        let [first, second] = [0, 1].map(|index| {
            let (member, (_, _, residuals, outs, weight)) = (&members[index], &mut sides[index]);
            member.rms_norm(&residuals[0], weight, 1e-5, rows, &mut outs[0]).unwrap();
            member.check_exchange(&exchanges[index]).unwrap_or_else(|error| panic!("{name}: {error}"));
            [&residuals[0], &residuals[1], &outs[0], &outs[1]].map(|buffer| member.read(buffer, 0..rows).unwrap())
        });
        assert!(first == second, "{name}: members disagree");
        let [sum, same_sum, norm, same_norm] = first;
        assert!(sum == same_sum, "{name}: another sum beside the norm");
        for (found, expected) in same_norm.iter().zip(&norm) {
            assert!((found - expected).abs() <= expected.abs() / 64.0, "{name}: norm {found}, not {expected}");
        }
        // Every seventh column, in f64.
        for range in self.ranges() {
            let weights = &weights[usize::from(range.expert == Expert::Vision)];
            for row in range.rows {
                for column in (row % 7..width).step_by(7) {
                    let products = x[row * 2 * depth..][..2 * depth].iter().zip(&weights[column * 2 * depth..]);
                    let products = products.map(|(a, b)| f64::from(*a) * f64::from(*b));
                    let (mut exact, mut size) = (0.0, 0.0);
                    products.for_each(|product| (exact, size) = (exact + product, size + product.abs()));
                    let result = exact + f64::from(before[row * width + column]);
                    let found = f64::from(sum[row * width + column]);
                    let roundings = if activations == DType::Bf16 { 2_f64.powi(-8) } else { 2_f64.powi(-23) };
                    let depth = 2.0 * depth as f64;
                    let bound =
                        2_f64.powi(-24) * (4.0 + 2.0 * depth.sqrt()) * size + roundings * (exact.abs() + result.abs());
                    assert!((found - result).abs() <= bound, "{name}: [{row}, {column}] is {found}, not {result}");
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU; two say more; run with `--ignored` where there are some"]
fn members_add_up_what_one_device_sums() {
    use KernelPath::{Generic, Hopper, Portable};
    for (activations, path) in
        [(DType::F32, Generic), (DType::Bf16, Generic), (DType::Bf16, Portable), (DType::Bf16, Hopper)]
    {
        let members = members(activations, path);
        for (rows, depth, width) in [
            (1, 2048, 4096),
            (1, 5504, 4096),
            (9, 512, 4096),
            (16, 256, 4096),
            (3, 64, 200),
            (40, 48, 1000),
            (2, 7, 33),
            (300, 512, 4096),
            (700, 128, 512),
        ] {
            Case { rows, depth, width }.run(&members, activations);
        }
    }
}

#[test]
#[ignore = "needs a GPU; two say more; takes as long as a member waits"]
fn a_member_that_does_not_come_is_named() {
    let members = members(DType::Bf16, KernelPath::Hopper);
    let mut exchanges = CudaBackend::join(&members.each_ref(), [1, 4096]).unwrap_or_else(|error| panic!("{error}"));
    let mut residual = members[0].alloc("test", DType::Bf16, [1, 4096]).unwrap();
    for slot in [0, 1] {
        members[0].add_partials(&mut exchanges[0], slot, 1, &mut residual, None).unwrap();
    }
    members[0].synchronize().unwrap();
    let error = members[0].check_exchange(&exchanges[0]).unwrap_err().to_string();
    assert!(error.starts_with("device 0: waited") && error.contains("for device 1"), "{error}");
    members[1].check_exchange(&exchanges[1]).unwrap();
}
