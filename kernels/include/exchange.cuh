// How devices that compute one layer together (members) tell each other the sums of few rows: whoever computes a sum
// writes it into the memory of every other member, in one word with the number of the exchange, so that a word which has
// the number has the sum. Nothing is signalled beside, and nobody reads what lies on another device.
//
// The number: each of the two slots that are used in turn has a word with the number of its next exchange. Products
// read it, and so does whoever adds up (add_partials.cu), who then gives the other slot the number that follows. So all
// members count alike, in memory, and a launch can be recorded and run again.
// Why a word is not overwritten before it was read: the one with the same place is written after the next exchange of
// the writer. There it had words of the reader, who wrote them after it had read this one.
#pragma once
#include "common.cuh"

constexpr u32 MAX_MEMBERS = 8;

// Field by field as `Push` in cogvlm-cuda/src/exchange.rs.
struct Push {
    u64* inboxes[MAX_MEMBERS - 1];  // in the memory of each other member: [rows][width]
    const u32* exchange;            // the number of this exchange
    u32 num_others;

    __device__ __forceinline__ u32 number() const { return load_word(exchange); }

    __device__ __forceinline__ void tell(u64 at, float sum, u32 number) const {
        const u64 word = u64(number) << 32 | __float_as_uint(sum);
        for (u32 other = 0; other < num_others; ++other)
            asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(inboxes[other] + at), "l"(word) : "memory");
    }
};

// For products that nobody else is told of.
struct NoPush {
    __device__ __forceinline__ u32 number() const { return 0; }
    __device__ __forceinline__ void tell(u64, float, u32) const {}
};
