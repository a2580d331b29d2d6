// Attention of one new token of each sequence: rotary positions, the new key and value appended to the
// cache, and softmax(q K^T scale) V over the keys that are there.
//
// The bound is the cache's bytes / memory bandwidth: at 1024 tokens of Llama-3-8B 4.2 MB, 0.9 us on an
// H200, less than the way through any kernel. So what counts is that the cache is under way before the
// queries are there: keys and values of earlier tokens depend on no kernel of this step, and their copies
// start before `wait_for_predecessor`.
//
// A cluster serves QUERIES query heads of one kv head of one sequence. Its warps take tiles of TILE keys
// in turns, each through a ring of its own, so that no warp waits for another before the end. Tensor cores
// multiply: a query is a row of A, of which there are 16, so rows 0..7 hold the queries rounded to 16 bits
// and rows 8..15 what the rounding left; likewise the weights. Their products are added in one lane, and
// nothing but the stored keys and values and the result is rounded to 16 bits. Every warp keeps a running
// maximum, sum and result; they are joined in the CTA, and by the CTA of the cluster that owns an output:
// always in the same order, so a repeated call gives the same bits.
//
// A tile lies in shared memory key by key; its 16-byte pieces are permuted by the key, so that eight keys'
// pieces of one place are in different banks. The new key and value are put where the cache's last would
// be followed by the next.
//
//   macro      values         meaning
//   HALF       0, 1           float16, not bfloat16
//   HEAD       64, 128, 256   numbers of a head
//   QUERIES    1 2 4 8        query heads of a cluster; the kv head's that are left over are idle
//   CLUSTER    1 2 4 8 16     CTAs that split the keys
//   STAGES     2..            tiles that a warp's ring holds
//   NORM       0, 1           queries and keys are normalised, by RMS, before the rotation
//   SOFTCAP    0, 1           scores are cap tanh(score / cap)
//
// Source: online softmax, Milakov and Gimelshein 2018 (arXiv 1805.02867); split over keys, Dao et al. 2023
// (Flash-Decoding); rows for the heads of a group, Ainslie et al. 2023 (arXiv 2305.13245, grouped queries).

#include "ptx.cuh"

constexpr int WARPS = 512 / HEAD, THREADS = 32 * WARPS;
constexpr int LANES = HEAD / 16;                 // that share the new key
constexpr int STEPS = HEAD / 16;                 // of 16 numbers of a head
constexpr int TILE = 16;                         // keys
constexpr int ROW_BYTES = 2 * HEAD;
constexpr int PIECES = ROW_BYTES / 16;           // of a key
constexpr int TILE_BYTES = TILE * ROW_BYTES;     // of keys, and of values
constexpr int STAGE_BYTES = 2 * TILE_BYTES;
constexpr int WORKERS = WARPS * CLUSTER;         // that take tiles in turns
constexpr int OUTPUTS = QUERIES * HEAD;
constexpr int OWNED = OUTPUTS / CLUSTER;         // of a CTA
constexpr bool KEPT = HEAD < 256;                // queries in registers, of which a thread has enough
constexpr float LOWEST = -1e30f;                 // below every score; its difference with itself is 0
constexpr float LOG2_E = 1.4426950408889634f;

static_assert(QUERIES <= 8, "rows 8..15 hold what rounding has left");
static_assert(OUTPUTS % CLUSTER == 0, "every CTA owns as many outputs");

extern __shared__ __align__(128) u8 ring[];

// 16 numbers of a head: eight of each half, so that a rotary pair is in one lane.
struct Piece {
    float low[8], high[8];
};

__device__ __forceinline__ Piece read(const u16* head, int j) {
    Piece piece;
    unpack_8<HALF>(piece.low, *reinterpret_cast<const uint4*>(head + 8 * j));
    unpack_8<HALF>(piece.high, *reinterpret_cast<const uint4*>(head + HEAD / 2 + 8 * j));
    return piece;
}

