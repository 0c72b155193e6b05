// Rows by themselves: embedding, angles of rotation, and activations as products of many rows take them.
// Equations: pointwise.py and rotary.py in kernels/reference/.

// a: the embedding, columns, x, stride, learned positions (0: none).
template <class K> FUNCTION void embed(Words a, Words p, Work work) {
    Matrix w = matrix_at(a);
    Words to = a + MATRIX;
    int columns = to[0];
    const float *learned = floats(to[3]);
    int64 runs = p[ROWS] * w.runs;
    for (int64 i = work.block * threads() + thread(); i < runs; i += work.blocks * threads()) {
        int64 row = i / w.runs;
        int run = i % w.runs;
        float v[32];
        unpack<K>(load_run<K>(w, words(p[IDS])[row], run), v);
        float *x = floats(to[1] + row * to[2]) + 32 * run;
        int64 at = learned ? position(p, row) : 0;
        for (int c = 0; c < min(32, columns - 32 * run); c++)
            x[c] = v[c] + (learned ? learned[columns * at + 32 * run + c] : 0.0f);
    }
}

OPERATOR void angles(Words a, Words p, Work work) {
    const double *freq = (const double *)a[0];
    int64 pairs = a[angles_at::pairs], most = a[angles_at::most], offset = a[angles_at::offset];
    double factor = number(a[angles_at::factor]);
    float *c = floats(a[angles_at::cos]), *s = floats(a[angles_at::sin]);
    for (int64 i = work.block * threads() + thread(); i < p[ROWS] * pairs; i += work.blocks * threads()) {
        double at = (double)(min(position(p, i / pairs), most) + offset) * freq[i % pairs];
        c[i] = (float)(factor * cos(at)), s[i] = (float)(factor * sin(at));
    }
}

OPERATOR void add(Words a, Words p, Work work) {
    float *x = floats(a[add_at::x]);
    const float *y = floats(a[add_at::y]);
    int64 count = p[ROWS] * a[add_at::columns];
    for (int64 i = work.block * threads() + thread(); i < count; i += work.blocks * threads()) x[i] += y[i];
}

OPERATOR void scale(Words a, Words p, Work work) {
    float *x = floats(a[scale_at::x]), factor = (float)number(a[scale_at::factor]);
    int64 count = p[ROWS] * a[scale_at::columns];
    for (int64 i = work.block * threads() + thread(); i < count; i += work.blocks * threads()) x[i] *= factor;
}

// cap tanh(x / cap) of the logits that are wanted.
OPERATOR void softcap(Words a, Words p, Work work) {
    float *x = floats(p[LOGITS]), cap = (float)number(a[softcap_at::cap]);
    int64 count = p[OUT_ROWS] * a[softcap_at::columns];
    for (int64 i = work.block * threads() + thread(); i < count; i += work.blocks * threads()) x[i] = cap * tanhf(x[i] / cap);
}

// RMS norm of each head by itself, a warp a head.
OPERATOR void head_norm(Words a, Words p, Work work) {
    int width = a[head_norm_at::width];
    int64 G = p[KEY_HEADS], heads = a[head_norm_at::heads] / G;
    const float *weight = floats(a[head_norm_at::weight]);
    float eps = (float)number(a[head_norm_at::eps]);
    for (int64 item = work.block; item < p[ROWS] * G; item += work.blocks)
        for (int64 h = heads * item + warp(); h < heads * (item + 1); h += warps()) {
            float *x = floats(a[head_norm_at::x]) + width * h, sum = 0;
            for (int c = lane(); c < width; c += 32) sum += x[c] * x[c];
            float by = 1.0f / sqrtf(warp_sum(sum) / (float)width + eps);
            for (int c = lane(); c < width; c += 32) x[c] = x[c] * by * weight[c];
        }
}

// The power of two that brings a row's largest value between 512 and 1024: halves hold what is 2^-24 of it still.
FUNCTION float factor_of(float most) {
    int exponent = (int)(__float_as_uint(most) >> 23 & 255) - 127 - 9;
    return exponent < -100 || exponent > 100 ? 1.0f : __uint_as_float((unsigned)(127 + exponent) << 23);
}

// Where `prepare` writes: rows of float32, or of halves with a factor each, of the whole pass or for the head alone.
struct Prepared {
    char *out;
    int64 stride;
    float *factors;
    int rows, first;  // the first: of the pass
    // Columns that are written: of halves up to a whole run, or a whole panel.
    MEMBER int end(int columns) const {
        int whole = in_panels(rows) ? 128 : 32;
        return factors ? (columns + whole - 1) / whole * whole : columns;
    }
    // Four columns of a row: as float32, or times `by` as halves.
    MEMBER void put(int row, int c, float4 v, float by) const {
        uint2 halves = make_uint2(to_halves(v.x * by, v.y * by), to_halves(v.z * by, v.w * by));
        char *own = out + row * stride;
        if (!factors)
            ((float4 *)own)[c / 4] = v;
        else if (in_panels(rows))
            put_in_panel(out, rows, row, c, halves);
        else
            ((uint2 *)own)[c / 4] = halves;
    }
};

FUNCTION Prepared prepared_at(Words a, Words p) {
    Words to = a + STAGED;
    return {(char *)to[0], to[1], floats(to[2]), (int)(to[3] ? p[OUT_ROWS] : p[ROWS]), (int)(to[3] ? p[OUT_FIRST] : 0)};
}

