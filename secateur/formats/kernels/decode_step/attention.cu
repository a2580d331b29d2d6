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
// nothing but the stored keys and values and the result is rounded to 16 bits. A warp multiplies the keys
// of its next tile while it makes weights of this tile's scores: one after the other, they would take it
// twice as long. Every warp keeps a running maximum, sum and result, and sends each to the CTA of the
// cluster that owns the output, which joins them: always in the same order, so a repeated call gives the
// same bits.
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
constexpr int SHARE = OWNED >= THREADS ? 1 : OWNED >= THREADS / 8 ? THREADS / OWNED : 8;   // lanes that join an output
constexpr int PITCH = OWNED + (SHARE > 1 ? 32 / SHARE : 0);   // so that they read different banks
constexpr bool KEPT = HEAD < 256;                // queries in registers, of which a thread has enough
constexpr int CHAINS = KEPT ? 2 : 1;             // of multiplications that wait for one another, for a score
constexpr float LOWEST = -1e30f;                 // below every score; its difference with itself is 0
constexpr float LOG2_E = 1.4426950408889634f;

static_assert(QUERIES <= 8, "rows 8..15 hold what rounding has left");
static_assert(OUTPUTS % CLUSTER == 0 && WORKERS % SHARE == 0, "every CTA owns, every lane joins as many");

extern __shared__ __align__(128) u8 ring[];

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

// The new key and value of a kv head: 16 numbers of each, one lane's.
struct New {
    uint4 key_low, key_high, value_low, value_high;

    __device__ __forceinline__ void read(const u16* key_head, const u16* value_head, int j) {
        const uint4* const key = reinterpret_cast<const uint4*>(key_head);
        const uint4* const value = reinterpret_cast<const uint4*>(value_head);
        key_low = key[j], key_high = key[LANES + j], value_low = value[j], value_high = value[LANES + j];
    }

