// What every operator is given, and small things that many of them do.
//
// An operator is name(a, p, work): `a` are the arguments of its step, `p` the words of the pass (both as in
// kernels/cpu/plan.py, in the same order as the compiled operators of kernels/cpu have them), and `work` says which
// block of how many this is. The threads of a block do an operator together.

typedef const int64 *Words;

struct Work {
    int block, blocks;
    bool by_head;  // items must go to blocks by key head: the steps around this one wait for their own block alone
};

FUNCTION float *floats(int64 address) { return (float *)address; }
FUNCTION const unsigned short *shorts(int64 address) { return (const unsigned short *)address; }
FUNCTION Words words(int64 address) { return (Words)address; }
FUNCTION double number(int64 bits) { return __longlong_as_double(bits); }

FUNCTION float lowest() { return __uint_as_float(0xff800000u); }  // -infinity, which NVRTC has no name for

// Those that compute: in a token's one launch a warp more brings weights (stream.h).
#ifdef EACH_TOGETHER
FUNCTION int threads() { return TOGETHER_THREADS; }
FUNCTION void block_barrier() { first_threads_meet(TOGETHER_THREADS); }
#else
FUNCTION int threads() { return blockDim.x; }
FUNCTION void block_barrier() { __syncthreads(); }
#endif
FUNCTION int thread() { return threadIdx.x; }
FUNCTION int warps() { return threads() / 32; }
FUNCTION int warp() { return threadIdx.x / 32; }
FUNCTION int lane() { return threadIdx.x % 32; }

// The first DESK bytes of shared memory: block-wide sums, and what stream.h has there. Behind them, in a token's launch, HAND
// bytes for what it is told (passes.cu). An operator's own room is behind that.
#ifdef EACH_TOGETHER
FUNCTION char *room() { return shared_memory() + DESK + HAND; }
#else
FUNCTION char *room() { return shared_memory() + DESK; }
#endif

// The sum over all threads of the block, in all of them; in an order that depends on the block's size alone.
FUNCTION float block_sum(float x) {
    float *desk = (float *)shared_memory();
    x = warp_sum(x);
    block_barrier();
    if (lane() == 0) desk[warp()] = x;
    block_barrier();
    float total = 0;
    for (int i = 0; i < warps(); i++) total += desk[i];
    return total;
}

FUNCTION float block_max(float x) {
    float *desk = (float *)shared_memory();
    x = warp_max(x);
    block_barrier();
    if (lane() == 0) desk[warp()] = x;
    block_barrier();
    float most = desk[0];
    for (int i = 1; i < warps(); i++) most = fmaxf(most, desk[i]);
    return most;
}

// Two lanes, `apart` from each other, add up N numbers: one gets the first half of the sums, the other the second half; a
// single number they both get.
template <int N, int ROOM> FUNCTION void halve(float (&x)[ROOM], int apart) {
    bool upper = lane() & apart;
    if (N == 1) x[0] += shuffle(x[0], lane() ^ apart);
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        float mine = upper ? x[N / 2 + i] : x[i], other = upper ? x[i] : x[N / 2 + i];
        x[i] = mine + shuffle(other, lane() ^ apart);
    }
}

FUNCTION float sigmoid(float x) { return reciprocal(1.0f + expf(-x)); }

// Of the sequence that a row belongs to: FIELDS, FIRST, ROW, COUNT.
FUNCTION Words sequence(Words p, int64 i) { return words(p[TABLE]) + SEQUENCE * i; }
FUNCTION Words sequence_of(Words p, int64 row) { return sequence(p, words(p[SEQUENCE_OF])[row]); }

// Where in its stream a row of the pass stands.
FUNCTION int64 position(Words p, int64 row) {
    Words s = sequence_of(p, row);
    return s[FIRST] + row - s[ROW];
}

// a / b of numbers that are not negative; of small ones by floats, in a fifth of the time.
FUNCTION int quotient(int a, int b) { return (a | b) >> 20 ? a / b : (int)(((float)a + 0.5f) * reciprocal((float)b)); }

// a % b of numbers that are not negative: mostly small ones, which divide ten times faster.
FUNCTION int64 rest_of(int64 a, int64 b) { return (a | b) >> 32 ? a % b : (unsigned)a % (unsigned)b; }

// Where a position is kept: sinks in front, then the ring.
FUNCTION int64 slot_of(int64 at, int64 window, int64 sinks) {
    return window == 0 || at < sinks ? at : sinks + rest_of(at - sinks, window);
}
