// Attention of one new token of each sequence: rotary positions, the new key and value appended to the
// cache, and softmax(q K^T scale) V over the keys that are there.
//
// The bound is the cache's bytes / memory bandwidth: at 1024 tokens of Llama-3-8B 4.2 MB, 0.9 us on an
// H200, less than the way through any kernel. So what counts is that the cache is under way before the
// queries are there: keys and values of earlier tokens depend on no kernel of this step, and their copies
// start before `wait_for_predecessor`.
//
// A cluster serves QUERIES query heads of one kv head of one sequence. Each of its CTAs takes a part of
// the keys, in tiles of TILE keys that bulk copies bring to a ring; consecutive keys of a head follow one
// another in the cache, so a tile is one run of bytes. LANES lanes share a key: lane j has the numbers
// 8j..8j+7 of both halves of the head, so that a rotary pair is in one lane. Every group of lanes keeps a
// running maximum, sum and result; they are joined in the warp, in the CTA, and by the CTA of the cluster
// that owns an output: always in the same order, so a repeated call gives the same bits.
//
// The queries are not rounded after the rotation, keys are, as they are stored. Sums are float32.
//
//   macro      values         meaning
//   HALF       0, 1           float16, not bfloat16
//   HEAD       64, 128, 256   numbers of a head
//   QUERIES    1 2 4          query heads of a cluster; the kv head's that are left over are idle
//   CLUSTER    1 2 4 8 16     CTAs that split the keys
//   STAGES     2..            tiles that the ring holds
//   NORM       0, 1           queries and keys are normalised, by RMS, before the rotation
//   SOFTCAP    0, 1           scores are cap tanh(score / cap)
//
// Source: online softmax, Milakov and Gimelshein 2018 (arXiv 1805.02867); split over keys, Dao et al. 2023
// (Flash-Decoding).

#include "ptx.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int LANES = HEAD / 16;                 // that share a key
constexpr int GROUPS = THREADS / LANES;          // of lanes, in a CTA
constexpr int KEYS = 2;                          // of a group, in a tile
constexpr int TILE = KEYS * GROUPS;
constexpr int ROW_BYTES = 2 * HEAD;
constexpr int TILE_BYTES = TILE * ROW_BYTES;     // of keys, and of values
constexpr int STAGE_BYTES = 2 * TILE_BYTES;
constexpr int OUTPUTS = QUERIES * HEAD;
constexpr int OWNED = OUTPUTS / CLUSTER;         // of a CTA
constexpr float LOWEST = -1e30f;                 // below every score; its difference with itself is 0
constexpr float LOG2_E = 1.4426950408889634f;

static_assert(OUTPUTS % CLUSTER == 0, "every CTA owns as many outputs");

extern __shared__ __align__(128) u8 ring[];

// 16 numbers of a head: eight of each half.
struct Piece {
    float low[8], high[8];
};

__device__ __forceinline__ Piece read(const u16* head, int j) {
    Piece piece;
    unpack_8<HALF>(piece.low, *reinterpret_cast<const uint4*>(head + 8 * j));
    unpack_8<HALF>(piece.high, *reinterpret_cast<const uint4*>(head + HEAD / 2 + 8 * j));
    return piece;
}

__device__ __forceinline__ Piece read_shared(u32 row, int j) {
    Piece piece;
    unpack_8<HALF>(piece.low, load_shared_128(row + 16 * j));
    unpack_8<HALF>(piece.high, load_shared_128(row + HEAD + 16 * j));
    return piece;
}

// The sum over the lanes that share a key.
__device__ __forceinline__ float over_lanes(float v) {
    #pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    return v;
}

__device__ __forceinline__ float dot(const Piece& a, const Piece& b) {
    float sum = 0.0f;
    #pragma unroll
    for (int i = 0; i < 8; ++i) sum += a.low[i] * b.low[i];
    #pragma unroll
    for (int i = 0; i < 8; ++i) sum += a.high[i] * b.high[i];
    return sum;
}

// x = x / rms(x) * weight, over the head.
__device__ __forceinline__ void normalise(Piece& x, const Piece& weight, float epsilon) {
    if constexpr (NORM) {
        const float inverse = rsqrtf(over_lanes(dot(x, x)) / HEAD + epsilon);
        #pragma unroll
        for (int i = 0; i < 8; ++i) x.low[i] *= inverse * weight.low[i], x.high[i] *= inverse * weight.high[i];
    }
}

// What has been found of one query: the result before it is divided by the sum, relative to the maximum.
struct Found {
    float most, sum;
    Piece result;
};