    // The key as it is stored.
    __device__ __forceinline__ void rotate(
        const u16* key_norm, const float* cosine, const float* sine, float epsilon, int j) {
        float low[8], high[8];
        unpack_8<HALF>(low, key_low);
        unpack_8<HALF>(high, key_high);
        if constexpr (NORM) {
            float squares = 0.0f, of_low[8], of_high[8];
            unpack_8<HALF>(of_low, reinterpret_cast<const uint4*>(key_norm)[j]);
            unpack_8<HALF>(of_high, reinterpret_cast<const uint4*>(key_norm)[LANES + j]);
            #pragma unroll
            for (int i = 0; i < 8; ++i) squares += low[i] * low[i] + high[i] * high[i];
            const float inverse = rsqrtf(over_lanes<LANES>(squares) / HEAD + epsilon);
            #pragma unroll
            for (int i = 0; i < 8; ++i) low[i] *= inverse * of_low[i], high[i] *= inverse * of_high[i];
        }
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float l = low[i], r = high[i], c = cosine[8 * j + i], s = sine[8 * j + i];
            low[i] = l * c - r * s;
            high[i] = r * c + l * s;
        }
        key_low = pack_8<HALF>(low), key_high = pack_8<HALF>(high);
    }
};

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

    __shared__ __align__(16) float results[WORKERS][PITCH];   // of this CTA's outputs, by every warp of the cluster
    __shared__ float2 states[WORKERS][QUERIES];               // their maxima and sums
    __shared__ __align__(8) u64 barrier;
    __shared__ New new_pieces[LANES];
    __shared__ uint4 query_pieces[KEPT ? 1 : STEPS][32];
    const u32 stages = shared_address(ring) + warp * STAGES * STAGE_BYTES, joined = shared_address(&barrier);

    // The place of a piece of a key in a tile.
    auto place = [](int key, int piece) { return key * ROW_BYTES + 16 * (piece ^ key % 8); };
    // Starts the copies of a tile's keys, or values, of which this lane has a piece of every AT_ONCE-th key.
    constexpr int AT_ONCE = 32 / PIECES;
    const int own_key = lane / PIECES, own_piece = lane % PIECES;
    auto fetch = [&](const u16* from, int tile, u32 to) {
        if (tile >= tiles) return;
        const int first = TILE * (tile * WORKERS + worker);
        const u16* const own = from + static_cast<u32>((first + own_key) * HEAD + 8 * own_piece);   // below 2^32
        #pragma unroll
        for (int key = 0; key < TILE; key += AT_ONCE) {      // own_key is less than AT_ONCE: their sum has the bits of both
            const u32 at = to + (own_key + key) * ROW_BYTES + 16 * (own_piece ^ own_key ^ key % 8);
            const bool there = first + own_key + key < count;   // else zeros: what lies there need not be numbers
            copy_16(at, there ? own + key * HEAD : from, there);
        }
    };
    if constexpr (CLUSTER > 1) {
        if (threadIdx.x == 0) {
            barrier_init(joined, 1 + WARPS);
            barrier_init_done();
            barrier_expect(joined, (WORKERS - WARPS) * (OWNED * 4 + QUERIES * 8));   // from the other CTAs
        }
    }
    // Group i of copies has the keys of tile i and the values of the tile before.
    #pragma unroll
    for (int i = 0; i < STAGES; ++i) {
        fetch(old_keys, i, stages + i * STAGE_BYTES);
        if (i > 0) fetch(old_values, i - 1, stages + (i - 1) * STAGE_BYTES + TILE_BYTES);
        commit_copies();
    }
    fetch(old_values, STAGES - 1, stages + (STAGES - 1) * STAGE_BYTES + TILE_BYTES);
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
    New fresh;                                       // asked for before the queries are waited for
    if (has_new) fresh.read(heads + (query_heads + kv) * HEAD, heads + (query_heads + kv_heads + kv) * HEAD, j);
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
        fresh.rotate(key_norm, cosine, sine, epsilon, j);
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
    const int newest = count - TILE * ((tiles - 1) * WORKERS + worker);   // the new key's place in the last tile
    auto put_new = [&](u32 to, int low, int high) {  // pieces j and LANES + j of it
        __syncwarp();                                // zeros are there, which other lanes have copied
        if (lane < LANES) {
            const uint4* const pieces = &new_pieces[lane].key_low;   // this lane's own
            store_shared_128(to + place(newest, j), pieces[low]);
            store_shared_128(to + place(newest, LANES + j), pieces[high]);
        }
    };
    float scores[2][CHAINS][4];                      // of eight keys each
    auto multiply_keys = [&](u32 of_keys) {
        #pragma unroll
        for (int i = 0; i < 8 * CHAINS; ++i) scores[i / 4 / CHAINS][i / 4 % CHAINS][i % 4] = 0.0f;
        #pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            u32 a[4], k[4];
            query(a, step);
            load_matrices(k, of_keys + place(matrix / 2 * 8 + row, 2 * step + matrix % 2));
            multiply_16<HALF>(scores[0][step % CHAINS], a, k[0], k[1]);
            multiply_16<HALF>(scores[1][step % CHAINS], a, k[2], k[3]);
        }
    };
    wait_copies<STAGES - 1>();
    if (has_new && tiles == 1) put_new(stages, 0, 1);
    __syncwarp();                                    // every lane's copies are there for all
    multiply_keys(stages);
    __syncwarp();                                    // all have read them
    fetch(old_keys, STAGES, stages);
    commit_copies();

    u32 stage = stages;
    for (int tile = 0; tile < tiles; ++tile) {
        const int first = TILE * (tile * WORKERS + worker);
        const u32 next = stage == stages + (STAGES - 1) * STAGE_BYTES ? stages : stage + STAGE_BYTES;
        wait_copies<STAGES - 1>();
        if (has_new && tile == tiles - 2) put_new(next, 0, 1);
        if (has_new && tile == tiles - 1) put_new(stage + TILE_BYTES, 2, 3);
        __syncwarp();

        float value[2][2], highest = LOWEST;
        #pragma unroll
        for (int t = 0; t < 2; ++t)
            #pragma unroll
            for (int i = 0; i < 2; ++i) {
                float v = scores[t][0][i] + scores[t][0][2 + i];
                if constexpr (CHAINS == 2) v += scores[t][1][i] + scores[t][1][2 + i];
                v *= unit;
                if constexpr (SOFTCAP) v = cap * tanhf(v / cap) * LOG2_E;
                value[t][i] = first + 8 * t + 2 * q + i <= count ? v : LOWEST;
                highest = fmaxf(highest, value[t][i]);
            }
        multiply_keys(next);                         // behind the last tile: of no use, and not used
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
        const float kept = exp2f(most - fmaxf(most, highest));
        most = fmaxf(most, highest);
        sum *= kept;
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
            load_matrices_transposed(v, stage + TILE_BYTES + place(matrix % 2 * 8 + row, 2 * d + matrix / 2));
            #pragma unroll
            for (int i = 0; i < 8; ++i) result[2 * d + i / 4][i % 4] *= kept;
            multiply_16<HALF>(result[2 * d], weights, v[0], v[1]);
            multiply_16<HALF>(result[2 * d + 1], weights, v[2], v[3]);
        }
        __syncwarp();                                // all have read the keys and the values
        fetch(old_values, tile + STAGES, stage + TILE_BYTES);
        fetch(old_keys, tile + 1 + STAGES, next);
        commit_copies();
        stage = next;
    }

    // Each warp's sums go to the CTAs that own the outputs.
    sum = over_lanes<4>(sum);
    if constexpr (CLUSTER > 1) cluster_wait();       // the others have begun: their memory can be written
    if (h < QUERIES) {
        for (int owner = q; owner < CLUSTER; owner += 4) {
            float2* const to = &states[worker][h];
            if (owner == rank) *to = make_float2(most, sum);
            else store_remote(in_cta(shared_address(to), owner), most, sum, in_cta(joined, owner));
        }
        #pragma unroll
        for (int d = 0; d < 2 * STEPS; ++d) {
            const int output = h * HEAD + 8 * d + 2 * q, owner = output / OWNED;
            float* const to = &results[worker][output % OWNED];
            const float a = result[d][0] + result[d][2], b = result[d][1] + result[d][3];
            if (CLUSTER == 1 || owner == rank) to[0] = a, to[1] = b;
            else store_remote(in_cta(shared_address(to), owner), a, b, in_cta(joined, owner));
        }
    }
    if constexpr (CLUSTER > 1) {
        __syncwarp();
        if (lane == 0) barrier_arrive(joined);       // this warp's sums for this CTA itself
        barrier_wait_cluster(joined, 0);
    } else {
        __syncthreads();
    }

    #pragma unroll
    for (int base = 0; base < OWNED; base += THREADS / SHARE) {
        const int index = base + static_cast<int>(threadIdx.x) / SHARE, own = min(index, OWNED - 1);
        const int output = rank * OWNED + own, h = output / HEAD, from = lane % SHARE;
        float most = LOWEST, sum = 0.0f, result = 0.0f;
        #pragma unroll
        for (int w = 0; w < WORKERS; w += SHARE) most = fmaxf(most, states[w + from][h].x);
        #pragma unroll
        for (int step = SHARE / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        #pragma unroll
        for (int w = 0; w < WORKERS; w += SHARE) {
            const float2 state = states[w + from][h];
            const float weight = exp2f(state.x - most);
            result += weight * results[w + from][own];
            sum += weight * state.y;
        }
        sum = over_lanes<SHARE>(sum), result = over_lanes<SHARE>(result);
        if (index >= OWNED || from > 0 || part * QUERIES + h >= of_kv) continue;
        const size_t row = static_cast<size_t>(sequence) * query_heads + first_query + h;
        y[row * HEAD + output % HEAD] = round_16<HALF>(result / sum);
    }
}
