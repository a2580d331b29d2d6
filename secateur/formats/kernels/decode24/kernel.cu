// y = x W^T + bias for a 2:4 weight W and few tokens (1 to 64), on the sparse tensor cores, or for a 4:8 one,
// or one of integers without zeros, on the dense ones.
//
// At few tokens a linear layer is a stream of weights from memory, and everything here serves that
// stream: the weights are read once, in order, in pieces of one to a few KB, with enough of them
// under way; what is not weights (activations, sums, results) must not hold the stream up.
//
// The bound is packed bytes / memory bandwidth. On an H200 (4.8 TB/s by its data sheet) one token takes
//   28672 x 4096   16-bit 30.0 us, 4.4 TB/s, 92 %    int4 12.4 us, 3.7 TB/s, 77 %
//    6144 x 4096   16-bit  7.0 us, 4.0 TB/s, 84 %    int4  3.3 us, 2.9 TB/s, 60 %
// (docs/formats/measured-gpu.md, bench/results/decode_2026-11-23_nvidia-h200_b42fe9c.csv).
//
//   D[16 rows, 8 tokens] += A[16 rows, 32 columns, 2:4] B[32 columns, 8 tokens]        mma.sp m16n8k32
//
// Weights are operand A, tokens the 8 columns of operand B. A **unit** is 16 rows x 128 columns of W
// (four mma.sp); it is stored as one run of bytes, units of the same 16 rows, a **tile**, one after another:
// units.cuh draws the layout. Units of 4:8 have as many bytes, and eight mma: see of_eight.cuh. Those of which
// all columns are kept have eight mma, too.
//
// Numbers become 16-bit floats by masks and shifts alone (`expand_word`): codes are stored so that they
// are subnormal, or small, floats, and a power of two restores the value. bf16 products would then
// leave float32's range, so the activations are multiplied by 2^64 on their way to shared memory
// (or, where activations are streamed, on their way from there to the dense tensor cores; for the sparse ones,
// the weights by 2^126 or 2^120).
//
// A cluster computes 16 WARP_ROWS WARP_TILES rows; each of its CTAs takes a part of the columns, and
// the CTA's WARP_ROWS x WARP_SPLITS warps split rows and columns again. Each warp runs through its own
// part of the weights with its own ring of stages, filled by bulk copies: no CTA-wide synchronisation
// while weights flow. At the end each warp sends its sums to the CTA of the cluster that owns them,
// which adds them in a fixed order and stores: deterministic, no workspace, no atomics.
//
// Kernels follow one another by programmatic dependent launch: the ring is filled before
// `wait_for_predecessor`, because weights do not depend on the kernel before.
//
// M tokens, N rows of W (out_features), K columns (in_features). All else is fixed when it is compiled,
// by macros that `LaunchConfig.defines` sets (config.py): from the layer and the number of tokens,
// from the fields of the launch config, from both together, and from the device.
//
//   macro            values    from     meaning
//   KIND             `Kind`    layer    how values are stored
//   STRUCTURE        `Structure` layer  which columns have values
//   GROUP_SCALES     0, 1      layer    each 128 columns of a row have a scale, which lies in the unit
//   HALF             0, 1      layer    x, y, scales and bias are float16, not bfloat16
//   TOKEN_TILES      1 2 4 8   tokens   operands B, of 8 tokens, for each operand A
//   TOKEN_PAIRS      1, 4      tokens   pairs of a token tile that are summed: 1 for up to 2 tokens
//   CLUSTER          1 2 4 8   config   CTAs that split the columns
//   WARP_ROWS        1..20     config   warps of a CTA that have rows of their own
//   WARP_SPLITS      1..16     config   warps of a CTA that split the columns of the same rows
//   WARP_TILES       1..8      config   tiles of 16 rows of a warp
//   STEP_UNITS       1 2 4     config   units of each tile that a warp multiplies in one step
//   STAGES           1..8      config   steps that a warp's ring holds
//   STREAM           0, 1      config   activations pass through a ring of the CTA, because they would not
//                                       fit; else they lie whole in shared memory
//   X_STAGES         2..4      config   steps that the activations' ring holds
//   TRIGGER          `Trigger` config   when the next kernel's CTAs may start
//   WGMMA            0, 1      config   four warps multiply together (sm_90a)
//   READ_AHEAD       0, 1      config   weights leave the ring a step before they are multiplied, the first
//                                       ones before the wait for the kernel ahead
//   STAY_KILOCYCLES  0..       config   how long CTAs without rows stay: see `keep_apart`
//   INPUT            `Input`   fusion   what is done to the inputs as they are read
//   GATE             `GATE_..` fusion   the activation of gated inputs
//   ADD              0, 1      fusion   the results are added to what y holds
//   WHOLE_STEPS      0, 1      both     every step of every warp has STEP_UNITS units
//   REFILL           0, 1      both     some warp makes more steps than its ring holds
//   CTAS_PER_SM      1, 2      both     as many fit by shared memory and registers
//   PORTABLE         0, 1      device   sm_80 to sm_89: no clusters, bulk copies or dependent launch; each
//                                       lane copies the 16 byte pieces that it will read
//
// Source: PTX ISA for the instructions' register layouts. The design follows measurements of the
// parts, see docs/log.

#include "of_eight.cuh"

