// The twin of machine.h on a CPU, for tests: a kernel runs thread by thread, each CUDA thread a fiber on the one thread
// that calls launch(). Barriers and functions of a whole warp are the places where fibers wait for each other; from one
// such place to the next a fiber runs alone, and a seed says who comes first. An answer that depends on it is a race.
//
// What it cannot show: how long anything takes (on an H100 64-bit divisions, conversions of bytes to floats, and code that
// is run once cost more than the arithmetic around them; what a thread keeps in local memory comes from the second cache
// after every meeting of blocks); and what CuPy does.
#pragma once
#undef _FORTIFY_SOURCE // its longjmp refuses to leave one stack for another

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <bit>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

typedef long long int64;
typedef unsigned long long uint64;

#define FUNCTION [[maybe_unused]] static inline
#define MEMBER inline
#define OPERATOR [[maybe_unused]] static
#define KERNEL(threads, blocks) void // by its C++ name, or one called `write` would clash with C's
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
FUNCTION uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
FUNCTION float2 make_float2(float x, float y) { return {x, y}; }
FUNCTION int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
FUNCTION uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
FUNCTION float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static struct { unsigned x; } threadIdx, blockIdx, blockDim, gridDim;

// ---------------------------------------------------------------------------------------------------------------------
// Fibers, and who runs when.

