// How TMA (sm_90 on) finds the operands of a product.
#pragma once
#include "common.cuh"

// `CUtensorMap` of the driver.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// Field by field as `Maps` in cogvlm-cuda/src/ops/product_wgmma.rs.
struct Maps {
    TensorMap x;         // boxes of 128 rows
    TensorMap x_groups;  // boxes of 8 rows
    TensorMap weight[2];
    TensorMap second[2];
};
