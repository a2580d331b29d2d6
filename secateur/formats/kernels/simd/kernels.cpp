// Sparse linear layers on a CPU: y = x W^T + bias, from weights as their formats store them.
//
// Compiled once for each body (vectors.h) with -DBODY_<name>; an entry point is <kernel>_<body>.
// The library needs no torch: its threads come through `parallel`, which is libtorch's own
// torch_parallel_for (torch/csrc/stable/c/shim.h, since torch 2.10), handed in by the caller.
// Arguments are checked by the caller (secateur/formats/kernels/simd/__init__.py); nothing is
// thrown. x [tokens, in], y [tokens, out] and the bias have the layer's type, and are contiguous.
// What is the same for every call of a layer is laid out once: a call gets its address, x and y,
// and room for what it computes in float32, if the layer's type is another.
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

// How types are numbered for the caller.
enum Kind : int32_t { FLOAT32, BFLOAT16, FLOAT16, INT8, FLOAT8, INT4 };

// The i-th of floats of this kind.
inline float read(const void* p, int64_t i, int32_t kind) {
    if (kind == FLOAT32) return static_cast<const float*>(p)[i];
    if (kind == BFLOAT16) return widen(static_cast<const bfloat16*>(p)[i]);
    return widen(static_cast<const float16*>(p)[i]);
}
inline void write(void* p, int64_t i, int32_t kind, float value) {
    if (kind == FLOAT32) static_cast<float*>(p)[i] = value;
    else if (kind == BFLOAT16) static_cast<bfloat16*>(p)[i] = to_bfloat16(value);
    else static_cast<float16*>(p)[i] = to_float16(value);
}

template <class T>
inline void widen_row(const T* from, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + N <= count; i += N) store(to + i, load(from + i));
    for (; i < count; i++) to[i] = widen(from[i]);
}

// x in float32: as it is, or in `room`.
inline const float* wide(
    Parallel parallel, const void* x, int32_t kind, int64_t tokens, int64_t in, float* room) {
    if (kind == FLOAT32) return static_cast<const float*>(x);
    auto run = [&](int64_t t) {
        float* to = room + t * in;
        if (kind == BFLOAT16) widen_row(static_cast<const bfloat16*>(x) + t * in, to, in);
        else widen_row(static_cast<const float16*>(x) + t * in, to, in);
    };
    each(parallel, tokens, in * int64_t(sizeof(float)), run);
    return room;
}

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

struct LayerOf24 {
    Parallel parallel;
    const uint8_t* values;
    const uint8_t* metadata;
    const void* scales;  // [rows, groups], or null
    const void* bias;    // [rows], or null
    int64_t rows, in;
    int64_t group;  // inputs that share a scale: a multiple of 2 N, or all
    int32_t kind, scale_kind, type, bias_type;
};

