// Products with weights for one token: y = W x + b, each warp some rows of W, x in shared memory.
// Equation: kernels/reference/quants.py. Weights: kinds.h. What x is made of on the way: staging.h.

// The inner products of ROWS rows of W with x, in all lanes.
template <class K, int ROWS> FUNCTION void rows_times_x(const Matrix &w, int64 row, int rows, float sums[ROWS]) {
    const float4 *x = (const float4 *)room();
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r] = 0;
    for (int first = 0; first < w.runs; first += 32) {
        int run = first + lane();
        if (run < w.runs) {
            Run<K> part[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) part[r] = load_run<K>(w, row + min(r, rows - 1), run);
            float v[32], total[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float4 four = x[place_of(run, i)];
                v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
            }
            if (K::SCALED) {
#pragma unroll
                for (int i = 0; i < 32; i++) total[i / 16] += v[i];
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float q[32], dot[2] = {0, 0};
                K::values(part[r].low, part[r].high, q);
#pragma unroll
                for (int i = 0; i < 32; i++) dot[i / 16] += q[i] * v[i];
                const Scales &by = part[r].by;
                if (K::SCALED)
                    sums[r] += by.d[0] * dot[0] + by.m[0] * total[0] + by.d[1] * dot[1] + by.m[1] * total[1];
                else
                    sums[r] += dot[0] + dot[1];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r] = warp_sum(sums[r]);
}

struct Into {
    float *y;
    const float *bias, *gate;
    bool add;
};

template <class K, int ROWS>
FUNCTION void each_row(const Matrix &w, int outputs, int before, const Into &into, Work work) {
    int all = work.blocks * warps(), own = (warp() * work.blocks + work.block - before % all + all) % all;
    for (int i = own; i < (outputs + ROWS - 1) / ROWS; i += all) {
        float sums[ROWS];
        int rows = min(ROWS, outputs - ROWS * i);
        rows_times_x<K, ROWS>(w, ROWS * i, rows, sums);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (lane() == r && r < rows) {
                int o = ROWS * i + r;
                float value = sums[r] + (into.bias ? into.bias[o] : 0.0f);
                if (into.gate) value *= *into.gate;
                into.y[o] = into.add ? into.y[o] + value : value;
            }
        }
    }
}

// a: W, its outputs; y (0: the pass's logits), bias, gate (0: none), whether to add to y; how many rows the steps
// before it, for which it does not wait, have (so that other warps go first); then what x is (staging.h).
template <class K> FUNCTION void linear_one(Words a, Words p, Work work) {
    Words to = a + MATRIX;
    Into into = {floats(to[1] ? to[1] : p[LOGITS]), floats(to[2]), floats(to[3]), to[4] != 0};
    if (!to[1] && !p[OUT_ROWS]) return;
    stage(to + 6);
    Matrix w = matrix_at(a);
    // Four rows a warp read x once for all of them; two, where four would leave warps without any.
    if (to[0] < 4 * work.blocks * warps())
        each_row<K, 2>(w, to[0], to[5], into, work);
    else
        each_row<K, 4>(w, to[0], to[5], into, work);
}
