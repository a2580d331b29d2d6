// How a lane reads its weights of a unit where these are codes of 4 bits, two's complement, with a scale for each
// 128 columns of a row. Beside what lanes.cuh draws, a unit has one line of scales behind its bits: word (g, q)
// holds that of row g and, in its upper half, of row g + 8, in the unit's group q.
//
// A **byte** of bits, two nibbles, is four columns of row g and the same of row g + 8: all of a lane's operand A
// of one mma. The next eight codes of its run, in two words as they are and four bits down, are bytes whose
// lower halves are all of them; two permutations put these at their columns.

#pragma once

#include "lanes.cuh"

constexpr int SCALES = BIT_LINES * LINE_BYTES;             // of a unit, before its scales
constexpr int HEAD = SCALES + LINE_BYTES;                  // and before its numbers
static_assert(UNIT_COLUMNS == 512, "a line of scales");
static_assert(COPIES == 1 || COPIES == 32, "of the table of meanings");

// What a byte of bits does with the next eight codes of a run, codes 0, 2, 4, 6 in the lower halves of the bytes
// of `low` and 1, 3, 5, 7 in those of `high`:
//   x, bits 0..15   selector: row g's columns 0, 2, 1, 3. What is not kept is the sign of high's last byte: zero
//   x, bits 16..    4 x how many are kept, of both rows
//   y               selector: row g + 8's
__device__ __forceinline__ uint2 meaning_of_byte(u32 byte) {
    u32 selectors[2] = {}, kept = 0;
    for (int i = 0; i < 8; ++i) {
        const bool here = byte >> i & 1;
        const u32 which = here ? kept % 2 * 4 + kept / 2 : 15;
        const int column = i % 4, place = column / 2 + column % 2 * 2;
        selectors[i / 4] |= which << 4 * place;
        kept += here;
    }
    return make_uint2(selectors[0] | 4 * kept << 16, selectors[1]);
}

constexpr int TABLE_BYTES = 256 * 8 * COPIES;              // of dynamic shared memory, its first

// Four bits of each half, as `floats_of` takes them. Read, not known: LOP3 takes one constant, and the compiler would
// make this one anew each time.
__shared__ u32 lower_bits;

// Fills the table, which a barrier of the CTA has to follow. Lanes with a copy each never wait for a bank.
__device__ __forceinline__ void know_meanings() {
    if (threadIdx.x == 0) lower_bits = 0x000F000F;
    for (u32 byte = threadIdx.x; byte < 256; byte += blockDim.x) {
        const uint2 meaning = meaning_of_byte(byte);
        for (u32 copy = 0; copy < COPIES; ++copy)          // neighbours write to other banks
            store_shared_64(shared_address(shared) + 8 * (COPIES * byte + (copy + byte) % COPIES), meaning);
    }
}

// Byte i of a word.
__device__ __forceinline__ uint2 meaning_of_byte_in(u32 word, int i) {
    const u32 own = threadIdx.x % COPIES * 8;
    const u32 at = COPIES == 32 ? permuted(word, own, 0x7604 | i << 4) : (word >> 8 * i & 0xFF) * 8;
    return load_shared_64(shared_address(shared) + at);
}

// Codes as 16-bit floats, exactly: the lower four bits of both halves, in the bits of 128 (bf16) or 1024 (half),
// are 8 more than the code, which is taken away.
__device__ __forceinline__ u32 floats_of(u32 codes, u32 lower) {
    constexpr u32 BIASED = HALF ? 0x64086408 : 0x43084308, BIAS = HALF ? 0xE408E408 : 0xC308C308;
    const u32 biased = (codes & lower) ^ BIASED;
    return HALF ? add_f16x2(biased, BIAS) : add_bf16x2(biased, BIAS);
}

// A lane's place in its run of a unit.
struct Run {
    u32 lines;      // where the lane's words begin, in shared memory
    u32 bits;       // 4 x the codes that were taken: bits of the run
    u32 lower;

    // At the beginning of a unit whose first word of this lane is here.
    __device__ __forceinline__ explicit Run(u32 unit)
        : lines(unit + HEAD), bits(0), lower(load_shared_32(shared_address(&lower_bits))) {}
};

// What a word of bits has: 64 columns, four operands A. All that has to be loaded for them is asked for first, as
// loads stay in the order in which they are written.
struct Line {
    uint2 meanings[4];
    u32 codes[4], lower;

    __device__ __forceinline__ Line(u32 word, Run& run) : lower(run.lower) {
        #pragma unroll
        for (int i = 0; i < 4; ++i) meanings[i] = meaning_of_byte_in(word, i);
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 at;
            asm("mad.lo.u32 %0, %1, 4, %2;" : "=r"(at) : "r"(run.bits & ~31u), "r"(run.lines));
            codes[i] = __funnelshift_r(load_shared_32(at), load_shared_32(at + LINE_BYTES), run.bits);
            run.bits += meanings[i].x >> 16;
        }
    }

    // Operand A of columns 16 i to 16 i + 15.
    __device__ __forceinline__ void operand(u32 (&a)[4], int i) const {
        const u32 low = codes[i], high = low >> 4;
        const u32 first = permuted(low, high, meanings[i].x), second = permuted(low, high, meanings[i].y);
        a[0] = floats_of(first, lower), a[2] = floats_of(first >> 8, lower);
        a[1] = floats_of(second, lower), a[3] = floats_of(second >> 8, lower);
    }
};

// The scales of rows g and g + 8 in a group of a unit whose first word is here.
__device__ __forceinline__ u32 scales_of(u32 unit, int group) {
    return load_shared_32(unit + SCALES + 16 * (threadIdx.x % 32 / 4) + 4 * group);
}
