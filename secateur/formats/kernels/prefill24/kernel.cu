// y = f((q W^T) scaled + bias) for codes q of many tokens, a 2:4 weight W of 8-bit codes and an
// activation f, which may be none, on Hopper.
//
//   D[64 rows, 256 tokens] += A[64 rows, 64 columns, 2:4] B[64 columns, 256 tokens]     wgmma.sp
//
// Weights are operand A, from registers; tokens are operand B, from shared memory. A CTA computes
// 128 rows x 256 tokens: two warpgroups of 64 rows each read the same tokens. A third copies blocks of
// 128 columns into a ring of STAGES stages. The CTAs of a cluster have the same tokens and rows of their
// own: each copies its share of the tokens to all of them, because the L2 cache could not feed each by
// itself.
//
// Codes of tokens lie row by row in memory, as whatever rounds the inputs writes them. The copy engine
// takes boxes of 128 columns and permutes each token's 16-byte pieces: wgmma's 128-byte swizzle.
// Weights lie as they are copied, in runs of bytes (`arrange.py`):
//
//   [128 rows] [128 columns]:   8 KB values   [warpgroup, 64 columns, warp, lane] 16 B
//                               2 KB metadata [warpgroup, warp, lane] 2 words
//
// Lane l of a warp has g = l/4, t = l%4. R0 holds row g of the warp's 16, kept columns 4t..4t+3 of 32;
// R1 row g+8; R2, R3 the same rows, kept columns 16+4t... A lane's metadata word for 64 columns holds
// eight nibbles: of row g + 8 (t%2), columns 32 (t/2) to 32 (t/2) + 31.
//
// CTAs stay and take tiles in turn; while a tile's results are scaled and stored, the first stages of
// the next are copied. Results are transposed in shared memory, so that y is written in whole lines.
//
// Source: PTX ISA for the layouts of registers and shared memory.
//
// M tokens, N rows of W (out_features), blocks of 128 columns (in_features, padded with zeros).

#include "activation.cuh"
#include "tiles.cuh"

constexpr int ROWS = 128, TOKENS = 256, COLUMNS = 128;
constexpr int CONSUMERS = 2;                               // warpgroups, of 64 rows
constexpr int THREADS = 128 * (CONSUMERS + 1);
constexpr int VALUE_BYTES = ROWS * COLUMNS / 2, META_BYTES = ROWS * COLUMNS / 8;
constexpr int A_BYTES = VALUE_BYTES + META_BYTES;
constexpr int BOX_TOKENS = TOKENS / CLUSTER;              // that each CTA copies to all
constexpr int B_BYTES = TOKENS * COLUMNS;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int OUT_TOKENS = 64;                             // transposed at a time
constexpr int OUT_BYTES = OUT_TOKENS * 64 * 2;             // of one warpgroup

#if FP8
using Sum = float;
#else
using Sum = int;
#endif

extern __shared__ __align__(1024) u8 shared[];

extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill(
    const __grid_constant__ TensorMap codes,   // [M, K], in boxes of BOX_TOKENS x COLUMNS
    const float* __restrict__ token_scales,    // [M]
    const u8* __restrict__ weight,         // [row tiles, blocks, A_BYTES]
    const u16* __restrict__ row_scales,    // [N]
    const u16* __restrict__ bias,          // [N], or null: 0
    u16* __restrict__ y,                   // [M, N]
    int M, int N, int blocks) {
    const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const int row_tiles = (N + ROWS - 1) / ROWS, row_groups = (row_tiles + CLUSTER - 1) / CLUSTER;
    const int token_tiles = (M + TOKENS - 1) / TOKENS, tiles = row_groups * token_tiles;
    const int first = static_cast<int>(blockIdx.x) / CLUSTER, clusters = static_cast<int>(gridDim.x) / CLUSTER;

    const u32 ring = (shared_address(shared) + 1023) / 1024 * 1024;
    const u32 results = ring + STAGES * STAGE_BYTES;
    __shared__ __align__(8) u64 barriers[2 * STAGES];
    __shared__ float scales_here[CONSUMERS][TOKENS];
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES;

    if (threadIdx.x == 0) {
        #pragma unroll
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, CLUSTER * CONSUMERS * 4);
        }
        barrier_init_done();
    }
    if constexpr (CLUSTER > 1) {
        cluster_arrive_relaxed();
        cluster_wait();
    } else {
        __syncthreads();
    }

    if (group == CONSUMERS) {
        give_registers<40>();
        if (warp == 0 && one_lane()) {
            wait_for_predecessor();
            int stage = 0;
            u32 parity = 1;
            for (int t = first; t < tiles; t += clusters) {
                const Tile<CLUSTER> tile(t, row_groups, token_tiles);
                const u8* a = weight + static_cast<size_t>(min(tile.rows, row_tiles - 1)) * blocks * A_BYTES;
                const u32 rank = CLUSTER == 1 ? 0 : cluster_rank();
                const int token = tile.tokens * TOKENS + static_cast<int>(rank) * BOX_TOKENS;
                for (int block = 0; block < blocks; ++block, a += A_BYTES) {
                    const u32 at = ring + stage * STAGE_BYTES, barrier = full + 8 * stage;
                    barrier_wait(empty + 8 * stage, parity);
                    barrier_expect(barrier, STAGE_BYTES);
                    copy_box_to_all<CLUSTER>(at + rank * (B_BYTES / CLUSTER), codes, block * COLUMNS, token, barrier);
                    copy_bulk_to_all<1>(at + B_BYTES, a, A_BYTES, barrier);
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                }
            }
        }
    } else {
        take_registers<232>();
        wait_for_predecessor();
        const u32 values = B_BYTES + group * VALUE_BYTES / 2 + warp * 512 + lane * 16;
        const u32 places = B_BYTES + VALUE_BYTES + group * META_BYTES / 2 + warp * 256 + lane * 8;
        const int g = lane / 4, pair = lane % 4;
        int stage = 0;
        u32 parity = 0;

        auto release = [&](int which) {
            if (lane < CLUSTER) barrier_arrive_in(in_cta(empty + 8 * which, lane));
        };

        for (int t = first; t < tiles; t += clusters) {
            const Tile<CLUSTER> tile(t, row_groups, token_tiles);
            for (int i = threadIdx.x % 128; i < TOKENS; i += 128) {
                const int token = tile.tokens * TOKENS + i;
                scales_here[group][i] = token < M ? token_scales[token] : 0.0f;
            }
            const int row = tile.rows * ROWS + group * 64 + warp * 16 + g;
            float scale[2], offset[2];
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
                const bool inside = row + 8 * h < N;
                scale[h] = inside ? float_of_16<HALF>(row_scales[row + 8 * h]) : 0.0f;
                offset[h] = inside && bias ? float_of_16<HALF>(bias[row + 8 * h]) : 0.0f;
            }

            // Each block's values go to one of two sets of registers: the multiplications of the
            // block before still read the other.
            Sum acc[TOKENS / 8][4];
            uint4 a[2][2];
            uint2 metadata[2];
            int before = 0;
            auto step = [&](int set, int block) {
                const u32 at = ring + stage * STAGE_BYTES;
                barrier_wait(full + 8 * stage, parity);
                a[set][0] = load_shared_128(at + values);
                a[set][1] = load_shared_128(at + values + 2048);
                metadata[set] = load_shared_64(at + places);
                const u64 b = swizzled_operand(at);
                wgmma_fence();
                multiply_sparse_codes(acc, a[set][0], b, metadata[set].x, block > 0);
                multiply_sparse_codes(acc, a[set][1], b + (64 >> 4), metadata[set].y, 1);
                wgmma_commit();
                if (block > 0) {
                    wgmma_wait<1>();
                    release(before);
                }
                before = stage;
                if (++stage == STAGES) stage = 0, parity ^= 1;
            };
            #pragma unroll 1
            for (int block = 0; block < blocks; block += 2) {
                step(0, block);
                if (block + 1 < blocks) step(1, block + 1);
            }
            wgmma_wait<0>();
            release(before);

            // Scaled, transposed, stored: 64 tokens at a time, in two buffers in turn.
            barrier_of_warpgroup(1 + group);       // scales_here is there
            #pragma unroll
            for (int part = 0; part < TOKENS / OUT_TOKENS; ++part) {
                const u32 out = results + (2 * group + part % 2) * OUT_BYTES;
                #pragma unroll
                for (int nt = 0; nt < OUT_TOKENS / 8; nt += 2) {
                    u32 packed[4];
                    #pragma unroll
                    for (int n = 0; n < 2; ++n) {
                        const int token = part * OUT_TOKENS + 8 * (nt + n) + 2 * pair;
                        const float2 ts = *reinterpret_cast<const float2*>(&scales_here[group][token]);
                        const Sum(&d)[4] = acc[part * OUT_TOKENS / 8 + nt + n];
                        #pragma unroll
                        for (int h = 0; h < 2; ++h)
                            packed[2 * n + h] = pack_16(
                                activated(static_cast<float>(d[2 * h]) * ts.x * scale[h] + offset[h]),
                                activated(static_cast<float>(d[2 * h + 1]) * ts.y * scale[h] + offset[h]));
                    }
                    // lane l gives the address of row l%8 of matrix l/8: tokens nt, nt + 1; rows 0, 8
                    const int token = 8 * (nt + lane / 16) + lane % 8, piece = 2 * warp + lane / 8 % 2;
                    store_matrices_transposed(out + 128 * token + 16 * (piece ^ (token & 7)), packed);
                }
                barrier_of_warpgroup(1 + group);
                #pragma unroll
                for (int i = 0; i < OUT_TOKENS * 8 / 128; ++i) {
                    const int index = 128 * i + threadIdx.x % 128, token = index / 8, piece = index % 8;
                    const uint4 v = load_shared_128(out + 128 * token + 16 * (piece ^ (token & 7)));
                    const int m = tile.tokens * TOKENS + part * OUT_TOKENS + token;
                    const int n = tile.rows * ROWS + group * 64 + 8 * piece;
                    if (m < M && n < N) *reinterpret_cast<uint4*>(y + static_cast<size_t>(m) * N + n) = v;
                }
            }
            barrier_of_warpgroup(1 + group);       // scales_here has been read
        }
    }
    if constexpr (CLUSTER > 1) {                         // nobody leaves while others write to it
        cluster_arrive();
        cluster_wait();
    }
}
