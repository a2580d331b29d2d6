// What stays of a tile of 4 x 4, as a mask: bit 4 i + j is row i, column j. The two places of a row, or of a column,
// that are packed are those that stay and, where fewer do, the first others.

#pragma once

enum Selection { TILES, ROWS, GREEDY };

constexpr float LARGEST = 0x1p100f;                        // sums of a tile stay finite

// The magnitude that a number is chosen by; one that is none, or not finite, is the largest.
__device__ __forceinline__ float size_of(float number) { return fminf(fabsf(number), LARGEST); }

// What a choice is worth, and its mask.
struct Choice {
    float worth;
    u32 mask;
};

// The other if it is worth more, so that the first of equals stays.
__device__ __forceinline__ Choice better(Choice one, Choice other) {
    const bool is_more = other.worth > one.worth;
    return {is_more ? other.worth : one.worth, is_more ? other.mask : one.mask};
}

// The columns j < k of four, numbered 01, 02, 03, 12, 13, 23.
__device__ __forceinline__ constexpr int number_of(int j, int k) { return j * (7 - j) / 2 + k - j - 1; }

// The least of the two columns that are neither j nor k; the other is 6 less all three.
__device__ __forceinline__ constexpr int least_without(int j, int k) { return j ? 0 : k == 1 ? 2 : 1; }

// Two rows of a tile: what each column is worth that both keep, and the better way to keep one of columns j and k in
// either row.
struct TwoRows {
    float both[4];
    Choice one_each[6];

    template <int FIRST>
    __device__ __forceinline__ void load(const float (&sizes)[4][4]) {
        #pragma unroll
        for (int j = 0; j < 4; ++j) both[j] = sizes[FIRST][j] + sizes[FIRST + 1][j];
        #pragma unroll
        for (int j = 0; j < 3; ++j)
            #pragma unroll
            for (int k = j + 1; k < 4; ++k)
                one_each[number_of(j, k)] = better(
                    {sizes[FIRST][j] + sizes[FIRST + 1][k], (1u << j | 16u << k) << 4 * FIRST},
                    {sizes[FIRST][k] + sizes[FIRST + 1][j], (1u << k | 16u << j) << 4 * FIRST});
    }

    // Every column once: one of two columns in either row, and one of the other two.
    __device__ __forceinline__ Choice each_once() const {
        const Choice &a = one_each[0], &b = one_each[5], &c = one_each[1], &d = one_each[4];
        return better({a.worth + b.worth, a.mask | b.mask}, {c.worth + d.worth, c.mask | d.mask});
    }
};

// The best of the 90 masks that keep two of each row and of each column, by the sum of magnitudes. It meets in the
// middle: what the upper two rows keep of each column, the lower two do not. So 19 choices are left, each made of
// sums of two rows. Of equals the first stays, in the order that reference.py has.
__device__ __forceinline__ u32 best_of_tile(const float (&sizes)[4][4]) {
    TwoRows upper, lower;
    upper.load<0>(sizes);
    lower.load<2>(sizes);
    Choice best{-1.0f, 0};
    #pragma unroll
    for (int j = 0; j < 3; ++j)
        #pragma unroll
        for (int k = j + 1; k < 4; ++k) {                  // both upper rows keep j and k
            const u32 above = 1u << j | 1u << k, below = 15 - above;
            const int l = least_without(j, k), m = 6 - j - k - l;
            best = better(best, {upper.both[j] + upper.both[k] + (lower.both[l] + lower.both[m]),
                                 above | above << 4 | below << 8 | below << 12});
        }
    #pragma unroll
    for (int j = 0; j < 3; ++j)
        #pragma unroll
        for (int k = j + 1; k < 4; ++k) {                  // one of j, k in each of the four rows
            const int l = least_without(j, k), m = 6 - j - k - l;
            const Choice &a = upper.one_each[number_of(j, k)], &b = lower.one_each[number_of(j, k)];
            const Choice twice = better({upper.both[l] + lower.both[m], 0x11u << l | 0x1100u << m},
                                        {upper.both[m] + lower.both[l], 0x11u << m | 0x1100u << l});
            best = better(best, {twice.worth + (a.worth + b.worth), twice.mask | a.mask | b.mask});
        }
    const Choice a = upper.each_once(), b = lower.each_once();
    return better(best, {a.worth + b.worth, a.mask | b.mask}).mask;
}