// The sum over neighbouring lanes, LANES of them or four.
template <int COUNT>
__device__ __forceinline__ float over_lanes(float v) {
    #pragma unroll
    for (int step = COUNT / 2; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    return v;
}

// Two numbers rounded to 16 bits, and what that leaves of them, rounded too.
struct Split {
    u32 rounded, rest;
};

__device__ __forceinline__ Split split(float a, float b) {
    const u16 low = round_16<HALF>(a), high = round_16<HALF>(b);
    const float a_left = a - float_of_16<HALF>(low), b_left = b - float_of_16<HALF>(high);
    return {low | static_cast<u32>(high) << 16,
            round_16<HALF>(a_left) | static_cast<u32>(round_16<HALF>(b_left)) << 16};
}

// The new key and value of a kv head, as they are stored: 16 numbers of each, one lane's.
struct New {
    uint4 key_low, key_high, value_low, value_high;
};

__device__ __forceinline__ New read_new(
    const u16* key_head, const u16* value_head, const u16* key_norm, const float* cosine, const float* sine,
    float epsilon, int j) {
    Piece key = read(key_head, j);
    if constexpr (NORM) {
        const Piece weight = read(key_norm, j);
        float squares = 0.0f;
        #pragma unroll
        for (int i = 0; i < 8; ++i) squares += key.low[i] * key.low[i] + key.high[i] * key.high[i];
        const float inverse = rsqrtf(over_lanes<LANES>(squares) / HEAD + epsilon);
        #pragma unroll
        for (int i = 0; i < 8; ++i) key.low[i] *= inverse * weight.low[i], key.high[i] *= inverse * weight.high[i];
    }
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float low = key.low[i], high = key.high[i], c = cosine[8 * j + i], s = sine[8 * j + i];
        key.low[i] = low * c - high * s;
        key.high[i] = high * c + low * s;
    }
    const uint4* const value = reinterpret_cast<const uint4*>(value_head);
    return {pack_8<HALF>(key.low), pack_8<HALF>(key.high), value[j], value[LANES + j]};
}

// A query's rotary pairs that lane q of its four has: numbers 16 s + 2 q + {0, 1, 8, 9} of both halves.
__device__ __forceinline__ constexpr int number_of(int i, int q) { return i / 4 * 16 + i % 4 / 2 * 8 + 2 * q + i % 2; }

