// Tokens rounded to 8-bit codes, a scale for each.
//
//   s = max(max |x| / LARGEST, 2^-126),  code = x (1 / s), rounded to the nearest, ties to even
//
// One CTA a token, which is read once and held in registers. A token with a number that is not finite
// has codes 0 and the scale NaN.

#include "ptx.cuh"

constexpr int THREADS = 128, RUN = 8;
constexpr float LARGEST = FP8 ? 448.0f : 127.0f;
constexpr float TO_INTEGER = 12582912.0f;                  // 1.5 x 2^23: the sum's low byte is the integer
constexpr u32 INFINITE = HALF ? 0x7C00 : 0x7F80;

__device__ __forceinline__ u32 four_codes(float a, float b, float c, float d, float inverse) {
    if constexpr (FP8) {
        return e4m3_pair(a * inverse, b * inverse) | e4m3_pair(c * inverse, d * inverse) << 16;
    } else {
        const u32 low = __byte_perm(__float_as_uint(__fadd_rn(__fmul_rn(a, inverse), TO_INTEGER)),
                                    __float_as_uint(__fadd_rn(__fmul_rn(b, inverse), TO_INTEGER)), 0x0040);
        const u32 high = __byte_perm(__float_as_uint(__fadd_rn(__fmul_rn(c, inverse), TO_INTEGER)),
                                     __float_as_uint(__fadd_rn(__fmul_rn(d, inverse), TO_INTEGER)), 0x0040);
        return __byte_perm(low, high, 0x5410);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) quantise(
    const u16* __restrict__ x,             // [M, K]
    u8* __restrict__ codes,                // [M, K]
    float* __restrict__ scales,            // [M]
    int K) {
    const int token = blockIdx.x;
    __shared__ u32 most_of_warp[THREADS / 32];
    launch_dependents();
    wait_for_predecessor();

    uint4 v[ITEMS];
    u32 most = 0;
    #pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int column = RUN * (THREADS * i + threadIdx.x);
        v[i] = make_uint4(0, 0, 0, 0);
        if (column < K) v[i] = *reinterpret_cast<const uint4*>(x + static_cast<size_t>(token) * K + column);
    }
    #pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        constexpr u32 MAGNITUDES = 0x7FFF7FFF;
        most = __vmaxu2(most, __vmaxu2(__vmaxu2(v[i].x & MAGNITUDES, v[i].y & MAGNITUDES),
                                       __vmaxu2(v[i].z & MAGNITUDES, v[i].w & MAGNITUDES)));
    }
    most = __reduce_max_sync(0xFFFFFFFF, max(most & 0xFFFF, most >> 16));
    if (threadIdx.x % 32 == 0) most_of_warp[threadIdx.x / 32] = most;
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < THREADS / 32; ++i) most = max(most, most_of_warp[i]);

    const bool finite = most < INFINITE;
    const float scale = fmaxf(__fdiv_rn(float_of_16<HALF>(static_cast<u16>(most)), LARGEST), 0x1p-126f);
    const float inverse = __fdiv_rn(1.0f, scale);
    if (threadIdx.x == 0) scales[token] = finite ? scale : __uint_as_float(0x7FFFFFFF);

    #pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int column = RUN * (THREADS * i + threadIdx.x);
        if (column >= K) continue;
        uint2 packed = make_uint2(0, 0);
        if (finite) {
            const u32 words[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
            float f[8];
            #pragma unroll
            for (int j = 0; j < 4; ++j) {
                f[2 * j] = float_of_16<HALF>(static_cast<u16>(words[j]));
                f[2 * j + 1] = float_of_16<HALF>(static_cast<u16>(words[j] >> 16));
            }
            packed.x = four_codes(f[0], f[1], f[2], f[3], inverse);
            packed.y = four_codes(f[4], f[5], f[6], f[7], inverse);
        }
        *reinterpret_cast<uint2*>(codes + static_cast<size_t>(token) * K + column) = packed;
    }
}