// At once; when this kernel's activations are there; after its loop; when the kernel before has ended,
// so that the next CTAs come about when its activations do.
enum Trigger { EARLY, AFTER_INPUTS, AFTER_LOOP, RELEASED };

// As they are; the residual stream, to be normalised by RMS: what is multiplied is x weight, and the
// results by 1 / rms(x), which every CTA finds from the whole row; [gate, up]: act(gate) up.
enum Input { PLAIN, NORMED, GATED };

static_assert((INPUT == PLAIN && !ADD) || (!STREAM && !WGMMA && !PORTABLE && TOKEN_PAIRS == 1),
              "fused for one or two tokens whose inputs lie whole in shared memory");
static_assert(INPUT != NORMED || !HALF, "a stream times its weight can leave float16's range");
static_assert(!WGMMA || WARP_ROWS % 4 == 0, "a warpgroup is four warps of rows");
static_assert(!WGMMA || !DENSE_CORES, "a warpgroup's B has its columns in order");
static_assert(!PORTABLE || (CLUSTER == 1 && STREAM && STAGES == X_STAGES),
              "without clusters one group of copies feeds both rings");
static_assert(!PORTABLE || !READ_AHEAD, "a stage is complete only when its step begins");

constexpr int WARPS = WARP_ROWS * WARP_SPLITS;
constexpr int THREADS = 32 * WARPS;
constexpr int SLICES = CLUSTER * WARP_SPLITS;             // parts that the columns are split into
constexpr int CLUSTER_TILES = WARP_ROWS * WARP_TILES;
constexpr int ROWS = 16 * CLUSTER_TILES;                  // of a cluster
constexpr int CHUNK_BYTES = (STEP_UNITS * UNIT_BYTES + 127) / 128 * 128;   // of a tile: bulk copies are slower
constexpr int STAGE_BYTES = WARP_TILES * CHUNK_BYTES;                     // to places not aligned to 128 bytes
constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;

// Activations in shared memory, for mma. Resident: rows padded so that what is read at once, the eight rows of
// a matrix, or for dense cores four pieces of two rows, lies in different banks. Streamed: 256-byte rows whose
// 16-byte pieces are permuted by the token. For wgmma, resident or streamed: blocks of 64 columns, 128-byte
// rows, permuted likewise.
constexpr int STRIDE = STREAM ? WARP_SPLITS * STEP_UNITS : STEP_UNITS;   // units from a warp's step to its next
constexpr int X_UNIT_BYTES = 8 * TOKEN_TILES * 2 * UNIT_COLUMNS;         // streamed: one unit's columns, all tokens
constexpr int X_STAGE_BYTES = STRIDE * X_UNIT_BYTES;
constexpr int X_BLOCK_BYTES = X_UNIT_BYTES / 2;                          // wgmma: 64 columns, all tokens
constexpr u32 X_ALIGNED = WGMMA ? 1024 : 128;
constexpr u32 X_PADDING = DENSE_CORES ? 64 : 16;
__device__ __forceinline__ int permuted(int piece, int token) {
    return piece ^ (DENSE_CORES ? 4 * (token & 1) : token & 7);
}

// Sums on their way, in parts of 16 rows x 16 tokens (8, or 2, where there are no more), one from each
// slice. A lane sends what it has of a row in one piece: the two tokens 2t, 2t+1 of one token tile, or
// of two tiles together. The upper eight rows, and the next part, start in other banks than the lower.
constexpr int TILES_IN_PART = TOKEN_TILES == 1 ? 1 : 2;
constexpr int PARTS = CLUSTER_TILES * TOKEN_TILES / TILES_IN_PART;
constexpr int OWNED = (PARTS + CLUSTER - 1) / CLUSTER;
constexpr int SENT = 2 * TILES_IN_PART;                        // floats of a lane's piece
constexpr int POSITIONS = SENT * TOKEN_PAIRS;                  // of a row: the part's tokens
constexpr int EIGHT_ROWS = (8 + (TOKEN_PAIRS > 1)) * POSITIONS * 4;  // bytes
constexpr int PART_BYTES = 2 * EIGHT_ROWS;
// Rows that a thread adds up and stores at once: as many as leave work for every thread.
constexpr int most_rows(int run) {
    return run > 2 && OWNED * POSITIONS * 16 / run < THREADS ? most_rows(run / 2) : run;
}
constexpr int RUN = TOKEN_PAIRS == 1 ? 1 : most_rows(8);

// The scale of codes that are subnormal floats, and of the activations: see units.cuh.
constexpr bool RAISED_X = !HALF && KIND != W16 && (!STREAM || DENSE_CORES);
constexpr bool RAISED_W = !HALF && KIND != W16 && STREAM && !DENSE_CORES;
constexpr u32 RAISE_X = 0x5F805F80;                            // 2^64, twice
constexpr float RESTORE = RAISED_X ? (KIND == FP8 ? 0x1p56f : 0x1p69f) : RESTORE_RAISED;

extern __shared__ __align__(128) u8 shared[];

// ---- the kernel behind -------------------------------------------------------------------------

// Lets the next kernel's CTAs start, if this is the moment that was chosen.
template <Trigger MOMENT>
__device__ __forceinline__ void trigger() {
    if constexpr (!PORTABLE && TRIGGER == MOMENT) launch_dependents();
}

