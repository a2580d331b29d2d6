// Vectors of float32 for each body: what the kernels of kernels.cpp are written in.
//
// Body is AVX512_VNNI, AVX512, AVX2 or SCALAR, chosen by the macros of the translation unit. Everything is
// static and nothing comes from the standard library, so that no function compiled for one
// instruction set can be taken for another's by the linker.
//
// Of a body:
//   Vec                 N floats
//   Numbers             N integers of 32 bits, one for each lane
//   load<T>(p)          N weights of type T as floats; load<T>(p, n) the first n, zeros behind
//   positions(p)        of N kept weights of a 2:4 row: which of their 2 N inputs each multiplies,
//                       from the N / 4 bytes of metadata at p (secateur/formats/two_of_four.py)
//   pick(x, where)      those inputs, of the 2 N at x
//   codes4(p)           N codes of 4 bits as floats, in the order of positions4(p)
//
// And of products of integers, which are exact:
//   Codes, Sums         M codes of 8 bits; some sums of 32 bits
//   places(p)           of M kept codes: which of their 2 M inputs each multiplies, as pick reads it
//   pick(x, where)      those inputs, of the 2 M at x
//   dot(s, x, w)        s and the products of x and w, which are from -127 to 127; x is as input()
//                       made it, which adds OFFSET where the processor multiplies unsigned numbers
#pragma once

#ifdef BODY_AVX512_VNNI
#define BODY_AVX512
#endif

#include <stdint.h>

namespace {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };
struct float8 { uint8_t bits; };  // e4m3fn, without NaN

inline float as_float(uint32_t bits) { float f; __builtin_memcpy(&f, &bits, 4); return f; }
inline uint32_t as_bits(float f) { uint32_t bits; __builtin_memcpy(&bits, &f, 4); return bits; }

inline float widen(float w) { return w; }
inline float widen(int8_t w) { return w; }
inline float widen(bfloat16 w) { return as_float(uint32_t(w.bits) << 16); }
inline float widen(float16 w) {  // exponents 15 become exponents 127; infinities stay such
    uint32_t rest = uint32_t(w.bits & 0x7fff) << 13, sign = uint32_t(w.bits & 0x8000) << 16;
    float value = as_float(rest) * 0x1p112f;
    return as_float(as_bits(rest >= 0x0f800000u ? as_float(rest + 0x70000000u) : value) | sign);
}
inline float widen(float8 w) {
    float value = as_float(uint32_t(w.bits & 0x7f) << 20) * 0x1p120f;
    return as_float(as_bits(value) | uint32_t(w.bits & 0x80) << 24);
}

// Rounded to nearest, ties to even; NaN stays NaN.
inline bfloat16 to_bfloat16(float f) {
    uint32_t bits = as_bits(f);
    if (f != f) return {0x7fc0};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float16 to_float16(float f) {
    uint32_t bits = as_bits(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000u) return {uint16_t(sign | 0x7e00)};
    if (rest >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};  // from 65520 on: infinity
    if (rest < 0x38800000u)  // below 2^-14: a multiple of 2^-24, which the addition rounds to
        return {uint16_t(sign | (as_bits(as_float(rest) + 0.5f) - 0x3f000000u))};
    return {uint16_t(sign | (rest - 0x38000000u + 0xfff + (rest >> 13 & 1)) >> 13)};
}

}  // namespace

