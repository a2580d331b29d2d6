// What the kernels for many tokens share: which tile a CTA computes, and results in 16 bits.
//
// The macro HALF says whether results are float16, not bfloat16.

#pragma once
#include "ptx.cuh"

constexpr int BAND = 8;                                    // tiles of tokens that are worked on together

__device__ __forceinline__ u32 pack_16(float low, float high) {
    return round_16<HALF>(low) | static_cast<u32>(round_16<HALF>(high)) << 16;
}

// Which rows and tokens tile t has: tokens go first, within bands, so that CTAs that run at one time
// share both. The CTAs of a cluster of SHARING have the same tokens and rows of their own.
template <int SHARING>
struct Tile {
    int rows, tokens;

    __device__ __forceinline__ Tile(int t, int row_groups, int token_tiles) {
        const int band = t / (row_groups * BAND), width = min(BAND, token_tiles - band * BAND);
        const int within = t - band * row_groups * BAND;
        tokens = band * BAND + within % width;
        rows = within / width * SHARING + (SHARING == 1 ? 0 : static_cast<int>(cluster_rank()));
    }
};