namespace host {

constexpr unsigned GUARD = 64;        // bytes before and after a block's shared memory that nobody may write
constexpr unsigned STACK = 64 * 1024; // bytes of a fiber's stack

struct Copy {
    void *to;
    const void *from;
    int group;
};

struct Fiber {
    jmp_buf at;
    bool warm = false; // it waits in `at`; a cold one has yet to begin, at the top of its stack
    int group = 0;     // of copies: the one that is open
    std::vector<Copy> copies;
};

// A product of a warpgroup that is on its way: of one of its warps, by lanes.
struct WideProduct {
    const unsigned *a[32];
    float *c[32];
    uint64 b;
    int rows, group; // of b; of products
};

struct Warp {
    unsigned ready, arrived; // a bit per lane: can run, waits for the other lanes
    const char *where;       // the function in which they wait
    unsigned first, fiber;   // its lane 0: the thread in the block, the index in `fibers`
    alignas(16) char in[32 * 48], out[32 * 16];
    int group; // of products: the one that is open
    std::vector<WideProduct> products;
};

struct Block {
    unsigned index, arrived, returned; // threads that wait at the block's barrier, that are through
    unsigned wanted;                   // threads, from the first on, that a barrier is for
    const unsigned *arrivals;          // what thread 0 watches at a barrier of the grid; null: it does not
    unsigned goal;
    char *shared;
    Warp *warps;
};

// A barrier of machine.h in shared memory.
struct Mbarrier {
    unsigned arrivals : 15, left : 15, parity : 1;
    int bytes; // that are to come
};
static_assert(sizeof(Mbarrier) == 8);

// A lane that waits at one.
struct Waiter {
    Warp *warp;
    unsigned lane;
    const Mbarrier *at;
    unsigned parity;
};
static std::vector<Waiter> waiters;

// Bytes on their way, and whom they tell.
struct Chunk {
    Block *block;
    char *to;
    const char *from;
    unsigned bytes;
    Mbarrier *at;
};
static std::vector<Chunk> chunks;

static void (*kernel)(const int64 *, const int64 *);
static const int64 *first_argument, *second_argument;
static unsigned seed, shared_bytes, warp_count;
static uint64 chance;

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static std::vector<Block> blocks;
static std::unique_ptr<char[]> shared;
static size_t page, shared_size;
static char *stacks;

static Fiber *fiber; // the one that runs, and its warp and block
static Warp *warp;
static Block *block;
static unsigned order[32], turn; // of the warp's lanes in this round; the next one's place in it

static jmp_buf round_over, failure;
static char message[512];

[[noreturn, gnu::format(printf, 1, 2)]] static void fail(const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(message, sizeof message, format, list);
    va_end(list);
    _longjmp(failure, 1);
}

// A fault of the running thread, with its place.
[[noreturn]] static void fault(const char *what) { fail("thread %u of block %u: %s", threadIdx.x, blockIdx.x, what); }

static void on_signal(int number) {
    fault(number == SIGFPE                          ? "division by zero"
          : number == SIGILL || number == SIGTRAP ? "misaligned access, index past a local array, or shift by too much"
                                                    : "bad or misaligned address, or its stack is full");
}

// The numbers below n in the order of the seed.
static void deal(unsigned *to, unsigned n) {
    for (unsigned i = 0; i < n; i++) to[i] = seed == 1 ? n - 1 - i : i;
    for (unsigned i = n; seed > 1 && i > 1; i--) {
        chance = chance * 6364136223846793005u + 1442695040888963407u;
        std::swap(to[i - 1], to[(chance >> 32) * i >> 32]);
    }
}

static void finish();

static void live() {
    for (;;) {
        kernel(first_argument, second_argument);
        finish();
    }
}

static char *stack(unsigned i) { return stacks + i * (page + STACK) + page; }

// The next lane of the round runs. Fibers enter each other without a detour through the scheduler.
[[noreturn]] static void onward() {
    while (turn < 32) {
        unsigned lane = order[turn++];
        if (!(warp->ready >> lane & 1)) continue;
        unsigned i = warp->fiber + lane;
        fiber = &fibers[i];
        threadIdx.x = warp->first + lane;
        if (fiber->warm) _longjmp(fiber->at, 1);
        static ucontext_t fresh;
        fiber->warm = true;
        getcontext(&fresh);
        fresh.uc_stack.ss_sp = stack(i);
        fresh.uc_stack.ss_size = STACK - i % 16 * 256; // tops of many stacks would share few lines of the cache
        makecontext(&fresh, live, 0);
        setcontext(&fresh);
    }
    _longjmp(round_over, 1);
}

// The running fiber waits until it is ready again and its turn comes. Nothing may be assumed of memory across it,
// which the compiler, blind to the jumps, is told by `noipa`.
[[gnu::noipa]] static void park() {
    if (!_setjmp(fiber->at)) onward();
    asm volatile("" ::: "memory");
}

[[gnu::noipa]] static void round() {
    if (!_setjmp(round_over)) onward();
    asm volatile("" ::: "memory");
}

static void unready() { warp->ready &= ~(1u << threadIdx.x % 32); }

[[gnu::noinline]] static void finish() {
    fiber->copies.clear();
    fiber->group = 0;
    block->returned++;
    unready();
    park();
}

// All 32 lanes meet. The last to come settles, from what each brought, what each goes away with.
template <class Out, class In, class Settle> static Out meet(const char *where, const In &in, Settle settle) {
    static_assert(sizeof(In) <= 48 && sizeof(Out) <= 16);
    if (warp->arrived && strcmp(warp->where, where))
        fail("lanes of a warp of block %u meet at %s and at %s", blockIdx.x, warp->where, where);
    unsigned lane = threadIdx.x % 32;
    ((In *)warp->in)[lane] = in;
    warp->where = where;
    unready();
    if (!~(warp->arrived |= 1u << lane)) settle((In *)warp->in, (Out *)warp->out);
    park();
    return ((Out *)warp->out)[lane];
}

// A bit for each lane that the block's w-th warp has.
static unsigned lanes(unsigned w) {
    unsigned n = blockDim.x - w * 32;
    return n < 32 ? (1u << n) - 1 : ~0u;
}

static void prepare(unsigned place, unsigned index) {
    Block &b = blocks[place];
    b = {index, 0, 0, blockDim.x, nullptr, 0, shared.get() + place * shared_size + GUARD, &warps[place * warp_count]};
    memset(b.shared - GUARD, 0xA5, GUARD);
    memset(b.shared, 0xFF, shared_bytes); // not a number in every format
    memset(b.shared + shared_bytes, 0xA5, GUARD);
    for (unsigned w = 0; w < warp_count; w++) {
        Warp &p = b.warps[w];
        p.ready = lanes(w);
        p.arrived = 0;
        p.first = w * 32;
        p.fiber = place * blockDim.x + w * 32;
        p.group = 0;
        p.products.clear();
    }
}

// A phase of a barrier has ended if nothing is missing: who waits for that goes on.
static void end_phase(Mbarrier &b) {
    if (b.left || b.bytes) return;
    b.left = b.arrivals, b.parity ^= 1;
    for (size_t i = 0; i < waiters.size();) {
        Waiter &w = waiters[i];
        if (w.at != &b || w.parity == b.parity) {
            i++;
            continue;
        }
        w.warp->ready |= 1u << w.lane;
        w = waiters.back(), waiters.pop_back();
    }
}

// What a block waits for comes, one of the copies: with seed 0 the first that it asked for, with seed 1 the last.
static bool bring_one(Block &b) {
    std::vector<unsigned> own, turns;
    for (unsigned i = 0; i < chunks.size(); i++)
        if (chunks[i].block == &b) own.push_back(i);
    if (own.empty()) return false;
    turns.resize(own.size());
    deal(turns.data(), own.size());
    Chunk c = chunks[own[turns[0]]];
    chunks.erase(chunks.begin() + own[turns[0]]);
    memcpy(c.to, c.from, c.bytes);
    c.at->bytes -= (int)c.bytes;
    end_phase(*c.at);
    return true;
}

// Runs a block until none of its threads can go on; whether any could. A warp runs as far as it comes before another
// does, and who has met leaves in the order of the seed, not the last to come first: so of two accesses with no barrier
// between them one comes first in ascending order, the other in descending.
static bool run(Block &b) {
    if (b.arrivals && *(const volatile unsigned *)b.arrivals >= b.goal) b.arrivals = nullptr, b.warps->ready |= 1;
    block = &b;
    blockIdx.x = b.index;
    bool any = false;
    for (bool more = true; more;) {
        unsigned turns[32];
        deal(turns, warp_count);
        more = false;
        for (unsigned i = 0; i < warp_count; i++)
            for (warp = &b.warps[turns[i]]; warp->ready; more = any = true) {
                deal(order, 32);
                turn = 0;
                round();
                if (!~warp->arrived) warp->arrived = 0, warp->ready = ~0u;
            }
        if (!more && b.returned < blockDim.x && bring_one(b)) {
            more = any = true;
            continue;
        }
        if (!b.arrived || b.arrived < b.wanted) continue;
        b.arrived = 0;
        for (unsigned w = 0; w * 32 < b.wanted; w++) b.warps[w].ready = lanes(w);
    }
    return any;
}

static void check_guards(const Block &b) {
    for (unsigned i = 0; i < GUARD; i++) {
        if ((unsigned char)b.shared[shared_bytes + i] != 0xA5)
            fail("block %u writes past its %u bytes of shared memory", b.index, shared_bytes);
        if ((unsigned char)b.shared[-1 - (int)i] != 0xA5) fail("block %u writes before its shared memory", b.index);
    }
}

[[noreturn]] static void deadlock(const Block &b) {
    unsigned waiting = 0;
    const char *where = "a function";
    for (unsigned w = 0; w < warp_count; w++)
        if (b.warps[w].arrived) waiting += __builtin_popcount(b.warps[w].arrived), where = b.warps[w].where;
    fail("deadlock in block %u: of its %u threads %u wait at a block barrier, %u at %s of the warp, %u at a grid "
         "barrier; %u have returned",
         b.index, blockDim.x, b.arrived, waiting, where, b.arrivals ? 1 : 0, b.returned);
}

// Runs the first n of `blocks` to their ends.
static void run_all(unsigned n) {
    static std::vector<unsigned> turns; // static, as the jump out of a failed launch destroys nothing
    turns.resize(n);
    for (unsigned left = n; left;) {
        bool any = false;
        deal(turns.data(), n);
        left = 0;
        for (unsigned i : turns) any |= blocks[i].returned < blockDim.x && run(blocks[i]);
        for (unsigned i = 0; i < n; i++) left += blocks[i].returned < blockDim.x;
        for (unsigned i = 0; left && !any; i++)
            if (blocks[i].returned < blockDim.x) deadlock(blocks[i]);
    }
    for (unsigned i = 0; i < n; i++) check_guards(blocks[i]);
    if (!chunks.empty()) fail("a block ends while %u bytes are on their way to it", chunks[0].bytes);
}

// Gives back the stacks of this program, until its next launch: each is two of the maps that a process may have.
extern "C" void release() {
    if (stacks) munmap(stacks, fibers.size() * (page + STACK));
    fibers = std::vector<Fiber>(); // all cold: their stacks are gone
    stacks = nullptr;
}

static void make_room(unsigned alive) {
    size_t count = alive * blockDim.x, size = (GUARD + shared_bytes + GUARD + 63) / 64 * 64;
    if (warps.size() < alive * warp_count) warps.resize(alive * warp_count);
    if (blocks.size() < alive) blocks.resize(alive);
    static size_t room;
    if (room < alive * size) shared.reset(new (std::align_val_t(64)) char[room = alive * size]);
    shared_size = size;
    if (fibers.size() >= count) return;
    page = getauxval(AT_PAGESZ);
    release();
    stacks = (char *)mmap(nullptr, count * (page + STACK), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == (char *)MAP_FAILED) stacks = nullptr, fail("no memory for the stacks of %zu threads", count);
    fibers.resize(count);
    for (size_t i = 0; i < count; i++) mprotect(stack(i) - page, page, PROT_NONE); // a full stack faults
}

[[gnu::noipa]] static bool attempt(unsigned together) {
    if (_setjmp(failure)) return false;
    if (!gridDim.x || !blockDim.x || blockDim.x > 1024) fail("%u blocks of %u threads", gridDim.x, blockDim.x);
    unsigned alive = together ? gridDim.x : 1;
    waiters.clear(), chunks.clear();
    make_room(alive);
    if (together) {
        for (unsigned i = 0; i < alive; i++) prepare(i, i);
        run_all(alive);
    } else {
        static std::vector<unsigned> turns;
        turns.resize(gridDim.x);
        deal(turns.data(), gridDim.x);
        for (unsigned i = 0; i < gridDim.x; i++) prepare(0, turns[i]), run_all(1);
    }
    return true;
}

static bool is_shared(const void *p) { return (uint64)p - (uint64)block->shared < shared_bytes; }

// What both ends of a copy of 16 bytes, and a row of a matrix, must be.
static void want_aligned(const void *p, bool in_shared, const char *who) {
    if ((uint64)p % 16) fault(who);
    if (is_shared(p) != in_shared) fault(in_shared ? "memory that is not shared" : "shared memory for global");
}

} // namespace host