struct TwoOfFour : LayerOf24 {
    const float* x;
    void* y;
    int64_t tokens;
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
            if (a.bias) result += read(a.bias, row + r, a.bias_type);
            write(a.y, (token + t) * a.rows + row + r, a.type, result);
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
void two_of_four_of(const TwoOfFour& a) {
    constexpr int R = 4;
    auto run = [&](int64_t i) {
        int64_t row = i * R;
        if (row + R <= a.rows) return rows_of_2_4<W, S, R>(a, row);
        for (; row < a.rows; row++) rows_of_2_4<W, S, 1>(a, row);
    };
    each(a.parallel, (a.rows + R - 1) / R, R * Row<W>::bytes(a.in / 2), run);
}

// The dense weight: floats of 16 bits as they are stored, everything else in float32.
template <class W> struct Dense { using Type = float; };
template <> struct Dense<bfloat16> { using Type = bfloat16; };
template <> struct Dense<float16> { using Type = float16; };

template <class W, class S>
void dense_of(const TwoOfFour& a) {
    using Out = typename Dense<W>::Type;
    int64_t kept = a.in / 2, groups = (a.in + a.group - 1) / a.group;
    auto run = [&](int64_t row) {
        Row<W> weights{(decltype(Row<W>::p))(a.values + row * Row<W>::bytes(kept))};
        const uint8_t* places = a.metadata + row * ((a.in + 7) / 8);
        const S* scales = static_cast<const S*>(a.scales) + row * groups;
        Out* out = static_cast<Out*>(a.y) + row * a.in;
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
    each(a.parallel, a.rows, a.in * int64_t(sizeof(Out)), run);
}

// A product or the dense weight, as the caller asks, of weights and scales of these types.
template <class W, class S>
void two_of_four_as(const TwoOfFour& a, bool dense) {
    if (dense) dense_of<W, S>(a);
    else two_of_four_of<W, S>(a);
}

template <class S>
void quantised_as(const TwoOfFour& a, bool dense) {
    switch (a.kind) {
        case INT8: return two_of_four_as<int8_t, S>(a, dense);
        case FLOAT8: return two_of_four_as<float8, S>(a, dense);
        case INT4: return two_of_four_as<int4, S>(a, dense);
    }
}

void any_two_of_four(const TwoOfFour& a, bool dense) {
    switch (a.kind) {
        case FLOAT32: return two_of_four_as<float, float>(a, dense);
        case BFLOAT16: return two_of_four_as<bfloat16, float>(a, dense);
        case FLOAT16: return two_of_four_as<float16, float>(a, dense);
    }
    switch (a.scale_kind) {
        case FLOAT32: return quantised_as<float>(a, dense);
        case BFLOAT16: return quantised_as<bfloat16>(a, dense);
        case FLOAT16: return quantised_as<float16>(a, dense);
    }
}

}  // namespace

ENTRY(two_of_four)(
    const LayerOf24* layer, const void* x, void* y, float* room, int64_t tokens) {
    const float* inputs = wide(layer->parallel, x, layer->type, tokens, layer->in, room);
    any_two_of_four({*layer, inputs, y, tokens}, false);
}

// y is the dense weight, [rows, in]: of the values' own type, or of float32.
ENTRY(dense_two_of_four)(
    const LayerOf24* layer, const void* x, void* y, float* room, int64_t tokens) {
    any_two_of_four({*layer, nullptr, y, 0}, true);
}

// ---- 2:4, inputs rounded to integers ------------------------------------------------------------

namespace {

// A token as dynamic.py (secateur/formats) defines it: codes from -127 to 127 and their scale,
// which is NaN where a number is not finite.
struct Token {
    float scale;
    int8_t codes[];
    static int64_t floats(int64_t in) { return in / 4 + 1; }
    static Token& at(float* room, int64_t t, int64_t in) {
        return *reinterpret_cast<Token*>(room + t * floats(in));
    }
};

template <class X>
inline void round_token(const X* x, int64_t in, Token& to) {
    constexpr uint32_t INFINITE = 0x7f800000;
    uint32_t most = 0;  // of magnitudes, whose bits are ordered as they are
    for (int64_t i = 0; i < in; i++) {
        uint32_t bits = as_bits(widen(x[i])) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float scale = as_float(most) / 127;
    scale = scale > 0x1p-126f ? scale : 0x1p-126f;
    float factor = most < INFINITE ? 1 / scale : 0;
    to.scale = most < INFINITE ? scale : as_float(0x7fc00000);
    for (int64_t i = 0; i < in; i++) {
        float code = widen(x[i]) * factor;
        code = code > -127 ? code : -127;
        code = code < 127 ? code : 127;
        to.codes[i] = input(most < INFINITE ? int(nearest(code)) : 0);
    }
}

inline void round_tokens(const LayerOf24& a, const void* x, float* room, int64_t tokens) {
    auto run = [&](int64_t t) {
        Token& to = Token::at(room, t, a.in);
        int64_t first = t * a.in;
        if (a.type == FLOAT32) round_token(static_cast<const float*>(x) + first, a.in, to);
        else if (a.type == BFLOAT16)
            round_token(static_cast<const bfloat16*>(x) + first, a.in, to);
        else round_token(static_cast<const float16*>(x) + first, a.in, to);
    };
    each(a.parallel, tokens, a.in * int64_t(sizeof(float)), run);
}

// A product that is rounded before anything is added to it.
inline float rounded(float product) {
    asm("" : "+m"(product));
    return product;
}

struct Rounded24 : LayerOf24 {
    float* room;
    void* y;
    int64_t tokens;
};

template <int R, int T>
inline void rounded_tile(const Rounded24& a, int64_t row, int64_t token) {
    int64_t kept = a.in / 2, whole = kept / M * M, stride = (a.in + 7) / 8;
    const int8_t* values = reinterpret_cast<const int8_t*>(a.values) + row * kept;
    const uint8_t* metadata = a.metadata + row * stride;
    const int8_t* x[T];
    Sums sums[R][T], offsets[R];
    for (int t = 0; t < T; t++) x[t] = Token::at(a.room, token + t, a.in).codes;
    for (int r = 0; r < R; r++) {
        offsets[r] = nothing();
        for (int t = 0; t < T; t++) sums[r][t] = nothing();
    }
    for (int64_t i = 0; i < whole; i += M)
        for (int r = 0; r < R; r++) {
            const uint8_t* at = metadata + r * stride + uint64_t(i) / 4;
            __builtin_prefetch(values + (R + r) * kept + i);
            __builtin_prefetch(at + R * stride);
            auto where = places(at);
            Codes w = codes(values + r * kept + i);
            if (OFFSET) offsets[r] = dot(offsets[r], every(OFFSET), w);
            for (int t = 0; t < T; t++) sums[r][t] = dot(sums[r][t], pick(x[t] + 2 * i, where), w);
        }
    for (int r = 0; r < R; r++) {
        float scale = read(a.scales, row + r, a.scale_kind);
        int32_t offset = total(offsets[r]);
        for (int t = 0; t < T; t++) {
            int32_t result = total(sums[r][t]) - offset;
            for (int64_t i = whole; i < kept; i++) {
                int place = metadata[r * stride + i / 4] >> (2 * (i % 4)) & 3;
                result += values[r * kept + i] * code_of(x[t][i / 2 * 4 + place]);
            }
            float y = float(result) * Token::at(a.room, token + t, a.in).scale * scale;
            if (a.bias) y = rounded(y) + read(a.bias, row + r, a.bias_type);
            write(a.y, (token + t) * a.rows + row + r, a.type, y);
        }
    }
}

template <int R>
inline void rounded_rows(const Rounded24& a, int64_t row) {
    int64_t token = 0;
    for (; token + 4 <= a.tokens; token += 4) rounded_tile<R, 4>(a, row, token);
    for (; token + 2 <= a.tokens; token += 2) rounded_tile<R, 2>(a, row, token);
    for (; token < a.tokens; token++) rounded_tile<R, 1>(a, row, token);
}

}  // namespace

// Of codes in int8: room is what Token::floats says for each token.
ENTRY(rounded_two_of_four)(
    const LayerOf24* layer, const void* x, void* y, float* room, int64_t tokens) {
    constexpr int R = 4;
    round_tokens(*layer, x, room, tokens);
    Rounded24 a{*layer, room, y, tokens};
    auto run = [&](int64_t i) {
        int64_t row = i * R;
        if (row + R <= a.rows) return rounded_rows<R>(a, row);
        for (; row < a.rows; row++) rounded_rows<1>(a, row);
    };
    each(a.parallel, (a.rows + R - 1) / R, R * a.in / 2, run);
}

// ---- blocks -------------------------------------------------------------------------------------

namespace {

struct LayerOfBlocks {
    Parallel parallel;
    const void* values;  // [blocks, cols, rows]: a column of a block is one run of memory
    const int32_t* starts;  // [out / rows + 1]
    const int32_t* columns;  // [blocks]
    const void* bias;    // [out], or null
    int64_t out, in, rows, cols;
    int32_t kind, type, bias_type;
};

struct Blocks : LayerOfBlocks {
    const float* x;
    float* y;  // sums, which are rounded into `rounded` where the layer's type is another
    void* rounded;
    int64_t tokens;
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
void blocks_of(const Blocks& a) {
    int64_t down = a.out / a.rows;
    auto run = [&](int64_t i) {
        float* y = a.y + i * a.rows;
        for (int64_t t = 0; t < a.tokens; t++)
            for (int64_t r = 0; r < a.rows; r++)
                y[t * a.out + r] = a.bias ? read(a.bias, i * a.rows + r, a.bias_type) : 0;
        for (int64_t b = a.starts[i]; b < a.starts[i + 1]; b++) {
            const W* w = static_cast<const W*>(a.values) + b * a.cols * a.rows;
            block<W>(a.x + a.columns[b] * a.cols, w, y, a);
        }
        if (a.type == FLOAT32) return;
        for (int64_t t = 0; t < a.tokens; t++)
            for (int64_t r = 0; r < a.rows; r++)
                write(a.rounded, t * a.out + i * a.rows + r, a.type, y[t * a.out + r]);
    };
    int64_t bytes = a.starts[down] * a.rows * a.cols * int64_t(sizeof(W)) * a.tokens;
    each(a.parallel, down, bytes / (down ? down : 1), run);
}

}  // namespace

ENTRY(blocks)(
    const LayerOfBlocks* layer, const void* x, void* y, float* room, int64_t tokens) {
    bool same = layer->type == FLOAT32;
    float* sums = same ? static_cast<float*>(y) : room + tokens * layer->in;
    Blocks a{*layer, wide(layer->parallel, x, layer->type, tokens, layer->in, room), sums, y,
             tokens};
    switch (a.kind) {
        case FLOAT32: return blocks_of<float>(a);
        case BFLOAT16: return blocks_of<bfloat16>(a);
        case FLOAT16: return blocks_of<float16>(a);
    }
}

// What this library was compiled from, so that one of other sources is never called.
#ifdef BODY_SCALAR
extern "C" __attribute__((visibility("default"))) const char secateur_sources[] = SOURCES;
#endif
