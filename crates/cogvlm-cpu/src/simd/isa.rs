//! Levels of vector instructions.
#![expect(unsafe_code, reason = "functions that use instructions beyond the baseline are called here")]

use std::fmt;

/// A level of vector instructions that this machine has: values are made by [`Isa::available`] alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(pub(super) Level);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Isa {
    /// What the compiler assumes of every machine.
    pub const PORTABLE: Self = Self(Level::Portable);

    /// The levels that this machine has, the best last.
    pub fn available() -> Vec<Self> {
        let mut levels = vec![Self::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma") && has!("f16c");
            let avx512 = avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
            let found =
                [(avx2, Level::Avx2), (avx512, Level::Avx512), (avx512 && has!("avx512bf16"), Level::Avx512Bf16)];
            levels.extend(found.into_iter().filter(|(has, _)| *has).map(|(_, level)| Self(level)));
        }
        levels
    }

    /// The fastest level of this machine. That is the highest but for Intel's processors, where a product of bf16 pairs
    /// is slower than two f32 products: 16 cores measured 696 GFLOP/s with it, 1217 without.
    pub fn best() -> Self {
        let mut levels = Self::available();
        #[cfg(target_arch = "x86_64")]
        if is_intel() {
            levels.retain(|level| level.0 != Level::Avx512Bf16);
        }
        levels.pop().unwrap_or(Self::PORTABLE)
    }

    /// Runs `work` compiled for this level: loops that are inlined into it use its vectors.
    #[inline(always)]
    pub(crate) fn vectorised<R>(self, work: impl FnOnce() -> R) -> R {
        match self.0 {
            Level::Portable => work(),
            // SAFETY: values of these levels exist only where `available` found the features.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Bf16 => unsafe { avx512(work) },
        }
    }
}

/// [`Isa::vectorised`] of a block that is inlined whatever its length: what is called instead would be compiled for the
/// baseline. Write loops as `for` in it; adaptors that take closures may not be inlined.
macro_rules! vectorised {
    ($isa:expr, $work:expr $(,)?) => {
        $isa.vectorised(
            #[inline(always)]
            || $work,
        )
    };
}
pub(crate) use vectorised;

/// Whether the processor calls itself `GenuineIntel`.
#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2<R>(work: impl FnOnce() -> R) -> R {
    work()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
fn avx512<R>(work: impl FnOnce() -> R) -> R {
    work()
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 => "avx512-bf16",
        })
    }
}