// Runs a kernel over a grid, all blocks at once or one after the other; returns null, or what went wrong.
extern "C" const char *launch(void (*kernel)(const int64 *, const int64 *), const int64 *a, const int64 *p,
                              unsigned blocks, unsigned threads, unsigned shared_bytes, int together, unsigned seed) {
    constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
    static char room[64 * 1024]; // a stack for the handler: the fiber's own may be full
    host::kernel = kernel, host::first_argument = a, host::second_argument = p;
    host::shared_bytes = shared_bytes, host::warp_count = (threads + 31) / 32;
    host::seed = seed, host::chance = seed * 0x9E3779B97F4A7C15u;
    gridDim.x = blocks, blockDim.x = threads;
    stack_t stack = {room, 0, sizeof room}, former_stack;
    struct sigaction action = {}, former[5];
    action.sa_handler = host::on_signal;
    action.sa_flags = SA_ONSTACK | SA_NODEFER;
    sigaltstack(&stack, &former_stack);
    for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], &action, former + i);
    bool good = host::attempt(together);
    for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], former + i, nullptr);
    sigaltstack(&former_stack, nullptr);
    if (good) return nullptr;
    for (host::Fiber &f : host::fibers) f.warm = false, f.group = 0, f.copies.clear(); // they hang in mid-kernel
    return host::message;
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA's own.