// What CTAs without rows do, which are launched only to fill the device: they stay after the wait until
// those of the kernel behind are placed, one on each SM. On an SM that is left empty two would be placed,
// and each would be slow. Too long a stay delays the kernel's own end.
__device__ __forceinline__ void keep_apart() {
    if constexpr (!PORTABLE) {
        launch_dependents();               // else the kernel behind could not start before this ends
        wait_for_predecessor();
        if constexpr (STAY_KILOCYCLES > 0)
            for (const u32 begin = cycles(); cycles() - begin < 1000 * STAY_KILOCYCLES;) {}
    }
}

// ---- activations -------------------------------------------------------------------------------

// Where the activations lie that a lane's multiplications read.
struct Inputs {
    u32 base[TOKEN_TILES];  // mma, resident: the token's row, and the lane's 8 columns; streamed: the token's row
    u32 token;              // mma, streamed: of a token tile, which permutes the row's 16-byte pieces
    u32 piece;              // mma, streamed: the lane's 8 columns, as a 16-byte piece

    __device__ __forceinline__ Inputs(u32 shared, u32 pitch, int lane, int M) {
        token = DENSE_CORES ? lane / 4 : lane % 8;
        piece = DENSE_CORES ? lane % 4 : lane / 8;
        #pragma unroll
        for (int nt = 0; nt < TOKEN_TILES; ++nt) {
            const int row = 8 * nt + static_cast<int>(token);
            if constexpr (WGMMA) base[nt] = shared;
            else if constexpr (STREAM) base[nt] = shared + row * 2 * UNIT_COLUMNS;
            else base[nt] = shared + min(row, M - 1) * pitch + 16 * piece;
        }
    }

    // The address of 32 columns, `step` of a unit that starts `bytes` into the row (or stage).
    __device__ __forceinline__ u32 at(int nt, u32 bytes, int step) const {
        if constexpr (STREAM) return base[nt] + bytes + 16 * permuted(4 * step + piece, token);
        else return base[nt] + bytes + 64 * step;
    }

    // The B registers of 32 columns. For the dense cores each lane takes the columns that it has of A.
    __device__ __forceinline__ void load(u32 (&b)[4], int nt, u32 bytes, int step) const {
        if constexpr (DENSE_CORES) {
            const uint4 v = load_shared_128(at(nt, bytes, step));
            b[0] = v.x, b[1] = v.y, b[2] = v.z, b[3] = v.w;
            if constexpr (RAISED_X && STREAM) {
                #pragma unroll
                for (int i = 0; i < 4; ++i) b[i] = multiply_bf16x2(b[i], RAISE_X);
            }
        } else {
            load_matrices(b, at(nt, bytes, step));
        }
    }
};

// A thread's walk over the 16-byte pieces of all tokens. Its divisions are done before the wait for
// the kernel ahead.
struct Walk {
    int token, piece, token_step, piece_step;

    __device__ __forceinline__ explicit Walk(int pieces) {
        if constexpr (STREAM) return;      // which walks by stages
        token = threadIdx.x / pieces, piece = threadIdx.x % pieces;
        token_step = THREADS / pieces, piece_step = THREADS % pieces;
        asm volatile("" : "+r"(token), "+r"(piece), "+r"(token_step), "+r"(piece_step));
    }

    __device__ __forceinline__ void advance(int pieces) {
        token += token_step, piece += piece_step;
        if (piece >= pieces) piece -= pieces, ++token;
    }
};

// act(gate) up of eight numbers.
__device__ __forceinline__ uint4 gated(uint4 gate, uint4 up) {
    float a[8], b[8];
    unpack_8<HALF>(a, gate);
    unpack_8<HALF>(b, up);
    #pragma unroll
    for (int i = 0; i < 8; ++i) a[i] = gate_of<GATE>(a[i]) * b[i];
    return pack_8<HALF>(a);
}

// The stream's row as it is read by NORMED, from the first column to the last: this CTA keeps its own part,
// times the weight, and adds up the squares of all.
__device__ __forceinline__ void load_normed(
    u32 to, u32 pitch, const u16* x, const u16* weight, int M, int K, int first_column, int last_column,
    float (&squares)[2], Walk walk) {
    constexpr int BATCH = 2;
    const int pieces = (K + UNIT_COLUMNS - 1) / UNIT_COLUMNS * (UNIT_COLUMNS / 8);
    while (walk.token < M) {
        uint4 v[BATCH], w[BATCH];
        int columns[BATCH], tokens[BATCH];
        #pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            columns[i] = 8 * walk.piece, tokens[i] = walk.token;
            v[i] = w[i] = make_uint4(0, 0, 0, 0);
            if (walk.token < M && columns[i] < K) {
                v[i] = *reinterpret_cast<const uint4*>(x + static_cast<size_t>(walk.token) * K + columns[i]);
                w[i] = *reinterpret_cast<const uint4*>(weight + columns[i]);
            }
            walk.advance(pieces);
        }
        #pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            float a[8], b[8], sum = 0.0f;
            unpack_8<HALF>(a, v[i]);
            unpack_8<HALF>(b, w[i]);
            #pragma unroll
            for (int n = 0; n < 8; ++n) sum += a[n] * a[n], a[n] *= RAISED_X ? b[n] * 0x1p64f : b[n];
            squares[0] += tokens[i] == 0 ? sum : 0.0f;
            squares[1] += tokens[i] == 1 ? sum : 0.0f;
            if (tokens[i] < M && columns[i] >= first_column && columns[i] < last_column)
                store_shared_128(to + tokens[i] * pitch + 2 * (columns[i] - first_column), pack_8<HALF>(a));
        }
    }
}

