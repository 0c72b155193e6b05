// What operators ask of the machine: numbers of 16 bits, sums over a warp, tensor cores, barriers. Inline PTX stands
// here and nowhere else; tests/gpu/host.h gives the same names on a CPU, where tests run the operators thread by thread.
#ifndef HOST

typedef long long int64;
typedef unsigned long long uint64;

#define FUNCTION [[maybe_unused]] static __device__ __forceinline__
#define MEMBER __device__ __forceinline__  // a function in a struct
#define OPERATOR [[maybe_unused]] static __device__ __noinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)

// The block's shared memory: all of it, in one piece, aligned to 1024 bytes.
FUNCTION char *shared_memory() {
    extern __shared__ __align__(1024) uint4 shared_room[];
    return (char *)shared_room;
}

FUNCTION float from_half(unsigned short h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

// To the nearest, ties to even; beyond 65504 infinite.
FUNCTION unsigned short to_half(float f) {
    unsigned short h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

FUNCTION float from_brain(unsigned short b) { return __uint_as_float((unsigned)b << 16); }

// Two numbers as halves in one word, the first in the low 16 bits.
FUNCTION unsigned to_halves(float low, float high) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Both halves of a + b, and of a b + c, each rounded once.
FUNCTION unsigned add_halves(unsigned a, unsigned b) {
    unsigned sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
    return sum;
}
FUNCTION unsigned multiply_add_halves(unsigned a, unsigned b, unsigned c) {
    unsigned sum;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

// 16 bytes of weights: read once, so they push nothing out of the first cache. Never of what a kernel itself writes.
FUNCTION uint4 load_weights(const void *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

// 1 / x, the last bit perhaps another; a division proper takes ten times as long.
FUNCTION float reciprocal(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// c + the products of four pairs of signed bytes.
FUNCTION int add_products(int a, int b, int c) {
    int d;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// One lane's value in all lanes of the warp; all 32 must come.
FUNCTION float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

FUNCTION float warp_sum(float x) {
#pragma unroll
    for (int i = 16; i; i >>= 1) x += __shfl_xor_sync(0xffffffffu, x, i);
    return x;
}

FUNCTION float warp_max(float x) {
#pragma unroll
    for (int i = 16; i; i >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
    return x;
}

// What the warp's lanes have written to shared memory is there for all of them.
FUNCTION void warp_barrier() { __syncwarp(); }

// Four 8 x 8 matrices of halves from shared memory: lane l names the 16 bytes of row l % 8 of matrix l / 8, and gets
// of each matrix the elements (l / 4, 2 (l % 4)) and the one after it.
FUNCTION void load_matrices(unsigned r[4], const void *row) {
    unsigned at = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

// The same, each matrix transposed.
FUNCTION void load_matrices_turned(unsigned r[4], const void *row) {
    unsigned at = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8] over a warp, halves into float32. Lane l, with g = l / 4 and t = l % 4, holds
// a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with the column after it; b: (2t, g), (2t + 8, g), each
// with the row after it; c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
FUNCTION void multiply(float c[4], const unsigned a[4], const unsigned b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes from global to shared memory, in the background; what was asked for so far is one group.
FUNCTION void copy_later(void *to, const void *from) {
    unsigned at = (unsigned)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
FUNCTION void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `left` groups are on their way.
template <int left> FUNCTION void wait_for_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory"); }

// So many threads of the block meet, from thread 0 on.
FUNCTION void first_threads_meet(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

// Barriers in shared memory of 8 bytes: so many arrivals end a phase, and phases are known by their parity, from 0 on.
FUNCTION void mbarrier_init(uint64 *at, unsigned arrivals) {
    unsigned where = (unsigned)__cvta_generic_to_shared(at);
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(where), "r"(arrivals) : "memory");
}
FUNCTION void mbarrier_arrive(uint64 *at) {
    unsigned where = (unsigned)__cvta_generic_to_shared(at);
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(where) : "memory");
}
// Arrives, and the phase ends no sooner than so many bytes have come by copy_whole.
FUNCTION void mbarrier_expect(uint64 *at, unsigned bytes) {
    unsigned where = (unsigned)__cvta_generic_to_shared(at);
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(where), "r"(bytes)
                 : "memory");
}
// So many bytes, a multiple of 16, from global to shared memory in the background: one thread asks for all of them. Such
// copies may come in another order.
FUNCTION void copy_whole(void *to, const void *from, unsigned bytes, uint64 *at) {
    unsigned there = (unsigned)__cvta_generic_to_shared(to), where = (unsigned)__cvta_generic_to_shared(at);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(there),
                 "l"(from), "r"(bytes), "r"(where)
                 : "memory");
}
// What this thread has written to shared memory, barriers included, is there for copy_whole.
FUNCTION void shared_for_copies() {
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// A warp asks for such a copy; once that is there it is CHUNK_ARRIVALS arrivals at `full`.
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
enum { CHUNK_ARRIVALS = 1 };
FUNCTION void copy_chunk(void *to, const void *from, unsigned bytes, uint64 *full) {
    if (threadIdx.x % 32 == 0) mbarrier_expect(full, bytes), copy_whole(to, from, bytes, full);
}
#else  // 16 bytes at a time
enum { CHUNK_ARRIVALS = 32 };
FUNCTION void copy_chunk(void *to, const void *from, unsigned bytes, uint64 *full) {
    unsigned where = (unsigned)__cvta_generic_to_shared(full);
#pragma unroll 4
    for (unsigned i = 16 * (threadIdx.x % 32); i < bytes; i += 16 * 32)
        copy_later((char *)to + i, (const char *)from + i);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(where) : "memory");
}
#endif
// Until the phase of this parity has ended; the one before the first has. Who waits may be one phase behind, no more.
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
#define WAIT_A_WHILE "try_wait"
#else
#define WAIT_A_WHILE "test_wait"
#endif
FUNCTION void mbarrier_wait(uint64 *at, unsigned parity) {
    unsigned where = (unsigned)__cvta_generic_to_shared(at), done;
    do asm volatile("{ .reg .pred p; mbarrier." WAIT_A_WHILE ".parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                    : "=r"(done)
                    : "r"(where), "r"(parity)
                    : "memory");
    while (!done);
}

// Products of a warpgroup, which is four warps in a row: compute capability 9.0 alone (sm_90a). c [64, n] += a [64, 16]
// b [16, n], halves into float32, n twice as many as c has numbers. Of a warp's 16 rows of a and c a lane has what it has
// in `multiply`, of c for 8 columns after 8. b lies in shared memory, transposed: `b` is a descriptor of its n rows
// (panels.h). It happens in the background: products from begin_products() to end_products() are one group, and neither
// a, b nor c may be touched before it is done.
FUNCTION unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }
FUNCTION void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FUNCTION void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `left` groups are on their way.
template <int left> FUNCTION void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}
// The compiler takes no number of c before this.
template <int COUNT> FUNCTION void products_are_done(float (&c)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(c[i])::"memory");
}

#define SUMS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SUMS_32 \
    SUMS_16 \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_64 \
    SUMS_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_128 \
    SUMS_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUM_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SUM_16(i) SUM_4(i), SUM_4(i + 4), SUM_4(i + 8), SUM_4(i + 12)
#define SUM_32(i) SUM_16(i), SUM_16(i + 16)
#define SUM_64(i) SUM_32(i), SUM_32(i + 32)
#define SUM_128(i) SUM_64(i), SUM_64(i + 64)
#define WIDE_PRODUCT(n, count, a0, a1, a2, a3, at)                                                          \
    FUNCTION void multiply_wide(float (&c)[count], const unsigned (&a)[4], uint64 b) {                      \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" SUMS_##count "}, {%" #a0     \
                     ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #at ", 1, 1, 1, 0;"                               \
                     : SUM_##count(0)                                                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                 \
    }
WIDE_PRODUCT(32, 16, 16, 17, 18, 19, 20)
WIDE_PRODUCT(64, 32, 32, 33, 34, 35, 36)
WIDE_PRODUCT(128, 64, 64, 65, 66, 67, 68)
WIDE_PRODUCT(256, 128, 128, 129, 130, 131, 132)

// All blocks of a cooperative launch meet, their first `threads` threads; what each has written before is there for all
// afterwards. `arrivals` counts from 0 at the launch and is never reset in it; `goal` is the count at which this meeting
// is complete.
FUNCTION void grid_barrier(unsigned *arrivals, unsigned goal, int threads) {
    first_threads_meet(threads);
    if (threadIdx.x == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrivals) : "memory");
        unsigned count;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(arrivals) : "memory");
        while (count < goal);
    }
    first_threads_meet(threads);
}

#endif
