//! Elements that a rule makes.

use half::bf16;

use crate::ElementRule;

/// Difference between the states of neighbouring elements.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
/// Row `r` of a mixture adds up rows `(r * MUL[k] + ADD[k]) % rows`, each times its weight.
const MUL: [u64; 4] = [1_000_003, 1_000_033, 1_000_037, 1_000_039];
const ADD: [u64; 4] = [12_345, 24_690, 37_035, 49_380];
const WEIGHTS: [f32; 4] = [1.0, 0.89, 0.78, 0.67];

/// Element `index` of a tensor of shape `[rows, columns]` (of any shape, where no rows are mixed).
pub fn made_element(rule: ElementRule, [rows, columns]: [usize; 2], index: usize) -> bf16 {
    let number = if rule.mixes_rows {
        let (row, column) = ((index / columns) as u64, (index % columns) as u64);
        let terms = [0, 1, 2, 3].map(|k| {
            let source = (row * MUL[k] + ADD[k]) % rows as u64;
            WEIGHTS[k] * uniform(rule.key, source * columns as u64 + column)
        });
        ((terms[0] + terms[1]) + terms[2]) + terms[3]
    } else {
        uniform(rule.key, index as u64)
    };
    bf16::from_f32(rule.base + rule.amplitude * number)
}

/// Number `index` of the stream `key`, in [-1, 1), a multiple of 2^-23.
fn uniform(key: u64, index: u64) -> f32 {
    let mut z = key.wrapping_add(index.wrapping_mul(STEP));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    ((z >> 40) as i32 - (1 << 23)) as f32 / (1 << 23) as f32
}
