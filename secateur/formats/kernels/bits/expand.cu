// The dense weight [N, K] of a weight's bits and numbers; lanes.cuh draws how they lie.
//
// One warp a unit. A lane spreads its numbers as for a product, and stores what it has of a row and 32 columns: 16
// bytes. Writes of the weight dominate.
//
//   macro            values     meaning
//   NUMBER_BITS      4, 16      of a kept weight: a code, which its scale is multiplied by, or a 16-bit float
//   HALF             0, 1       the weight is float16, not bfloat16
//   UNIT_COLUMNS     512, 256   of a unit, of codes or floats
//   PORTABLE         0, 1       sm_80 to sm_89: no dependent launch

constexpr unsigned COPIES = 1;                             // of the table of meanings: few weights would pay for more
#if NUMBER_BITS == 4
#include "codes.cuh"
#else
#include "floats.cuh"
#endif

constexpr int WARPS = 4;

extern "C" __global__ void __launch_bounds__(32 * WARPS) expand_bits(
    const u32* __restrict__ lines,         // [lines, 32]: the units of each tile, one tile after another
    const int* __restrict__ starts,        // [tiles, units + 1]: the line where each unit starts and ends
    u16* __restrict__ dense,               // [N, K]
    int N, int K, int stage_bytes) {
    if constexpr (!PORTABLE) launch_dependents();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int units = (K + UNIT_COLUMNS - 1) / UNIT_COLUMNS, tiles = (N + 15) / 16;
    const int number = static_cast<int>(blockIdx.x) * WARPS + warp, tile = number / units, unit = number % units;
    know_meanings();
    const u32 stage = (shared_address(shared) + TABLE_BYTES + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES + warp * stage_bytes;
    if (tile < tiles) {
        const int* const at = starts + static_cast<size_t>(tile) * (units + 1) + unit;
        const u32* const from = lines + static_cast<size_t>(at[0]) * 32;
        const int bytes = (at[1] - at[0]) * LINE_BYTES;
        for (int byte = 16 * lane; byte < bytes; byte += 16 * 32) copy_16(stage + byte, from + byte / 4, true);
    }
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    if constexpr (!PORTABLE) wait_for_predecessor();       // which may still read what is written here
    if (tile >= tiles) return;

    Run run(stage + 4 * lane);
    for (int line = 0; line < BIT_LINES; ++line) {
        Line four(load_shared_32(stage + 4 * lane + line * LINE_BYTES), run);
        #pragma unroll
        for (int s = 0; s < 2; ++s) {
            u32 a[2][4];                                   // of columns 8 t + 4 j, as operands A
            #pragma unroll
            for (int j = 0; j < 2; ++j) four.operand(a[j], 2 * s + j);
#if NUMBER_BITS == 4
            const u32 scales = scales_of(stage, line / 2);
            #pragma unroll
            for (int j = 0; j < 2; ++j)
                #pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const u32 scale = permuted(scales, 0, i % 2 ? 0x3232 : 0x1010);
                    a[j][i] = HALF ? multiply_f16x2(a[j][i], scale) : multiply_bf16x2(a[j][i], scale);
                }
#endif
            const int column = unit * UNIT_COLUMNS + 64 * line + 32 * s + 8 * t;
            #pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = 16 * tile + g + 8 * r;
                if (row < N && column < K)
                    *reinterpret_cast<uint4*>(dense + static_cast<size_t>(row) * K + column)
                        = make_uint4(a[0][r], a[0][r + 2], a[1][r], a[1][r + 2]);
            }
        }
    }
}