extern "C" __global__ void __launch_bounds__(THREADS, 2) attention(
    const u16* __restrict__ qkv,        // [B, (query heads + 2 kv heads) HEAD]
    u16* __restrict__ keys,             // [B, kv heads, slots, HEAD]
    u16* __restrict__ values,
    const float* __restrict__ cosines,  // [positions, HEAD / 2]
    const float* __restrict__ sines,
    const u16* __restrict__ query_norm, // [HEAD], or null
    const u16* __restrict__ key_norm,
    const int* __restrict__ position,   // [1]: the slot of the new tokens
    const int* __restrict__ padding,    // [B]: slots of each sequence that hold nothing, from 0 on
    u16* __restrict__ y,                // [B, query heads HEAD]
    int query_heads, int kv_heads, int slots,
    int window,                         // the most keys that a query sees, its own among them
    float scale, float cap, float epsilon) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int of_kv = query_heads / kv_heads, clusters = (of_kv + QUERIES - 1) / QUERIES;
    int cluster = static_cast<int>(blockIdx.x) / CLUSTER;
    const int part = cluster % clusters;
    cluster /= clusters;
    const int kv = cluster % kv_heads, sequence = cluster / kv_heads;
    const int rank = CLUSTER > 1 ? static_cast<int>(cluster_rank()) : 0;
    const int here = *position, skipped = padding[sequence];
    const int first_key = max(skipped, here - window + 1), count = max(here - first_key, 0);   // in the cache
    const int worker = rank * WARPS + warp, all_tiles = count / TILE + 1;                      // with the new key
    const int tiles = (all_tiles - worker + WORKERS - 1) / WORKERS;                            // of this warp
    const bool has_new = (all_tiles - 1) % WORKERS == worker;                                  // in its last
    const size_t cache = (static_cast<size_t>(sequence) * kv_heads + kv) * slots;
    const u16* const old_keys = keys + (cache + first_key) * HEAD;
    const u16* const old_values = values + (cache + first_key) * HEAD;

    __shared__ float warp_results[WARPS][OUTPUTS], warp_most[WARPS][QUERIES], warp_sums[WARPS][QUERIES];
    __shared__ float cta_results[CLUSTER][OWNED], cta_most[CLUSTER][QUERIES], cta_sums[CLUSTER][QUERIES];
    __shared__ New new_pieces[LANES];
    __shared__ uint4 query_pieces[KEPT ? 1 : STEPS][32];
    const u32 stages = shared_address(ring) + warp * STAGES * STAGE_BYTES;

    // The place of a piece of a key in a tile.
    auto place = [](int key, int piece) { return key * ROW_BYTES + 16 * (piece ^ key % 8); };
    auto fetch = [&](int tile, u32 to) {
        if (tile < tiles) {
            const int first = TILE * (tile * WORKERS + worker);
            #pragma unroll 4
            for (int i = 0; i < TILE * PIECES / 32; ++i) {
                const int key = (32 * i + lane) / PIECES, piece = (32 * i + lane) % PIECES;
                const bool there = first + key < count;   // else zeros: what lies there need not be numbers
                const u32 offset = there ? (first + key) * HEAD + 8 * piece : 0;   // of a head: less than 2^32
                copy_16(to + place(key, piece), old_keys + offset, there);
                copy_16(to + TILE_BYTES + place(key, piece), old_values + offset, there);
            }
        }
        commit_copies();
    };
    #pragma unroll
    for (int i = 0; i < STAGES; ++i) fetch(i, stages + i * STAGE_BYTES);
    if constexpr (CLUSTER > 1) cluster_arrive_relaxed();

    const int h = lane / 4, q = lane % 4;            // this lane's query, and which of its lanes it is
    const float* const cosine = cosines + static_cast<size_t>(here - skipped) * (HEAD / 2);
    const float* const sine = sines + static_cast<size_t>(here - skipped) * (HEAD / 2);
    float c[2 * STEPS], s[2 * STEPS];
    #pragma unroll
    for (int i = 0; i < 2 * STEPS; i += 2) {
        const float2 cos_pair = *reinterpret_cast<const float2*>(cosine + number_of(i, q));
        const float2 sin_pair = *reinterpret_cast<const float2*>(sine + number_of(i, q));
        c[i] = cos_pair.x, c[i + 1] = cos_pair.y, s[i] = sin_pair.x, s[i + 1] = sin_pair.y;
    }

    wait_for_predecessor();
    launch_dependents();                // whoever starts behind this kernel knows that all before it has ended

    const u16* const heads = qkv + static_cast<size_t>(sequence) * (query_heads + 2 * kv_heads) * HEAD;
    const int first_query = kv * of_kv + part * QUERIES, j = lane % LANES;
    u32 queries[STEPS][4];                           // A of each 16 numbers: rounded and rest, in turns
    {
        const u16* const head = heads + min(first_query + min(h, QUERIES - 1), kv * of_kv + of_kv - 1) * HEAD;
        float low[2 * STEPS], high[2 * STEPS];
        auto read_pair = [&](float* to, const u16* at) {
            const u32 pair = *reinterpret_cast<const u32*>(at);
            to[0] = float_of_16<HALF>(static_cast<u16>(pair)), to[1] = float_of_16<HALF>(static_cast<u16>(pair >> 16));
        };
        #pragma unroll
        for (int i = 0; i < 2 * STEPS; i += 2) {
            read_pair(low + i, head + number_of(i, q));
            read_pair(high + i, head + HEAD / 2 + number_of(i, q));
        }
        if constexpr (NORM) {
            float squares = 0.0f;
            #pragma unroll
            for (int i = 0; i < 2 * STEPS; ++i) squares += low[i] * low[i] + high[i] * high[i];
            const float inverse = rsqrtf(over_lanes<4>(squares) / HEAD + epsilon);
            #pragma unroll
            for (int i = 0; i < 2 * STEPS; i += 2) {
                float of_low[2], of_high[2];
                read_pair(of_low, query_norm + number_of(i, q));
                read_pair(of_high, query_norm + HEAD / 2 + number_of(i, q));
                #pragma unroll
                for (int k = 0; k < 2; ++k) low[i + k] *= inverse * of_low[k], high[i + k] *= inverse * of_high[k];
            }
        }
        #pragma unroll
        for (int i = 0; i < 2 * STEPS; ++i) {
            const float l = low[i], r = high[i];
            low[i] = l * c[i] - r * s[i];
            high[i] = r * c[i] + l * s[i];
        }
        #pragma unroll
        for (int i = 0; i < 2 * STEPS; i += 2) {
            const Split of_low = split(low[i], low[i + 1]), of_high = split(high[i], high[i + 1]);
            const int step = i / 4, to = i % 4;      // a[0], a[1]: the first eight numbers; a[2], a[3]: the others
            queries[step][to] = of_low.rounded, queries[step][to + 1] = of_low.rest;
            queries[STEPS / 2 + step][to] = of_high.rounded, queries[STEPS / 2 + step][to + 1] = of_high.rest;
        }
    }
    if constexpr (!KEPT)                             // no matter which warp is the last: all have the same
        #pragma unroll
        for (int step = 0; step < STEPS; ++step)
            query_pieces[step][lane] =
                make_uint4(queries[step][0], queries[step][1], queries[step][2], queries[step][3]);
    auto query = [&](u32 (&a)[4], int step) {
        const uint4 pieces = KEPT ? make_uint4(queries[step][0], queries[step][1], queries[step][2], queries[step][3])
                                  : query_pieces[step][lane];
        a[0] = pieces.x, a[1] = pieces.y, a[2] = pieces.z, a[3] = pieces.w;
    };
    if (has_new) {
        const New fresh = read_new(
            heads + (query_heads + kv) * HEAD, heads + (query_heads + kv_heads + kv) * HEAD, key_norm,
            cosine, sine, epsilon, j);
        if (lane < LANES) new_pieces[lane] = fresh;
        if (lane < LANES && part == 0) {
            uint4* const key = reinterpret_cast<uint4*>(keys + (cache + here) * HEAD);
            uint4* const value = reinterpret_cast<uint4*>(values + (cache + here) * HEAD);
            key[j] = fresh.key_low, key[LANES + j] = fresh.key_high;
            value[j] = fresh.value_low, value[LANES + j] = fresh.value_high;
        }
    }

    const float unit = SOFTCAP ? scale : scale * LOG2_E;
    float most = LOWEST, sum = 0.0f;                 // of this lane's query; the sum is of this lane's keys
    float result[2 * STEPS][4];                      // by the rounded weights, and by their rests
    #pragma unroll
    for (int d = 0; d < 2 * STEPS; ++d)
        #pragma unroll
        for (int i = 0; i < 4; ++i) result[d][i] = 0.0f;

    const int matrix = lane / 8, row = lane % 8;     // whose address this lane gives, of four
    u32 of_keys = stages;
    for (int tile = 0; tile < tiles; ++tile) {
        const int first = TILE * (tile * WORKERS + worker);
        const u32 of_values = of_keys + TILE_BYTES;
        wait_copies<STAGES - 1>();
        if (has_new && tile == tiles - 1 && lane < LANES) {
            const int key = count - first;
            const New fresh = new_pieces[lane];          // this lane's own
            store_shared_128(of_keys + place(key, j), fresh.key_low);
            store_shared_128(of_keys + place(key, LANES + j), fresh.key_high);
            store_shared_128(of_values + place(key, j), fresh.value_low);
            store_shared_128(of_values + place(key, LANES + j), fresh.value_high);
        }
        __syncwarp();                                // every lane's copies are there for all

        float scores[2][4] = {};                     // of eight keys each
        #pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            u32 a[4], k[4];
            query(a, step);
            load_matrices(k, of_keys + place(matrix / 2 * 8 + row, 2 * step + matrix % 2));
            multiply_16<HALF>(scores[0], a, k[0], k[1]);
            multiply_16<HALF>(scores[1], a, k[2], k[3]);
        }
        float value[2][2], highest = LOWEST;
        #pragma unroll
        for (int t = 0; t < 2; ++t)
            #pragma unroll
            for (int i = 0; i < 2; ++i) {
                float v = (scores[t][i] + scores[t][2 + i]) * unit;
                if constexpr (SOFTCAP) v = cap * tanhf(v / cap) * LOG2_E;
                value[t][i] = first + 8 * t + 2 * q + i <= count ? v : LOWEST;
                highest = fmaxf(highest, value[t][i]);
            }
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
        if (__any_sync(~0u, highest > most)) {
            const float kept = exp2f(most - fmaxf(most, highest));
            most = fmaxf(most, highest);
            sum *= kept;
            #pragma unroll
            for (int d = 0; d < 2 * STEPS; ++d)
                #pragma unroll
                for (int i = 0; i < 4; ++i) result[d][i] *= kept;
        }
        u32 weights[4];
        #pragma unroll
        for (int t = 0; t < 2; ++t) {
            const float a = exp2f(value[t][0] - most), b = exp2f(value[t][1] - most);
            sum += a + b;
            const Split both = split(a, b);
            weights[2 * t] = both.rounded, weights[2 * t + 1] = both.rest;
        }
        #pragma unroll
        for (int d = 0; d < STEPS; ++d) {
            u32 v[4];
            load_matrices_transposed(v, of_values + place(matrix % 2 * 8 + row, 2 * d + matrix / 2));
            multiply_16<HALF>(result[2 * d], weights, v[0], v[1]);
            multiply_16<HALF>(result[2 * d + 1], weights, v[2], v[3]);
        }
        __syncwarp();                                // all have read the stage
        fetch(tile + STAGES, of_keys);
        of_keys = of_keys == stages + (STAGES - 1) * STAGE_BYTES ? stages : of_keys + STAGE_BYTES;
    }

    // Join the lanes of a query, the warps of the CTA, and the CTAs of the cluster.
    sum = over_lanes<4>(sum);
    if (h < QUERIES) {
        float* const to = warp_results[warp] + h * HEAD + 2 * q;
        #pragma unroll
        for (int d = 0; d < 2 * STEPS; ++d)
            *reinterpret_cast<float2*>(to + 8 * d) =
                make_float2(result[d][0] + result[d][2], result[d][1] + result[d][3]);
        if (q == 0) warp_most[warp][h] = most, warp_sums[warp][h] = sum;
    }
    if constexpr (CLUSTER > 1) cluster_wait();      // the others have begun: their memory can be written
    __syncthreads();
    for (int index = threadIdx.x; index < OUTPUTS; index += THREADS) {
        const int h = index / HEAD;
        float most = warp_most[0][h], sum = 0.0f, result = 0.0f;
        #pragma unroll
        for (int w = 1; w < WARPS; ++w) most = fmaxf(most, warp_most[w][h]);
        #pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float weight = exp2f(warp_most[w][h] - most);
            result += weight * warp_results[w][index];
            sum += weight * warp_sums[w][h];
        }
        const int owner = index / OWNED;
        store_in_cta(in_cta(shared_address(&cta_results[rank][index % OWNED]), owner), result);
        if (index % HEAD < CLUSTER) {   // every CTA needs the maxima and sums of all
            store_in_cta(in_cta(shared_address(&cta_most[rank][h]), index % HEAD), most);
            store_in_cta(in_cta(shared_address(&cta_sums[rank][h]), index % HEAD), sum);
        }
    }
    if constexpr (CLUSTER > 1) cluster_arrive(), cluster_wait();
    else __syncthreads();
    for (int index = threadIdx.x; index < OWNED; index += THREADS) {
        const int output = rank * OWNED + index, h = output / HEAD;
        if (part * QUERIES + h >= of_kv) continue;
        float most = cta_most[0][h], sum = 0.0f, result = 0.0f;
        #pragma unroll
        for (int other = 1; other < CLUSTER; ++other) most = fmaxf(most, cta_most[other][h]);
        #pragma unroll
        for (int other = 0; other < CLUSTER; ++other) {
            const float weight = exp2f(cta_most[other][h] - most);
            result += weight * cta_results[other][index];
            sum += weight * cta_sums[other][h];
        }
        const size_t row = static_cast<size_t>(sequence) * query_heads + first_query + h;
        y[row * HEAD + output % HEAD] = round_16<HALF>(result / sum);
    }
}
