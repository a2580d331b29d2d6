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
constexpr int WARPS = 8;                                    // each has 16 rows of the block
constexpr int UNITS = 8;                                   // of either pack
constexpr int VALUE_BYTES = 2048, UNIT_BYTES = 2304;
constexpr int IMAGE_BYTES = UNIT_BYTES + 64;               // units of the transpose lie in other banks
constexpr int PIECES = UNIT_BYTES / 16;

__shared__ __align__(16) u8 images[2][UNITS * IMAGE_BYTES];
// Nibbles of two tiles side by side: of their rows, a tile in each half of a word, and of their columns. The second
// index is that along the unit, with some more so that banks differ.
__shared__ __align__(16) u32 row_nibbles[SIDE / 4][SIDE / 8 + 8];
__shared__ __align__(16) u32 column_nibbles[SIDE / 8][SIDE / 4 + 4];

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
    const u32 column_nibble = nibbles_of(of_columns);
    u8* const column_image = images[1] + group / 4 * IMAGE_BYTES;
    #pragma unroll
    for (int j = 0; j < 4; ++j) {
        const u32 (&of)[4] = j < 2 ? first : last;
        const u32 which = j % 2 ? 0x7632 : 0x5410;
        const u32 above = __byte_perm(of[0], of[1], which), below = __byte_perm(of[2], of[3], which);
        u8* const at = column_image + place(group % 4 * 4 + j, down);
        *reinterpret_cast<u32*>(at) = kept(above, below, column_nibble >> 4 * j);
    }
    return nibbles | column_nibble << 16;
}

// Writes a lane's metadata of a unit: 16 columns of row g in the low half of a word, of row g + 8 in the high half.
// Lane t of a row's four has columns 16 t of each 64.
__device__ __forceinline__ void write_row_metadata(int unit, int lane) {
    const int g = lane / 4, by = g % 4 * 4;
    u32 words[2];
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 rows[2];
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const u32* const from = &row_nibbles[4 * unit + 2 * h + g / 4][8 * half + lane % 4 * 2];
            const uint2 two = *reinterpret_cast<const uint2*>(from);
            const u32 spread = (two.x >> by & 0x000F000F) | (two.y >> by & 0x000F000F) << 8;
            rows[h] = spread | spread >> 12;
        }
        words[half] = __byte_perm(rows[0], rows[1], 0x5410);
    }
    *reinterpret_cast<uint2*>(images[0] + unit * IMAGE_BYTES + VALUE_BYTES + 8 * lane) = make_uint2(words[0], words[1]);
}

// The same of the transpose.
__device__ __forceinline__ void write_column_metadata(int unit, int lane) {
    const int by = lane / 4 * 4;
    u32 words[2];
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 columns[2];
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint4 four = *reinterpret_cast<const uint4*>(&column_nibbles[2 * unit + h][16 * half + lane % 4 * 4]);
            columns[h] = (four.x >> by & 15) | (four.y >> by & 15) << 4
                | (four.z >> by & 15) << 8 | (four.w >> by & 15) << 12;
        }
        words[half] = columns[0] | columns[1] << 16;
    }
    *reinterpret_cast<uint2*>(images[1] + unit * IMAGE_BYTES + VALUE_BYTES + 8 * lane) = make_uint2(words[0], words[1]);
}

__device__ __forceinline__ void copy_unit(uint4* to, const u8* image, int lane) {
    #pragma unroll
    for (int piece = 0; piece < PIECES; piece += 32)
        if (piece + lane < PIECES) to[piece + lane] = *reinterpret_cast<const uint4*>(image + 16 * (piece + lane));
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
        column_nibbles[pair][down] = __byte_perm(left, right, 0x7632);
    }
    __syncwarp();                                          // which has chosen all of its rows
    const int row_tile = UNITS * block_row + warp, column_tile = UNITS * block_column + warp;
    write_row_metadata(warp, lane);
    __syncwarp();
    const size_t of_rows = static_cast<size_t>(row_tile) * across + block_column;
    if (16 * row_tile < N) copy_unit(units + of_rows * PIECES, images[0] + warp * IMAGE_BYTES, lane);
    __syncthreads();
    write_column_metadata(warp, lane);
    __syncwarp();
    const size_t of_columns = static_cast<size_t>(column_tile) * below + block_row;
    if (16 * column_tile < K) copy_unit(transposed_units + of_columns * PIECES, images[1] + warp * IMAGE_BYTES, lane);
}
