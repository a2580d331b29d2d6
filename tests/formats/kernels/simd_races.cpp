// Calls of the kernels for a CPU beside each other, each on several threads, for a compiler's
// -fsanitize=thread to watch. test_simd.py compiles this once for each body and runs it.
//
// The loop over threads is std::thread's here: torch's own was not compiled to be watched. It takes
// no notice of the least work that a thread is woken for, so that small layers are split, too.
// With an argument every thread also takes the first index of the next one: a race, to see that
// one would be found.
#include "kernels.cpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int THREADS = 3, CALLERS = 3, TIMES = 3;
constexpr int64_t ROWS = 24, IN = 268, TOKENS = 7;  // inputs with a rest behind the vectors
int64_t overlap = 0;

using Bytes = std::vector<uint8_t>;

int32_t split(int64_t begin, int64_t end, int64_t, Range range, void* context) {
    std::vector<std::thread> threads;
    int64_t part = (end - begin + THREADS - 1) / THREADS;
    for (int64_t at = begin; at < end; at += part)
        threads.emplace_back(range, at, std::min(end, at + part + overlap), context);
    for (auto& thread : threads) thread.join();
    return 0;
}

int32_t whole(int64_t begin, int64_t end, int64_t, Range range, void* context) {
    range(begin, end, context);
    return 0;
}

// Numbers near 1 in every type: bytes from 0x38 to 0x3f.
Bytes numbers(int64_t count) {
    Bytes made(count);
    for (int64_t i = 0; i < count; i++) made[i] = uint8_t(0x38 + i * 5 % 8);
    return made;
}

// Whether callers beside each other, of one layer, all get what one caller on one thread gets.
template <class Layer, void (*RUN)(const Layer*, const void*, void*, float*, int64_t)>
bool same(const char* what, Layer layer, int64_t out_bytes) {
    Bytes x = numbers(TOKENS * IN * 4), alone(out_bytes);
    auto call = [&](const Layer& of, Bytes& y) {
        std::vector<float> room(TOKENS * (IN + ROWS));
        RUN(&of, x.data(), y.data(), room.data(), TOKENS);
    };
    layer.parallel = whole;
    call(layer, alone);
    layer.parallel = split;
    std::vector<Bytes> found(CALLERS, Bytes(out_bytes));
    std::vector<std::thread> callers;
    for (Bytes& y : found)
        callers.emplace_back([&] { for (int i = 0; i < TIMES; i++) call(layer, y); });
    for (auto& caller : callers) caller.join();
    bool equal = std::all_of(found.begin(), found.end(), [&](auto& y) { return y == alone; });
    if (!equal) std::printf("%s: other bits\n", what);
    return equal;
}

bool two_of_four_is_right(int32_t kind, int32_t type) {
    bool coded = kind == INT8 || kind == FLOAT8 || kind == INT4;
    Bytes values = numbers(ROWS * IN / 2 * 4), metadata = numbers(ROWS * ((IN + 7) / 8));
    Bytes scales = numbers(ROWS * 4 * 4), bias = numbers(ROWS * 4);
    LayerOf24 layer{
        nullptr, values.data(), metadata.data(), coded ? scales.data() : nullptr, bias.data(),
        ROWS, IN, kind == INT4 ? 128 : IN, kind, type, type, type};
    int64_t size = type == FLOAT32 ? 4 : 2;
    return same<LayerOf24, JOIN(two_of_four, BODY)>("two_of_four", layer, TOKENS * ROWS * size) &
           same<LayerOf24, JOIN(dense_two_of_four, BODY)>("dense", layer, ROWS * IN * 4);
}

bool rounded_is_right(int32_t type) {
    Bytes values = numbers(ROWS * IN / 2), metadata = numbers(ROWS * ((IN + 7) / 8));
    Bytes scales = numbers(ROWS * 4), bias = numbers(ROWS * 4);
    LayerOf24 layer{nullptr, values.data(), metadata.data(), scales.data(), bias.data(),
                    ROWS, IN, IN, INT8, type, type, type};
    int64_t size = type == FLOAT32 ? 4 : 2;
    return same<LayerOf24, JOIN(rounded_two_of_four, BODY)>(
        "rounded_two_of_four", layer, TOKENS * ROWS * size);
}

bool blocks_are_right(int32_t type) {
    constexpr int64_t rows = 8, cols = 4;
    std::vector<int32_t> starts{0}, columns;
    for (int64_t i = 0; i < ROWS / rows; i++) {
        for (int32_t c = int32_t(i); c < IN / cols; c += 2) columns.push_back(c);
        starts.push_back(int32_t(columns.size()));
    }
    Bytes values = numbers(int64_t(columns.size()) * rows * cols * 4), bias = numbers(ROWS * 4);
    LayerOfBlocks layer{nullptr, values.data(), starts.data(), columns.data(), bias.data(),
                        ROWS, IN, rows, cols, type, type, type};
    int64_t size = type == FLOAT32 ? 4 : 2;
    return same<LayerOfBlocks, JOIN(blocks, BODY)>("blocks", layer, TOKENS * ROWS * size);
}

}  // namespace

int main(int count, char**) {
    overlap = count - 1;
    bool right = true;
    for (int32_t type : {FLOAT32, BFLOAT16, FLOAT16}) {
        for (int32_t kind : {type, int32_t(INT8), int32_t(FLOAT8), int32_t(INT4)})
            right &= two_of_four_is_right(kind, type);
        right &= rounded_is_right(type) & blocks_are_right(type);
    }
    return right ? 0 : 1;
}
