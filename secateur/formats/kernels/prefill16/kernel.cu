// y = f(x W^T + bias) for many tokens x, a 2:4 weight W in the decode kernel's units and an activation
// f, which may be none, on Hopper.
//
//   D[64 rows, TOKENS] += A[64 rows, 32 columns, 2:4] B[32 columns, TOKENS]              wgmma.sp
//
// Weights are operand A, from registers, where their codes become 16-bit floats as in the decode kernel
// (units.cuh); tokens are operand B, from shared memory. A CTA computes ROWS rows x TOKENS tokens:
// CONSUMERS warpgroups, each with ROW_BLOCKS times 64 rows, read the same tokens. One more warpgroup
// copies: one warp units of 128 columns into a ring of A_STAGES stages, one warp tokens into a ring of
// B_STAGES boxes of 64 columns, whose 16-byte pieces the copy engine permutes (wgmma's 128-byte swizzle).
//
// With scales for groups of columns, a code times its scale is rounded once, in registers, to the
// numbers that the dense weight has. Scales of rows and the bias are applied to the sums.
//
// Where there are too few tiles for the device, SPLITS CTAs of a cluster each take a part of the columns
// of one tile. Each owns some parts of its results: the others send it their sums, and it adds all in order.
//
// The copy engine takes long over what lies beyond a matrix, so no box of tokens does: the last tile
// starts so early that it is whole, and computes some tokens a second time, to the same bits. With fewer
// tokens than a tile's, boxes are smaller, and what is left in shared memory gives results of no token.
//
// CTAs stay and take tiles in turn; while a tile's results are stored, the first stages of the next are
// copied. Results are transposed in shared memory, and the copy engine stores them while the warpgroup
// goes on.
//
// M tokens, N rows of W (out_features), units of 128 columns (in_features, filled up with zeros).
//
//   macro            values    meaning
//   KIND, GROUP_SCALES, HALF   of the weight, see units.cuh
//   ROW_BLOCKS       1 2       times 64 rows, of a warpgroup
//   TOKENS           48..256   of a tile, a multiple of 16
//   SPLITS           1..8      CTAs of a cluster, which split the columns
//   A_STAGES         2..       units of each row tile that lie in shared memory
//   B_STAGES         2..       boxes of 64 columns that lie there
//   OUT_BUFFERS      1..4      of 64 x 64 results for each warpgroup
//   ACTIVATION       0..4      see activation.cuh
//
// Source: PTX ISA for the layouts of registers and shared memory.

#include "units.cuh"
#include "activation.cuh"
#include "tiles.cuh"

constexpr int CONSUMERS = 2;                               // warpgroups that multiply
constexpr int THREADS = 128 * (CONSUMERS + 1);
constexpr int GROUP_ROWS = 64 * ROW_BLOCKS;                // of a warpgroup
constexpr int ROWS = CONSUMERS * GROUP_ROWS;
constexpr int TILES = ROWS / 16;                           // row tiles, as units lie
constexpr int PIECES = KIND == W16 ? 2 : 1;                // of a unit: a box has at most 256 words of 8 bytes a side
constexpr int A_BYTES = (TILES * UNIT_BYTES + 127) / 128 * 128;
constexpr int BOX_COLUMNS = 64;
constexpr int B_BYTES = TOKENS * BOX_COLUMNS * 2;
// A part is what one CTA of a cluster stores at a time: 64 rows of so many tokens. The larger the better,
// if each CTA owns as many.
constexpr bool even(int tokens) { return TOKENS % tokens == 0 && ROW_BLOCKS * TOKENS / tokens % SPLITS == 0; }
constexpr int OUT_TOKENS = even(64) ? 64 : even(32) ? 32 : 16;
constexpr int OUT_BYTES = OUT_TOKENS * 64 * 2, SUM_BYTES = OUT_TOKENS * 64 * 4;
constexpr int BLOCK_PARTS = TOKENS / OUT_TOKENS, PARTS = ROW_BLOCKS * BLOCK_PARTS;     // of 64 rows, of a warpgroup
// Of which a CTA of a cluster owns so many: the first, the one SPLITS later, and so on.
constexpr int owned(int cta) { return (PARTS - cta + SPLITS - 1) / SPLITS; }
constexpr int ROUNDS = owned(0);
// Registers of a thread: of those that copy and those that multiply, all of an SM's together.
constexpr int FEW = 40, MANY = 232;

static_assert(TOKENS % OUT_TOKENS == 0, "a part is whole");
static_assert(!GROUP_SCALES || KIND == INT4, "groups are of 4 bits");

