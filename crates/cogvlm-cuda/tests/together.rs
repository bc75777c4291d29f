//! GPUs that compute one layer together: two of them where there are, else two members on one.
//!
//! One test at a time: members wait for each other on their GPUs, and streams of many tests share the queues that a GPU
//! has, so that one test's members could wait for another's.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use cogvlm_backend::conformance::VecTensor;
use cogvlm_backend::{Backend, ExpertWeights, FollowingNorm, Shardable};
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::{DType, Device, Expert};
use cogvlm_cuda::{CudaBackend, KernelPath};

const ARENA_BYTES: u64 = 1 << 30;

fn alone() -> MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

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
    let _alone = alone();
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
    let _alone = alone();
    // Waited for where sums are read, and where they are sent.
    for is_pushed in [false, true] {
        let members = members(DType::Bf16, KernelPath::Hopper);
        let mut exchanges = CudaBackend::join(&members.each_ref(), [1, 4096]).unwrap_or_else(|error| panic!("{error}"));
        let [mut residual, x] = [(); 2].map(|()| members[0].alloc("test", DType::Bf16, [1, 4096]).unwrap());
        let weight = VecTensor::new("w", DType::Bf16, &[4096, 4096], &vec![0.5; 4096 * 4096]).shared();
        let weight = members[0].load(&weight).unwrap();
        let weights = ExpertWeights { language: Some(&weight), vision: None };
        let ranges = [ExpertRange { rows: 0..1, expert: Expert::Language }];
        for slot in [0, 1] {
            if is_pushed {
                members[0].linear_partial(&x, weights, &ranges, slot, &mut exchanges[0]).unwrap();
            }
            members[0].add_partials(&mut exchanges[0], slot, 1, &mut residual, None).unwrap();
        }
        members[0].synchronize().unwrap();
        let error = members[0].check_exchange(&exchanges[0]).unwrap_err().to_string();
        assert!(error.starts_with("device 0: waited") && error.contains("for device 1"), "{error}");
        members[1].check_exchange(&exchanges[1]).unwrap();
    }
}

/// Two members whose residuals go through a recurrence: what each adds is a product of the norm of what all added
/// before, so that a sum which is read too early, or too late, changes everything after it.
struct Recurrence {
    members: [CudaBackend; 2],
    exchanges: Vec<<CudaBackend as Shardable>::Exchange>,
    sides: Vec<Side>,
    rows: usize,
}

struct Side {
    residual: <CudaBackend as Backend>::Buffer,
    normed: <CudaBackend as Backend>::Buffer,
    weight: <CudaBackend as Backend>::Weight,
    norm: <CudaBackend as Backend>::Weight,
}

/// What is done in a turn.
#[derive(Clone, Copy, PartialEq)]
enum Turn {
    /// Products and meetings, launch by launch, everybody waited for after each.
    Slow,
    /// The same, as recordings.
    Recorded,
    /// The same, launch by launch, nobody waited for.
    Launched,
    /// Products and norms of each member alone, recorded.
    ProductsAlone,
    /// Meetings without products, recorded.
    MeetingsAlone,
}

impl Recurrence {
    fn new(rows: usize, width: usize) -> Self {
        let members = members(DType::Bf16, KernelPath::Hopper);
        let exchanges = CudaBackend::join(&members.each_ref(), [rows, width]).unwrap_or_else(|error| panic!("{error}"));
        let side = |(index, member): (usize, &CudaBackend)| {
            let filled = || {
                let mut buffer = member.alloc("test", DType::Bf16, [rows, width]).unwrap();
                member.write(&numbers(7, rows * width), &mut buffer, 0).unwrap();
                buffer
            };
            let load = |shape: &[usize], values: &[f32]| {
                member.load(&VecTensor::new("w", DType::Bf16, shape, values).shared()).unwrap()
            };
            let [residual, normed] = [(); 2].map(|()| filled());
            // Less of everything on the diagonal: residuals stay small, so that no sum is lost in their roundings.
            let mut weights = numbers(8 + index as u64, width * width);
            weights.iter_mut().for_each(|weight| *weight /= (width as f32).sqrt());
            (0..width).for_each(|diagonal| weights[diagonal * width + diagonal] -= 1.0);
            let (weight, norm) = (load(&[width, width], &weights), load(&[width], &vec![1.0; width]));
            Side { residual, normed, weight, norm }
        };
        let sides = members.iter().enumerate().map(side).collect();
        Self { members, exchanges, sides, rows }
    }

    fn turn(&mut self, turn: Turn) {
        let Self { members, exchanges, sides, rows } = self;
        let rows = *rows;
        let ranges = [ExpertRange { rows: 0..rows, expert: Expert::Language }];
        let mut operations = || {
            for slot in [0, 1] {
                for ((member, side), exchange) in members.iter().zip(&*sides).zip(&mut *exchanges) {
                    let weights = ExpertWeights { language: Some(&side.weight), vision: None };
                    if turn != Turn::MeetingsAlone {
                        member.linear_partial(&side.normed, weights, &ranges, slot, exchange)?;
                    }
                }
                for ((member, side), exchange) in members.iter().zip(&mut *sides).zip(&mut *exchanges) {
                    let Side { residual, normed, norm, .. } = side;
                    if turn == Turn::ProductsAlone {
                        member.rms_norm(residual, norm, 1e-5, rows, normed)?;
                        continue;
                    }
                    let following = FollowingNorm { weight: norm, eps: 1e-5, out: normed };
                    member.add_partials(exchange, slot, rows, residual, Some(following))?;
                }
                if turn == Turn::Slow {
                    members.iter().try_for_each(Backend::synchronize)?;
                }
            }
            Ok(())
        };
        let outcome = match turn {
            Turn::Slow | Turn::Launched => operations(),
            _ => CudaBackend::replay_together(&members.each_ref(), turn as u64, &mut operations),
        };
        outcome.unwrap_or_else(|error| panic!("{error}"));
    }