// This thread's share of the activations, whole. Loads go out in batches.
__device__ __forceinline__ void load_resident(
    u32 to, u32 pitch, const u16* x, int M, int K, int first_column, int pieces, Walk walk) {
    constexpr int BATCH = INPUT == GATED ? (GATE == 1 ? 1 : 2) : TOKEN_PAIRS == 1 ? 4 : 8;
    while (walk.token < M) {
        uint4 v[BATCH], up[INPUT == GATED ? BATCH : 1] = {};
        u32 at[BATCH];
        bool valid[BATCH];
        #pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int column = first_column + 8 * walk.piece;
            valid[i] = walk.token < M;
            at[i] = to + (WGMMA ? walk.piece / 8 * X_BLOCK_BYTES + 128 * walk.token
                                      + 16 * ((walk.piece ^ walk.token) & 7)
                                : walk.token * pitch + 16 * walk.piece);
            v[i] = make_uint4(0, 0, 0, 0);                     // beyond K: a unit's padding
            if (valid[i] && column < K) {
                if constexpr (INPUT == GATED) {
                    const u16* const row = x + static_cast<size_t>(walk.token) * 2 * K + column;
                    v[i] = *reinterpret_cast<const uint4*>(row);
                    up[i] = *reinterpret_cast<const uint4*>(row + K);
                } else {
                    v[i] = *reinterpret_cast<const uint4*>(x + static_cast<size_t>(walk.token) * K + column);
                }
            }
            walk.advance(pieces);
        }
        #pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if constexpr (INPUT == GATED) v[i] = gated(v[i], up[i]);
            if constexpr (RAISED_X) {
                v[i].x = multiply_bf16x2(v[i].x, RAISE_X);
                v[i].y = multiply_bf16x2(v[i].y, RAISE_X);
                v[i].z = multiply_bf16x2(v[i].z, RAISE_X);
                v[i].w = multiply_bf16x2(v[i].w, RAISE_X);
            }
            if (valid[i]) store_shared_128(at[i], v[i]);
        }
    }
}

// This thread's share of one stage of streamed activations: STRIDE units, all 8 TOKEN_TILES token rows.
__device__ __forceinline__ void load_streamed(u32 to, const u16* x, int M, int K, int first_column) {
    constexpr int PIECES = X_STAGE_BYTES / 16;
    #pragma unroll
    for (int done = 0; done < PIECES; done += THREADS) {
        const int index = done + threadIdx.x;
        if (PIECES % THREADS == 0 || index < PIECES) {
            const int unit = index / (X_UNIT_BYTES / 16);
            const int token = index / 16 % (8 * TOKEN_TILES);
            const int piece = index % 16;
            const int column = first_column + UNIT_COLUMNS * unit + 8 * piece;
            const bool valid = token < M && column < K;
            const u16* from = x + (valid ? static_cast<size_t>(token) * K + column : 0);
            const u32 at = WGMMA ? piece / 8 * X_BLOCK_BYTES + 128 * token + 16 * ((piece ^ token) & 7)
                                 : 2 * UNIT_COLUMNS * token + 16 * permuted(piece, token);
            copy_16(to + unit * X_UNIT_BYTES + at, from, valid);
        }
    }
}

// ---- multiplication ----------------------------------------------------------------------------

__device__ __forceinline__ float float_of(u16 bits) {
    return HALF ? float_of_half(bits) : float_of_bf16(bits);
}

// acc += scale x sum: the unit's two scales for rows g and g + 8.
__device__ __forceinline__ void add_scaled(float (&acc)[4], const float (&sum)[4], u32 scales) {
    const float low = float_of(static_cast<u16>(scales)), high = float_of(static_cast<u16>(scales >> 16));
    acc[0] += low * sum[0];
    acc[1] += low * sum[1];
    acc[2] += high * sum[2];
    acc[3] += high * sum[3];
}

// acc += A B over a unit; with GROUP_SCALES the unit has scales of its own.
__device__ __forceinline__ void multiply_unit(
    float (&acc)[4], const u32 (&a)[MULTIPLICATIONS][4], const u32 (&b)[4][4], const Unit& unit) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float(&d)[4] = GROUP_SCALES ? sum : acc;
    if constexpr (DENSE_CORES) {
        #pragma unroll
        for (int s = 0; s < 8; ++s) multiply_16<HALF>(d, a[s], b[s / 2][s % 2 * 2], b[s / 2][s % 2 * 2 + 1]);
    } else {
        multiply_sparse<HALF, 0>(d, a[0], b[0], unit.metadata.x);
        multiply_sparse<HALF, 1>(d, a[1], b[1], unit.metadata.x);
        multiply_sparse<HALF, 0>(d, a[2], b[2], unit.metadata.y);
        multiply_sparse<HALF, 1>(d, a[3], b[3], unit.metadata.y);
    }
    if constexpr (GROUP_SCALES) add_scaled(acc, sum, unit.scales);
}