__device__ __forceinline__ void add_scaled(Piece& to, float scale, const Piece& value, float weight) {
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
        to.low[i] = to.low[i] * scale + weight * value.low[i];
        to.high[i] = to.high[i] * scale + weight * value.high[i];
    }
}

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
    const int lane = threadIdx.x % 32, j = lane % LANES, group = threadIdx.x / LANES;
    const int of_kv = query_heads / kv_heads, clusters = (of_kv + QUERIES - 1) / QUERIES;
    int cluster = static_cast<int>(blockIdx.x) / CLUSTER;
    const int part = cluster % clusters;
    cluster /= clusters;
    const int kv = cluster % kv_heads, sequence = cluster / kv_heads;
    const int rank = CLUSTER > 1 ? static_cast<int>(cluster_rank()) : 0;
    const int here = *position, skipped = padding[sequence];
    const int first_key = max(skipped, here - window + 1), count_all = max(here - first_key, 0);
    const int share = (count_all + CLUSTER - 1) / CLUSTER;
    const int begin = min(rank * share, count_all), count = min(share, count_all - begin);
    const int tiles = (count + TILE - 1) / TILE;
    const size_t cache = (static_cast<size_t>(sequence) * kv_heads + kv) * slots;
    const size_t from = (cache + first_key + begin) * HEAD;

    __shared__ __align__(8) u64 landed_here[STAGES];
    __shared__ float warp_results[WARPS][OUTPUTS], warp_most[WARPS][QUERIES], warp_sums[WARPS][QUERIES];
    __shared__ float cta_results[CLUSTER][OWNED], cta_most[CLUSTER][QUERIES], cta_sums[CLUSTER][QUERIES];
    const u32 landed = shared_address(landed_here), stages = shared_address(ring);

    auto fetch = [&](int tile) {
        const u32 bytes = min(TILE, count - tile * TILE) * ROW_BYTES;
        const u32 barrier = landed + 8 * (tile % STAGES), to = stages + tile % STAGES * STAGE_BYTES;
        const size_t offset = from + static_cast<size_t>(tile) * TILE * HEAD;
        barrier_expect(barrier, 2 * bytes);
        copy_bulk_to_all<1>(to, keys + offset, bytes, barrier);
        copy_bulk_to_all<1>(to + TILE_BYTES, values + offset, bytes, barrier);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) barrier_init(landed + 8 * i, 1);
        barrier_init_done();
        for (int i = 0; i < STAGES; ++i)
            if (i < tiles) fetch(i);
    }
    if constexpr (CLUSTER > 1) cluster_arrive_relaxed();

    const float* const cosine = cosines + static_cast<size_t>(here - skipped) * (HEAD / 2) + 8 * j;
    const float* const sine = sines + static_cast<size_t>(here - skipped) * (HEAD / 2) + 8 * j;
    float c[8], s[8];
    #pragma unroll
    for (int i = 0; i < 8; i += 4) {
        *reinterpret_cast<float4*>(c + i) = *reinterpret_cast<const float4*>(cosine + i);
        *reinterpret_cast<float4*>(s + i) = *reinterpret_cast<const float4*>(sine + i);
    }
    auto rotate = [&](Piece& x) {
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float low = x.low[i], high = x.high[i];
            x.low[i] = low * c[i] - high * s[i];
            x.high[i] = high * c[i] + low * s[i];
        }
    };

    __syncthreads();                    // the barriers are there for those who wait on them
    wait_for_predecessor();
    launch_dependents();                // whoever starts behind this kernel knows that all before it has ended

    const u16* const heads = qkv + static_cast<size_t>(sequence) * (query_heads + 2 * kv_heads) * HEAD;
    const int first_query = kv * of_kv + part * QUERIES;
    const float unit = SOFTCAP ? scale : scale * LOG2_E;
    Piece query[QUERIES];
    #pragma unroll
    for (int h = 0; h < QUERIES; ++h) {
        const int head = min(first_query + h, kv * of_kv + of_kv - 1);
        query[h] = read(heads + head * HEAD, j);
        if constexpr (NORM) normalise(query[h], read(query_norm, j), epsilon);
        rotate(query[h]);
        #pragma unroll
        for (int i = 0; i < 8; ++i) query[h].low[i] *= unit, query[h].high[i] *= unit;
    }
    auto score = [&](int h, const Piece& key) {
        float value = over_lanes(dot(query[h], key));
        if constexpr (SOFTCAP) value = cap * tanhf(value / cap) * LOG2_E;
        return value;
    };

    Found found[QUERIES];
    #pragma unroll
    for (int h = 0; h < QUERIES; ++h) {
        found[h].most = LOWEST, found[h].sum = 0.0f;
        #pragma unroll
        for (int i = 0; i < 8; ++i) found[h].result.low[i] = found[h].result.high[i] = 0.0f;
    }

    if (rank == 0 && threadIdx.x < 32) {   // the new key and value: one group's, read by all of its warp
        Piece key = read(heads + (query_heads + kv) * HEAD, j);
        if constexpr (NORM) normalise(key, read(key_norm, j), epsilon);
        rotate(key);
        const uint4 low = pack_8<HALF>(key.low), high = pack_8<HALF>(key.high);
        const u16* const value = heads + (query_heads + kv_heads + kv) * HEAD;
        if (part == 0 && group == 0) {
            const size_t to = (cache + here) * HEAD + 8 * j;
            *reinterpret_cast<uint4*>(keys + to) = low;
            *reinterpret_cast<uint4*>(keys + to + HEAD / 2) = high;
            *reinterpret_cast<uint4*>(values + to) = *reinterpret_cast<const uint4*>(value + 8 * j);
            *reinterpret_cast<uint4*>(values + to + HEAD / 2) =
                *reinterpret_cast<const uint4*>(value + HEAD / 2 + 8 * j);
        }
        unpack_8<HALF>(key.low, low), unpack_8<HALF>(key.high, high);
        #pragma unroll
        for (int h = 0; h < QUERIES; ++h) {
            const float most = score(h, key);
            if (group == 0) found[h].most = most, found[h].sum = 1.0f, found[h].result = read(value, j);
        }
    }

    for (int tile = 0; tile < tiles; ++tile) {
        const u32 stage = stages + tile % STAGES * STAGE_BYTES;
        barrier_wait(landed + 8 * (tile % STAGES), tile / STAGES & 1);
        const int left = count - tile * TILE;
        float scores[KEYS][QUERIES];
        #pragma unroll
        for (int k = 0; k < KEYS; ++k) {
            const Piece key = read_shared(stage + (group + k * GROUPS) * ROW_BYTES, j);
            #pragma unroll
            for (int h = 0; h < QUERIES; ++h) {
                const float value = score(h, key);   // of what an earlier tile left there, where there is no key
                scores[k][h] = group + k * GROUPS < left ? value : LOWEST;
            }
        }
        float weights[KEYS][QUERIES], kept[QUERIES];
        #pragma unroll
        for (int h = 0; h < QUERIES; ++h) {
            float most = found[h].most;
            #pragma unroll
            for (int k = 0; k < KEYS; ++k) most = fmaxf(most, scores[k][h]);
            kept[h] = exp2f(found[h].most - most);
            found[h].most = most;
            found[h].sum *= kept[h];
            #pragma unroll
            for (int k = 0; k < KEYS; ++k) {
                weights[k][h] = group + k * GROUPS < left ? exp2f(scores[k][h] - most) : 0.0f;
                found[h].sum += weights[k][h];
            }
        }
        #pragma unroll
        for (int k = 0; k < KEYS; ++k) {
            if (group + k * GROUPS >= left) break;   // what lies there need not be numbers
            const Piece value = read_shared(stage + TILE_BYTES + (group + k * GROUPS) * ROW_BYTES, j);
            #pragma unroll
            for (int h = 0; h < QUERIES; ++h)
                add_scaled(found[h].result, k == 0 ? kept[h] : 1.0f, value, weights[k][h]);
        }
        if (tile + STAGES < tiles) {
            __syncthreads();            // all have read the stage
            if (threadIdx.x == 0) fetch(tile + STAGES);
        }
    }

    // Join the groups of the warp, the warps of the CTA, and the CTAs of the cluster.
    #pragma unroll
    for (int h = 0; h < QUERIES; ++h) {
        Found& mine = found[h];
        float most = mine.most;
        #pragma unroll
        for (int step = LANES; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        const float scale_here = exp2f(mine.most - most);
        auto join = [&](float v) {
            v *= scale_here;
            #pragma unroll
            for (int step = LANES; step < 32; step *= 2) v += __shfl_xor_sync(~0u, v, step);
            return v;
        };
        mine.sum = join(mine.sum);
        float* const to = warp_results[threadIdx.x / 32] + h * HEAD + 8 * j;
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float low = join(mine.result.low[i]), high = join(mine.result.high[i]);
            if (lane < LANES) to[i] = low, to[HEAD / 2 + i] = high;
        }
        if (lane == 0) warp_most[threadIdx.x / 32][h] = most, warp_sums[threadIdx.x / 32][h] = mine.sum;
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
