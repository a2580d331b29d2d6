// Both packs of a weight [N, K] that trains in 2:4: of the weight, and of its transpose for the gradient of the
// input, each as units of 16 rows x 128 columns (decode24/units.cuh draws them).
//
// A CTA reads a block of 128 x 128 once and writes 8 units of either pack. A thread takes tiles of 4 x 4, two side
// by side at a time, chooses what stays (selection.cuh), and puts the kept numbers and their places into images of
// the units in shared memory, which are then copied out whole. What the block has beyond the weight is zeros.
//
//   macro       values     meaning
//   WIDE        0, 1       the weight is float32, not 16 bits as its packs
//   HALF        0, 1       packs are of float16, not of bfloat16
//   SELECTION   0, 1, 2    whole tiles, rows and then what is left of columns, tiles greedily

#include "ptx.cuh"
#include "selection.cuh"

constexpr int SIDE = 128;                                  // rows and columns of a block
constexpr int WARPS = 8;
constexpr int UNITS = 8;                                   // of either pack
constexpr int VALUE_BYTES = 2048, UNIT_BYTES = 2304;
constexpr int IMAGE_BYTES = UNIT_BYTES + 64;               // units of the transpose lie in other banks
constexpr int PIECES = UNIT_BYTES / 16;
constexpr int NIBBLE_WORDS = 24;                           // of 4 rows of a block: 16, and so that banks differ

__shared__ __align__(16) u8 images[2][UNITS * IMAGE_BYTES];
__shared__ __align__(16) u32 row_nibbles[SIDE / 4][NIBBLE_WORDS];      // of two tiles: a half each, a row after the other
__shared__ __align__(16) u32 column_nibbles[SIDE / 4][NIBBLE_WORDS];   // of two tiles: a column after the other

// Where a unit has the two kept numbers of this row, 0..15, and group of four columns, 0..31.
__device__ __forceinline__ int place(int row, int group) {
    return group / 8 * 512 + row % 8 * 64 + group % 4 * 16 + group / 4 % 2 * 8 + row / 8 * 4;
}

// The kept two of four numbers, by their nibble.
__device__ __forceinline__ u32 kept(u32 first, u32 last, u32 nibble) {
    return __byte_perm(first, last, 0x1010 + (nibble & 3) * 0x22 + (nibble >> 2 & 3) * 0x2200);
}

// Eight numbers of a row: as they are packed, and their magnitudes.
struct Eight {
    u32 words[4];
    float sizes[8];

    __device__ __forceinline__ void load(const void* weight, size_t at, bool valid) {
        const uint4 none = make_uint4(0, 0, 0, 0);
        if constexpr (WIDE) {
            const uint4* const from = reinterpret_cast<const uint4*>(static_cast<const float*>(weight) + at);
            const uint4 low = valid ? __ldg(from) : none, high = valid ? __ldg(from + 1) : none;
            const u32 bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            #pragma unroll
            for (int i = 0; i < 4; ++i)
                words[i] = round_16<HALF>(__uint_as_float(bits[2 * i]))
                    | static_cast<u32>(round_16<HALF>(__uint_as_float(bits[2 * i + 1]))) << 16;
            #pragma unroll
            for (int i = 0; i < 8; ++i) sizes[i] = size_of(__uint_as_float(bits[i]));
        } else {
            const uint4 v = valid ? __ldg(reinterpret_cast<const uint4*>(static_cast<const u16*>(weight) + at)) : none;
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
            #pragma unroll
            for (int i = 0; i < 4; ++i) {
                sizes[2 * i] = size_of(float_of_16<HALF>(static_cast<u16>(words[i])));
                sizes[2 * i + 1] = size_of(float_of_16<HALF>(static_cast<u16>(words[i] >> 16)));
            }
        }
    }
};