constexpr bool RAISED = !HALF && KIND != W16;
// Groups are scaled in registers, to the value; see `weights_of`.
constexpr float RESTORE = GROUP_SCALES ? 1.0f : RESTORE_RAISED;
constexpr u32 HALF_2_12 = 0x6C006C00, BF16_2_7 = 0x43004300;      // 2^12 and 2^7, twice

extern __shared__ __align__(1024) u8 shared[];

// A place in a ring, and the parity of the barriers there.
template <int STAGES>
struct Place {
    int stage = 0;
    u32 parity;

    __device__ __forceinline__ explicit Place(u32 first) : parity(first) {}
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// Stores what nobody reads, so that these registers stay as they are until then. Multiplications read
// metadata as late as weights, but the assembler, which keeps the weights' registers, does not know it.
__device__ __forceinline__ void hold(u32 address, uint2 v) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" :: "r"(address), "r"(v.x), "r"(v.y) : "memory");
}

// A lane's scales of a unit's rows g and g + 8, each twice, as `weights_of` multiplies by them.
struct Scales {
    u32 of_row[GROUP_SCALES ? 2 : 1];

    __device__ __forceinline__ void load(u32 unit, int lane) {
        if constexpr (GROUP_SCALES) {
            u32 both = load_shared_32(unit + VALUE_BYTES + META_BYTES + lane / 4 * 4);
            if constexpr (RAISED && KIND != FP8) both = multiply_bf16x2(both, BF16_2_7);
            of_row[0] = __byte_perm(both, both, 0x1010);
            of_row[1] = __byte_perm(both, both, 0x3232);
        }
    }
};

// A lane's words of a unit: those that one load brings, for one, two or four steps of 32 columns.
struct Words {
    uint4 loaded;

    __device__ __forceinline__ void load(u32 unit, int lane, int step) {
        constexpr int STEPS = 4 / STEP_WORDS;                      // that a load serves
        if (step % STEPS == 0) loaded = load_shared_128(unit + 512 * (step / STEPS) + 16 * lane);
    }

    __device__ __forceinline__ u32 word(int n) const {
        return n == 0 ? loaded.x : n == 1 ? loaded.y : n == 2 ? loaded.z : loaded.w;
    }
};

// The A registers of one step, with groups at their value, else as RESTORE has it.
__device__ __forceinline__ void weights_of(u32 (&a)[4], const Words& from, const Scales& scales, int step) {
    #pragma unroll
    for (int w = 0; w < STEP_WORDS; ++w)
        expand_word(a, w * (4 / STEP_WORDS), from.word(STEP_WORDS * step % 4 + w));
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (RAISED) a[i] = multiply_bf16x2(a[i], RAISE_W);
        if constexpr (GROUP_SCALES && HALF) {              // code 2^-24: a subnormal scale must not meet it
            a[i] = multiply_f16x2(multiply_f16x2(multiply_f16x2(a[i], HALF_2_12), HALF_2_12), scales.of_row[i % 2]);
        } else if constexpr (GROUP_SCALES) {
            a[i] = multiply_bf16x2(a[i], scales.of_row[i % 2]);
        }
    }
}

