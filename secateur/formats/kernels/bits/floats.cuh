// How a lane reads its weights of a unit where these are 16-bit floats: four of them at a time, a nibble of bits.

#pragma once

#include "lanes.cuh"

constexpr int HEAD = BIT_LINES * LINE_BYTES;               // of a unit, before its numbers
constexpr int TABLE_BYTES = 0;                             // of dynamic shared memory

// What a nibble does with the next four numbers h0..h3 of a run, h0 h1 in word `low` and h2 h3 in `high`:
//   x, bits 0..15   selector: the first two weights from (low, 0)
//   x, bits 16..31  16 x how many are kept
//   y, bits 0..15   selector: the last two from (low, high), where high's upper half is h3, or else zero
//   y, bits 16..31  ones where all four are kept, and h3 is one of them
__device__ __forceinline__ uint2 meaning_of(u32 nibble) {
    u32 places[4], kept = 0;
    for (int i = 0; i < 4; ++i) {
        const bool here = nibble >> i & 1;
        places[i] = here ? kept : i < 2 ? 2 : 3;           // two bytes of zeros: 4 and 5, or 6 and 7
        kept += here;
    }
    auto selector = [](u32 a, u32 b) { return (2 * a) | (2 * a + 1) << 4 | (2 * b) << 8 | (2 * b + 1) << 12; };
    return make_uint2(selector(places[0], places[1]) | 16 * kept << 16,
                      selector(places[2], places[3]) | (kept == 4 ? 0xFFFF0000u : 0u));
}

__shared__ __align__(256) uint2 meanings[16];            // so that an address is its place in the lowest byte

// Fills the table, which a barrier of the CTA has to follow.
__device__ __forceinline__ void know_meanings() {
    if (threadIdx.x < 16) meanings[threadIdx.x] = meaning_of(threadIdx.x);
}

// The eight nibbles of a word, each as the address of its meaning.
struct Nibbles {
    u32 table, even, odd;  // the lowest bytes of the addresses, of nibbles 0, 2, 4, 6 and 1, 3, 5, 7

    __device__ __forceinline__ explicit Nibbles(u32 word)
        : table(shared_address(meanings)), even(word << 3 & 0x78787878), odd(word >> 1 & 0x78787878) {}
    __device__ __forceinline__ u32 meaning(int i) const { return permuted(i % 2 ? odd : even, table, 0x7650 + i / 2); }
};

// A lane's place in its run of a unit.
struct Run {
    u32 lines;      // where the lane's words begin, in shared memory
    u32 bits;       // 16 x the numbers that were taken: bits of the run

    // At the beginning of a unit whose first word of this lane is here.
    __device__ __forceinline__ explicit Run(u32 unit) : lines(unit + HEAD), bits(0) {}

    // The four weights of a nibble: two words.
    __device__ __forceinline__ uint2 take(u32 at_meaning) {
        const uint2 meaning = load_shared_64(at_meaning);
        u32 at;
        asm("mad.lo.u32 %0, %1, 4, %2;" : "=r"(at) : "r"(bits & ~31u), "r"(lines));
        const u32 w0 = load_shared_32(at), w1 = load_shared_32(at + LINE_BYTES), w2 = load_shared_32(at + 2 * LINE_BYTES);
        const u32 low = __funnelshift_r(w0, w1, bits), high = __funnelshift_r(w1, w2, bits);
        bits += meaning.x >> 16;
        return make_uint2(permuted(low, 0, meaning.x), permuted(low, high & (meaning.y | 0xFFFF), meaning.y));
    }
};

// What a word of bits has: 64 columns, four operands A, which are taken in order.
struct Line {
    Nibbles nibbles;
    Run& run;

    __device__ __forceinline__ Line(u32 word, Run& run) : nibbles(word), run(run) {}

    // Operand A of columns 16 i to 16 i + 15.
    __device__ __forceinline__ void operand(u32 (&a)[4], int i) {
        const uint2 low = run.take(nibbles.meaning(2 * i)), high = run.take(nibbles.meaning(2 * i + 1));
        a[0] = low.x, a[1] = high.x, a[2] = low.y, a[3] = high.y;
    }
};
