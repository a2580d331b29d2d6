// A unit: 16 rows x 128 columns of a weight, as `arrange.py` lays it out and every kernel for these weights
// reads it. Units of the same 16 rows, a **tile**, lie one after another. Of a 2:4 one:
//
//   values    W16: 4 x 512 B   for each 32 columns, 16 B a lane: the registers R0..R3 of operand A
//             int8, fp8: 2 x 512 B   for each 64 columns, 16 B a lane: two words for each 32 columns
//             int4: 512 B      16 B a lane: one word for each 32 columns
//   metadata  256 B            8 B a lane: one word for each 64 columns
//   scales    32 B             only with GROUP_SCALES: lane/4 reads rows g and g+8 in one word
//
// Lane l of a warp has g = l/4, t = l%4. R0 is row g, kept columns 2t and 2t+1 of 16; R1 row g+8;
// R2, R3 the same rows, kept columns 2t+8, 2t+9. A metadata word holds in its low half the four
// nibbles of row g, columns 16t..16t+15 of the 64, in its high half those of row g+8.
//
// A unit of which all columns are kept has no metadata, and twice the values, for eight mma of the dense tensor
// cores: mma 2s + j of lane l has columns 32s + 8t + 4j .. + 3 of rows g and g+8, R0 and R1 the first two. In
// which order an mma takes its columns is free: so a lane's B registers of 32 columns are 16 neighbouring bytes.
//
//   values    int8: 4 x 512 B   for each 32 columns, 16 B a lane: two words for each mma
//             int4: 2 x 512 B   for each 64 columns, 16 B a lane: one word for each mma
//
// Units of 4:8 are as large as those of 2:4: see of_eight.cuh.
//
// Numbers become 16-bit floats by masks and shifts alone (`expand_word`): codes are stored so that they
// are subnormal, or small, floats, and a power of two restores the value.
//
// The macros KIND, STRUCTURE, GROUP_SCALES and HALF say how values are stored, which columns have some,
// whether each 128 columns of a row have a scale, and whether 16-bit floats are float16, not bfloat16.

#pragma once
#include "ptx.cuh"

enum Kind { W16, INT8, FP8, INT4 };
enum Structure { TWO_OF_FOUR, FOUR_OF_EIGHT, ALL };

static_assert(STRUCTURE != ALL || KIND == INT8 || KIND == INT4, "weights without zeros are kept as integers");

constexpr int UNIT_COLUMNS = 128;
constexpr int VALUE_BYTES = (KIND == W16 ? 2048 : KIND == INT4 ? 512 : 1024) * (STRUCTURE == ALL ? 2 : 1);
constexpr int META_BYTES = STRUCTURE == ALL ? 0 : 256;
constexpr int SCALE_BYTES = GROUP_SCALES ? 32 : 0;
constexpr int UNIT_BYTES = VALUE_BYTES + META_BYTES + SCALE_BYTES;
constexpr bool DENSE_CORES = STRUCTURE != TWO_OF_FOUR;
constexpr int MULTIPLICATIONS = DENSE_CORES ? 8 : 4;       // mma, or mma.sp, that a unit takes
constexpr int STEP_WORDS = VALUE_BYTES / 512;              // of a lane, for each mma.sp

// What brings bfloat16's codes into the range of ordinary numbers: 2^120 or 2^126, twice. Products with
// the subnormal ones would leave float32's range.
constexpr u32 RAISE_W = KIND == FP8 ? 0x7B807B80 : 0x7E807E80;
// What code x RAISE_W, or float16's code, has to be multiplied by.
constexpr float RESTORE_RAISED =
    KIND == W16 ? 1.0f : HALF ? (KIND == FP8 ? 0x1p8f : 0x1p24f) : (KIND == FP8 ? 1.0f : 0x1p7f);

// What one word gives of an mma's A registers: all four, from `first` on two, or that one.
//
// int4, int8: sign and magnitude; in place they are subnormals of value magnitude x 2^-133 (bf16) or
// 2^-24 (half). One word serves two (int8) or four (int4) registers by rotation.
// fp8: sign, exponent and mantissa in place make the value x 2^-120 (bf16) or 2^-8 (half), also for
// fp8's own subnormals. The second register's bits fill the gaps that the first leaves.
__device__ __forceinline__ void expand_word(u32 (&a)[4], int first, u32 w) {
    if constexpr (KIND == W16) {
        a[first] = w;
    } else if constexpr (KIND == INT4) {
        #pragma unroll
        for (int r = 0; r < 4; ++r) a[r] = __funnelshift_l(w, w, 4 * r) & 0x80078007u;
    } else if constexpr (KIND == INT8) {
        a[first] = w & 0x807F807Fu;
        a[first + 1] = __funnelshift_l(w, w, 8) & 0x807F807Fu;
    } else if constexpr (HALF) {
        a[first] = w & 0xBF80BF80u;
        a[first + 1] = ((w << 7) & 0x3F803F80u) | ((w << 1) & 0x80008000u);
    } else {
        a[first] = w & 0x87F087F0u;
        a[first + 1] = ((w << 4) & 0x80F080F0u) | ((w >> 4) & 0x07000700u);
    }
}

// A unit's bytes as a lane loads them.
struct Unit {
    uint4 values[VALUE_BYTES / 512];
    uint2 metadata;
    u32 scales;

    __device__ __forceinline__ void load(u32 unit, int lane) {
        #pragma unroll
        for (int i = 0; i < VALUE_BYTES / 512; ++i) values[i] = load_shared_128(unit + 512 * i + 16 * lane);
        if constexpr (META_BYTES > 0) metadata = load_shared_64(unit + VALUE_BYTES + 8 * lane);
        if constexpr (GROUP_SCALES) scales = load_shared_32(unit + VALUE_BYTES + META_BYTES + lane / 4 * 4);
    }

    // A word that is known only when every load has arrived.
    __device__ __forceinline__ u32 any() const {
        u32 word = META_BYTES > 0 ? metadata.x : 0;
        if constexpr (GROUP_SCALES) word ^= scales;
        #pragma unroll
        for (int i = 0; i < VALUE_BYTES / 512; ++i) word ^= values[i].x;
        return word;
    }
};

// The A registers of a unit's multiplications; of 4:8 `expand_of_eight` makes them.
template <bool RAISED, int COUNT>
__device__ __forceinline__ void expand(u32 (&a)[COUNT][4], const Unit& unit) {
    constexpr int WORDS = VALUE_BYTES / 128 / COUNT;           // of a lane, for each of them
    #pragma unroll
    for (int i = 0; i < VALUE_BYTES / 512; ++i) {
        const u32 words[4] = {unit.values[i].x, unit.values[i].y, unit.values[i].z, unit.values[i].w};
        #pragma unroll
        for (int j = 0; j < 4; ++j)
            expand_word(a[(4 * i + j) / WORDS], (4 * i + j) % WORDS * (4 / WORDS), words[j]);
    }
    if constexpr (RAISED) {
        #pragma unroll
        for (int s = 0; s < COUNT; ++s)
            #pragma unroll
            for (int i = 0; i < 4; ++i) a[s][i] = multiply_bf16x2(a[s][i], RAISE_W);
    }
}
