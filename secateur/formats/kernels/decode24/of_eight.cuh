// A unit that keeps four of every eight columns, for the dense tensor cores. It has the bytes of a 2:4 one
// (units.cuh) and is loaded as one; but a lane has whole groups, and puts their numbers at their columns.
//
// Of the 32 columns of a step lane l (g = l/4, t = l%4) has columns 8t..8t+7 of rows g and g+8. The numbers
// that the first four keep lie in front, in ascending order, those of the last four behind, in descending
// order: so where a column's number lies depends on its own four alone. A metadata word serves two steps: bit
// 8c + 4s + 2h + f is set if row g + 8h keeps column 4f + c in step s of the two. Four of eight are, always.
//
//   columns 1, 4, 6 and 7 are kept:   numbers of column 1, 7, 6, 4   bits f = 0: 0100   f = 1: 1011
//
//   W16     16 B a lane and step: the first two numbers of row g, of row g+8, the last two of row g, of row g+8
//   int4    one word a lane and step. Of row g's number r the magnitude is in bits 0..2 of byte r and the sign
//           in bit 7; of row g+8's the magnitude is in bits 4..6, and the sign in bit 3 of the byte behind
//
// The numbers of a lane's eight columns are its A registers of two mma, and 16 neighbouring bytes of a token
// are its B registers: in which order an mma takes its columns is free as long as A and B agree.
//
// A half's four bits, spread over bytes, become the selectors of its two byte permutations by one
// multiplication, which adds up how many are kept before each column (`selectors`). A unit (128 columns,
// 16 rows, 8 tokens) takes a warp, beside loads and loop:
//
//            LOP3, PRMT, SHF   IMAD   HMMA                (the first at 2 a cycle and SM, of 4 that issue)
//   int4     86                16     8        43 cycles  of 42 that its 800 bytes take at 4.4 TB/s
//   W16      130               16     8        65         of 121
//
// Source: ours.

#pragma once
#include "units.cuh"

static_assert(STRUCTURE != FOUR_OF_EIGHT || KIND == W16 || KIND == INT4, "no other numbers are kept four of eight");

// Four bytes of b:a, each chosen by a nibble of the selector's low half; one of 8 or more replicates the sign
// of the byte that it names.
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}

// For four columns the two bytes that each takes, a nibble a byte: of a group's two words of 16-bit numbers,
// or of its magnitudes and its signs. Bits J, J + 8, J + 16, J + 24 of the metadata tell which are kept. A
// column behind P kept ones has number P, or from the end 3 - P; one that is not kept has a byte with the top
// bit set, whose nibbles replicate the signs of magnitudes: zeros.
template <int J>
__device__ __forceinline__ u32 selectors(u32 metadata) {
    constexpr bool FROM_THE_END = J % 2;
    constexpr int NUMBER = KIND == INT4 ? 0x11 : 0x22;                 // from a number's bytes to the next one's
    constexpr int BEFORE = NUMBER * (FROM_THE_END ? -0x01010100 : 0x01010100);
    constexpr int NONE = 0x88, KEPT = (KIND == INT4 ? 0x40 : 0x10) - NONE;
    constexpr u32 BASE = (NONE + (FROM_THE_END ? 3 * NUMBER : 0)) * 0x01010101u;
    static_assert((BEFORE + KEPT) % 8 == 0, "the bits' own place, J, is made up for by the factor");
    constexpr u32 FACTOR = static_cast<u32>((BEFORE + KEPT) / 8 * (8 >> J));
    return (metadata & 0x01010101u << J) * FACTOR + BASE;
}

// The numbers of four columns, in pairs.
__device__ __forceinline__ void place(u32& first, u32& second, u32 low, u32 high, u32 which) {
    first = permute(low, high, which);
    second = permute(low, high, which >> 16);
    if constexpr (KIND != INT4) {          // no byte of them is known to be positive
        first &= ~permute(which, which, 0x9988);
        second &= ~permute(which, which, 0xBBAA);
    }
}

// The A registers of a unit's eight mma.
__device__ __forceinline__ void expand_of_eight(u32 (&a)[8][4], const Unit& unit) {
    #pragma unroll
    for (int s = 0; s < 4; ++s) {
        u32 low[2], high[2];               // of rows g and g + 8
        if constexpr (KIND == INT4) {
            const uint4 steps = unit.values[0];
            const u32 word = s == 0 ? steps.x : s == 1 ? steps.y : s == 2 ? steps.z : steps.w;
            const u32 turned = __funnelshift_r(word, word, 4);
            low[0] = word & 0x07070707u, high[0] = word & 0x80808080u;
            low[1] = turned & 0x07070707u, high[1] = turned & 0x80808080u;
        } else {
            const uint4 numbers = unit.values[s];
            low[0] = numbers.x, low[1] = numbers.y, high[0] = numbers.z, high[1] = numbers.w;
        }
        u32 metadata = s < 2 ? unit.metadata.x : unit.metadata.y;
        if (s % 2) metadata >>= 4;
        place(a[2 * s][0], a[2 * s][2], low[0], high[0], selectors<0>(metadata));
        place(a[2 * s + 1][0], a[2 * s + 1][2], low[0], high[0], selectors<1>(metadata));
        place(a[2 * s][1], a[2 * s][3], low[1], high[1], selectors<2>(metadata));
        place(a[2 * s + 1][1], a[2 * s + 1][3], low[1], high[1], selectors<3>(metadata));
    }
}

// The A registers of a unit of any structure; those of 4:8 are never raised.
template <bool RAISED, int COUNT>
__device__ __forceinline__ void expand_any(u32 (&a)[COUNT][4], const Unit& unit) {
    if constexpr (STRUCTURE == FOUR_OF_EIGHT) expand_of_eight(a, unit);
    else expand<RAISED>(a, unit);
}
