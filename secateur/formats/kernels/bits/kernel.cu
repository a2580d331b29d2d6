// y = x W^T + bias for a weight W with zeros anywhere and few tokens (1 to 16), on the tensor cores.
//
// W is stored as a bit for each weight and the numbers that are not zero; lanes.cuh draws how they lie. Each
// lane spreads its own numbers to the places that its bits name, by byte permutations, and what comes out is
// operand A of a dense product:
//
//   D[16 rows, 8 tokens] += A[16 rows, 16 columns] B[16 columns, 8 tokens]              mma m16n8k16
//
// The bound is stored bytes / memory bandwidth: at half the weights 16 x 0.5 + 1 bits a weight, and a fifth
// of the numbers more, because the lane with the most sets the lines of a unit. Beside it, for four weights
// a lane: 15 instructions, and five reads of shared memory.
//
// A CTA takes GROUP tiles of 16 rows at a time, and the next ones when these are done, so that all SMs have as
// many. SPLITS warps split a tile's columns, unit by unit. Each warp has a ring of its own for the units to come,
// filled by bulk copies; it goes on to the next tiles while others finish. Sums of a tile are added in order.
//
// M tokens, N rows of W (out_features), K columns (in_features).
//
//   macro            values     meaning
//   HALF             0, 1       x, W, y and bias are float16, not bfloat16
//   TOKEN_TILES      1 2        operands B, of 8 tokens, for each operand A
//   GROUP            1..16      tiles of 16 rows that a CTA has at a time
//   SPLITS           1..16      warps that split a tile's columns
//   UNIT_COLUMNS     256        of a unit
//   PORTABLE         0, 1       sm_80 to sm_89: no bulk copies or dependent launch
//
// Source: PTX ISA for the instructions' register layouts.

constexpr unsigned COPIES = 32;                            // of the table of meanings, where these are many
#if NUMBER_BITS == 4
#include "codes.cuh"
constexpr int LINES_AT_ONCE = 2;                           // of bits: 128 columns, which share scales
#else
#include "floats.cuh"
constexpr int LINES_AT_ONCE = BIT_LINES;
#endif

constexpr int WARPS = GROUP * SPLITS, THREADS = 32 * WARPS;
constexpr int STAGES = 2;                                  // units that a warp's ring holds
constexpr int TOKENS = 8 * TOKEN_TILES;
constexpr int PITCH = 20;                                  // floats from a token's sums to the next: other banks
constexpr int SUMS = TOKENS * PITCH;                       // of a warp

// acc += A B over some of a unit's lines of bits, from `line` on. `inputs` are the tokens of this lane at its
// first column; unless the unit is WHOLE, those from `end` on are zero, as its weights are.
template <bool WHOLE>
__device__ __forceinline__ void multiply_lines(
    float (&acc)[TOKEN_TILES][4], Run& run, u32 unit, int line, const u16* const (&inputs)[TOKEN_TILES], int first,
    int end) {
    #pragma unroll (WHOLE ? 2 : 1)
    for (const int behind = line + LINES_AT_ONCE; line < behind; ++line) {
        uint4 b[2][TOKEN_TILES];
        #pragma unroll
        for (int s = 0; s < 2; ++s)
            #pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) {
                const int column = first + 64 * line + 32 * s;
                if (WHOLE || column < end) b[s][n] = *reinterpret_cast<const uint4*>(inputs[n] + column);
                else b[s][n] = make_uint4(0, 0, 0, 0);
            }
        Line four(load_shared_32(unit + 4 * (threadIdx.x % 32) + line * LINE_BYTES), run);
        #pragma unroll
        for (int step = 0; step < 4; ++step) {             // of 16 columns
            u32 a[4];
            four.operand(a, step);
            #pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) {
                const uint4 v = b[step / 2][n];
                multiply_16<HALF>(acc[n], a, step % 2 ? v.z : v.x, step % 2 ? v.w : v.y);
            }
        }
    }
}

