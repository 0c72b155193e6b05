// Products with weights for one token: y = W x + b, chunks of W as stream.h brings them, x in shared memory.
// Equation: kernels/reference/quants.py. Weights: kinds.h. What x is made of on the way: staging.h.

// Adds to sums the inner products of a chunk's rows with x: a lane has a run of each row. first: the chunk's first run.
template <class K> FUNCTION void chunk_times_x(const char *chunk, int first, int runs, float sums[K::ROWS]) {
    if (lane() >= runs) return;
    const float4 *x = (const float4 *)room();
    float v[32], total[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float4 four = x[place_of(first + lane(), i)];
        v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
    }
    if (K::SCALED) {
#pragma unroll
        for (int i = 0; i < 32; i++) total[i / 16] += v[i];
    }
#pragma unroll
    for (int r = 0; r < K::ROWS; r++) {
        Run<K> part = run_of<K, true>(chunk, runs, r, lane());
        float q[32], dot[2] = {0, 0};
        K::values(part.low, part.high, q);
#pragma unroll
        for (int i = 0; i < 32; i++) dot[i / 16] += q[i] * v[i];
        const Scales &by = part.by;
        if (K::SCALED)
            sums[r] += by.d[0] * dot[0] + by.m[0] * total[0] + by.d[1] * dot[1] + by.m[1] * total[1];
        else
            sums[r] += dot[0] + dot[1];
    }
}

struct Into {
    float *y;
    const float *bias, *gate;
    bool add;

    MEMBER void put(int o, float sum) const {
        float value = sum + (bias ? bias[o] : 0.0f);
        if (gate) value *= *gate;
        y[o] = add ? y[o] + value : value;
    }
};

// a: W, its outputs; y (0: the pass's logits), bias, gate (0: none), whether to add to y; tiles that other blocks
// go first by, the number of this stream of weights; then what x is (staging.h).
template <class K> FUNCTION void linear_one(Words a, Words p, Work work) {
    const Stream stream = stream_at_hand();
    Words to = a + MATRIX;
    int outputs = to[0], shift = to[5], number = to[6];
    int *begun = (int *)(shared_memory() + DESK_BEGUN);  // chunks of the streams before, by turns
    unsigned n = begun[number & 1];
    bool wanted = to[1] || p[OUT_ROWS];
    Matrix w = matrix_at(a);
    int chunks = (w.runs + 31) / 32, tiles = (outputs + K::ROWS - 1) / K::ROWS;
    int first = first_tile(shift, work.block, work.blocks);
    int own = wanted && first < tiles ? (tiles - first + work.blocks - 1) / work.blocks : 0;
    if (thread() == 0) begun[(number + 1) & 1] = n + own * chunks;
    if (!wanted) return;
    Into into = {floats(to[1] ? to[1] : p[LOGITS]), floats(to[2]), floats(to[3]), to[4] != 0};
    stage(to + 7);
    if (!own) return;

    // Where there are few tiles, several warps share each: a warp takes every so-manieth of its chunks.
    int sharers = own < warps() ? min(chunks, warps() / own) : 1, groups = warps() / sharers;
    float *parts = (float *)(shared_memory() + DESK_PARTS);  // [warps, ROWS]
    for (int i = warp() / sharers; i < own && warp() < groups * sharers; i += groups) {
        float sums[K::ROWS] = {};
        for (int c = warp() % sharers; c < chunks; c += sharers) {
            unsigned of = n + i * chunks + c;
            mbarrier_wait(stream.full(of), stream.turn(of));
            chunk_times_x<K>(stream.slot(of), 32 * c, min(32, w.runs - 32 * c), sums);
            warp_barrier();
            if (lane() == 0) mbarrier_arrive(stream.empty(of));
        }
#pragma unroll
        for (int r = 0; r < K::ROWS; r++) {
            float sum = warp_sum(sums[r]);
            int o = K::ROWS * (first + i * work.blocks) + r;
            if (lane() != r) continue;
            if (sharers > 1)
                parts[K::ROWS * warp() + r] = sum;
            else if (o < outputs)
                into.put(o, sum);
        }
    }
    if (sharers == 1) return;
    block_barrier();
    for (int i = thread(); i < own * K::ROWS; i += threads()) {
        int tile = i / K::ROWS, r = i % K::ROWS, o = K::ROWS * (first + tile * work.blocks) + r;
        float sum = 0;
        for (int s = 0; s < sharers; s++) sum += parts[K::ROWS * (tile * sharers + s) + r];
        if (o < outputs) into.put(o, sum);
    }
}
