// PTX that the kernels share, each instruction with what it promises. Names follow the PTX ISA.
//
// Shared-memory addresses are 32-bit (`shared_address`); that is what the instructions take, and it
// halves the registers of address arithmetic. What an architecture lacks is assembled only where a kernel
// calls it, so that kernels leave it out by `if constexpr`.

#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Clock cycles of this SM, the lower 32 bits.
__device__ __forceinline__ u32 cycles() {
    u32 count;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(count));
    return count;
}

// ---- shared memory -----------------------------------------------------------------------------

__device__ __forceinline__ uint4 load_shared_128(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

__device__ __forceinline__ uint2 load_shared_64(u32 address) {
    uint2 v;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
    return v;
}

__device__ __forceinline__ float load_shared_float(u32 address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
    return v;
}

__device__ __forceinline__ u32 load_shared_32(u32 address) {
    u32 v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address));
    return v;
}

__device__ __forceinline__ void store_shared_64(u32 address, uint2 v) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" :: "r"(address), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ void store_shared_128(u32 address, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ void store_shared_float2(u32 address, float a, float b) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" :: "r"(address), "f"(a), "f"(b) : "memory");
}

__device__ __forceinline__ void store_shared_float4(u32 address, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// Four 8x8 matrices of 16-bit numbers. Lane l gives the address of row l%8 of matrix l/8, and
// receives from each matrix the two neighbours in row l/4, columns 2(l%4) and 2(l%4)+1.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

// The same, transposed on their way: lane l receives the two neighbours in column l/4, rows 2(l%4) and
// 2(l%4)+1.
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

// Four 8x8 matrices of 16-bit numbers, transposed on their way: lane l has the two neighbours in row
// l/4, columns 2(l%4) and 2(l%4)+1, of each, and gives the address of column l%8 of matrix l/8.
__device__ __forceinline__ void store_matrices_transposed(u32 address, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// Asks for the 128 bytes around an address, so that a load finds them in the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" :: "l"(address));
}

// ---- asynchronous copies, sm_80 ----------------------------------------------------------------

// 16 bytes to shared memory past the registers; with `valid` false it writes 16 zero bytes.
__device__ __forceinline__ void copy_16(u32 to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most N of this thread's latest groups are still on their way.
template <int N>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

// ---- mbarriers and bulk copies, sm_90 ----------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine and to the other CTAs of the cluster.
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// One arrival, and `bytes` more to come before the phase is complete.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n"
        "}" :: "r"(barrier), "r"(parity) : "memory");
}

// As above, for bytes that come from other CTAs of the cluster.
__device__ __forceinline__ void barrier_wait_cluster(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n"
        "}" :: "r"(barrier), "r"(parity) : "memory");
}

// The policy for bytes that are read once: they are the first to leave the L2 cache.
__device__ __forceinline__ u64 evict_first() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// A multiple of 16 bytes by the copy engine; the barrier counts them as they land.
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], %4;"
        :: "r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}

// The same to the same place of every CTA of a cluster, each of which counts the bytes on its own
// barrier; of one: to this one.
template <int CTAS>
__device__ __forceinline__ void copy_bulk_to_all(u32 to, const void* from, u32 bytes, u32 barrier) {
    if constexpr (CTAS == 1) {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
            :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1], %2, [%3], %4;"
            :: "r"(to), "l"(from), "r"(bytes), "r"(barrier), "h"(static_cast<u16>((1 << CTAS) - 1)) : "memory");
    }
}

// Describes a matrix to the copy engine: where it lies, its sizes, the box that one copy takes and how
// the box's bytes are permuted on the way. The host makes it; a kernel takes it as a parameter.
struct alignas(64) TensorMap {
    u64 words[16];
};

// The box at (column, row) of the matrix, to the same place of every CTA of a cluster, each of which
// counts the bytes on its own barrier. Numbers beyond the matrix are zeros, and are counted.
template <int CTAS>
__device__ __forceinline__ void copy_box_to_all(
    u32 to, const TensorMap& matrix, int column, int row, u32 barrier) {
    if constexpr (CTAS == 1) {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
            "[%0], [%1, {%2, %3}], [%4];"
            :: "r"(to), "l"(&matrix), "r"(column), "r"(row), "r"(barrier) : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1, {%2, %3}], [%4], %5;"
            :: "r"(to), "l"(&matrix), "r"(column), "r"(row), "r"(barrier),
               "h"(static_cast<u16>((1 << CTAS) - 1)) : "memory");
    }
}

// The box at (x, y, z) of an array of three dimensions, to this CTA alone.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& array, int x, int y, int z, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];"
        :: "r"(to), "l"(&array), "r"(x), "r"(y), "r"(z), "r"(barrier) : "memory");
}

