// What stands between the linear layers of one decode step: the embedding, RMS norms with the sum into
// the residual stream before them, act(gate) up, and the choice of the next token.
//
// Each is a few KB and takes as long as its way through the GPU does, so each is one launch, whose
// constants are read before `wait_for_predecessor`. The residual stream is kept in 16 bits, as the model's own
// forward keeps it.
//
//   macro      values   meaning
//   HALF       0, 1     float16, not bfloat16
//   GATE       0 1 2    the activation of `gated`: silu; gelu; gelu by tanh

#include "ptx.cuh"

constexpr int THREADS = 512, WARPS = THREADS / 32;

// The sum over the CTA, the same in every thread and every time.
__device__ __forceinline__ float over_cta(float v) {
    __shared__ float parts[WARPS];
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.0f;
    #pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += parts[w];
    return sum;
}

// A row of the stream in registers: PIECES times eight numbers of each thread.
template <int PIECES>
__device__ __forceinline__ void norm_row(
    u16* stream, const u16* added, const u16* weight, u16* y, int width, float epsilon, bool replace) {
    float row[PIECES][8], weights[PIECES][8];
    #pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        const int column = 8 * (p * THREADS + threadIdx.x);
        if (column < width) unpack_8<HALF>(weights[p], *reinterpret_cast<const uint4*>(weight + column));
    }
    wait_for_predecessor();
    float squares = 0.0f;
    #pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        const int column = 8 * (p * THREADS + threadIdx.x);
        if (column >= width) break;
        unpack_8<HALF>(row[p], *reinterpret_cast<const uint4*>(added + column));
        if (!replace) {
            float before[8];
            unpack_8<HALF>(before, *reinterpret_cast<const uint4*>(stream + column));
            #pragma unroll
            for (int i = 0; i < 8; ++i) row[p][i] += before[i];
        }
        const uint4 rounded = pack_8<HALF>(row[p]);   // what the norm sees is what is kept
        *reinterpret_cast<uint4*>(stream + column) = rounded;
        unpack_8<HALF>(row[p], rounded);
        #pragma unroll
        for (int i = 0; i < 8; ++i) squares += row[p][i] * row[p][i];
    }
    const float inverse = rsqrtf(over_cta(squares) / width + epsilon);
    #pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        const int column = 8 * (p * THREADS + threadIdx.x);
        if (column >= width) break;
        #pragma unroll
        for (int i = 0; i < 8; ++i) row[p][i] *= inverse * weights[p][i];
        *reinterpret_cast<uint4*>(y + column) = pack_8<HALF>(row[p]);
    }
}

// stream += added (or = with `tokens`: the embedding's row; or stays, without `added`), then
// y = stream / rms(stream) * weight. One CTA a row.
extern "C" __global__ void __launch_bounds__(THREADS) add_norm(
    u16* stream,                         // [B, width]
    const u16* added,                    // [B, width], or null, or the embedding [vocabulary, width]
    const long long* __restrict__ tokens,  // [B], or null
    const u16* __restrict__ weight,      // [width]
    u16* __restrict__ y,                 // [B, width]
    int width, float epsilon) {
    launch_dependents();
    if (tokens) wait_for_predecessor();
    const size_t row = static_cast<size_t>(blockIdx.x) * width;
    const u16* const from =
        !added ? stream + row : added + (tokens ? static_cast<size_t>(tokens[blockIdx.x]) * width : row);
    const bool replace = tokens || !added;
    if (width <= 8 * THREADS) norm_row<1>(stream + row, from, weight, y + row, width, epsilon, replace);
    else norm_row<4>(stream + row, from, weight, y + row, width, epsilon, replace);
}

// y = act(gate) up. THREADS / 4 threads a CTA.
extern "C" __global__ void __launch_bounds__(THREADS / 4) gated(
    const u16* __restrict__ gates,  // [B, width], rows `stride` numbers apart
    const u16* __restrict__ ups,
    u16* __restrict__ y,            // [B, width]
    int stride, int width, int rows) {
    launch_dependents();
    wait_for_predecessor();
    const int index = static_cast<int>(blockIdx.x) * (THREADS / 4) + threadIdx.x;
    const int row = index / (width / 8), column = 8 * (index % (width / 8));
    if (row >= rows) return;
    const size_t from = static_cast<size_t>(row) * stride + column;
    float gate[8], up[8];
    unpack_8<HALF>(gate, *reinterpret_cast<const uint4*>(gates + from));
    unpack_8<HALF>(up, *reinterpret_cast<const uint4*>(ups + from));
    #pragma unroll
    for (int i = 0; i < 8; ++i) gate[i] = gate_of<GATE>(gate[i]) * up[i];
    *reinterpret_cast<uint4*>(y + static_cast<size_t>(row) * width + column) = pack_8<HALF>(gate);
}

// A float's bits in the order of its value; nan is above all.
__device__ __forceinline__ u32 ordered(float v) {
    const u32 bits = __float_as_uint(v);
    return v != v ? ~0u : bits >> 31 ? ~bits : bits | 1u << 31;
}

// The most likely token of each row, ties to the first: written as the next step's input and into the
// history; the position moves on. CTAs_A_ROW CTAs a row; `best` and `done` are 0 before and after.
extern "C" __global__ void __launch_bounds__(THREADS) choose(
    const u16* __restrict__ logits,   // [B, vocabulary]
    u64* __restrict__ best,           // [B]
    int* __restrict__ done,           // [1]
    long long* __restrict__ tokens,   // [B]
    long long* __restrict__ history,  // [slots, B]
    int* __restrict__ position,       // [1]
    int vocabulary, int rows) {
    launch_dependents();
    wait_for_predecessor();
    const int of_row = static_cast<int>(gridDim.x) / rows, row = static_cast<int>(blockIdx.x) / of_row;
    const int part = static_cast<int>(blockIdx.x) % of_row;
    const u16* const from = logits + static_cast<size_t>(row) * vocabulary;
    u64 most = 0;
    for (int column = 8 * (part * THREADS + threadIdx.x); column < vocabulary; column += 8 * THREADS * of_row) {
        float v[8];
        if (vocabulary % 8 == 0) unpack_8<HALF>(v, *reinterpret_cast<const uint4*>(from + column));
        else
            for (int i = 0; i < 8; ++i)
                if (column + i < vocabulary) v[i] = float_of_16<HALF>(from[column + i]);
        #pragma unroll
        for (int i = 0; i < 8; ++i)
            if (column + i < vocabulary) {
                const u64 here = static_cast<u64>(ordered(v[i])) << 32 | ~static_cast<u32>(column + i);
                most = here > most ? here : most;
            }
    }
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const u64 other = __shfl_xor_sync(~0u, most, step);
        most = other > most ? other : most;
    }
    if (threadIdx.x % 32 == 0) atomicMax(best + row, most);
    __threadfence();
    __syncthreads();
    __shared__ int last;
    if (threadIdx.x == 0) last = atomicAdd(done, 1) == static_cast<int>(gridDim.x) - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    const int here = *position;
    __syncthreads();
    for (int r = threadIdx.x; r < rows; r += THREADS) {
        const u64 found = atomicExch(best + r, 0ull);
        const long long token = static_cast<long long>(~static_cast<u32>(found));
        tokens[r] = token;
        history[static_cast<size_t>(here) * rows + r] = token;
    }
    if (threadIdx.x == 0) *position = here + 1, *done = 0;
}