// The larger two of four, of equals the first, as four bits.
__device__ __forceinline__ u32 larger_two(float a, float b, float c, float d) {
    const float sizes[4] = {a, b, c, d};
    u32 ahead = 0;                                         // a byte for each: how many are before it
    #pragma unroll
    for (int i = 0; i < 3; ++i)
        #pragma unroll
        for (int j = i + 1; j < 4; ++j) ahead += sizes[j] > sizes[i] ? 1u << 8 * i : 1u << 8 * j;
    return (~ahead >> 1 & 0x01010101u) * 0x01020408u >> 24 & 15;
}

__device__ __forceinline__ u32 largest_of_rows(const float (&sizes)[4][4]) {
    u32 mask = 0;
    #pragma unroll
    for (int i = 0; i < 4; ++i) mask |= larger_two(sizes[i][0], sizes[i][1], sizes[i][2], sizes[i][3]) << 4 * i;
    return mask;
}

// Of what the mask keeps; a mask of the tile's transpose.
__device__ __forceinline__ u32 largest_of_columns(const float (&sizes)[4][4], u32 mask) {
    u32 result = 0;
    #pragma unroll
    for (int j = 0; j < 4; ++j) {
        float left[4];
        #pragma unroll
        for (int i = 0; i < 4; ++i) left[i] = mask >> (4 * i + j) & 1 ? sizes[i][j] : 0.0f;
        result |= larger_two(left[0], left[1], left[2], left[3]) << 4 * j;
    }
    return result;
}

// The larger of two stays first.
__device__ __forceinline__ void order(u32& first, u32& second) {
    const u32 least = min(first, second);
    first = max(first, second);
    second = least;
}

// Keeps weights from the largest on, of equals the first, while their row and their column have fewer than two.
//
// A key is a magnitude whose lowest bits are 15 less the place. They are sorted by Batcher's odd-even merges. Each row
// has a nibble of `taken`, each column one above, the last of either first: what it has taken, 2 if it is full.
__device__ __forceinline__ u32 greedy_of_tile(const float (&sizes)[4][4]) {
    u32 keys[16];
    #pragma unroll
    for (int i = 0; i < 16; ++i) keys[i] = (__float_as_uint(sizes[i / 4][i % 4]) & ~15u) | (15 - i);
    #pragma unroll
    for (int outer = 0; outer < 4; ++outer)
        #pragma unroll
        for (int inner = outer; inner >= 0; --inner) {
            const int apart = 1 << inner, begin = inner == outer ? 0 : apart;
            #pragma unroll
            for (int i = 0; i < 16; ++i)
                if (i >= begin && (i - begin) / apart % 2 == 0 && i + apart < 16
                    && i >> (outer + 1) == (i + apart) >> (outer + 1))
                    order(keys[i], keys[i + apart]);
        }
    u32 taken = 0, mask = 0;
    #pragma unroll
    for (int i = 0; i < 16; ++i) {
        const u32 one = 1u << (keys[i] & 12) | 0x10000u << (keys[i] & 3) * 4;
        const bool is_free = (taken & one << 1) == 0;
        taken += is_free ? one : 0;
        mask |= is_free ? 0x8000u >> (keys[i] & 15) : 0;
    }
    return mask;
}

// The mask with two of every row, where at least one is: the first other one, too.
__device__ __forceinline__ u32 filled(u32 mask) {
    const u32 c0 = mask & 0x1111, c1 = mask >> 1 & 0x1111, c2 = mask >> 2 & 0x1111, c3 = mask >> 3 & 0x1111;
    const u32 alone = (c0 ^ c1 ^ c2 ^ c3) & 0x1111;        // two are even
    return mask | (alone & ~c0) | (alone & c0) << 1;
}

// The mask of the tile's transpose.
__device__ __forceinline__ u32 transposed(u32 mask) {
    u32 swap = (mask ^ mask >> 3) & 0x0A0A;
    mask ^= swap | swap << 3;
    swap = (mask ^ mask >> 6) & 0x00CC;
    return mask ^ (swap | swap << 6);
}

// The nibbles of the four rows, one after the other: the first kept column, and four times the second.
__device__ __forceinline__ u32 nibbles_of(u32 mask) {
    const u32 c0 = mask & 0x1111, c1 = mask >> 1 & 0x1111, c2 = mask >> 2 & 0x1111, c3 = mask >> 3 & 0x1111;
    const u32 first = (~c0 & c1) | (~c0 & ~c1 & 0x1111) << 1;      // 0, else 1, else 2
    const u32 second = (c3 | (~c2 & 0x1111)) | (c3 | c2) << 1;     // 3, else 2, else 1
    return first | second << 2;
}
