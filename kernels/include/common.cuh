// Device code that kernels share: bf16, loads of any element type, reductions, overlapped launches. No CUDA header is
// needed, so that any nvcc from 12.4 on compiles it.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// A bf16 number as its bits.
struct bf16 {
    u16 bits;
};

// Element types as `DType` of the host numbers them (cogvlm-cuda, `dtype_code`).
enum ElementType : u32 { F32 = 0, BF16 = 1, F16 = 2 };

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ __forceinline__ float to_float(float x) { return x; }

// Nearest, ties to even.
__device__ __forceinline__ bf16 to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two at once: `low` in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

__device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ float f16_to_float(u16 bits) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
}

// `x` as it is after being stored as T.
template <class T> __device__ __forceinline__ float rounded(float x);
template <> __device__ __forceinline__ float rounded<float>(float x) { return x; }
template <> __device__ __forceinline__ float rounded<bf16>(float x) { return to_float(to_bf16(x)); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return to_bf16(x); }

// Element `i` of an array of any type.
__device__ __forceinline__ float load_element(const void* p, u32 type, u64 i) {
    if (type == BF16) return to_float(static_cast<const bf16*>(p)[i]);
    if (type == F32) return static_cast<const float*>(p)[i];
    return f16_to_float(static_cast<const u16*>(p)[i]);
}

// Overlapped launches (programmatic dependent launch, sm_90 on). A kernel that was launched with overlap may start
// before the one before it has ended. Every kernel calls `wait_for_previous` before it reads or writes anything but
// weights and tables of the batch, which a copy wrote before the step, and `allow_next` as early as it likes: the next
// kernel's own wait covers all of this one, if a thread of this one has waited itself.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void allow_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Past the cache of the multiprocessor, which may hold what it read during a kernel that ran before.
__device__ __forceinline__ u32 load_word(const u32* p) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

// Towards the second-level cache, nothing more: whatever is there by then may still change.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
    return v;
}

// Sum of `v` over the block, given to every thread; all THREADS threads must call it.
template <u32 THREADS> __device__ __forceinline__ float block_sum(float v) {
    __shared__ float partial[THREADS / 32];
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();  // partial[] is complete before anyone reads it
    float total = 0.0f;
#pragma unroll
    for (u32 warp = 0; warp < THREADS / 32; ++warp) total += partial[warp];
    __syncthreads();  // everyone has read partial[] before a next call overwrites it
    return total;
}
