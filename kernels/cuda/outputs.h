// What products of many rows are told, and where their outputs go. Blocks of 256 threads.

const int MANY_THREADS = ALONE_THREADS, MANY_WARPS = MANY_THREADS / 32;

// Where a column of outputs goes: y and bias of the first row, whose next one is `stride` floats further.
struct Column {
    float *y;
    int64 stride;
    const float *bias;
};

struct Many {
    Matrix w;
    int outputs, rows, columns;
    const char *x;
    int64 x_stride;
    const float *factors, *gate;
    bool add;
    int pair, second, third;  // as linear_one has them
    Words a;  // where what is said of each part is read when it is needed

    MEMBER Column column(int output, int64 logits) const {
        using namespace linear_many_at;
        bool other = second && output >= second, last = other && third && output >= third;
        int o = last ? output - third : other ? output - second : pair ? output / 2 : output;
        int64 to = last ? a[y_3] : other ? a[y_2] : a[y] ? a[y] : logits;
        int64 more = last ? a[bias_3] : other ? a[bias_2] : a[linear_many_at::bias];
        return {floats(to) + o, (last ? a[y_3_stride] : other ? a[y_2_stride] : a[linear_many_at::y_stride]) / 4,
                more ? floats(more) + o : nullptr};
    }
};

FUNCTION Many many_at(Words a, Words p) {
    namespace at = linear_many_at;
    return {matrix_at(a), (int)a[at::outputs], (int)(a[at::head] ? p[OUT_ROWS] : p[ROWS]), (int)a[at::columns],
            (char *)a[at::rows], a[at::rows_stride], floats(a[at::factors]), floats(a[at::gate]), a[at::add] != 0,
            (int)a[at::pair], (int)a[at::second], (int)a[at::third], a};
}

// beside: the sum of the next output, of a pair.
FUNCTION void put_sum(const Many &m, Words p, int row, int output, float sum, float beside = 0) {
    if (row >= m.rows || output >= m.outputs) return;
    Column c = m.column(output, p[LOGITS]);
    float factor = m.factors ? m.factors[row] : 1.0f, *y = c.y + row * c.stride;
    if (m.pair) {
        *y = activated(m.pair, factor * sum) * (factor * beside);
        return;
    }
    float value = factor * sum + (c.bias ? *c.bias : 0.0f);
    if (m.gate) value *= m.gate[row];
    *y = m.add ? *y + value : value;
}

struct Place {
    int row, output;
};

// Where a tile begins. Blocks at work together share rows of x and of W in the second cache.
FUNCTION Place tile_at(const Many &m, int item, int HIGH, int OUTPUTS) {
    const int BAND = 8;  // tiles of rows
    int high = (m.rows + HIGH - 1) / HIGH, wide = (m.outputs + OUTPUTS - 1) / OUTPUTS;
    int band = item / (BAND * wide), in_band = min(BAND, high - BAND * band), within = item - BAND * wide * band;
    return {HIGH * (BAND * band + within % in_band), within / in_band * OUTPUTS};
}