FUNCTION float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
FUNCTION float __int_as_float(int x) { return std::bit_cast<float>(x); }
FUNCTION unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
FUNCTION int __float_as_int(float x) { return std::bit_cast<int>(x); }
// Counts up, and says nothing of time.
FUNCTION int64 clock64() {
    static int64 count = 0;
    return ++count;
}
FUNCTION double __longlong_as_double(int64 x) { return std::bit_cast<double>(x); }
FUNCTION int64 __double_as_longlong(double x) { return std::bit_cast<int64>(x); }
FUNCTION int __float2int_rn(float x) { return (int)rintf(x); }
FUNCTION int __ffs(int x) { return __builtin_ffs(x); }
FUNCTION int __popc(unsigned x) { return std::popcount(x); }
FUNCTION unsigned __byte_perm(unsigned a, unsigned b, unsigned which) {
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= (unsigned)(((uint64)b << 32 | a) >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
FUNCTION int __clz(int x) { return std::countl_zero((unsigned)x); }
FUNCTION float rsqrtf(float x) { return (float)(1 / sqrt((double)x)); }

template <class A, class B> FUNCTION std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return fmin((T)a, (T)b);
    else return (T)b < (T)a ? (T)b : (T)a;
}

template <class A, class B> FUNCTION std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return fmax((T)a, (T)b);
    else return (T)a < (T)b ? (T)b : (T)a;
}