// Where a tile starts: the last one so early that it ends with the tokens.
__device__ __forceinline__ int first_token_of(int tile, int M) {
    return max(min(tile * TOKENS, M - TOKENS), 0);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill(
    const __grid_constant__ TensorMap x,       // [M, K], in boxes of min(M, TOKENS) x BOX_COLUMNS
    const __grid_constant__ TensorMap y,       // [M, N], in boxes of OUT_TOKENS x 64
    const __grid_constant__ TensorMap weight,  // [N / 16, units PIECES, bytes of a piece], in boxes of TILES units
    const u16* __restrict__ row_scales,    // [N], or null: 1
    const u16* __restrict__ bias,          // [N], or null: 0
    int M, int N, int units) {
    const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const int row_groups = (N + ROWS - 1) / ROWS;
    const int token_tiles = (M + TOKENS - 1) / TOKENS, tiles = row_groups * token_tiles;
    const int first = static_cast<int>(blockIdx.x) / SPLITS, clusters = static_cast<int>(gridDim.x) / SPLITS;
    const int rank = SPLITS == 1 ? 0 : static_cast<int>(cluster_rank());
    const int from = SPLITS == 1 ? 0 : units * rank / SPLITS, to = SPLITS == 1 ? units : units * (rank + 1) / SPLITS;

    const u32 b_ring = (shared_address(shared) + 1023) / 1024 * 1024;
    const u32 results = b_ring + B_STAGES * B_BYTES;
    const u32 sums = results + CONSUMERS * OUT_BUFFERS * OUT_BYTES;
    const u32 a_ring = sums + CONSUMERS * (SPLITS - 1) * SUM_BYTES;
    __shared__ __align__(16) u16 scales_here[ROWS], bias_here[ROWS];
    __shared__ __align__(8) u64 barriers[2 * (A_STAGES + B_STAGES) + CONSUMERS * (1 + SPLITS)];
    __shared__ __align__(8) u8 held_here[8];
    const u32 held = shared_address(held_here);
    const u32 a_full = shared_address(barriers), a_empty = a_full + 8 * A_STAGES;
    const u32 b_full = a_empty + 8 * A_STAGES, b_empty = b_full + 8 * B_STAGES;
    // Of each warpgroup: that sums have come here, and that those sent to each other CTA are read.
    const u32 sums_full = b_empty + 8 * B_STAGES, sums_empty = sums_full + 8 * CONSUMERS;

    if (threadIdx.x == 0) {
        for (int i = 0; i < A_STAGES; ++i) {
            barrier_init(a_full + 8 * i, 1);
            barrier_init(a_empty + 8 * i, CONSUMERS * 4);
        }
        for (int i = 0; i < B_STAGES; ++i) {
            barrier_init(b_full + 8 * i, 1);
            barrier_init(b_empty + 8 * i, CONSUMERS * 4);
        }
        for (int i = 0; i < CONSUMERS; ++i) {
            barrier_init(sums_full + 8 * i, 1);
            for (int owner = 0; owner < SPLITS; ++owner) barrier_init(sums_empty + 8 * (i * SPLITS + owner), 4);
        }
        barrier_init_done();
    }
    if constexpr (SPLITS > 1) {
        cluster_arrive_relaxed();
        cluster_wait();
    } else {
        __syncthreads();
    }
    launch_dependents();

    if (group == CONSUMERS) {
        give_registers<FEW>();
        if (warp == 0 && one_lane()) {
            wait_for_predecessor();
            Place<B_STAGES> b(1);
            for (int t = first; t < tiles; t += clusters) {
                const Tile<1> tile(t, row_groups, token_tiles);
                const int token = first_token_of(tile.tokens, M);
                for (int box = 2 * from; box < 2 * to; ++box, b.advance()) {
                    const u32 barrier = b_full + 8 * b.stage;
                    barrier_wait(b_empty + 8 * b.stage, b.parity);
                    barrier_expect(barrier, min(M, TOKENS) * 2 * BOX_COLUMNS);
                    copy_box_to_all<1>(b_ring + b.stage * B_BYTES, x, box * 2 * BOX_COLUMNS, token, barrier);
                }
            }
        } else if (warp == 1 && one_lane()) {      // weights do not depend on the kernel before
            Place<A_STAGES> a(1);
            for (int t = first; t < tiles; t += clusters) {
                const Tile<1> tile(t, row_groups, token_tiles);
                for (int unit = from; unit < to; ++unit, a.advance()) {
                    const u32 barrier = a_full + 8 * a.stage;
                    barrier_wait(a_empty + 8 * a.stage, a.parity);
                    barrier_expect(barrier, TILES * UNIT_BYTES);
                    copy_box(a_ring + a.stage * A_BYTES, weight, 0, unit * PIECES, tile.rows * TILES, barrier);
                }
            }
        }
    } else {
        take_registers<MANY>();
        wait_for_predecessor();
        const int g = lane / 4;
        const u32 own = a_ring + (group * ROW_BLOCKS * 4 + warp) * UNIT_BYTES;     // this warp's first row tile
        Place<A_STAGES> a(0);
        Place<B_STAGES> b(0);
        const bool stores = threadIdx.x % 128 == 0;
        int stored = 0, done = 0;              // parts and tiles
        auto release_box = [&](int stage) {
            if (lane == 0) barrier_arrive(b_empty + 8 * stage);
        };

        // Sends the sums of a part to the CTA that owns it.
        auto send = [&](const float (&d)[TOKENS / 8][4], int first, int owner) {
            const u32 barrier = in_cta(sums_full + 8 * group, owner);
            const int slot = group * (SPLITS - 1) + (rank < owner ? rank : rank - 1);
            const u32 there = in_cta(sums + slot * SUM_BYTES + threadIdx.x % 128 * 16, owner);
            #pragma unroll
            for (int n = 0; n < OUT_TOKENS / 8; ++n) {
                const float(&sum)[4] = d[first + n];
                store_remote(there + n * 2048, sum[0], sum[1], sum[2], sum[3], barrier);
            }
        };
        // Adds its own sums and those that the others have sent, and tells them. The order is that of the
        // ranks, whoever adds: a token of two tiles has the same bits in both.
        auto receive = [&](float (&d)[TOKENS / 8][4], int first) {
            #pragma unroll
            for (int n = 0; n < OUT_TOKENS / 8; ++n) {
                float(&own)[4] = d[first + n], sum[4] = {};
                #pragma unroll
                for (int cta = 0; cta < SPLITS; ++cta) {
                    const int slot = group * (SPLITS - 1) + max(cta < rank ? cta : cta - 1, 0);
                    const uint4 v = load_shared_128(sums + slot * SUM_BYTES + threadIdx.x % 128 * 16 + n * 2048);
                    sum[0] += cta == rank ? own[0] : __uint_as_float(v.x);
                    sum[1] += cta == rank ? own[1] : __uint_as_float(v.y);
                    sum[2] += cta == rank ? own[2] : __uint_as_float(v.z);
                    sum[3] += cta == rank ? own[3] : __uint_as_float(v.w);
                }
                #pragma unroll
                for (int i = 0; i < 4; ++i) own[i] = sum[i];
            }
            __syncwarp();
            if (lane < SPLITS && lane != rank) barrier_arrive_in(in_cta(sums_empty + 8 * (group * SPLITS + rank), lane));
        };
        // Results of 64 rows and OUT_TOKENS tokens, as y has them.
        auto transpose = [&](const float (&d)[TOKENS / 8][4], int first, const float (&scale)[2], const float (&offset)[2], u32 out) {
            #pragma unroll
            for (int nt = 0; nt < OUT_TOKENS / 8; nt += 2) {
                u32 packed[4];
                #pragma unroll
                for (int n = 0; n < 2; ++n)
                    #pragma unroll
                    for (int h = 0; h < 2; ++h)
                        packed[2 * n + h] = pack_16(activated(d[first + nt + n][2 * h] * scale[h] + offset[h]),
                                                    activated(d[first + nt + n][2 * h + 1] * scale[h] + offset[h]));
                // lane l gives the address of row l%8 of matrix l/8: tokens nt, nt + 1; rows 0, 8
                const int token = 8 * (nt + lane / 16) + lane % 8, piece = 2 * warp + lane / 8 % 2;
                store_matrices_transposed(out + 128 * token + 16 * (piece ^ (token & 7)), packed);
            }
        };

        for (int t = first; t < tiles; t += clusters) {
            const Tile<1> tile(t, row_groups, token_tiles);
            const int first_row = tile.rows * ROWS + group * GROUP_ROWS;
            if (threadIdx.x % 128 < GROUP_ROWS / 8) {
                const int here = 8 * (threadIdx.x % 128), row = first_row + here;
                if (row_scales && row < N) copy_16(shared_address(scales_here + group * GROUP_ROWS + here), row_scales + row, true);
                if (bias && row < N) copy_16(shared_address(bias_here + group * GROUP_ROWS + here), bias + row, true);
            }
            commit_copies();

            // Each step's weights go to one of two sets of registers, each unit's metadata too: the
            // multiplications of the step before still read the other.
            float acc[ROW_BLOCKS][TOKENS / 8][4];
            u32 set[2][ROW_BLOCKS][4];
            uint2 metadata[2][ROW_BLOCKS];
            int before = 0;
            auto multiply = [&](const int parity, bool begun) {
                const u32 at = own + a.stage * A_BYTES;
                Words words[ROW_BLOCKS];
                Scales scales[ROW_BLOCKS];
                barrier_wait(a_full + 8 * a.stage, a.parity);
                #pragma unroll
                for (int m = 0; m < ROW_BLOCKS; ++m) {
                    scales[m].load(at + m * 4 * UNIT_BYTES, lane);
                    metadata[parity][m] = load_shared_64(at + m * 4 * UNIT_BYTES + VALUE_BYTES + 8 * lane);
                }
                #pragma unroll
                for (int s = 0; s < 4; ++s) {
                    #pragma unroll
                    for (int m = 0; m < ROW_BLOCKS; ++m) {
                        words[m].load(at + m * 4 * UNIT_BYTES, lane, s);
                        weights_of(set[s % 2][m], words[m], scales[m], s);
                    }
                    if (s % 2 == 0) barrier_wait(b_full + 8 * b.stage, b.parity);
                    const u64 operand = swizzled_operand(b_ring + b.stage * B_BYTES) + s % 2 * (64 >> 4);
                    wgmma_fence();
                    #pragma unroll
                    for (int m = 0; m < ROW_BLOCKS; ++m) {
                        const u32 places = s < 2 ? metadata[parity][m].x : metadata[parity][m].y;
                        if (s % 2) multiply_sparse_warpgroup<HALF, 1, TOKENS / 8>(acc[m], set[1][m], operand, places, 1);
                        else multiply_sparse_warpgroup<HALF, 0, TOKENS / 8>(
                            acc[m], set[0][m], operand, places, s > 0 || begun);
                    }
                    wgmma_commit();
                    if (s > 0 || begun) wgmma_wait<1>();
                    if (s == 0 && begun) {
                        #pragma unroll
                        for (int m = 0; m < ROW_BLOCKS; ++m) hold(held, metadata[parity ^ 1][m]);
                    }
                    if (s % 2 == 0) {
                        if (s > 0 || begun) release_box(before);
                        before = b.stage;
                    } else {
                        b.advance();
                    }
                }
                if (lane == 0) barrier_arrive(a_empty + 8 * a.stage);      // all of it is in registers
                a.advance();
            };
            multiply(0, false);
            #pragma unroll 1
            for (int unit = from + 1; unit < to; unit += 2) {
                multiply(1, true);
                if (unit + 1 < to) multiply(0, true);
            }
            wgmma_wait<0>();
            release_box(before);

            // Added, scaled, transposed, stored: some tokens of 64 rows at a time, in buffers in turn.
            wait_copies<0>();
            #pragma unroll
            for (int round = 0; round < ROUNDS; ++round) {
                if constexpr (SPLITS > 1) {
                    #pragma unroll
                    for (int owner = 0; owner < SPLITS; ++owner) {
                        const int part = round * SPLITS + owner, sent = done * owned(owner) + round;
                        if (part >= PARTS || owner == rank) continue;
                        barrier_wait_cluster(sums_empty + 8 * (group * SPLITS + owner), sent % 2 ^ 1);
                        send(acc[part / BLOCK_PARTS], part % BLOCK_PARTS * OUT_TOKENS / 8, owner);
                    }
                    if (round * SPLITS + rank < PARTS) {
                        if (stores) barrier_expect(sums_full + 8 * group, (SPLITS - 1) * SUM_BYTES);
                        barrier_wait_cluster(sums_full + 8 * group, stored % 2);
                    }
                }
                #pragma unroll
                for (int owner = 0; owner < SPLITS; ++owner) {
                    const int part = round * SPLITS + owner;
                    if (part >= PARTS || (SPLITS > 1 && owner != rank)) continue;
                    const int m = part / BLOCK_PARTS, first_token = part % BLOCK_PARTS * OUT_TOKENS;
                    float(&d)[TOKENS / 8][4] = acc[m];
                    if constexpr (SPLITS > 1) receive(d, first_token / 8);
                    const u32 out = results + (group * OUT_BUFFERS + stored % OUT_BUFFERS) * OUT_BYTES;
                    if (OUT_BUFFERS < ROUNDS || round == 0) {
                        if (stores) wait_stores_read<OUT_BUFFERS < ROUNDS ? OUT_BUFFERS - 1 : 0>();
                        barrier_of_warpgroup(1 + group);   // scales are there, the buffer is free
                    }
                    float scale[2], offset[2];
                    #pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int here = group * GROUP_ROWS + m * 64 + warp * 16 + g + 8 * h;
                        scale[h] = row_scales ? float_of_16<HALF>(scales_here[here]) * RESTORE : RESTORE;
                        offset[h] = bias ? float_of_16<HALF>(bias_here[here]) : 0.0f;
                    }
                    transpose(d, first_token / 8, scale, offset, out);
                    fence_async_proxy();
                    barrier_of_warpgroup(1 + group);
                    const int row = first_row + m * 64, token = first_token_of(tile.tokens, M) + first_token;
                    if (stores) {
                        if (row < N && token < M) store_box(y, 2 * row, token, out);
                        commit_stores();
                    }
                    ++stored;
                }
            }
            ++done;
        }
        if (threadIdx.x % 128 == 0) wait_stores();
    }
    if constexpr (SPLITS > 1) {                            // nobody leaves while others write to it
        cluster_arrive();
        cluster_wait();
    }
}