// The box at (column, row) of the matrix, from shared memory; what would lie beyond the matrix is not
// written. It belongs to this thread's next group of stores.
__device__ __forceinline__ void store_box(const TensorMap& matrix, int column, int row, u32 from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
                 :: "l"(&matrix), "r"(column), "r"(row), "r"(from) : "memory");
}

__device__ __forceinline__ void commit_stores() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most N of this thread's latest groups of stores have still to be read from shared memory.
template <int N>
__device__ __forceinline__ void wait_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(N) : "memory");
}

// Waits until all of this thread's stores are written.
__device__ __forceinline__ void wait_stores() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// True in one lane of the warp; unlike `lane == 0` it lets the assembler know that it is one, and
// spares a loop over lanes around each bulk copy.
__device__ __forceinline__ bool one_lane() {
    u32 elected;
    asm volatile(
        "{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected;
}

// ---- clusters, sm_90 ---------------------------------------------------------------------------

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Enough after `barrier_init_done`, which is the release.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same place in the shared memory of another CTA of the cluster.
__device__ __forceinline__ u32 in_cta(u32 address, u32 rank) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// One arrival; what this thread has stored before is seen by those who wait.
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// One arrival in any CTA of the cluster, at an address of `in_cta`. It says that this thread has done
// its reading; what it has stored is not promised to be seen there, which would take a fence of the
// whole GPU.
__device__ __forceinline__ void barrier_arrive_in(u32 barrier_there) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" :: "r"(barrier_there) : "memory");
}

// Stores 8 or 16 bytes in another CTA and counts them on a barrier there; nobody waits here.
__device__ __forceinline__ void store_remote(u32 there, float a, float b, u32 barrier_there) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
        :: "r"(there), "f"(a), "f"(b), "r"(barrier_there) : "memory");
}

__device__ __forceinline__ void store_remote(
    u32 there, float a, float b, float c, float d, u32 barrier_there) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
        :: "r"(there), "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier_there) : "memory");
}

// Stores a float in another CTA, at an address of `in_cta`; a cluster's barrier says when it is there.
__device__ __forceinline__ void store_in_cta(u32 there, float v) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" :: "r"(there), "f"(v) : "memory");
}

// ---- dependent launch, sm_90 -------------------------------------------------------------------

// The next kernel's CTAs may start once every CTA of this one has said so, or has ended.
__device__ __forceinline__ void launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Returns when the kernels before have ended and what they wrote can be read. Every CTA of every
// kernel must call it, idle ones too: otherwise a kernel could end before the one two places ahead.
__device__ __forceinline__ void wait_for_predecessor() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// ---- arithmetic --------------------------------------------------------------------------------

// d += A B: A is 16x32 and 2:4, stored as 16x16 kept values in `a` and their positions in
// `metadata`; B is 32x8. With selector 0 the metadata of lanes 0, 1 of each quad is used, with 1
// that of lanes 2, 3: one word a lane serves two multiplications. ordered_metadata: the two
// positions of a group ascend.
template <bool F16, int SELECTOR>
__device__ __forceinline__ void multiply_sparse(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 metadata) {
    if constexpr (F16) {
        asm(
            "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
              "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata), "n"(SELECTOR));
    } else {
        asm(
            "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
              "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata), "n"(SELECTOR));
    }
}

// d += A B: A is 16x16, B is 16x8; both have neighbours in k in one word.
template <bool F16>
__device__ __forceinline__ void multiply_16(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high) {
    if constexpr (F16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
    }
}

// a * b of two packed bf16; exact for a power of two as long as the result is in range. As a fused
// multiply-add because sm_80 has no bf16 product; -0 is the sum's neutral element.
__device__ __forceinline__ u32 multiply_bf16x2(u32 a, u32 b) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
    return d;
}

// The same of two packed float16.
__device__ __forceinline__ u32 multiply_f16x2(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// a + b of two packed bf16, and of two packed float16.
__device__ __forceinline__ u32 add_bf16x2(u32 a, u32 b) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3F803F80u), "r"(b));
    return d;
}

