// The dense weight [N, K] of a weight's units: scale x code in float32, rounded once; zeros where nothing is
// kept.
//
// One warp a unit. Of units for the dense tensor cores a lane has runs of eight columns, which it stores as they
// are. Of 2:4 its registers hold groups of four columns (units.cuh): register i of step s is row g + 8 (i % 2),
// columns 32 s + 16 (i / 2) + 4 t. It asks the quad's lane that has the group's nibble
// for it, and neighbours t, t ^ 1 exchange half of their groups, so that each stores 16 bytes.
// Writes of the weight dominate: 2 bytes a weight, and 0.4 to 1.1 that are read.
//
//   macro            values    meaning
//   KIND             `Kind`    how values are stored
//   STRUCTURE        `Structure` which columns have values
//   GROUP_SCALES     0, 1      each 128 columns of a row have a scale, which lies in the unit
//   HALF             0, 1      the weight and its scales are float16, not bfloat16
//   PORTABLE         0, 1      sm_80 to sm_89: no dependent launch

#include "of_eight.cuh"

constexpr int THREADS = 128;
constexpr u32 ALL_LANES = 0xFFFFFFFF;

// The kept pair of a group of four columns, at the places that the nibble names.
__device__ __forceinline__ uint2 placed(u32 pair, u32 nibble) {
    const u64 group = static_cast<u64>(pair & 0xFFFF) << (nibble & 3) * 16
                    | static_cast<u64>(pair >> 16) << (nibble >> 2 & 3) * 16;
    return make_uint2(static_cast<u32>(group), static_cast<u32>(group >> 32));
}

__device__ __forceinline__ u16 scaled(u32 code, float scale) {
    return round_16<HALF>(float_of_16<HALF>(static_cast<u16>(code)) * RESTORE_RAISED * scale);
}

__device__ __forceinline__ u32 scaled_pair(u32 codes, float scale) {
    if constexpr (KIND == W16) return codes;
    if constexpr (STRUCTURE == FOUR_OF_EIGHT && !HALF) codes = multiply_bf16x2(codes, RAISE_W);    // else `expand` raises them
    return scaled(codes, scale) | static_cast<u32>(scaled(codes >> 16, scale)) << 16;
}

extern "C" __global__ void __launch_bounds__(THREADS) expand_units(
    const u8* __restrict__ weight,         // [N / 16, units, UNIT_BYTES]
    const u16* __restrict__ row_scales,    // [N], or null: 1
    u16* __restrict__ dense,               // [N, K]
    int count, int units, int K) {
    if constexpr (!PORTABLE) launch_dependents();
    const int number = (static_cast<int>(blockIdx.x) * THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4;
    const bool here = number < count;
    const int tile = number / units, column = (number - tile * units) * UNIT_COLUMNS;
    const u8* from = weight + static_cast<size_t>(here ? number : 0) * UNIT_BYTES;

    Unit unit;
    #pragma unroll
    for (int i = 0; i < VALUE_BYTES / 512; ++i)
        unit.values[i] = *reinterpret_cast<const uint4*>(from + 512 * i + 16 * lane);
    if constexpr (META_BYTES > 0) unit.metadata = *reinterpret_cast<const uint2*>(from + VALUE_BYTES + 8 * lane);
    if constexpr (GROUP_SCALES) unit.scales = *reinterpret_cast<const u32*>(from + VALUE_BYTES + META_BYTES + 4 * g);
    if constexpr (!PORTABLE) wait_for_predecessor();       // which may still read what is written here
    if (!here) return;

    float scale[2] = {1.0f, 1.0f};
    #pragma unroll
    for (int h = 0; h < 2; ++h) {
        if constexpr (GROUP_SCALES) scale[h] = float_of_16<HALF>(static_cast<u16>(unit.scales >> 16 * h));
        else if (row_scales) scale[h] = float_of_16<HALF>(row_scales[16 * tile + g + 8 * h]);
    }
    u32 a[MULTIPLICATIONS][4];
    expand_any<KIND != W16 && !HALF>(a, unit);
    if constexpr (DENSE_CORES) {
        #pragma unroll
        for (int s = 0; s < 4; ++s) {
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                const uint4 run = make_uint4(scaled_pair(a[2 * s][h], scale[h]), scaled_pair(a[2 * s][h + 2], scale[h]),
                                             scaled_pair(a[2 * s + 1][h], scale[h]), scaled_pair(a[2 * s + 1][h + 2], scale[h]));
                const int at = column + 32 * s + 8 * t;
                if (at < K) *reinterpret_cast<uint4*>(dense + static_cast<size_t>(16 * tile + g + 8 * h) * K + at) = run;
            }
        }
        return;
    }
    #pragma unroll
    for (int s = 0; s < 4; ++s) {
        const u32 word = s < 2 ? unit.metadata.x : unit.metadata.y;
        u32 places[2];                     // of columns 16 b + 4 t: this row's nibbles low, row g + 8's high
        #pragma unroll
        for (int b = 0; b < 2; ++b) places[b] = __shfl_sync(ALL_LANES, word, 2 * (s % 2) + b, 4) >> 4 * t;
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint2 group[2];
            #pragma unroll
            for (int b = 0; b < 2; ++b) {
                const u32 pair = scaled_pair(a[s][2 * b + h], scale[h]);
                group[b] = placed(pair, places[b] >> 16 * h);
            }
            // an even lane keeps its groups of b = 0 and takes its right neighbour's, an odd one b = 1
            const bool odd = t % 2;
            const uint2 given = odd ? group[0] : group[1], kept = odd ? group[1] : group[0];
            const uint2 taken = make_uint2(__shfl_xor_sync(ALL_LANES, given.x, 1), __shfl_xor_sync(ALL_LANES, given.y, 1));
            const uint4 run = odd ? make_uint4(taken.x, taken.y, kept.x, kept.y)
                                  : make_uint4(kept.x, kept.y, taken.x, taken.y);
            const int at = column + 32 * s + (odd ? 16 + 4 * (t - 1) : 4 * t);
            const size_t row = 16 * tile + g + 8 * h;
            if (at < K) *reinterpret_cast<uint4*>(dense + row * K + at) = run;
        }
    }
}
