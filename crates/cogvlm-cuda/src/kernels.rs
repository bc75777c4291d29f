//! The embedded kernels.

// `MODULES`: name and fat binary of every `kernels/NAME.cu`. `ARCHITECTURES`: those that they hold machine code for, by
// nvcc's names without `sm_`; any other GPU runs their PTX of compute capability 8.0.
include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// The least CUDA version whose drivers load the embedded machine code, as the driver numbers it: 13.0's compiler makes
/// code for drivers from 13.0 on, 12's for those of 12.
pub(crate) const CUDA_VERSION: i32 = 12040;

/// Whether kernels were compiled into this executable.
pub fn is_built_in() -> bool {
    !MODULES.is_empty()
}

/// Whether kernels/product_wgmma.cu holds code for a GPU of this compute capability: made for exactly 9.0, and only in
/// builds with 90a.
pub(crate) fn has_wgmma(architectures: &[&str], capability: (u32, u32)) -> bool {
    capability == (9, 0) && architectures.contains(&"90a")
}

/// Whether kernels wait by themselves for those before them (`wait_for_previous` in kernels/include/common.cuh) on a GPU
/// of this compute capability: in code that was compiled for 9.0 or later, which a GPU of 9.0 or later need not run.
pub(crate) fn can_overlap(architectures: &[&str], capability: (u32, u32)) -> bool {
    capability.0 >= 9 && architectures.iter().any(|name| runs_on(name, capability))
}

/// Whether a GPU of this compute capability runs machine code of architecture `name`: that of its major version and no
/// later minor one, and with an `a` only that of exactly its own.
fn runs_on(name: &str, (major, minor): (u32, u32)) -> bool {
    let digits = name.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let Ok(number) = digits.parse::<u32>() else { return false };
    let is_exact = name.ends_with('a');
    number / 10 == major && if is_exact { number % 10 == minor } else { number % 10 <= minor }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [&str; 6] = ["80", "86", "89", "90a", "100", "120"];

    #[test]
    fn hopper_needs_code_of_its_own() {
        assert!(has_wgmma(&ALL, (9, 0)));
        assert!(!has_wgmma(&ALL, (10, 0)) && !has_wgmma(&ALL, (8, 0)));
        assert!(!has_wgmma(&["80", "90"], (9, 0)), "a build without 90a");
        assert!(!has_wgmma(&[], (9, 0)), "PTX alone");
    }

    #[test]
    fn launches_overlap_where_the_code_waits() {
        for capability in [(9, 0), (10, 0), (10, 3), (12, 0), (12, 1)] {
            assert!(can_overlap(&ALL, capability), "{capability:?}");
            assert!(!can_overlap(&["80", "89"], capability), "{capability:?} with PTX of 8.0");
        }
        assert!(!can_overlap(&ALL, (8, 9)), "the GPU cannot");
        assert!(!can_overlap(&ALL, (11, 0)), "no code of that version: PTX of 8.0");
        assert!(can_overlap(&["90"], (9, 0)));
        assert!(!can_overlap(&["90a"], (10, 0)) && !can_overlap(&["103"], (10, 0)));
    }
}
