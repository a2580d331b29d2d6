// Queries and keys of a prompt's tokens: normalised where the model does so, turned by rotary positions;
// keys and values appended to the cache.
//
// LANES lanes have a head of a token: lane j the numbers 8j..8j+7 of both halves, so that a rotary pair is
// in one lane. Queries stay where they are. Bound by memory: every number is read and written once.
//
//   macro      values         meaning
//   HALF       0, 1           float16, not bfloat16
//   HEAD       64, 128, 256   numbers of a head
//   NORM       0, 1           queries and keys are normalised, by RMS, before the rotation

#include "ptx.cuh"

constexpr int THREADS = 256, LANES = HEAD / 16;

extern "C" __global__ void __launch_bounds__(THREADS) append(
    u16* queries,                       // [B T, ...]: a token's heads one after another
    const u16* __restrict__ new_keys,
    const u16* __restrict__ new_values,
    u16* __restrict__ keys,             // [B, kv heads, slots, HEAD]
    u16* __restrict__ values,
    const float* __restrict__ cosines,  // [positions, HEAD / 2]
    const float* __restrict__ sines,
    const u16* __restrict__ query_norm, // [HEAD], or null
    const u16* __restrict__ key_norm,
    int query_stride, int key_stride, int value_stride,  // from one token to the next, in numbers
    int rows, int tokens,               // B T, and T
    int query_heads, int kv_heads, int slots, float epsilon) {
    launch_dependents();
    wait_for_predecessor();
    const int heads = query_heads + 2 * kv_heads, j = threadIdx.x % LANES;
    const long long index = static_cast<long long>(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
    const bool idle = index >= static_cast<long long>(rows) * heads;   // it takes part in the sums over lanes
    const int row = idle ? rows - 1 : static_cast<int>(index / heads);
    const int head = idle ? heads - 1 : static_cast<int>(index % heads);
    const int sequence = row / tokens, token = row % tokens;
    const bool is_query = head < query_heads, is_value = head >= query_heads + kv_heads;
    const int kv = head - query_heads - (is_value ? kv_heads : 0);
    const u16* const from =
        is_query   ? queries + static_cast<size_t>(row) * query_stride + head * HEAD
        : is_value ? new_values + static_cast<size_t>(row) * value_stride + kv * HEAD
                   : new_keys + static_cast<size_t>(row) * key_stride + kv * HEAD;
    u16* const cache = (is_value ? values : keys) +
        ((static_cast<size_t>(sequence) * kv_heads + max(kv, 0)) * slots + token) * HEAD;
    u16* const to = is_query ? queries + static_cast<size_t>(row) * query_stride + head * HEAD : cache;

    uint4 packed_low = *reinterpret_cast<const uint4*>(from + 8 * j);
    uint4 packed_high = *reinterpret_cast<const uint4*>(from + HEAD / 2 + 8 * j);
    float low[8], high[8];
    unpack_8<HALF>(low, packed_low), unpack_8<HALF>(high, packed_high);
    if constexpr (NORM) {
        float squares = 0.0f;
        #pragma unroll
        for (int i = 0; i < 8; ++i) squares += low[i] * low[i] + high[i] * high[i];
        #pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
        const float inverse = rsqrtf(squares / HEAD + epsilon);
        const u16* const weight = is_query ? query_norm : key_norm;
        float of_low[8], of_high[8];
        unpack_8<HALF>(of_low, *reinterpret_cast<const uint4*>(weight + 8 * j));
        unpack_8<HALF>(of_high, *reinterpret_cast<const uint4*>(weight + HEAD / 2 + 8 * j));
        #pragma unroll
        for (int i = 0; i < 8; ++i) low[i] *= inverse * of_low[i], high[i] *= inverse * of_high[i];
    }
    if (!is_value) {
        const size_t turn = static_cast<size_t>(token) * (HEAD / 2) + 8 * j;
        #pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float l = low[i], r = high[i], c = cosines[turn + i], s = sines[turn + i];
            low[i] = l * c - r * s;
            high[i] = r * c + l * s;
        }
        packed_low = pack_8<HALF>(low), packed_high = pack_8<HALF>(high);
    }
    if (idle) return;
    *reinterpret_cast<uint4*>(to + 8 * j) = packed_low;
    *reinterpret_cast<uint4*>(to + HEAD / 2 + 8 * j) = packed_high;
}
