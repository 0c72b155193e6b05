// A row of activations on its way into a product: as it is, or what a norm or an activation makes of it. Computed by
// every block that needs it, which takes less time than to meet once more. Equations: kernels/reference/pointwise.py.

enum { PLAIN, RMS_NORM, LAYER_NORM, SWIGLU, GELU };

// Words of a staged row: what is made of it (one of the above), float32 rows x, their stride in bytes, their columns,
// then weight, bias and epsilon of a norm, or the rows that gate x. FRESH: 0 where the step before has staged the same.
enum { MAKE, X, X_STRIDE, COLUMNS, WEIGHT, BIAS, EPSILON, FRESH, STAGED };

// Where four columns lie, 4 (8 run + quarter) on: a lane reads a run of 32 columns, and no two lanes the same bank.
FUNCTION int place_of(int run, int quarter) { return 32 * (8 * (run / 32) + quarter) + run % 32; }

struct Row {
    int make, columns;
    const float *x, *weight, *bias;
    float mean, scale;

    MEMBER float at(int c) const {
        float v = x[c];
        if (make == RMS_NORM) return v * scale * weight[c];
        if (make == LAYER_NORM) return (v - mean) * scale * weight[c] + (bias ? bias[c] : 0.0f);
        if (make == SWIGLU) return weight[c] * sigmoid(weight[c]) * v;
        if (make == GELU) return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
        return v;
    }
};

// Row `row` of the pass, with what its norm needs of the whole row. All threads of the block.
FUNCTION Row row_at(Words a, int64 row) {
    Row r = {(int)a[MAKE], (int)a[COLUMNS], floats(a[X] + row * a[X_STRIDE]), floats(a[WEIGHT]), floats(a[BIAS]), 0, 1};
    if (r.make == SWIGLU) r.weight = floats(a[WEIGHT] + row * a[X_STRIDE]);
    if (r.make == RMS_NORM || r.make == LAYER_NORM) {
        float sum = 0;
        if (r.make == LAYER_NORM) {
            for (int c = thread(); c < r.columns; c += threads()) sum += r.x[c];
            r.mean = block_sum(sum) / (float)r.columns;
        }
        sum = 0;
        for (int c = thread(); c < r.columns; c += threads()) sum += (r.x[c] - r.mean) * (r.x[c] - r.mean);
        r.scale = 1.0f / sqrtf(block_sum(sum) / (float)r.columns + (float)number(a[EPSILON]));
    }
    return r;
}

// The row into shared memory, zeros behind its end up to a whole run.
FUNCTION void stage(Words a, Words, int64 row) {
    if (!a[FRESH]) return;
    __syncthreads();  // nobody reads what lay there
    Row r = row_at(a, row);
    int runs = (r.columns + 31) / 32;
    float4 *out = (float4 *)room();
    for (int i = thread(); i < 256 * ((runs + 31) / 32); i += threads()) {
        int run = i / 256 * 32 + i % 32, quarter = i / 32 % 8, c = 32 * run + 4 * quarter;
        if (run >= runs) continue;
        float v[4];
        for (int k = 0; k < 4; k++) v[k] = c + k < r.columns ? r.at(c + k) : 0.0f;
        out[place_of(run, quarter)] = make_float4(v[0], v[1], v[2], v[3]);
    }
    __syncthreads();
}