// acc += A B over a unit, whose first word is here; codes by their scales.
template <bool WHOLE>
__device__ __forceinline__ void multiply(
    float (&acc)[TOKEN_TILES][4], u32 unit, const u16* const (&inputs)[TOKEN_TILES], int first, int end) {
    Run run(unit + 4 * (threadIdx.x % 32));
#if NUMBER_BITS == 4
    #pragma unroll 1
    for (int group = 0; group < BIT_LINES / LINES_AT_ONCE; ++group) {
        float sums[TOKEN_TILES][4] = {};
        const u32 scales = scales_of(unit, group);
        multiply_lines<WHOLE>(sums, run, unit, group * LINES_AT_ONCE, inputs, first, end);
        const float of_row[2] = {float_of_16<HALF>(static_cast<u16>(scales)), float_of_16<HALF>(static_cast<u16>(scales >> 16))};
        #pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n)
            #pragma unroll
            for (int i = 0; i < 4; ++i) acc[n][i] += of_row[i / 2] * sums[n][i];
    }
#else
    multiply_lines<WHOLE>(acc, run, unit, 0, inputs, first, end);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_bits(
    const u16* __restrict__ x,             // [M, K]
    const u32* __restrict__ lines,         // [lines, 32]: the units of each tile, one tile after another
    const int* __restrict__ starts,        // [tiles, units + 1]: the line where each unit starts and ends
    const u16* __restrict__ bias,          // [N], or null: 0
    u16* __restrict__ y,                   // [M, N]
    int M, int N, int K, int stage_bytes) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int tiles = (N + 15) / 16, units = (K + UNIT_COLUMNS - 1) / UNIT_COLUMNS;
    __shared__ float sums[WARPS][SUMS];
    __shared__ __align__(8) u64 barriers[WARPS * STAGES];
    const u32 landed = shared_address(barriers + warp * STAGES);
    const u32 ring = (shared_address(shared) + TABLE_BYTES + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES + warp * STAGES * stage_bytes;
    u64 policy;
    if constexpr (!PORTABLE) policy = evict_first();

    // This warp's units: one of SPLITS of each of its tiles. Which, changes with the tile, so that all have
    // as many in the end.
    struct Place {
        int turn, tile, unit;
    };
    auto first_of = [&](int turn) {
        const int tile = (turn * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)) * GROUP + warp / SPLITS;
        return Place{turn, tile, (warp + turn) % SPLITS};
    };
    auto settle = [&](Place place) {                       // the first unit there is from here on
        while (place.tile < tiles && place.unit >= units) place = first_of(place.turn + 1);
        return place;
    };
    auto next_of = [&](Place place) { return settle(Place{place.turn, place.tile, place.unit + SPLITS}); };
    auto lines_of = [&](Place place) {                     // where the unit starts and ends
        const int* const at = starts + static_cast<size_t>(place.tile) * (units + 1) + place.unit;
        return place.tile < tiles ? make_int2(at[0], at[1]) : make_int2(0, 0);
    };
    Place ahead = settle(first_of(0));                     // the next unit to be copied
    int2 ahead_lines = lines_of(ahead);
    auto fetch = [&](int stage, u32 after) {
        if (ahead.tile < tiles) {
            const u32 bytes = (ahead_lines.y - ahead_lines.x) * LINE_BYTES, to = ring + stage * stage_bytes + (after & K >> 31);
            const u32* const from = lines + static_cast<size_t>(ahead_lines.x) * 32;
            if constexpr (PORTABLE) {
                for (u32 byte = 16 * lane; byte < bytes; byte += 16 * 32) copy_16(to + byte, from + byte / 4, true);
            } else if (one_lane()) {
                barrier_expect(landed + 8 * stage, bytes);
                copy_bulk(to, from, bytes, landed + 8 * stage, policy);
            }
            ahead = next_of(ahead);
            ahead_lines = lines_of(ahead);
        }
        if constexpr (PORTABLE) commit_copies();
    };

    if constexpr (!PORTABLE) {
        if (lane == 0) {
            for (int i = 0; i < STAGES; ++i) barrier_init(landed + 8 * i, 1);
            barrier_init_done();
        }
        __syncwarp();
    }
    for (int i = 0; i < STAGES; ++i) fetch(i, 0);
    know_meanings();
    if constexpr (!PORTABLE) {
        launch_dependents();
        wait_for_predecessor();
    }
    __syncthreads();

    const u16* inputs[TOKEN_TILES];
    #pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) inputs[n] = x + static_cast<size_t>(min(8 * n + g, M - 1)) * K + 8 * t;

    int stage = 0;
    u32 parity = 0;
    for (int turn = 0; first_of(turn).tile - warp / SPLITS < tiles; ++turn) {
        const Place first = first_of(turn);
        float acc[TOKEN_TILES][4] = {};
        for (int unit = first.unit; unit < units && first.tile < tiles; unit += SPLITS) {
            if constexpr (PORTABLE) {
                wait_copies<STAGES - 1>();
                __syncwarp();
            } else {
                barrier_wait(landed + 8 * stage, parity);
            }
            const u32 at = ring + stage * stage_bytes;
            if ((unit + 1) * UNIT_COLUMNS <= K) multiply<true>(acc, at, inputs, unit * UNIT_COLUMNS, K - 8 * t);
            else multiply<false>(acc, at, inputs, unit * UNIT_COLUMNS, K - 8 * t);
            // A load that has been issued can still be in a queue when the copy writes, so the copy is made to
            // depend on the sums, which every lane's loads went into.
            __syncwarp();
            fetch(stage, __float_as_uint(acc[0][0]));
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }

        #pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n)
            #pragma unroll
            for (int i = 0; i < 4; ++i) sums[warp][(8 * n + 2 * t + i % 2) * PITCH + g + i / 2 * 8] = acc[n][i];
        __syncthreads();
        for (int index = threadIdx.x; index < GROUP * TOKENS * 16; index += THREADS) {
            const int row = index % 16, token = index / 16 % TOKENS, place = index / (16 * TOKENS);
            const int n = 16 * ((turn * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x)) * GROUP + place) + row;
            if (token >= M || n >= N) continue;
            float sum = 0.0f;
            #pragma unroll
            for (int split = 0; split < SPLITS; ++split) sum += sums[place * SPLITS + split][token * PITCH + row];
            if (bias) sum += float_of_16<HALF>(bias[n]);
            y[static_cast<size_t>(token) * N + n] = round_16<HALF>(sum);
        }
        __syncthreads();                                   // before sums are written again
    }
}
