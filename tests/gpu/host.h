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

#include "host_cuda.h"
#include "host_machine.h"
