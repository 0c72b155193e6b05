// Products with weights for one token: y = W x + b, chunks of W as stream.h brings them, x in shared memory.
// Equation: kernels/reference/quants.py. Weights: kinds.h. What x is made of on the way: staging.h.

// Adds to sums the inner products of a chunk's rows with x: a lane has a run of each row. first: the chunk's first run.
template <class K> FUNCTION void chunk_times_x(const char *chunk, int first, int runs, float sums[K::ROWS]) {
    if (lane() >= runs) return;
    if constexpr (K::SCALED) {
        Bytes x = bytes_of(first + lane());
#pragma unroll
        for (int r = 0; r < K::ROWS; r++) {
            Run<K> part = run_of<K, true>(chunk, runs, r, lane());
            int q[8], high[2] = {0, 0}, middle[2] = {0, 0}, low[2] = {0, 0};
            K::integers(part.low, part.high, q);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int half = K::HALVED ? i / 4 : 0;
                high[half] = add_products(q[i], x.high[i], high[half]);
                middle[half] = add_products(q[i], x.middle[i], middle[half]);
                low[half] = add_products(q[i], x.low[i], low[half]);
            }
            const Scales &by = part.by;
            float dot = 0;
#pragma unroll
            for (int half = 0; half < (K::HALVED ? 2 : 1); half++)
                dot += by.d[half] * (65536.0f * (float)high[half] + (float)(256 * middle[half] + low[half]));
            sums[r] += x.scale * dot;
            if (K::HALVED) sums[r] += by.m[0] * x.sums[0] + by.m[1] * x.sums[1];
            if (!K::HALVED && K::ADDED) sums[r] += by.m[0] * (x.sums[0] + x.sums[1]);
        }
    } else {
        const float4 *x = (const float4 *)room();
        float v[32];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float4 four = x[place_of(first + lane(), i)];
            v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
        }
#pragma unroll
        for (int r = 0; r < K::ROWS; r++) {
            Run<K> part = run_of<K, true>(chunk, runs, r, lane());
            float q[32], dot[2] = {0, 0};
            K::values(part.low, part.high, q);
#pragma unroll
            for (int i = 0; i < 32; i++) dot[i / 16] += q[i] * v[i];
            sums[r] += dot[0] + dot[1];
        }
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

// a: W, its outputs; y (0: the pass's logits), bias, gate (0: none), whether to add to y; the block's share and the number
// of this stream of weights (stream.h); then what x is (staging.h).
template <class K> FUNCTION void linear_one(Words a, Words p, Work work) {
    const Stream stream = stream_at_hand();
    Words to = a + MATRIX;
    int outputs = to[0], number = to[10];
    int *begun = (int *)(shared_memory() + DESK_BEGUN);  // chunks of the streams before, by turns
    unsigned n = begun[number & 1];
    bool wanted = to[1] || p[OUT_ROWS];
    Matrix w = matrix_at(a);
    int chunks = (w.runs + 31) / 32;
    Share share = share_of(to + 5, work.block, work.blocks);
    if (thread() == 0) begun[(number + 1) & 1] = n + (wanted ? share.tiles * chunks : 0);
    if (!wanted) return;
    Into into = {floats(to[1] ? to[1] : p[LOGITS]), floats(to[2]), floats(to[3]), to[4] != 0};
    stage(to + 11, K::SCALED);

    float *parts = (float *)(shared_memory() + DESK_PARTS);  // [warps, ROWS]
    int sharers = share.sharers, own = warp() * share.inverse >> 12, part = warp() - own * sharers;
    if (own >= share.together) own = share.tiles;  // no work for this warp
    for (int tile = 0; tile + own < share.tiles; tile += share.together) {
        int beside = share.at_once(tile);
        float sums[K::ROWS] = {};
        for (int c = part; c < chunks; c += sharers) {
            unsigned of = n + tile * chunks + c * beside + own;
            mbarrier_wait(stream.full(of), stream.turn(of));
            chunk_times_x<K>(stream.slot(of), 32 * c, min(32, w.runs - 32 * c), sums);
            warp_barrier();
            if (lane() == 0) mbarrier_arrive(stream.empty(of));
        }
#pragma unroll
        for (int r = 0; r < K::ROWS; r++) {
            float sum = warp_sum(sums[r]);
            int o = K::ROWS * (share.first + (tile + own) * work.blocks) + r;
            if (lane() != r) continue;
            if (sharers > 1)
                parts[K::ROWS * warp() + r] = sum;
            else if (o < outputs)
                into.put(o, sum);
        }
    }
    if (sharers == 1) return;
    block_barrier();
    for (int i = thread(); i < share.tiles * K::ROWS; i += threads()) {
        int tile = i / K::ROWS, r = i % K::ROWS, o = K::ROWS * (share.first + tile * work.blocks) + r;
        float sum = 0;
        for (int s = 0; s < sharers; s++) sum += parts[K::ROWS * (tile * sharers + s) + r];
        if (o < outputs) into.put(o, sum);
    }
}