FUNCTION int atomicAdd(int *p, int x) { return std::exchange(*p, (int)((unsigned)*p + (unsigned)x)); }
FUNCTION unsigned atomicAdd(unsigned *p, unsigned x) { return std::exchange(*p, *p + x); }
FUNCTION unsigned atomicMax(unsigned *p, unsigned x) { return std::exchange(*p, max(*p, x)); }
FUNCTION unsigned atomicMin(unsigned *p, unsigned x) { return std::exchange(*p, min(*p, x)); }

FUNCTION void first_threads_meet(int threads) {
    host::block->wanted = threads;
    host::block->arrived++;
    host::unready();
    host::park();
}

FUNCTION void __syncthreads() { first_threads_meet(blockDim.x); }

namespace host {

template <class T> struct Parcel {
    T x;
    int from;
};

// Each lane's x goes to the lanes that ask for it.
template <class T> static T carry(const char *where, unsigned mask, T x, int from) {
    static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4);
    if (~mask) fault("a warp's function without all of its lanes");
    return meet<T>(where, Parcel<T>{x, from}, [](Parcel<T> *in, T *out) {
        for (int l = 0; l < 32; l++) out[l] = in[in[l].from].x;
    });
}

static int lane() { return threadIdx.x % 32; }

} // namespace host

template <class T> FUNCTION T __shfl_sync(unsigned mask, T x, int from) {
    return host::carry("__shfl_sync", mask, x, from & 31);
}
template <class T> FUNCTION T __shfl_xor_sync(unsigned mask, T x, int n) {
    return host::carry("__shfl_xor_sync", mask, x, (host::lane() ^ n) & 31);
}
template <class T> FUNCTION T __shfl_up_sync(unsigned mask, T x, unsigned n) {
    int from = host::lane() - (int)n;
    return host::carry("__shfl_up_sync", mask, x, from < 0 ? host::lane() : from);
}
template <class T> FUNCTION T __shfl_down_sync(unsigned mask, T x, unsigned n) {
    int from = host::lane() + (int)n;
    return host::carry("__shfl_down_sync", mask, x, from > 31 ? host::lane() : from);
}