// One unit of columns for all WARP_TILES tiles of the warp. B fragments are shared by the tiles; where all
// tokens' fragments would not fit in registers, the expanded weights stay instead.
__device__ __forceinline__ void multiply_by_warp(
    float (&acc)[WARP_TILES][TOKEN_TILES][4], const Unit (&unit)[WARP_TILES], const Inputs& x, u32 x_bytes) {
    constexpr bool ONCE = TOKEN_TILES <= 2;
    constexpr int TOGETHER = ONCE ? TOKEN_TILES : DENSE_CORES ? 1 : 2;    // token tiles whose B fragments are held at once
    u32 a[ONCE ? 1 : WARP_TILES][MULTIPLICATIONS][4];
    if constexpr (!ONCE) {
        #pragma unroll
        for (int m = 0; m < WARP_TILES; ++m) expand_any<RAISED_W>(a[m], unit[m]);
    }
    #pragma unroll
    for (int first = 0; first < TOKEN_TILES; first += TOGETHER) {
        u32 b[TOGETHER][4][4];
        #pragma unroll
        for (int n = 0; n < TOGETHER; ++n)
            #pragma unroll
            for (int s = 0; s < 4; ++s) x.load(b[n][s], first + n, x_bytes, s);
        #pragma unroll
        for (int m = 0; m < WARP_TILES; ++m) {
            if constexpr (ONCE) expand_any<RAISED_W>(a[0], unit[m]);
            #pragma unroll
            for (int n = 0; n < TOGETHER; ++n)
                multiply_unit(acc[m][first + n], a[ONCE ? 0 : m], b[n], unit[m]);
        }
    }
}

// The same by warpgroups: B stays in shared memory, and four warps read it once for 64 rows.
__device__ __forceinline__ void multiply_by_warpgroup(
    float (&acc)[WARP_TILES][TOKEN_TILES][4], const Unit (&unit)[WARP_TILES], u32 x_unit) {
    constexpr u64 STEP = 64 >> 4, BLOCK = X_BLOCK_BYTES >> 4;
    const u64 b = swizzled_operand(x_unit);
    #pragma unroll
    for (int m = 0; m < WARP_TILES; ++m) {
        u32 a[4][4];
        float sum[TOKEN_TILES][4];
        float(&d)[TOKEN_TILES][4] = GROUP_SCALES ? sum : acc[m];
        expand<RAISED_W>(a, unit[m]);
        wgmma_fence();
        multiply_sparse_warpgroup<HALF, 0, TOKEN_TILES>(d, a[0], b, unit[m].metadata.x, !GROUP_SCALES);
        multiply_sparse_warpgroup<HALF, 1, TOKEN_TILES>(d, a[1], b + STEP, unit[m].metadata.x, 1);
        multiply_sparse_warpgroup<HALF, 0, TOKEN_TILES>(d, a[2], b + BLOCK, unit[m].metadata.y, 1);
        multiply_sparse_warpgroup<HALF, 1, TOKEN_TILES>(d, a[3], b + BLOCK + STEP, unit[m].metadata.y, 1);
        wgmma_commit();
        wgmma_wait();
        if constexpr (GROUP_SCALES) {
            #pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) add_scaled(acc[m][n], sum[n], unit[m].scales);
        }
    }
}

// ---- sums and results --------------------------------------------------------------------------

// Neighbouring 16-bit numbers, read and written in one access.
template <int COUNT>
struct alignas(2 * COUNT) Numbers {
    u16 bits[COUNT];
};

// y[0..COUNT) = sum x scale x factor + bias + added of as many neighbouring rows.
template <int COUNT>
__device__ __forceinline__ void store_result(
    u16* y, const float (&sum)[COUNT], const u16* row_scales, const u16* bias, const u16* added, float factor) {
    Numbers<COUNT> scales, offsets, before, result;
    if (row_scales) scales = *reinterpret_cast<const Numbers<COUNT>*>(row_scales);
    if (bias) offsets = *reinterpret_cast<const Numbers<COUNT>*>(bias);
    if constexpr (ADD) before = *reinterpret_cast<const Numbers<COUNT>*>(added);
    #pragma unroll
    for (int r = 0; r < COUNT; ++r) {
        const float scale = row_scales ? float_of(scales.bits[r]) * RESTORE : RESTORE;
        float value = INPUT == NORMED ? sum[r] * scale * factor : sum[r] * scale;
        value += bias ? float_of(offsets.bits[r]) : 0.0f;
        if constexpr (ADD) value += float_of(before.bits[r]);
        result.bits[r] = round_16<HALF>(value);
    }
    *reinterpret_cast<Numbers<COUNT>*>(y) = result;
}

// ---- the kernel --------------------------------------------------------------------------------