    /// What is left of a turn that breaks off after its first slot.
    fn broken_turn(&mut self) {
        let Self { members, exchanges, sides, rows } = self;
        let ranges = [ExpertRange { rows: 0..*rows, expert: Expert::Language }];
        for ((member, side), exchange) in members.iter().zip(&*sides).zip(&mut *exchanges) {
            let weights = ExpertWeights { language: Some(&side.weight), vision: None };
            member.linear_partial(&side.normed, weights, &ranges, 0, exchange).unwrap();
        }
        for ((member, side), exchange) in members.iter().zip(&mut *sides).zip(&mut *exchanges) {
            member.add_partials(exchange, 0, *rows, &mut side.residual, None).unwrap();
        }
        self.begin_anew();
    }

    /// After turns that left products without a meeting, or a meeting without the next.
    fn begin_anew(&mut self) {
        let Self { members, exchanges, .. } = self;
        members.iter().for_each(|member| member.synchronize().unwrap());
        for (member, exchange) in members.iter().zip(exchanges) {
            member.reset_exchange(exchange).unwrap();
        }
    }

    fn wait(&self) {
        for (member, exchange) in self.members.iter().zip(&self.exchanges) {
            member.synchronize().unwrap();
            member.check_exchange(exchange).unwrap_or_else(|error| panic!("{error}"));
        }
    }

    /// The residual of each member.
    fn residuals(&self) -> Vec<Vec<f32>> {
        self.wait();
        let read = |(member, side): (&CudaBackend, &Side)| member.read(&side.residual, 0..self.rows).unwrap();
        self.members.iter().zip(&self.sides).map(read).collect()
    }
}

#[test]
#[ignore = "needs a GPU; two say more; run with `--ignored` where there are some"]
fn recorded_meetings_give_the_sums_of_slow_ones() {
    let _alone = alone();
    for (rows, width) in [(1, 4096), (16, 4096), (17, 4096), (5, 512)] {
        let [slow, recorded] = [Turn::Slow, Turn::Recorded].map(|turn| {
            let mut recurrence = Recurrence::new(rows, width);
            (0..1000).for_each(|_| recurrence.turn(turn));
            recurrence.residuals()
        });
        assert!(slow[0] == slow[1], "{rows} rows of {width}: members disagree");
        assert!(recorded == slow, "{rows} rows of {width}: other sums where nobody waits");
        assert!(slow[0].iter().all(|value| value.is_finite()) && slow[0][0] != numbers(7, 1)[0]);
    }
}

#[test]
#[ignore = "needs a GPU; two say more; run with `--ignored` where there are some"]
fn few_and_many_rows_and_broken_turns_follow_each_other() {
    let _alone = alone();
    let [slow, launched] = [Turn::Slow, Turn::Launched].map(|turn| {
        let mut recurrence = Recurrence::new(17, 4096);
        for index in 0..400 {
            // Up to 16 rows are sent, 17 are read where they are.
            recurrence.rows = [1, 17, 16, 16, 5, 17, 17][index % 7];
            recurrence.turn(turn);
            if index % 11 == 0 {
                recurrence.broken_turn();
            }
        }
        recurrence.rows = 17;
        recurrence.residuals()
    });
    assert!(slow[0] == slow[1] && launched == slow, "other sums where nobody waits");
    assert!(slow[0].iter().all(|value| value.is_finite()));
}

/// Prints what a meeting takes: `cargo test --release -p cogvlm-cuda --test together -- --ignored --nocapture
/// meeting_takes`
#[test]
#[ignore = "needs a GPU; two say more; prints what a meeting takes"]
#[expect(clippy::print_stderr, reason = "what it is for")]
fn what_a_meeting_takes() {
    let _alone = alone();
    const TURNS: u32 = 500;
    for rows in [1, 4, 16, 256, 1024] {
        let mut recurrence = Recurrence::new(rows, 4096);
        let mut microseconds = |turn: Turn| {
            recurrence.begin_anew();
            (0..10).for_each(|_| recurrence.turn(turn));
            recurrence.wait();
            let begin = Instant::now();
            (0..TURNS).for_each(|_| recurrence.turn(turn));
            recurrence.wait();
            begin.elapsed().as_secs_f64() * 1e6 / f64::from(2 * TURNS)
        };
        let [together, products, meetings] =
            [Turn::Recorded, Turn::ProductsAlone, Turn::MeetingsAlone].map(&mut microseconds);
        eprintln!(
            "{rows:5} rows of 4096: {together:8.2} us for a product of 4096 x 4096 and a meeting with norm, \
             {products:8.2} us for the product and a norm alone, {meetings:8.2} us for a meeting alone, of sums that \
             are read"
        );
    }
}