// Packs the tile `group` columns of four from the left and `down` rows of four from the top of the block; gives the
// nibbles of its rows and, above 16 bits, those of its columns.
__device__ __forceinline__ u32 pack_tile(const Eight (&rows)[4], int half, int down, int group) {
    float sizes[4][4];
    u32 first[4], last[4];
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        first[i] = rows[i].words[2 * half], last[i] = rows[i].words[2 * half + 1];
        #pragma unroll
        for (int j = 0; j < 4; ++j) sizes[i][j] = rows[i].sizes[4 * half + j];
    }
    const u32 mask = SELECTION == TILES ? best_of_tile(sizes)
        : SELECTION == ROWS ? largest_of_rows(sizes) : greedy_of_tile(sizes);
    if constexpr (SELECTION != TILES) {                    // places that are packed may be of what does not stay
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 bits = mask >> 4 * i;
            first[i] &= (bits & 1 ? 0xFFFF : 0) | (bits & 2 ? 0xFFFF0000 : 0);
            last[i] &= (bits & 4 ? 0xFFFF : 0) | (bits & 8 ? 0xFFFF0000 : 0);
        }
    }
    const u32 nibbles = nibbles_of(SELECTION == GREEDY ? filled(mask) : mask);
    u8* const row_image = images[0] + down / 4 * IMAGE_BYTES;
    #pragma unroll
    for (int i = 0; i < 4; ++i)
        *reinterpret_cast<u32*>(row_image + place(down % 4 * 4 + i, group)) = kept(first[i], last[i], nibbles >> 4 * i);

    const u32 of_columns = SELECTION == TILES ? transposed(mask)
        : SELECTION == ROWS ? largest_of_columns(sizes, mask) : filled(transposed(mask));
    const u32 column_nibbles_here = nibbles_of(of_columns);
    u8* const column_image = images[1] + group / 4 * IMAGE_BYTES;
    #pragma unroll
    for (int j = 0; j < 4; ++j) {
        const u32 (&of)[4] = j < 2 ? first : last;
        const u32 which = j % 2 ? 0x7632 : 0x5410;
        const u32 above = __byte_perm(of[0], of[1], which), below = __byte_perm(of[2], of[3], which);
        *reinterpret_cast<u32*>(column_image + place(group % 4 * 4 + j, down)) = kept(above, below, column_nibbles_here >> 4 * j);
    }
    return nibbles | column_nibbles_here << 16;
}

// Four nibbles of a row, as metadata: of two pairs of tiles.
__device__ __forceinline__ u32 row_metadata(int row, int pair) {
    const uint2 two = *reinterpret_cast<const uint2*>(&row_nibbles[row / 4][pair]);
    const int by = row % 4 * 4;
    const u32 spread = (two.x >> by & 0x000F000F) | (two.y >> by & 0x000F000F) << 8;
    return (spread | spread >> 12) & 0xFFFF;
}

// The same of a column: of four tiles below each other.
__device__ __forceinline__ u32 column_metadata(int column, int down) {
    u32 result = 0;
    #pragma unroll
    for (int i = 0; i < 4; ++i)
        result |= (column_nibbles[down + i][column / 8] >> column % 8 * 4 & 15) << 4 * i;
    return result;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 3) pack_both_ways(
    const void* __restrict__ weight,       // [N, K]
    uint4* __restrict__ units,             // [N / 16, blocks across, PIECES]
    uint4* __restrict__ transposed_units,  // [K / 16, blocks down, PIECES]
    int N, int K) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int across = (K + SIDE - 1) / SIDE, below = (N + SIDE - 1) / SIDE;
    const int block_column = static_cast<int>(blockIdx.x) % across, block_row = static_cast<int>(blockIdx.x) / across;
    const int down = 4 * warp + lane / 8, row = SIDE * block_row + 4 * down;

    #pragma unroll 1
    for (int part = 0; part < 2; ++part) {
        const int pair = 8 * part + lane % 8, column = SIDE * block_column + 8 * pair;
        Eight rows[4];
        #pragma unroll
        for (int i = 0; i < 4; ++i)
            rows[i].load(weight, static_cast<size_t>(row + i) * K + column, row < N && column < K);
        const u32 left = pack_tile(rows, 0, down, 2 * pair), right = pack_tile(rows, 1, down, 2 * pair + 1);
        row_nibbles[down][pair] = __byte_perm(left, right, 0x5410);
        column_nibbles[down][pair] = __byte_perm(left, right, 0x7632);
    }
    __syncthreads();

    // Lane t of a row's four has its columns 16 t of 64, twice; row g in the low half of a word, row g + 8 in the high.
    #pragma unroll
    for (int word = threadIdx.x; word < UNITS * 64; word += 32 * WARPS) {
        const int unit = word / 64, of_lane = word / 2 % 32, half = word % 2, g = of_lane / 4, t = of_lane % 4;
        const int at = unit * IMAGE_BYTES + VALUE_BYTES + word % 64 * 4, first = 16 * unit + g;
        *reinterpret_cast<u32*>(images[0] + at) =
            row_metadata(first, 8 * half + 2 * t) | row_metadata(first + 8, 8 * half + 2 * t) << 16;
        *reinterpret_cast<u32*>(images[1] + at) =
            column_metadata(first, 16 * half + 4 * t) | column_metadata(first + 8, 16 * half + 4 * t) << 16;
    }
    __syncthreads();

    #pragma unroll
    for (int piece = threadIdx.x; piece < 2 * UNITS * PIECES; piece += 32 * WARPS) {
        const int way = piece / (UNITS * PIECES), unit = piece / PIECES % UNITS, in_unit = piece % PIECES;
        const uint4 v = *reinterpret_cast<const uint4*>(images[way] + unit * IMAGE_BYTES + 16 * in_unit);
        const int tile = UNITS * (way ? block_column : block_row) + unit;
        if (16 * tile < (way ? K : N)) {
            const size_t of = static_cast<size_t>(tile) * (way ? below : across) + (way ? block_row : block_column);
            (way ? transposed_units : units)[of * PIECES + in_unit] = v;
        }
    }
}