// Registers are shared out to four warps at a time.
extern "C" __global__ void __launch_bounds__((THREADS + 127) / 128 * 128, CTAS_PER_SM) decode(
    const u16* __restrict__ x,             // [M, K]
    const u8* __restrict__ weight,         // [N / 16, units, UNIT_BYTES]
    const u16* __restrict__ row_scales,    // [N], or null: 1
    const u16* __restrict__ bias,          // [N], or null: 0
    u16* __restrict__ y,                   // [M, N]
    int M, int N, int K
#if INPUT == 1
    , const u16* __restrict__ norm_weight  // [K]
    , float epsilon
#endif
) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = WGMMA ? 4 : 1;   // warps that must have the same columns
    const int warp_row = warp / group / WARP_SPLITS * group + warp % group, warp_slice = warp / group % WARP_SPLITS;
    const int units = (K + UNIT_COLUMNS - 1) / UNIT_COLUMNS;
    const int tiles = N / 16;
    const int first_tile = static_cast<int>(blockIdx.x) / CLUSTER * CLUSTER_TILES;
    int rank = 0;
    if constexpr (CLUSTER > 1) rank = static_cast<int>(cluster_rank());
    if (first_tile >= tiles) return keep_apart();

    // This CTA's units, this warp's first unit and number of steps.
    const int from = units * rank / CLUSTER, to = units * (rank + 1) / CLUSTER;
    const int first = STREAM ? from + warp_slice * STEP_UNITS : from + (to - from) * warp_slice / WARP_SPLITS;
    const int last = STREAM ? to : from + (to - from) * (warp_slice + 1) / WARP_SPLITS;
    const int steps = ((STREAM ? to - from : last - first) + STRIDE - 1) / STRIDE;

    const u32 pitch = (units + CLUSTER - 1) / CLUSTER * 2 * UNIT_COLUMNS + X_PADDING;   // the same in all CTAs
    const u32 x_bytes_all = STREAM ? X_STAGES * X_STAGE_BYTES
                            : WGMMA ? (units + CLUSTER - 1) / CLUSTER * X_UNIT_BYTES : M * pitch;
    const u32 x_shared = (shared_address(shared) + X_ALIGNED - 1) / X_ALIGNED * X_ALIGNED;
    const u32 rings = x_shared + (x_bytes_all + 127) / 128 * 128;
    const u32 ring = rings + warp * STAGES * STAGE_BYTES;
    const u32 sums = STREAM ? x_shared : rings + RING_BYTES;
    __shared__ __align__(16) u16 scales_here[ROWS], bias_here[ROWS], added_here[2][ADD ? ROWS : 8];
#if INPUT == 1
    __shared__ float squares_here[WARPS][2];
#endif
    __shared__ __align__(8) u64 barriers[WARPS * STAGES + 1];
    const u32 landed = PORTABLE ? 0 : shared_address(barriers + warp * STAGES);
    const u32 summed = PORTABLE ? 0 : shared_address(barriers + WARPS * STAGES);
    u64 policy;
    if constexpr (!PORTABLE) policy = evict_first();

    const u8* source[WARP_TILES];
    #pragma unroll
    for (int m = 0; m < WARP_TILES; ++m) {
        const int tile = min(first_tile + warp_row * WARP_TILES + m, tiles - 1);   // beyond N: read, never stored
        source[m] = weight + (static_cast<size_t>(tile) * units + first) * UNIT_BYTES;
    }

    // Units of step i: STEP_UNITS, but for the last.
    auto units_of = [&](int i) { return WHOLE_STEPS ? STEP_UNITS : min(STEP_UNITS, last - first - i * STRIDE); };

    // Starts the copies of step i into its stage, once `after` is known; for bulk copies, called by one lane.
    auto fetch = [&](int i, int stage_index, u32 after) {
        const int count = units_of(i);
        const u32 stage = ring + stage_index * STAGE_BYTES + (after & K >> 31);   // K is no negative number
        const u32 offset = i * STRIDE * UNIT_BYTES;        // of a row tile: below 2^31
        if constexpr (PORTABLE) {
            #pragma unroll
            for (int m = 0; m < WARP_TILES; ++m)
                for (int byte = 16 * lane; byte < count * UNIT_BYTES; byte += 16 * 32)
                    copy_16(stage + m * CHUNK_BYTES + byte, source[m] + offset + byte, true);
        } else {
            if (!WHOLE_STEPS && count <= 0) return;
            const u32 barrier = landed + stage_index * 8;
            barrier_expect(barrier, WARP_TILES * count * UNIT_BYTES);
            #pragma unroll
            for (int m = 0; m < WARP_TILES; ++m)
                copy_bulk(stage + m * CHUNK_BYTES, source[m] + offset, count * UNIT_BYTES, barrier, policy);
        }
    };

    // Reads step i from its stage, whole. Where there are fewer units, what lies behind them is read
    // in vain.
    Unit unit[STEP_UNITS][WARP_TILES];
    auto take = [&](int i, int stage_index, u32 parity) {
        if constexpr (!PORTABLE)
            if (WHOLE_STEPS || units_of(i) > 0) barrier_wait(landed + 8 * stage_index, parity);
        #pragma unroll
        for (int c = 0; c < STEP_UNITS; ++c)
            #pragma unroll
            for (int m = 0; m < WARP_TILES; ++m)
                unit[c][m].load(ring + stage_index * STAGE_BYTES + m * CHUNK_BYTES + c * UNIT_BYTES, lane);
    };

    // Starts to fill again the stage that step i was read from. A load that has been issued can still
    // be in a queue when the copy writes, whatever is synchronised between them, so the copy is made to
    // depend on what was loaded.
    auto refill = [&](int i, int stage_index) {
        if constexpr (!PORTABLE && REFILL) {
            u32 loaded = 0;
            #pragma unroll
            for (int c = 0; c < STEP_UNITS; ++c)
                #pragma unroll
                for (int m = 0; m < WARP_TILES; ++m) loaded ^= unit[c][m].any();
            __syncwarp();
            if (i + STAGES < steps && one_lane()) fetch(i + STAGES, stage_index, loaded);
        }
    };

    if constexpr (!PORTABLE) {
        if (lane == 0) {
            #pragma unroll
            for (int i = 0; i < STAGES; ++i) barrier_init(landed + 8 * i, 1);
            if (warp == 0) barrier_init(summed, 1 + WARPS);
            barrier_init_done();
        }
        __syncwarp();
        trigger<EARLY>();
        if (one_lane()) {
            #pragma unroll
            for (int i = 0; i < STAGES; ++i)
                if (i < steps) fetch(i, i, 0);
        }
        __syncwarp();
        if (CLUSTER > 1 && threadIdx.x == 0) {   // the bytes that come from other CTAs
            int bytes = 0;
            #pragma unroll
            for (int local = 0; local < OWNED; ++local) {
                const int part = local * CLUSTER + rank;
                const int pairs = min(max((M - 8 * (part * TILES_IN_PART % TOKEN_TILES) + 1) / 2, 0), 4);
                if (part < PARTS) bytes += (SLICES - WARP_SPLITS) * 16 * 4 * SENT * pairs;
            }
            barrier_expect(summed, bytes);
        }
        if constexpr (CLUSTER > 1) cluster_arrive_relaxed();   // waited for before the first sum is sent
    }
    // The rows' scales and bias are asked for now: at the end, memory would be waited for.
    for (int piece = threadIdx.x; piece < ROWS / 8; piece += THREADS) {
        const int n = 16 * first_tile + 8 * piece;
        if (row_scales && n < N) copy_16(shared_address(scales_here + 8 * piece), row_scales + n, true);
        if (bias && n < N) copy_16(shared_address(bias_here + 8 * piece), bias + n, true);
    }
    commit_copies();