__device__ __forceinline__ u32 add_f16x2(u32 a, u32 b) {
    u32 d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ __forceinline__ float float_of_half(u16 bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}

__device__ __forceinline__ float float_of_bf16(u16 bits) {
    return __uint_as_float(static_cast<u32>(bits) << 16);
}

template <bool F16>
__device__ __forceinline__ float float_of_16(u16 bits) {
    return F16 ? float_of_half(bits) : float_of_bf16(bits);
}

// Rounds to nearest, ties to even.
template <bool F16>
__device__ __forceinline__ u16 round_16(float f) {
    u16 bits;
    if constexpr (F16) {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    } else {
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    }
    return bits;
}

// Eight neighbouring numbers of 16 bits, as they are loaded and stored at once.
template <bool F16>
__device__ __forceinline__ void unpack_8(float (&to)[8], uint4 v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        to[2 * i] = float_of_16<F16>(static_cast<u16>(words[i]));
        to[2 * i + 1] = float_of_16<F16>(static_cast<u16>(words[i] >> 16));
    }
}

template <bool F16>
__device__ __forceinline__ uint4 pack_8(const float (&from)[8]) {
    u32 words[4];
    #pragma unroll
    for (int i = 0; i < 4; ++i)
        words[i] = round_16<F16>(from[2 * i]) | static_cast<u32>(round_16<F16>(from[2 * i + 1])) << 16;
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// The activation of a gate: silu; gelu; gelu by tanh.
template <int WHICH>
__device__ __forceinline__ float gate_of(float x) {
    if constexpr (WHICH == 0) return x / (1.0f + __expf(-x));
    else if constexpr (WHICH == 1) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    else return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

// Two e4m3 codes, `low` in the low byte; what is beyond the largest becomes the largest.
__device__ __forceinline__ u32 e4m3_pair(float low, float high) {
    u16 bits;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(high), "f"(low));
    return bits;
}

// ---- warpgroup multiplication, sm_90a ----------------------------------------------------------

// A shared-memory operand whose rows are 128 bytes, permuted in 16-byte pieces by the row (128-byte
// swizzle), eight rows to 1024 bytes. Adding b / 16 moves it by b bytes along the row.
__device__ __forceinline__ u64 swizzled_operand(u32 address) {
    constexpr u64 SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = static_cast<u64>(1024 >> 4) << 32;
    return SWIZZLE_128 | EIGHT_ROWS | 1ull << 16 | (address >> 4 & 0x3FFF);
}

// Registers written before are seen by the multiplications after.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most N of the latest groups are still under way.
template <int N = 0>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}

// Registers of each thread of this warpgroup from now on; those given are there for others to take.
template <int COUNT>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT));
}

// All 128 threads of a warpgroup have come here; each warpgroup has a barrier of its own.
__device__ __forceinline__ void barrier_of_warpgroup(int which) {
    asm volatile("bar.sync %0, 128;" :: "r"(which) : "memory");
}

// Ordinary stores to shared memory are seen by the multiplications that other warps start.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#define D4 "%0, %1, %2, %3"
#define D8 D4 ", %4, %5, %6, %7"
#define D16 D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define D32 D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define D48 D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define D64 D48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define D80 D64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define D96 D80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define D112 D96 ", %96, %97, %98, %99, %100, %101, %102, %103, " \
    "%104, %105, %106, %107, %108, %109, %110, %111"
#define D128 D112 ", %112, %113, %114, %115, %116, %117, %118, %119, " \
    "%120, %121, %122, %123, %124, %125, %126, %127"
#define SUM_OF(r, n) r(d[n][0]), r(d[n][1]), r(d[n][2]), r(d[n][3])
#define SUMS_OF(r, n) SUM_OF(r, n), SUM_OF(r, n + 1), SUM_OF(r, n + 2), SUM_OF(r, n + 3), \
    SUM_OF(r, n + 4), SUM_OF(r, n + 5), SUM_OF(r, n + 6), SUM_OF(r, n + 7)
#define HALF_OF(r, n) SUM_OF(r, n), SUM_OF(r, n + 1), SUM_OF(r, n + 2), SUM_OF(r, n + 3)
#define D_OF(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define SPARSE_WGMMA(N, TYPE, D, A0, A1, A2, A3, B, META, SEL, ADD) \
    "{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n" \
    "wgmma.mma_async.sp.sync.aligned.m64n" N "k32.f32." TYPE "." TYPE " {" D "}, " \
    "{" A0 ", " A1 ", " A2 ", " A3 "}, " B ", " META ", " SEL ", add, 1, 1, 0;\n}"
#define INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(SELECTOR), "r"(add)
#define EITHER_TYPE(N, D, OUTPUTS, ...) \
    if constexpr (F16) asm volatile(SPARSE_WGMMA(N, "f16", D, __VA_ARGS__) : OUTPUTS : INPUTS); \
    else asm volatile(SPARSE_WGMMA(N, "bf16", D, __VA_ARGS__) : OUTPUTS : INPUTS)
#define COMMA ,

