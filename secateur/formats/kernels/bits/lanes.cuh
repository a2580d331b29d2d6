// How a lane reads its weights of a unit: bits that say which are stored, and what is stored, in order.
//
// A **unit** is 16 rows x UNIT_COLUMNS columns of W. Lane (g, t) = (lane / 4, lane % 4) has its rows g and
// g + 8, and of each 32 columns those from 8 t to 8 t + 7: as operands A of two mma m16n8k16 want
// them, if operand B has its columns in the same order. It takes them by fours: **nibbles**.
//
//   nibble 4 s + 2 j + r    row g + 8 r, columns 32 s + 8 t + 4 j .. + 3
//
// A unit lies in memory as **lines** of 128 bytes, a word for each lane:
//
//   first UNIT_COLUMNS / 64 lines   eight nibbles a word, nibble i in bits 4 i .. 4 i + 3
//   then                            the numbers that are kept, in the nibbles' order, 32 / NUMBER_BITS a word; as
//                                   many lines as the lane with the most has words
//
// So a lane's numbers lie in one bank of shared memory, wherever in its run each lane is. `floats.cuh` and
// `codes.cuh` say how numbers of 16 and of 4 bits become operands, each by a table of what bits mean.

#pragma once

#include "ptx.cuh"

constexpr int LINE_BYTES = 128;
constexpr int BIT_LINES = UNIT_COLUMNS / 64;

extern __shared__ __align__(128) u8 shared[];

// The bytes of (low, high) that the lower 16 bits of the selector name. `__byte_perm` masks it first.
__device__ __forceinline__ u32 permuted(u32 low, u32 high, u32 selector) {
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
}