#if defined(BODY_AVX512)
#include <immintrin.h>
namespace {
constexpr int N = 16;
constexpr int ACCUMULATORS = 24;  // of 32 registers: the rest holds weights and an input
using Vec = __m512;
using Numbers = __m512i;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec all(float f) { return _mm512_set1_ps(f); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
inline void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }

inline Vec from(__m256i w, bfloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(w), 16));
}
inline Vec from(__m256i w, float16) { return _mm512_cvtph_ps(w); }
inline Vec from(__m128i w, int8_t) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(w)); }
inline Vec from(__m128i w, float8) {
    __m512i bits = _mm512_cvtepi8_epi32(w);  // the sign is the top bit already
    __m512i rest = _mm512_and_si512(_mm512_slli_epi32(bits, 20), _mm512_set1_epi32(0x07f00000));
    Vec value = _mm512_mul_ps(_mm512_castsi512_ps(rest), _mm512_set1_ps(0x1p120f));
    __m512i sign = _mm512_and_si512(bits, _mm512_set1_epi32(int(0x80000000)));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign));
}
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline Vec load(const bfloat16* p) { return from(_mm256_loadu_si256((const __m256i*)p), *p); }
inline Vec load(const float16* p) { return from(_mm256_loadu_si256((const __m256i*)p), *p); }
inline Vec load(const int8_t* p) { return from(_mm_loadu_si128((const __m128i*)p), *p); }
inline Vec load(const float8* p) { return from(_mm_loadu_si128((const __m128i*)p), *p); }
inline Vec load(const bfloat16* p, int n) { return from(_mm256_maskz_loadu_epi16(first(n), p), *p); }
inline Vec load(const float16* p, int n) { return from(_mm256_maskz_loadu_epi16(first(n), p), *p); }
inline Vec load(const int8_t* p, int n) { return from(_mm_maskz_loadu_epi8(first(n), p), *p); }
inline Vec load(const float8* p, int n) { return from(_mm_maskz_loadu_epi8(first(n), p), *p); }

// 3 where a number's low bits count within its group of four, the group's first input elsewhere.
inline Numbers within(Numbers word, Numbers shift, Numbers group) {
    __m512i places = _mm512_srlv_epi32(word, shift);
    return _mm512_ternarylogic_epi32(places, _mm512_set1_epi32(3), group, 0xea);  // a & b | c
}
inline Numbers positions(const uint8_t* p) {
    uint32_t word;
    __builtin_memcpy(&word, p, 4);
    return within(
        _mm512_set1_epi32(int(word)),
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
        _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28));
}
inline Vec pick(const float* x, Numbers where) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(x), where, _mm512_loadu_ps(x + 16));
}
// Even lanes hold the first eight codes, odd ones the others: one broadcast brings all 64 bits.
inline Numbers positions4(const uint8_t* p) {
    uint32_t word;
    __builtin_memcpy(&word, p, 4);
    return within(
        _mm512_set1_epi32(int(word)),
        _mm512_setr_epi32(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
        _mm512_setr_epi32(0, 16, 0, 16, 4, 20, 4, 20, 8, 24, 8, 24, 12, 28, 12, 28));
}
inline Vec codes4(const uint8_t* p) {
    uint64_t word;
    __builtin_memcpy(&word, p, 8);
    __m512i shift = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    __m512i low = _mm512_srlv_epi32(_mm512_set1_epi64(int64_t(word)), shift);
    return _mm512_permutexvar_ps(  // which reads the low four bits alone
        low, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
}
}  // namespace

#elif defined(BODY_AVX2)
#include <immintrin.h>
namespace {
constexpr int N = 8;
constexpr int ACCUMULATORS = 12;  // of 16 registers
using Vec = __m256;
using Numbers = __m256i;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec all(float f) { return _mm256_set1_ps(f); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline void store(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first(n), a); }

inline Vec from(__m128i w, bfloat16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(w), 16));
}
inline Vec from(__m128i w, float16) { return _mm256_cvtph_ps(w); }
inline Vec from(__m128i w, int8_t) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(w)); }
inline Vec from(__m128i w, float8) {
    __m256i bits = _mm256_cvtepi8_epi32(w);
    __m256i rest = _mm256_and_si256(_mm256_slli_epi32(bits, 20), _mm256_set1_epi32(0x07f00000));
    Vec value = _mm256_mul_ps(_mm256_castsi256_ps(rest), _mm256_set1_ps(0x1p120f));
    __m256i sign = _mm256_and_si256(bits, _mm256_set1_epi32(int(0x80000000)));
    return _mm256_castsi256_ps(_mm256_or_si256(_mm256_castps_si256(value), sign));
}
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
inline Vec load(const bfloat16* p) { return from(_mm_loadu_si128((const __m128i*)p), *p); }
inline Vec load(const float16* p) { return from(_mm_loadu_si128((const __m128i*)p), *p); }
inline Vec load(const int8_t* p) { return from(_mm_loadl_epi64((const __m128i*)p), *p); }
inline Vec load(const float8* p) { return from(_mm_loadl_epi64((const __m128i*)p), *p); }
template <class W>
inline Vec load(const W* p, int n) {
    float wide[N] = {};
    for (int i = 0; i < n; i++) wide[i] = widen(p[i]);
    return load(wide);
}