template <int MAKE, int QUADS> FUNCTION void make_held(Row r, float4 v[QUADS], const float4 w[QUADS]) {
    r.make = MAKE;  // told apart once, not for each value
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        int c = 4 * (thread() + q * threads());
        float4 b = make_float4(0, 0, 0, 0), x = v[q], of = w[q];
        if (c >= r.columns) continue;
        if (MAKE == LAYER_NORM && r.bias) b = *(const float4 *)(r.bias + c);
        v[q].x = r.made(x.x, of.x, b.x), v[q].y = r.made(x.y, of.y, b.y);
        v[q].z = r.made(x.z, of.z, b.z), v[q].w = r.made(x.w, of.w, b.w);
    }
}

// Rows whose values a block's registers hold, QUADS times four of each thread: memory is read once.
template <int QUADS> FUNCTION void prepare_held(Words a, Words p, Work work) {
    const Prepared to = prepared_at(a, p);
    const int64 x = a[X], weight = a[WEIGHT], x_stride = a[X_STRIDE];
    Row r = {};
    r.make = a[MAKE], r.columns = a[COLUMNS], r.bias = floats(a[BIAS]);
    float epsilon = (float)number(a[EPSILON]), part = 1.0f / (float)r.columns;
    bool normed = r.make == RMS_NORM || r.make == LAYER_NORM;
    for (int i = work.block; i < to.rows; i += work.blocks) {
        float4 v[QUADS], w[QUADS];
        r.x = floats(x + (to.first + i) * x_stride);
        r.weight = floats(r.gated() ? weight + (to.first + i) * x_stride : weight);
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            int c = 4 * (thread() + q * threads());
            v[q] = w[q] = make_float4(0, 0, 0, 0);
            if (c < r.columns) v[q] = *(const float4 *)(r.x + c);
            if (c < r.columns && r.weight) w[q] = *(const float4 *)(r.weight + c);
        }
        r.mean = 0, r.scale = 1;
        if (normed) {
            float sum = 0, squares = 0;
            if (r.make == LAYER_NORM) {
#pragma unroll
                for (int q = 0; q < QUADS; q++) sum += v[q].x + v[q].y + v[q].z + v[q].w;  // zeros behind the end
                r.mean = block_sum(sum) * part;
            }
#pragma unroll
            for (int q = 0; q < QUADS; q++) {
                float4 d = make_float4(v[q].x - r.mean, v[q].y - r.mean, v[q].z - r.mean, v[q].w - r.mean);
                bool there = 4 * (thread() + q * threads()) < r.columns;
                squares += there ? d.x * d.x + d.y * d.y + d.z * d.z + d.w * d.w : 0.0f;
            }
            r.scale = 1.0f / sqrtf(block_sum(squares) * part + epsilon);
        }
        if (r.make == RMS_NORM) make_held<RMS_NORM, QUADS>(r, v, w);
        if (r.make == LAYER_NORM) make_held<LAYER_NORM, QUADS>(r, v, w);
        if (r.make == SWIGLU) make_held<SWIGLU, QUADS>(r, v, w);
        if (r.make == GEGLU) make_held<GEGLU, QUADS>(r, v, w);
        if (r.make == GELU) make_held<GELU, QUADS>(r, v, w);
        float most = 0;
#pragma unroll
        for (int q = 0; q < QUADS; q++) most = fmaxf(most, largest_of_four(v[q]));
        float factor = to.factors ? factor_of(block_max(most)) : 1.0f, by = 1.0f / factor;
        int end = to.end(r.columns);
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            int c = 4 * (thread() + q * threads());
            if (c < end) to.put(i, c, v[q], by);
        }
        if (to.factors && thread() == 0) to.factors[i] = factor;
    }
}

// Staged rows (staging.h) written out: as float32, or divided by a factor each as halves (panels.h), zeros behind their end.
// a: what they are, then rows out, their stride in bytes, the factors (0: float32), whether for the head alone.
OPERATOR void prepare(Words a, Words p, Work work) {
#ifndef EACH_TOGETHER  // there it is one row, seldom
    int64 columns = a[COLUMNS];
    if (columns % 4 == 0 && a[MAKE] != MERGED_PARTS && columns <= 32 * threads()) {
        columns <= 8 * threads() ? prepare_held<2>(a, p, work) : prepare_held<8>(a, p, work);
        return;
    }
#endif
    Prepared to = prepared_at(a, p);
    for (int i = work.block; i < to.rows; i += work.blocks) {
        Row r = row_at(a, to.first + i);
        if (!to.factors) {
            for (int c = thread(); c < r.columns; c += threads()) ((float *)(to.out + i * to.stride))[c] = r.at(c);
            continue;
        }
        float most = 0;
        for (int c = 4 * thread(); c < r.columns; c += 4 * threads()) most = fmaxf(most, largest_of_four(r.four(c)));
        float factor = factor_of(block_max(most)), by = 1.0f / factor;
        for (int c = 4 * thread(); c < to.end(r.columns); c += 4 * threads()) to.put(i, c, r.four(c), by);
        if (thread() == 0) to.factors[i] = factor;
    }
}
