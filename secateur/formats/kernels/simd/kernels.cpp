// Sparse linear layers on a CPU: y = x W^T + bias, from weights as their formats store them.
//
// Compiled once for each body (vectors.h) with -DBODY_<name>; an entry point is <kernel>_<body>.
// The library needs no torch: its threads come through `parallel`, which is libtorch's own
// torch_parallel_for (torch/csrc/stable/c/shim.h, since torch 2.10), handed in by the caller.
// Arguments are checked by the caller (secateur/formats/kernels/simd/__init__.py); nothing is
// thrown. x and y are float32, contiguous, [tokens, in] and [tokens, out].
#include "vectors.h"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define ENTRY(name) extern "C" __attribute__((visibility("default"))) void JOIN(name, BODY)

namespace {

using Range = void (*)(int64_t begin, int64_t end, void* context);
using Parallel = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Range, void* context);

constexpr int64_t LEAST_WORK = 1 << 15;  // bytes of weights for which another thread is woken

template <class Body>
void each(Parallel parallel, int64_t count, int64_t bytes, Body& body) {
    int64_t grain = bytes < LEAST_WORK ? LEAST_WORK / (bytes ? bytes : 1) : 1;
    auto range = [](int64_t begin, int64_t end, void* context) {
        auto& run = *static_cast<Body*>(context);
        for (int64_t i = begin; i < end; i++) run(i);
    };
    parallel(0, count, grain, range, &body);
}

// How weights are numbered for the caller.
enum Kind : int32_t { FLOAT32, BFLOAT16, FLOAT16, INT8, FLOAT8, INT4 };

// ---- 2:4 ----------------------------------------------------------------------------------------

struct int4 {};  // two codes a byte, the first in the low half

template <class W>
struct Row {  // the kept weights of one row
    const W* p;
    static int64_t bytes(int64_t kept) { return kept * int64_t(sizeof(W)); }
    Vec at(int64_t i) const { return load(p + i); }
    float one(int64_t i) const { return widen(p[i]); }
    static Numbers where(const uint8_t* metadata) { return positions(metadata); }
};
template <>
struct Row<int4> {
    const uint8_t* p;
    static int64_t bytes(int64_t kept) { return (kept + 1) / 2; }
    Vec at(int64_t i) const { return codes4(p + i / 2); }
    float one(int64_t i) const { return float(((p[i / 2] >> (4 * (i % 2)) & 15) ^ 8) - 8); }
    static Numbers where(const uint8_t* metadata) { return positions4(metadata); }
};

struct TwoOfFour {
    const float* x;
    const uint8_t* values;
    const uint8_t* metadata;
    const void* scales;  // [rows, groups], or null
    const float* bias;   // [rows], or null
    float* y;
    int64_t tokens, rows, in;
    int64_t group;  // inputs that share a scale: a multiple of 2 N, or all
};

// R rows by T tokens: rows share the inputs, tokens the positions.
template <class W, int R, int T>
struct Tile {
    const TwoOfFour& a;
    int64_t stride = (a.in + 7) / 8, bytes = Row<W>::bytes(a.in / 2);
    const uint8_t* values;
    const uint8_t* metadata;
    const float* x;
    Vec sums[R][T];

    Tile(const TwoOfFour& a, int64_t row, int64_t token)
        : a(a), values(a.values + row * bytes), metadata(a.metadata + row * stride),
          x(a.x + token * a.in) {}

    Row<W> row(int r) const { return {(decltype(Row<W>::p))(values + r * bytes)}; }

    // The kept weights begin to end of each row, a multiple of N; what the next rows hold there is
    // on its way meanwhile.
    inline __attribute__((always_inline)) void add(int64_t begin, int64_t end) {
        for (int r = 0; r < R; r++)
            for (int t = 0; t < T; t++) sums[r][t] = zero();
        for (int64_t i = begin; i < end; i += N)
            for (int r = 0; r < R; r++) {
                const uint8_t* places = metadata + r * stride + uint64_t(i) / 4;
                __builtin_prefetch(values + (R + r) * bytes + Row<W>::bytes(i));
                __builtin_prefetch(places + R * stride);
                Numbers where = Row<W>::where(places);
                Vec w = row(r).at(i);
                for (int t = 0; t < T; t++)
                    sums[r][t] = fma(w, pick(x + t * a.in + 2 * i, where), sums[r][t]);
            }
    }