inline Numbers positions(const uint8_t* p) {
    uint16_t word;
    __builtin_memcpy(&word, p, 2);
    __m256i shift = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    __m256i group = _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12);
    __m256i place = _mm256_srlv_epi32(_mm256_set1_epi32(word), shift);
    return _mm256_or_si256(_mm256_and_si256(place, _mm256_set1_epi32(3)), group);
}
inline Vec pick(const float* x, Numbers where) {  // the first four lanes are of the first eight
    Vec low = _mm256_permutevar8x32_ps(load(x), where);
    Vec high = _mm256_permutevar8x32_ps(load(x + 8), where);
    return _mm256_blend_ps(low, high, 0xf0);
}
inline Numbers positions4(const uint8_t* p) { return positions(p); }
inline Vec codes4(const uint8_t* p) {
    uint32_t word;
    __builtin_memcpy(&word, p, 4);
    __m256i shift = _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    __m256i top = _mm256_sllv_epi32(_mm256_set1_epi32(int(word)), shift);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 28));
}
}  // namespace

#elif defined(BODY_SCALAR)
#ifdef __SSE__
#include <xmmintrin.h>
#endif
namespace {
constexpr int N = 8;
constexpr int ACCUMULATORS = 4;
struct Vec { float lane[N]; };
struct Numbers { int32_t lane[N]; };
#define EACH_LANE for (int i = 0; i < N; i++)

inline Vec all(float f) { Vec r; EACH_LANE r.lane[i] = f; return r; }
inline Vec zero() { return all(0); }
inline Vec add(Vec a, Vec b) { EACH_LANE a.lane[i] += b.lane[i]; return a; }
inline Vec mul(Vec a, Vec b) { EACH_LANE a.lane[i] *= b.lane[i]; return a; }
inline Vec fma(Vec a, Vec b, Vec c) { EACH_LANE c.lane[i] += a.lane[i] * b.lane[i]; return c; }
inline float sum(Vec a) { float s = 0; EACH_LANE s += a.lane[i]; return s; }
inline void store(float* p, Vec a) { EACH_LANE p[i] = a.lane[i]; }
inline void store(float* p, Vec a, int n) { for (int i = 0; i < n; i++) p[i] = a.lane[i]; }
template <class W>
inline Vec load(const W* p) { Vec r; EACH_LANE r.lane[i] = widen(p[i]); return r; }
template <class W>
inline Vec load(const W* p, int n) {
    Vec r = zero();
    for (int i = 0; i < n; i++) r.lane[i] = widen(p[i]);
    return r;
}
inline Numbers positions(const uint8_t* p) {
    Numbers r;
    EACH_LANE r.lane[i] = (i / 2) * 4 + ((p[i / 4] >> (2 * (i % 4))) & 3);
    return r;
}
inline Vec pick(const float* x, Numbers where) {
    Vec r;
    EACH_LANE r.lane[i] = x[where.lane[i]];
    return r;
}
inline Numbers positions4(const uint8_t* p) { return positions(p); }
inline Vec codes4(const uint8_t* p) {
    Vec r;
    EACH_LANE r.lane[i] = float(((p[i / 2] >> (4 * (i % 2)) & 15) ^ 8) - 8);
    return r;
}
}  // namespace
#endif

// ---- integers -----------------------------------------------------------------------------------

