// Activations of a number in float32. The macro ACTIVATION names one of `Activation`, in the order of
// `ACTIVATIONS` in prefill24/multiply.py.
//
// Instructions of the multi-function unit (2^x, 1/x) are within 2 ulp, far below the rounding to 16
// bits that follows. NaN stays NaN.

#pragma once
#include "ptx.cuh"

enum Activation { NONE, GELU, GELU_TANH, SILU, RELU };

// 2^x
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), so that nothing cancels, with
//   Phi(-z) = (a1 t + ... + a5 t^5) e^(-z^2 / 2) / 2,  t = 1 / (1 + p z / sqrt 2),
// whose error is at most 7.5e-8. Beyond z = 16 it is zero in float32.
// Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
__device__ __forceinline__ float gelu(float x) {
    const float z = fminf(fabsf(x), 16.0f);
    const float t = reciprocal_fast(fmaf(z, 0.3275911f * 0.70710678f, 1.0f));
    float tail = fmaf(t, 0.5f * 1.061405429f, 0.5f * -1.453152027f);
    tail = fmaf(t, tail, 0.5f * 1.421413741f);
    tail = fmaf(t, tail, 0.5f * -0.284496736f);
    tail = fmaf(t, tail, 0.5f * 0.254829592f);
    tail *= t * exp2_fast(z * z * -0.72134752f);     // log2(e) / 2
    return fmaf(-z, tail, x < 0.0f ? 0.0f : x);
}

// x / (1 + e^-u)
__device__ __forceinline__ float times_sigmoid(float x, float u) {
    return x * reciprocal_fast(1.0f + exp2_fast(u * -1.44269504f));
}

__device__ __forceinline__ float activated(float x) {
    if constexpr (ACTIVATION == GELU) return gelu(x);
    else if constexpr (ACTIVATION == GELU_TANH)            // tanh(u) = 2 sigmoid(2u) - 1
        return times_sigmoid(x, x * fmaf(x * x, 2.0f * 0.79788456f * 0.044715f, 2.0f * 0.79788456f));
    else if constexpr (ACTIVATION == SILU) return times_sigmoid(x, x);
    else if constexpr (ACTIVATION == RELU) return x < 0.0f ? 0.0f : x;
    else return x;
}