    // The product of the kept weights of one row from begin on, which are fewer than N.
    float rest(int r, int t, int64_t begin) const {
        float result = 0;
        for (int64_t i = begin; i < a.in / 2; i++) {
            int place = metadata[r * stride + i / 4] >> (2 * (i % 4)) & 3;
            result += row(r).one(i) * x[t * a.in + i / 2 * 4 + place];
        }
        return result;
    }
};

template <class W, class S, int R, int T>
inline void tile(const TwoOfFour& a, int64_t row, int64_t token) {
    Tile<W, R, T> rows(a, row, token);
    int64_t kept = a.in / 2, whole = kept / N * N, group = a.group / 2;
    int64_t groups = (a.in + a.group - 1) / a.group;
    const S* scales = static_cast<const S*>(a.scales) + row * groups;
    Vec total[R][T];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) total[r][t] = zero();
    for (int64_t g = 0; g < groups; g++) {
        int64_t begin = g * group, end = begin + group < whole ? begin + group : whole;
        rows.add(begin, end);
        for (int r = 0; r < R; r++) {
            Vec scale = all(a.scales ? widen(scales[r * groups + g]) : 1);
            for (int t = 0; t < T; t++) total[r][t] = fma(rows.sums[r][t], scale, total[r][t]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
            float result = sum(total[r][t]);
            if (whole < kept) {
                float scale = a.scales ? widen(scales[r * groups + groups - 1]) : 1;
                result += scale * rows.rest(r, t, whole);
            }
            a.y[(token + t) * a.rows + row + r] = result + (a.bias ? a.bias[row + r] : 0);
        }
}

template <class W, class S, int R>
inline void rows_of_2_4(const TwoOfFour& a, int64_t row) {
    int64_t token = 0;
    for (; token + 4 <= a.tokens; token += 4) tile<W, S, R, 4>(a, row, token);
    for (; token + 2 <= a.tokens; token += 2) tile<W, S, R, 2>(a, row, token);
    for (; token < a.tokens; token++) tile<W, S, R, 1>(a, row, token);
}

template <class W, class S>
void two_of_four_of(Parallel parallel, const TwoOfFour& a) {
    constexpr int R = 4;
    auto run = [&](int64_t i) {
        int64_t row = i * R;
        if (row + R <= a.rows) return rows_of_2_4<W, S, R>(a, row);
        for (; row < a.rows; row++) rows_of_2_4<W, S, 1>(a, row);
    };
    each(parallel, (a.rows + R - 1) / R, R * Row<W>::bytes(a.in / 2), run);
}

// The dense weight: floats of 16 bits as they are stored, everything else in float32.
template <class W> struct Dense { using Type = float; };
template <> struct Dense<bfloat16> { using Type = bfloat16; };
template <> struct Dense<float16> { using Type = float16; };

template <class W, class S>
void dense_of(Parallel parallel, const TwoOfFour& a) {
    using Out = typename Dense<W>::Type;
    int64_t kept = a.in / 2, groups = (a.in + a.group - 1) / a.group;
    auto run = [&](int64_t row) {
        Row<W> weights{(decltype(Row<W>::p))(a.values + row * Row<W>::bytes(kept))};
        const uint8_t* places = a.metadata + row * ((a.in + 7) / 8);
        const S* scales = static_cast<const S*>(a.scales) + row * groups;
        Out* out = reinterpret_cast<Out*>(a.y) + row * a.in;
        for (int64_t i = 0; i < kept; i += 2) {  // one group of four inputs
            int nibble = places[i / 4] >> (2 * (i % 4));
            Out* four = out + 2 * i;
            __builtin_memset(four, 0, 4 * sizeof(Out));
            if constexpr (sizeof(Out) == 2) {
                four[nibble & 3] = weights.p[i];
                four[nibble >> 2 & 3] = weights.p[i + 1];
            } else {
                float scale = a.scales ? widen(scales[2 * i / a.group]) : 1;
                four[nibble & 3] = scale * weights.one(i);
                four[nibble >> 2 & 3] = scale * weights.one(i + 1);
            }
        }
    };
    each(parallel, a.rows, a.in * int64_t(sizeof(Out)), run);
}

// Which of the two: a product or the dense weight, of weights and scales of these types.
template <class W, class S>
void two_of_four_as(Parallel parallel, const TwoOfFour& a, bool dense) {
    if (dense) dense_of<W, S>(parallel, a);
    else two_of_four_of<W, S>(parallel, a);
}

template <class S>
void quantised_as(Parallel parallel, const TwoOfFour& a, int32_t kind, bool dense) {
    switch (kind) {
        case INT8: return two_of_four_as<int8_t, S>(parallel, a, dense);
        case FLOAT8: return two_of_four_as<float8, S>(parallel, a, dense);
        case INT4: return two_of_four_as<int4, S>(parallel, a, dense);
    }
}

}  // namespace

