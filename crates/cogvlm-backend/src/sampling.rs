//! From logits to a token.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

/// How the next token is chosen. The order of steps is upstream's: repetition penalty, temperature, top-k, top-p,
/// softmax, draw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 means greedy: the most probable token, the lowest id on ties.
    pub temperature: f32,
    /// Keep the tokens at least as probable as the k-th; 0 keeps all.
    pub top_k: usize,
    /// Keep the fewest most probable tokens whose mass reaches this; 1 keeps all.
    pub top_p: f32,
    /// Divides positive and multiplies negative scores of tokens seen before; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Seed of the draws: the same seed, prompt and parameters give the same answer.
    pub seed: u64,
}

impl Default for SamplingParams {
    /// Greedy.
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0, seed: 0 }
    }
}

/// One row of logits to choose from.
#[derive(Debug, Clone, Copy)]
pub struct SampleRequest<'a> {
    /// How.
    pub params: &'a SamplingParams,
    /// Every id of prompt and output so far, for the penalty.
    pub seen: &'a [u32],
    /// Index of the token to choose in its answer, from 0: with the seed it determines the draw.
    pub index: u64,
}

/// The draw of token `index` under `seed`: uniform in [0, 1), from the top 53 bits of SplitMix64's output function.
pub fn uniform(seed: u64, index: u64) -> f64 {
    let mut z = seed
        .wrapping_mul(0xD1B5_4A32_D192_ED03)
        .wrapping_add(index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    (z >> 11) as f64 / (1u64 << 53) as f64
}

/// The token that `request` chooses from `logits`.
///
/// Kept tokens are ordered by id for the draw, so that it does not depend on how they were sorted. Logits that are
/// not numbers count as minus infinity.
pub fn sample(logits: &[f32], request: &SampleRequest<'_>) -> u32 {
    let params = request.params;
    let mut scores: Vec<f32> =
        logits.iter().map(|&score| if score.is_nan() { f32::NEG_INFINITY } else { score }).collect();
    if params.repetition_penalty != 1.0 {
        penalise(&mut scores, request.seen, params.repetition_penalty);
    }
    if params.temperature <= 0.0 {
        return argmax(&scores);
    }
    // Relative to the best score, so that a tiny temperature cannot overflow.
    let best = scores[argmax(&scores) as usize];
    let mut kept: Vec<(u32, f64)> = scores
        .iter()
        .enumerate()
        .map(|(id, &score)| (id as u32, f64::from(score - best) / f64::from(params.temperature)))
        .filter(|(_, score)| score.is_finite())
        .collect();
    if kept.is_empty() {
        return argmax(&scores);
    }
    kept.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0)));
    if params.top_k > 0 && params.top_k < kept.len() {
        let threshold = kept[params.top_k - 1].1;
        kept.retain(|(_, score)| *score >= threshold);
    }
    let mass: f64 = kept.iter().map(|(_, score)| score.exp()).sum();
    if params.top_p < 1.0 {
        let mut reached = 0.0;
        let count = kept.iter().take_while(|(_, score)| {
            let wanted = reached < f64::from(params.top_p);
            reached += score.exp() / mass;
            wanted
        });
        let count = count.count().max(1);
        kept.truncate(count);
    }
    kept.sort_by_key(|(id, _)| *id);
    let mass: f64 = kept.iter().map(|(_, score)| score.exp()).sum();
    let mut left = uniform(params.seed, request.index) * mass;
    for (id, score) in &kept {
        left -= score.exp();
        if left < 0.0 {
            return *id;
        }
    }
    kept[kept.len() - 1].0
}

/// Index of the greatest score, the lowest on ties.
pub fn argmax(scores: &[f32]) -> u32 {
    let mut best = 0;
    for (id, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = id;
        }
    }
    best as u32
}

fn penalise(scores: &mut [f32], seen: &[u32], penalty: f32) {
    let mut ids = seen.to_vec();
    ids.sort_unstable();
    ids.dedup();
    for id in ids {
        if let Some(score) = scores.get_mut(id as usize) {
            *score = if *score > 0.0 { *score / penalty } else { *score * penalty };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(logits: &[f32], params: &SamplingParams, seen: &[u32], index: u64) -> u32 {
        sample(logits, &SampleRequest { params, seen, index })
    }

    /// Tokens drawn in 2,000 tries, and how often.
    fn histogram(logits: &[f32], params: &SamplingParams) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        for index in 0..2000 {
            counts[choose(logits, params, &[], index) as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_the_best() {
        assert_eq!(choose(&[1.0, 3.0, 3.0, f32::NAN], &SamplingParams::default(), &[], 0), 1);
        let penalised = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
        assert_eq!(choose(&[1.0, 3.0, 2.5], &penalised, &[1, 1, 9], 0), 2);
        assert_eq!(choose(&[-1.0, -0.9], &penalised, &[1], 0), 0);
    }

    #[test]
    fn draws_follow_the_distribution_and_the_seed() {
        let params = SamplingParams { temperature: 1.0, seed: 5, ..SamplingParams::default() };
        let logits = [0.0, 2f32.ln(), 0.0, f32::NEG_INFINITY];
        let counts = histogram(&logits, &params);
        // Expected 500, 1000, 500, 0; five standard deviations of a binomial are below 112.
        for (count, expected) in counts.iter().zip([500i64, 1000, 500, 0]) {
            assert!((*count as i64 - expected).abs() < 112, "{counts:?}");
        }
        assert_eq!(counts[3], 0);
        let again: Vec<u32> = (0..50).map(|index| choose(&logits, &params, &[], index)).collect();
        let other = SamplingParams { seed: 6, ..params.clone() };
        assert_eq!(again, (0..50).map(|index| choose(&logits, &params, &[], index)).collect::<Vec<_>>());
        assert_ne!(again, (0..50).map(|index| choose(&logits, &other, &[], index)).collect::<Vec<_>>());
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [4f32.ln(), 3f32.ln(), 2f32.ln(), 1f32.ln()];
        let base = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
        let top_k = histogram(&logits, &SamplingParams { top_k: 2, ..base.clone() });
        assert!(top_k[0] > 0 && top_k[1] > 0 && top_k[2] == 0 && top_k[3] == 0, "{top_k:?}");
        // Masses 0.4, 0.3, 0.2, 0.1: two reach 0.65, three are needed for 0.75.
        let top_p = histogram(&logits, &SamplingParams { top_p: 0.65, ..base.clone() });
        assert!(top_p[1] > 0 && top_p[2] == 0, "{top_p:?}");
        let top_p = histogram(&logits, &SamplingParams { top_p: 0.75, ..base.clone() });
        assert!(top_p[2] > 0 && top_p[3] == 0, "{top_p:?}");
        let least = histogram(&logits, &SamplingParams { top_p: 0.0, ..base });
        assert_eq!(least[0], 2000);
    }

    #[test]
    fn ties_at_the_kth_value_are_kept() {
        let params = SamplingParams { temperature: 1.0, top_k: 1, ..SamplingParams::default() };
        let counts = histogram(&[1.0, 1.0, 0.0], &params);
        assert!(counts[0] > 0 && counts[1] > 0 && counts[2] == 0, "{counts:?}");
    }

    #[test]
    fn hopeless_logits_still_give_a_token() {
        let params = SamplingParams { temperature: 0.5, ..SamplingParams::default() };
        assert_eq!(choose(&[f32::NEG_INFINITY; 3], &params, &[], 0), 0);
        assert_eq!(choose(&[f32::NAN; 3], &params, &[], 0), 0);
        assert_eq!(choose(&[f32::INFINITY, 0.0], &params, &[], 0), 0);
    }
}