FUNCTION unsigned __ballot_sync(unsigned mask, int predicate) {
    if (~mask) host::fault("a warp's function without all of its lanes");
    return host::meet<unsigned>("__ballot_sync", predicate != 0, [](bool *in, unsigned *out) {
        unsigned votes = 0;
        for (int l = 0; l < 32; l++) votes |= (unsigned)in[l] << l;
        for (int l = 0; l < 32; l++) out[l] = votes;
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// What machine.h gives.

FUNCTION char *shared_memory() { return host::block->shared; }


FUNCTION float from_half(unsigned short h) {
    unsigned rest = h & 0x7FFF;
    if (rest > 0x7C00) return __uint_as_float(0x7FFFFFFF);
    float f = rest < 0x400 ? (float)rest * 0x1p-24f : __uint_as_float((rest << 13) + 0x38000000); // bias 127, not 15
    if (rest == 0x7C00) f = INFINITY;
    return h & 0x8000 ? -f : f;
}

FUNCTION unsigned short to_half(float f) {
    unsigned sign = __float_as_uint(f) >> 16 & 0x8000, rest = __float_as_uint(f) & 0x7FFFFFFF;
    if (rest > 0x7F800000) return 0x7FFF;
    if (rest >= 0x477FF000) return sign | 0x7C00; // from 65520, halfway to what would be the next
    // Below 2^-14 halves are multiples of 2^-24, as are floats from 0.5: the sum rounds.
    if (rest < 0x38800000) return sign | (__float_as_uint(fabsf(f) + 0.5f) - 0x3F000000);
    return sign | ((rest + 0xFFF + (rest >> 13 & 1) - 0x38000000) >> 13);
}

FUNCTION float from_brain(unsigned short b) { return __uint_as_float((unsigned)b << 16); }

FUNCTION unsigned to_halves(float low, float high) { return to_half(low) | (unsigned)to_half(high) << 16; }

FUNCTION unsigned multiply_add_halves(unsigned a, unsigned b, unsigned c) {
    auto one = [&](int at) {
        return (float)((double)from_half(a >> at) * from_half(b >> at) + from_half(c >> at));
    };
    return to_halves(one(0), one(16));
}

FUNCTION unsigned add_halves(unsigned a, unsigned b) { return multiply_add_halves(a, 0x3c003c00, b); }

FUNCTION uint4 load_weights(const void *p) {
    host::want_aligned(p, false, "load_weights of an address that is no multiple of 16");
    return *(const uint4 *)p;
}

FUNCTION float reciprocal(float x) { return 1 / x; }

FUNCTION int add_products(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += (signed char)(a >> i) * (signed char)(b >> i);
    return c;
}

FUNCTION float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

namespace host {

// Addition and maximum commute, so every lane of the butterfly ends with what lane 0 has.
template <class F> static void butterfly(const float *in, float *out, F f) {
    float x[32];
    memcpy(x, in, sizeof x);
    for (int i = 16; i; i >>= 1)
        for (int l = 0; l < i; l++) x[l] = f(x[l], x[l + i]);
    for (int l = 0; l < 32; l++) out[l] = x[0];
}

} // namespace host

FUNCTION float warp_sum(float x) {
    return host::meet<float>("warp_sum", x, [](float *in, float *out) {
        host::butterfly(in, out, [](float a, float b) { return a + b; });
    });
}

FUNCTION float warp_max(float x) {
    return host::meet<float>("warp_max", x, [](float *in, float *out) {
        host::butterfly(in, out, [](float a, float b) { return fmaxf(a, b); });
    });
}

FUNCTION void warp_barrier() {
    host::meet<char>("warp_barrier", '\0', [](char *, char *) {});
}

FUNCTION void load_matrices(unsigned r[4], const void *row) {
    host::want_aligned(row, true, "load_matrices of a row at no multiple of 16");
    uint4 v = host::meet<uint4>("load_matrices", row, [](const void **in, uint4 *out) {
        for (int l = 0; l < 32; l++)
            for (int m = 0; m < 4; m++) ((unsigned *)&out[l])[m] = ((const unsigned *)in[m * 8 + l / 4])[l % 4];
    });
    memcpy(r, &v, 16);
}

FUNCTION void load_matrices_turned(unsigned r[4], const void *row) {
    host::want_aligned(row, true, "load_matrices_turned of a row at no multiple of 16");
    uint4 v = host::meet<uint4>("load_matrices_turned", row, [](const void **in, uint4 *out) {
        for (int l = 0; l < 32; l++)
            for (int m = 0; m < 4; m++) {
                const unsigned short *const *rows = (const unsigned short **)in + m * 8 + l % 4 * 2;
                ((unsigned *)&out[l])[m] = rows[0][l / 4] | (unsigned)rows[1][l / 4] << 16;
            }
    });
    memcpy(r, &v, 16);
}

namespace host {

struct Product {
    unsigned a[4], b[2];
    float c[4];
};

// Products of halves are exact in float; each element's sum is rounded once. Tests spend most of their time here.
[[maybe_unused, gnu::no_sanitize("alignment", "bounds", "shift")]] static void multiply_all(Product *in, float4 *out) {
    double a[16][16], b[16][8], c[16][8];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 2; i++) {
            int g = l / 4, t = l % 4 * 2 + i;
            for (int m = 0; m < 4; m++) a[g + m % 2 * 8][t + m / 2 * 8] = from_half(in[l].a[m] >> i * 16);
            for (int m = 0; m < 2; m++) b[t + m * 8][g] = from_half(in[l].b[m] >> i * 16);
            for (int m = 0; m < 2; m++) c[g + m * 8][t] = in[l].c[m * 2 + i];
        }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) ((float *)&out[l])[i] = (float)c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

} // namespace host

FUNCTION void multiply(float c[4], const unsigned a[4], const unsigned b[2]) {
    host::Product in;
    memcpy(in.a, a, 16), memcpy(in.b, b, 8), memcpy(in.c, c, 16);
    float4 sum = host::meet<float4>("multiply", in, host::multiply_all);
    memcpy(c, &sum, 16);
}

// Products of a warpgroup: each of its warps has 16 rows of a and c by itself.
FUNCTION unsigned shared_address(const void *p) { return (unsigned)((const char *)p - host::block->shared); }
FUNCTION void begin_products() { warp_barrier(); }

FUNCTION void end_products() {
    host::meet<char>("end_products", '\0', [](char *, char *) { host::warp->group++; });
}

namespace host {

struct WideOperands {
    const unsigned *a;
    float *c;
    uint64 b;
    int rows;
};

// What the descriptor says of b: rows of 16 halves, eight rows 128 bytes apart, then eight more a stride further, the
// address's bits 4 to 6 swizzled by its bits 7 to 9.
static void multiply_wide_now(const WideProduct &p) {
    if (p.b >> 62 != 1 || (p.b >> 49 & 7)) fault("multiply_wide of a matrix that is not swizzled by 128 bytes");
    unsigned start = (p.b & 0x3fff) << 4, stride = (p.b >> 32 & 0x3fff) << 4;
    double b[256][16];
    for (int n = 0; n < p.rows; n++)
        for (int k = 0; k < 16; k++) {
            unsigned at = start + n / 8 * stride + n % 8 * 128 + 2 * k;
            at ^= (at >> 7 & 7) << 4;
            if (at >= shared_bytes) fault("multiply_wide of what is not in shared memory");
            b[n][k] = from_half(*(const unsigned short *)(block->shared + at));
        }
    for (int l = 0; l < 32; l++)
        for (int half = 0; half < 2; half++) {
            double a[16];  // row g or g + 8
            for (int k = 0; k < 16; k++)
                a[k] = from_half(p.a[l / 4 * 4 + k % 8 / 2][half + k / 8 * 2] >> k % 2 * 16);
            for (int i = 0; i < p.rows / 4; i++) {
                int n = i / 2 * 8 + l % 4 * 2 + i % 2;
                float &c = p.c[l][i / 2 * 4 + half * 2 + i % 2];
                double sum = c;
                for (int k = 0; k < 16; k++) sum += a[k] * b[n][k];
                c = (float)sum;
            }
        }
}

} // namespace host

// Happens as late as it may, with what a, b and c hold then.
template <int COUNT> FUNCTION void multiply_wide(float (&c)[COUNT], const unsigned (&a)[4], uint64 b) {
    host::WideOperands in = {a, c, b, 2 * COUNT};
    host::meet<char>("multiply_wide", in, [](host::WideOperands *in, char *) {
        host::WideProduct p = {{}, {}, in[0].b, in[0].rows, host::warp->group};
        for (int l = 0; l < 32; l++) {
            if (in[l].b != p.b) host::fault("lanes of a warp with several matrices in multiply_wide");
            p.a[l] = in[l].a, p.c[l] = in[l].c;
        }
        host::warp->products.push_back(p);
    });
}

template <int left> FUNCTION void wait_for_products() {
    host::meet<char>("wait_for_products", '\0', [](char *, char *) {
        std::vector<host::WideProduct> &products = host::warp->products;
        auto at = products.begin();
        for (; at != products.end() && at->group < host::warp->group - left; at++) host::multiply_wide_now(*at);
        products.erase(products.begin(), at);
    });
}

template <int COUNT> FUNCTION void products_are_done(float (&)[COUNT]) {}

// Happens as late as it may. Until then its room holds garbage, for who still reads there what was before is too late.
FUNCTION void copy_later(void *to, const void *from) {
    host::want_aligned(to, true, "copy_later to an address that is no multiple of 16");
    host::want_aligned(from, false, "copy_later from an address that is no multiple of 16");
    memset(to, 0xFF, 16);
    host::fiber->copies.push_back({to, from, host::fiber->group});
}

FUNCTION void end_group() { host::fiber->group++; }

template <int left> FUNCTION void wait_for_groups() {
    std::vector<host::Copy> &copies = host::fiber->copies;
    auto at = copies.begin();
    for (; at != copies.end() && at->group < host::fiber->group - left; at++) memcpy(at->to, at->from, 16);
    copies.erase(copies.begin(), at);
}

FUNCTION void mbarrier_init(uint64 *at, unsigned arrivals) {
    *(host::Mbarrier *)at = {arrivals & 0x7fff, arrivals & 0x7fff, 0, 0};
}

FUNCTION void mbarrier_arrive(uint64 *at) {
    host::Mbarrier &b = *(host::Mbarrier *)at;
    if (!b.left) host::fault("an arrival at no mbarrier, or a second one in a phase");
    b.left--;
    host::end_phase(b);
}

FUNCTION void mbarrier_expect(uint64 *at, unsigned bytes) {
    ((host::Mbarrier *)at)->bytes += bytes;
    mbarrier_arrive(at);
}

// Such copies come as late as they may, in the order of the seed. Until then their room holds garbage.
FUNCTION void copy_whole(void *to, const void *from, unsigned bytes, uint64 *at) {
    host::want_aligned(to, true, "copy_whole to an address that is no multiple of 16");
    host::want_aligned(from, false, "copy_whole from an address that is no multiple of 16");
    if (bytes % 16) host::fault("copy_whole of bytes that are no multiple of 16");
    memset(to, 0xFF, bytes);
    host::chunks.push_back({host::block, (char *)to, (const char *)from, bytes, (host::Mbarrier *)at});
}

FUNCTION void shared_for_copies() {}

enum { CHUNK_ARRIVALS = 1 };
FUNCTION void copy_chunk(void *to, const void *from, unsigned bytes, uint64 *full) {
    if (threadIdx.x % 32 == 0) mbarrier_expect(full, bytes), copy_whole(to, from, bytes, full);
}

FUNCTION void mbarrier_wait(uint64 *at, unsigned parity) {
    host::Mbarrier *b = (host::Mbarrier *)at;
    if (b->parity != (parity & 1)) return; // another phase runs: that one has ended
    host::waiters.push_back({host::warp, threadIdx.x % 32, b, parity & 1});
    host::unready();
    host::park();
}

// Thread 0 always waits a round, so that blocks leave in the order of the seed too.
FUNCTION void grid_barrier(unsigned *arrivals, unsigned goal, int threads) {
    first_threads_meet(threads);
    if (threadIdx.x == 0) {
        atomicAdd(arrivals, 1u);
        host::block->arrivals = arrivals;
        host::block->goal = goal;
        host::unready();
        host::park();
    }
    first_threads_meet(threads);
}