// Without tokens y is the dense weight, [rows, in].
ENTRY(two_of_four)(
    Parallel parallel, const float* x, const uint8_t* values, const uint8_t* metadata,
    const void* scales, const float* bias, float* y, int64_t tokens, int64_t rows, int64_t in,
    int64_t group, int32_t kind, int32_t scale_kind) {
    TwoOfFour a{x, values, metadata, scales, bias, y, tokens, rows, in, group};
    bool dense = tokens == 0;
    switch (kind) {
        case FLOAT32: return two_of_four_as<float, float>(parallel, a, dense);
        case BFLOAT16: return two_of_four_as<bfloat16, float>(parallel, a, dense);
        case FLOAT16: return two_of_four_as<float16, float>(parallel, a, dense);
    }
    switch (scale_kind) {
        case FLOAT32: return quantised_as<float>(parallel, a, kind, dense);
        case BFLOAT16: return quantised_as<bfloat16>(parallel, a, kind, dense);
        case FLOAT16: return quantised_as<float16>(parallel, a, kind, dense);
    }
}

// ---- blocks -------------------------------------------------------------------------------------

namespace {

struct Blocks {
    const float* x;
    const void* values;  // [blocks, cols, rows]: a column of a block is one run of memory
    const int32_t* starts;  // [out / rows + 1]
    const int32_t* columns;  // [blocks]
    const float* scales;  // [out], or null
    const float* bias;    // [out], or null
    float* y;
    int64_t tokens, out, in, rows, cols;
};

// T tokens by V vectors of outputs: y += x W^T of one block; the last vector may have n lanes only.
template <class W, int V, int T, bool WHOLE>
inline void micro(const float* x, const W* w, float* y, const Blocks& a, int n) {
    Vec sums[T][V];
    for (int t = 0; t < T; t++)
        for (int v = 0; v < V; v++) {
            const float* p = y + t * a.out + v * N;
            sums[t][v] = WHOLE ? load(p) : load(p, n);
        }
    for (int64_t c = 0; c < a.cols; c++, w += a.rows) {
        Vec column[V];
        for (int v = 0; v < V; v++) column[v] = WHOLE ? load(w + v * N) : load(w + v * N, n);
        for (int t = 0; t < T; t++) {
            Vec input = all(x[t * a.in + c]);
            for (int v = 0; v < V; v++) sums[t][v] = fma(column[v], input, sums[t][v]);
        }
    }
    for (int t = 0; t < T; t++)
        for (int v = 0; v < V; v++) {
            float* p = y + t * a.out + v * N;
            if (WHOLE) store(p, sums[t][v]);
            else store(p, sums[t][v], n);
        }
}

template <class W, int V, int T, bool WHOLE>
inline void tokens_by(const float* x, const W* w, float* y, const Blocks& a, int n, int64_t& t) {
    for (; t + T <= a.tokens; t += T)
        micro<W, V, T, WHOLE>(x + t * a.in, w, y + t * a.out, a, n);
}

template <class W, int V, bool WHOLE>
inline void strip(const float* x, const W* w, float* y, const Blocks& a, int n) {
    constexpr int MOST = ACCUMULATORS / V < 12 ? ACCUMULATORS / V : 12;
    int64_t t = 0;
    tokens_by<W, V, MOST, WHOLE>(x, w, y, a, n, t);
    if constexpr (MOST > 8) tokens_by<W, V, 8, WHOLE>(x, w, y, a, n, t);
    if constexpr (MOST > 4) tokens_by<W, V, 4, WHOLE>(x, w, y, a, n, t);
    if constexpr (MOST > 2) tokens_by<W, V, 2, WHOLE>(x, w, y, a, n, t);
    tokens_by<W, V, 1, WHOLE>(x, w, y, a, n, t);
}

template <class W>
inline void block(const float* x, const W* w, float* y, const Blocks& a) {
    int64_t r = 0;
    for (; r + 4 * N <= a.rows; r += 4 * N) strip<W, 4, true>(x, w + r, y + r, a, N);
    for (; r + 2 * N <= a.rows; r += 2 * N) strip<W, 2, true>(x, w + r, y + r, a, N);
    for (; r + N <= a.rows; r += N) strip<W, 1, true>(x, w + r, y + r, a, N);
    if (r < a.rows) strip<W, 1, false>(x, w + r, y + r, a, int(a.rows - r));
}

template <class W>
void blocks_of(Parallel parallel, const Blocks& a) {
    int64_t down = a.out / a.rows;
    auto run = [&](int64_t i) {
        float* y = a.y + i * a.rows;
        for (int64_t t = 0; t < a.tokens; t++)
            for (int64_t r = 0; r < a.rows; r++)
                y[t * a.out + r] = a.bias && !a.scales ? a.bias[i * a.rows + r] : 0;
        for (int64_t b = a.starts[i]; b < a.starts[i + 1]; b++) {
            const W* w = static_cast<const W*>(a.values) + b * a.cols * a.rows;
            block<W>(a.x + a.columns[b] * a.cols, w, y, a);
        }
        if (!a.scales) return;
        for (int64_t t = 0; t < a.tokens; t++)
            for (int64_t r = 0; r < a.rows; r++) {
                float offset = a.bias ? a.bias[i * a.rows + r] : 0;
                y[t * a.out + r] = y[t * a.out + r] * a.scales[i * a.rows + r] + offset;
            }
    };
    int64_t bytes = a.starts[down] * a.rows * a.cols * int64_t(sizeof(W)) * a.tokens;
    each(parallel, down, bytes / (down ? down : 1), run);
}

}  // namespace

ENTRY(blocks)(
    Parallel parallel, const float* x, const void* values, const int32_t* starts,
    const int32_t* columns, const float* scales, const float* bias, float* y, int64_t tokens,
    int64_t out, int64_t in, int64_t rows, int64_t cols, int32_t kind) {
    Blocks a{x, values, starts, columns, scales, bias, y, tokens, out, in, rows, cols};
    switch (kind) {
        case FLOAT32: return blocks_of<float>(parallel, a);
        case BFLOAT16: return blocks_of<bfloat16>(parallel, a);
        case FLOAT16: return blocks_of<float16>(parallel, a);
        case INT8: return blocks_of<int8_t>(parallel, a);
        case FLOAT8: return blocks_of<float8>(parallel, a);
    }
}

// What this library was compiled from, so that one of other sources is never called.
#ifdef BODY_SCALAR
extern "C" __attribute__((visibility("default"))) const char secateur_sources[] = SOURCES;
#endif