// As `multiply_sparse`, by four warps together, each with 16 of 64 rows of A and the same rows of
// the result; B is 32 columns of 8 N8 tokens in shared memory. d = A B, or d += A B with `add`.
template <bool F16, int SELECTOR, int N8>
__device__ __forceinline__ void multiply_sparse_warpgroup(
    float (&d)[N8][4], const u32 (&a)[4], u64 b, u32 metadata, int add) {
    if constexpr (N8 == 1) {
        EITHER_TYPE("8", D4, D_OF(0), "%4", "%5", "%6", "%7", "%8", "%9", "%10", "%11");
    } else if constexpr (N8 == 2) {
        EITHER_TYPE("16", D8, D_OF(0) COMMA D_OF(1), "%8", "%9", "%10", "%11", "%12", "%13", "%14", "%15");
    } else if constexpr (N8 == 4) {
        EITHER_TYPE("32", D16, D_OF(0) COMMA D_OF(1) COMMA D_OF(2) COMMA D_OF(3),
                    "%16", "%17", "%18", "%19", "%20", "%21", "%22", "%23");
    } else if constexpr (N8 == 8) {
        EITHER_TYPE("64", D32,
                    D_OF(0) COMMA D_OF(1) COMMA D_OF(2) COMMA D_OF(3) COMMA
                    D_OF(4) COMMA D_OF(5) COMMA D_OF(6) COMMA D_OF(7),
                    "%32", "%33", "%34", "%35", "%36", "%37", "%38", "%39");
    } else if constexpr (N8 == 12) {
        EITHER_TYPE("96", D48, SUMS_OF("+f", 0) COMMA HALF_OF("+f", 8),
                    "%48", "%49", "%50", "%51", "%52", "%53", "%54", "%55");
    } else if constexpr (N8 == 16) {
        EITHER_TYPE("128", D64, SUMS_OF("+f", 0) COMMA SUMS_OF("+f", 8),
                    "%64", "%65", "%66", "%67", "%68", "%69", "%70", "%71");
    } else if constexpr (N8 == 20) {
        EITHER_TYPE("160", D80, SUMS_OF("+f", 0) COMMA SUMS_OF("+f", 8) COMMA HALF_OF("+f", 16),
                    "%80", "%81", "%82", "%83", "%84", "%85", "%86", "%87");
    } else if constexpr (N8 == 24) {
        EITHER_TYPE("192", D96, SUMS_OF("+f", 0) COMMA SUMS_OF("+f", 8) COMMA SUMS_OF("+f", 16),
                    "%96", "%97", "%98", "%99", "%100", "%101", "%102", "%103");
    } else if constexpr (N8 == 28) {
        EITHER_TYPE("224", D112, SUMS_OF("+f", 0) COMMA SUMS_OF("+f", 8) COMMA SUMS_OF("+f", 16) COMMA HALF_OF("+f", 24),
                    "%112", "%113", "%114", "%115", "%116", "%117", "%118", "%119");
    } else {
        static_assert(N8 == 32, "a number of tokens that is spelt out here");
        EITHER_TYPE("256", D128, SUMS_OF("+f", 0) COMMA SUMS_OF("+f", 8) COMMA SUMS_OF("+f", 16) COMMA SUMS_OF("+f", 24),
                    "%128", "%129", "%130", "%131", "%132", "%133", "%134", "%135");
    }
}

#define SPARSE_CODES(TYPES, SIGNS, r) \
    asm volatile( \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %134, 0;\n" \
        "wgmma.mma_async.sp.sync.aligned.m64n256k64." TYPES " {" D128 "}, " \
        "{%128, %129, %130, %131}, %132, %133, 0, add" SIGNS ";\n}" \
        : SUMS_OF(r, 0), SUMS_OF(r, 8), SUMS_OF(r, 16), SUMS_OF(r, 24) \
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(metadata), "r"(add))

// d = A B, or d += A B with `add`, for 8-bit codes: A is 64 x 64 and 2:4, 16 rows in each of the four
// warps, stored as 64 x 32 kept codes in `a`; B is 64 columns of 256 tokens in shared memory. Every
// lane's metadata is used. Codes are int8 where sums are int32, and e4m3 where they are float, of
// which sm_90 keeps 14 bits.
__device__ __forceinline__ void multiply_sparse_codes(
    int (&d)[32][4], const uint4& a, u64 b, u32 metadata, int add) {
    SPARSE_CODES("s32.s8.s8", "", "+r");
}

__device__ __forceinline__ void multiply_sparse_codes(
    float (&d)[32][4], const uint4& a, u64 b, u32 metadata, int add) {
    SPARSE_CODES("f32.e4m3.e4m3", ", 1, 1", "+f");
}