namespace {

// The nearest integer, ties to even, without a function of a library.
inline float nearest(float f) {
#if defined(__SSE__) && !defined(__SSE4_1__)
    return float(_mm_cvtss_si32(_mm_set_ss(f)));
#else
    return __builtin_rintf(f);
#endif
}

#if defined(BODY_AVX512_VNNI)
constexpr int M = 64;
constexpr int OFFSET = 128;
using Codes = __m512i;
using Sums = __m512i;

inline Sums nothing() { return _mm512_setzero_si512(); }
inline Codes every(int code) { return _mm512_set1_epi8(char(code)); }
inline Codes codes(const int8_t* p) { return _mm512_loadu_si512(p); }
inline int32_t total(Sums a) { return _mm512_reduce_add_epi32(a); }
inline Sums dot(Sums s, Codes x, Codes w) { return _mm512_dpbusd_epi32(s, x, w); }
inline Codes places(const uint8_t* p) {
    // each eighth of the result has 16 of the 128 bits: every byte those from its own on
    __m512i halves = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p));
    __m512i words = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1), halves);
    __m512i shift = _mm512_add_epi64(
        _mm512_set1_epi64(0x0e0c0a0806040200),
        _mm512_setr_epi64(0, 0x1010101010101010, 0x2020202020202020, 0x3030303030303030, 0,
                          0x1010101010101010, 0x2020202020202020, 0x3030303030303030));
    __m512i group = _mm512_add_epi64(
        _mm512_set1_epi64(0x0c0c080804040000),
        _mm512_setr_epi64(0, 0x1010101010101010, 0x2020202020202020, 0x3030303030303030,
                          0x4040404040404040, 0x5050505050505050, 0x6060606060606060,
                          0x7070707070707070));
    __m512i bits = _mm512_multishift_epi64_epi8(shift, words);
    return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi8(3), group, 0xea);  // a & b | c
}
inline Codes pick(const int8_t* x, Codes where) {
    return _mm512_permutex2var_epi8(codes(x), where, codes(x + M));
}

#elif defined(BODY_AVX512) || defined(BODY_AVX2)
constexpr int M = 32;
constexpr int OFFSET = 0;
using Codes = __m256i;
using Sums = __m256i;

inline Sums nothing() { return _mm256_setzero_si256(); }
inline Codes every(int code) { return _mm256_set1_epi8(char(code)); }
inline Codes codes(const int8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline int32_t total(Sums a) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 1)));
}
inline Sums dot(Sums s, Codes x, Codes w) {  // |x| (w sign(x)): two of 127 x 127 fit 16 bits
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
    return _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline Codes places(const uint8_t* p) {  // within 16 inputs, of which each half lane has its own
    __m256i four = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
    four = _mm256_or_si256(four, _mm256_slli_epi32(four, 12));
    four = _mm256_or_si256(four, _mm256_slli_epi32(four, 6));
    __m256i group = _mm256_set1_epi64x(0x0c0c080804040000);
    return _mm256_or_si256(_mm256_and_si256(four, _mm256_set1_epi8(3)), group);
}
inline __m256i halves(const int8_t* low, const int8_t* high) {
    __m128i first = _mm_loadu_si128((const __m128i*)low);
    return _mm256_inserti128_si256(
        _mm256_castsi128_si256(first), _mm_loadu_si128((const __m128i*)high), 1);
}
inline Codes pick(const int8_t* x, Codes where) {
    __m256i even = _mm256_shuffle_epi8(halves(x, x + 32), where);
    __m256i odd = _mm256_shuffle_epi8(halves(x + 16, x + 48), where);
    return _mm256_blend_epi32(even, odd, 0xcc);
}

#else
constexpr int M = N;
constexpr int OFFSET = 0;
struct Codes { int8_t lane[M]; };
struct Sums { int32_t lane[M]; };

inline Sums nothing() { return {}; }
inline Codes every(int code) { Codes r; EACH_LANE r.lane[i] = int8_t(code); return r; }
inline Codes codes(const int8_t* p) { Codes r; EACH_LANE r.lane[i] = p[i]; return r; }
inline int32_t total(Sums a) { int32_t s = 0; EACH_LANE s += a.lane[i]; return s; }
inline Sums dot(Sums s, Codes x, Codes w) {
    EACH_LANE s.lane[i] += x.lane[i] * w.lane[i];
    return s;
}
inline Numbers places(const uint8_t* p) { return positions(p); }
inline Codes pick(const int8_t* x, Numbers where) {
    Codes r;
    EACH_LANE r.lane[i] = x[where.lane[i]];
    return r;
}
#endif
// A code as a vector of inputs has it, and back.
inline int8_t input(int code) { return int8_t(uint8_t(code + OFFSET)); }
inline int code_of(int8_t input) { return int8_t(uint8_t(input - OFFSET)); }

}  // namespace
