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

// The sums over the warp's lanes of N rows, N a power of two: each lane gets that of row lane / (32 / N).
template <int N, int APART = 16, int ROOM> FUNCTION float row_sum(float (&x)[ROOM]) {
    halve<N>(x, APART);
    if constexpr (APART > 1) row_sum<(N > 1 ? N / 2 : 1), APART / 2>(x);
    return x[0];
}

// Output o of a product, to where it belongs; of a pair both, o the gate.
FUNCTION void put_output(Words a, Words p, int o, float sum, float beside) {
    using namespace linear_one_at;
    int64 to = a[y] ? a[y] : p[LOGITS], more = a[bias];
    if (o >= a[outputs]) return;
    if (a[pair]) {
        floats(to)[o / 2] = activated((int)a[pair], sum) * beside;
        return;
    }
    if (a[second] && o >= a[second]) {
        bool last = a[third] && o >= a[third];
        to = a[last ? y_3 : y_2], more = a[last ? bias_3 : bias_2], o -= (int)a[last ? third : second];
    }
    if (more) sum += floats(more)[o];
    if (a[linear_one_at::gate]) sum *= *floats(a[linear_one_at::gate]);
    floats(to)[o] = a[linear_one_at::add] ? floats(to)[o] + sum : sum;
}

// a: W, its outputs; y (0: the pass's logits), bias, gate (0: none), whether to add to y; where outputs are gate and up by
// turns, by which activation they become one; from which output on y and bias are others, and from which on others
// again (0: none); the block's share and the number of this stream of weights (stream.h); then what x is (staging.h).
template <class K> FUNCTION void linear_one(Words a, Words p, Work work) {
    namespace at = linear_one_at;
    const int EACH = 32 / K::ROWS;  // lanes that hold a row's sum
    bool wanted = a[at::y] || p[OUT_ROWS];
    if (wanted) stage(a + at::make, K::SCALED);  // before anything that a register would have to be kept for
    const Stream &stream = stream_at_hand();
    int *begun = (int *)(shared_memory() + DESK_BEGUN);  // chunks of the streams before, by turns
    unsigned n = begun[a[at::number] & 1];
    int runs = (int)a[at::runs], chunks = (runs + 31) / 32;
    Share share = share_of(a + at::shift, work.block, work.blocks);
    if (thread() == 0) begun[(a[at::number] + 1) & 1] = n + (wanted ? share.tiles * chunks : 0);
    if (!wanted) return;
    float *parts = (float *)(shared_memory() + DESK_PARTS);  // [warps, ROWS]
    bool first = lane() % EACH == 0;
    for (int tile = 0; tile < share.tiles; tile += stream.takers) {
        int beside = share.at_once(tile, stream.takers);
        int sharers = beside < stream.takers ? share.sharers : 1;
        int part = beside < stream.takers ? warp() * share.inverse >> 12 : warp() >= stream.takers, own = warp() - part * beside;
        float sums[K::ROWS] = {};
        for (int c = part < sharers ? part : chunks; c < chunks; c += sharers) {
            unsigned of = n + tile * chunks + c * beside + own;
            mbarrier_wait(stream.full(of), stream.turn(of));
            chunk_times_x<K>(stream.slot(of), 32 * c, min(32, runs - 32 * c), sums);
            warp_barrier();
            if (lane() == 0) mbarrier_arrive(stream.empty(of));
        }
        float sum = row_sum<K::ROWS>(sums), next = shuffle(sum, (lane() + EACH) % 32);
        int o = K::ROWS * (share.first + (tile + own) * work.blocks) + lane() / EACH;
        if (sharers > 1 && first)
            parts[K::ROWS * warp() + lane() / EACH] = sum;
        else if (part < sharers && first && !(a[at::pair] && o % 2))
            put_output(a, p, o, sum, next);
    }
    if (share.sharers == 1) return;
    block_barrier();
    int tile = share.tiles - share.left;
    for (int i = thread(); i < share.left * K::ROWS; i += threads()) {
        int own = i / K::ROWS, r = i % K::ROWS, o = K::ROWS * (share.first + (tile + own) * work.blocks) + r;
        float sum = 0, next = 0;
        if (a[at::pair] && r % 2) continue;
        for (int s = 0; s < share.sharers; s++) {
            const float *of = parts + K::ROWS * (s * share.left + own) + r;
            sum += of[0], next += a[at::pair] ? of[1] : 0.0f;
        }
        put_output(a, p, o, sum, next);
    }
}