#if INPUT == 1
    if (64 * static_cast<int>(threadIdx.x) < K) prefetch_l2(norm_weight + 64 * threadIdx.x);  // it may be in no cache
#endif
    const Walk walk((INPUT == NORMED ? units : to - from) * 16);
    if (READ_AHEAD && steps > 0) take(0, 0, 0), refill(0, 0);
    if constexpr (!PORTABLE) wait_for_predecessor();
    trigger<RELEASED>();

    const Inputs inputs(x_shared, pitch, lane, M);
    auto stream_inputs = [&](int step, int stage) {
        if constexpr (PORTABLE) fetch(step, stage, 0);
        load_streamed(x_shared + stage * X_STAGE_BYTES, x, M, K, (from + step * STRIDE) * UNIT_COLUMNS);
    };
    if constexpr (STREAM) {
        #pragma unroll
        for (int i = 0; i < X_STAGES - 1; ++i) {
            if (i < steps) stream_inputs(i, i);
            commit_copies();
        }
    } else {
        if constexpr (ADD) {
            for (int index = threadIdx.x; index < M * (ROWS / 8); index += THREADS) {
                const int token = index / (ROWS / 8), row = 8 * (index % (ROWS / 8)), n = 16 * first_tile + row;
                if (n < N) copy_16(shared_address(added_here[token] + row), y + static_cast<size_t>(token) * N + n, true);
            }
            commit_copies();
        }
#if INPUT == 1
        float squares[2] = {0.0f, 0.0f};
        load_normed(x_shared, pitch, x, norm_weight, M, K, from * UNIT_COLUMNS, to * UNIT_COLUMNS, squares, walk);
        #pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            squares[0] += __shfl_xor_sync(~0u, squares[0], step);
            squares[1] += __shfl_xor_sync(~0u, squares[1], step);
        }
        if (lane == 0) squares_here[warp][0] = squares[0], squares_here[warp][1] = squares[1];
#else
        load_resident(x_shared, pitch, x, M, K, from * UNIT_COLUMNS, (to - from) * 16, walk);
#endif
        if constexpr (WGMMA) fence_async_proxy();
        __syncthreads();
    }
    trigger<AFTER_INPUTS>();

    auto load_weights = [&](int step, int stage, u32 parity) {
        take(step, stage, parity);
        refill(step, stage);
    };
    auto wait_inputs = [&](int step) {     // and starts the copies of those that take the last step's place
        wait_copies<X_STAGES - 2>();
        if constexpr (WGMMA) fence_async_proxy();
        __syncthreads();
        const int later = step + X_STAGES - 1;
        if (later < steps) stream_inputs(later, later % X_STAGES);
        commit_copies();
    };
    float acc[WARP_TILES][TOKEN_TILES][4] = {};
    constexpr int X_UNIT = WGMMA || STREAM ? X_UNIT_BYTES : 2 * UNIT_COLUMNS;    // from a unit's columns to the next
    auto inputs_of = [&](int step) -> u32 {                            // where its columns start
        if constexpr (STREAM) return step % X_STAGES * X_STAGE_BYTES + warp_slice * STEP_UNITS * X_UNIT_BYTES;
        else return (first - from + step * STRIDE) * X_UNIT;
    };
    auto multiply = [&](const Unit (&units)[STEP_UNITS][WARP_TILES], int step, u32 x_bytes) {
        #pragma unroll
        for (int c = 0; c < STEP_UNITS; ++c) {
            if (!WHOLE_STEPS && c >= units_of(step)) break;
            if constexpr (WGMMA) multiply_by_warpgroup(acc, units[c], x_shared + x_bytes + c * X_UNIT);
            else multiply_by_warp(acc, units[c], inputs, x_bytes + c * X_UNIT);
        }
    };

    u32 parity = 0;
    #pragma unroll 1
    for (int turn = 0; turn < steps; turn += STAGES, parity ^= 1) {
        #pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {
            const int step = turn + stage, next = (stage + 1) % STAGES;
            if (step >= steps) break;
            if constexpr (STREAM) wait_inputs(step);
            const u32 x_bytes = inputs_of(step);
            if constexpr (!READ_AHEAD) load_weights(step, stage, parity);
            Unit now[STEP_UNITS][WARP_TILES];
            #pragma unroll
            for (int c = 0; c < STEP_UNITS; ++c)
                #pragma unroll
                for (int m = 0; m < WARP_TILES; ++m) now[c][m] = unit[c][m];
            if (READ_AHEAD && step + 1 < steps) take(step + 1, next, next == 0 ? parity ^ 1 : parity);
            multiply(now, step, x_bytes);
            if (READ_AHEAD && step + 1 < steps) refill(step + 1, next);
        }
    }

    wait_copies<0>();                      // the scales and bias

    // Hand the sums to their owners. With STREAM they take the place of both rings, so that every CTA
    // of the cluster must have left its loop.
    trigger<AFTER_LOOP>();
    if constexpr (CLUSTER > 1) {
        cluster_wait();
        if constexpr (STREAM) {
            cluster_arrive();
            cluster_wait();
        }
    }
    if constexpr (CLUSTER == 1 && STREAM) __syncthreads();
    const int slice = rank * WARP_SPLITS + warp_slice;
    #pragma unroll
    for (int m = 0; m < WARP_TILES; ++m) {
        #pragma unroll
        for (int nt = 0; nt < TOKEN_TILES; nt += TILES_IN_PART) {
            const int part = ((warp_row * WARP_TILES + m) * TOKEN_TILES + nt) / TILES_IN_PART;
            const int pair = lane % 4;
            if (8 * nt + 2 * pair >= M) continue;
            const u32 at = sums + (part / CLUSTER * SLICES + slice) * PART_BYTES
                         + (lane / 4 * POSITIONS + SENT * pair) * 4;
            const float(&one)[4] = acc[m][nt];
            const float(&two)[4] = acc[m][nt + TILES_IN_PART - 1];
            const u32 owner = part % CLUSTER;
            if (CLUSTER == 1 || owner == rank) {
                if constexpr (TILES_IN_PART == 1) {
                    store_shared_float2(at, one[0], one[1]);
                    store_shared_float2(at + EIGHT_ROWS, one[2], one[3]);
                } else {
                    store_shared_float4(at, one[0], one[1], two[0], two[1]);
                    store_shared_float4(at + EIGHT_ROWS, one[2], one[3], two[2], two[3]);
                }
            }
            else if constexpr (CLUSTER > 1) {
                const u32 barrier = in_cta(summed, owner), there = in_cta(at, owner);
                if constexpr (TILES_IN_PART == 1) {
                    store_remote(there, one[0], one[1], barrier);
                    store_remote(there + EIGHT_ROWS, one[2], one[3], barrier);
                } else {
                    store_remote(there, one[0], one[1], two[0], two[1], barrier);
                    store_remote(there + EIGHT_ROWS, one[2], one[3], two[2], two[3], barrier);
                }
            }
        }
    }
    if constexpr (CLUSTER == 1) __syncthreads();
    else {
        __syncwarp();
        if (lane == 0) barrier_arrive(summed);         // this warp's sums for this CTA itself
        barrier_wait_cluster(summed, 0);
    }

    // Add the slices in order, restore the scale, and store.
    constexpr int ITEMS = POSITIONS * (16 / RUN);      // of a part
    for (int index = threadIdx.x; index < OWNED * ITEMS; index += THREADS) {
        const int local = index / ITEMS;
        const int position = RUN == 1 ? index / 16 % POSITIONS : index % POSITIONS;
        const int row = RUN == 1 ? index % 16 : index / POSITIONS % (16 / RUN) * RUN;
        const int part = local * CLUSTER + rank;
        const int here = part * TILES_IN_PART / TOKEN_TILES * 16 + row;
        const int n = 16 * first_tile + here;
        const int token = part * TILES_IN_PART % TOKEN_TILES * 8
                        + (TOKEN_TILES == 1 ? position : position / 4 * 2 + position % 4 / 2 * 8 + position % 2);
        if (part >= PARTS || n >= N || token >= M) continue;
        const u32 at = sums + local * SLICES * PART_BYTES
                     + row / 8 * EIGHT_ROWS + (row % 8 * POSITIONS + position) * 4;
        float sum[RUN] = {};
        #pragma unroll
        for (int p = 0; p < SLICES; ++p)
            #pragma unroll
            for (int r = 0; r < RUN; ++r)
                sum[r] += load_shared_float(at + p * PART_BYTES + r * POSITIONS * 4);
        float factor = 1.0f;
#if INPUT == 1
        float squares = 0.0f;
        for (int w = 0; w < WARPS; ++w) squares += squares_here[w][token];
        factor = rsqrtf(squares / K + epsilon);
#endif
        store_result<RUN>(
            y + static_cast<size_t>(token) * N + n, sum, row_scales ? scales_here + here : nullptr,
            bias ? bias_here + here : nullptr, ADD ? added_here[token] + here : nullptr, factor);
    }
}
