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

// Four columns of a prepared row: as float32, or times `by` as halves.
FUNCTION void put_four(char *row, int c, float4 v, bool halves, float by) {
    if (halves)
        ((uint2 *)row)[c / 4] = make_uint2(to_halves(v.x * by, v.y * by), to_halves(v.z * by, v.w * by));
    else
        ((float4 *)row)[c / 4] = v;
}

FUNCTION float largest_of_four(float4 v) { return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))); }

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
    Words to = a + STAGED;
    const int64 out = to[0], out_stride = to[1], x = a[X], weight = a[WEIGHT], x_stride = a[X_STRIDE];
    float *factors = floats(to[2]);
    int rows = to[3] ? p[OUT_ROWS] : p[ROWS], first = to[3] ? p[OUT_FIRST] : 0;
    Row r = {};
    r.make = a[MAKE], r.columns = a[COLUMNS], r.bias = floats(a[BIAS]);
    float epsilon = (float)number(a[EPSILON]), part = 1.0f / (float)r.columns;
    bool normed = r.make == RMS_NORM || r.make == LAYER_NORM;
    for (int i = work.block; i < rows; i += work.blocks) {
        char *own = (char *)(out + i * out_stride);
        float4 v[QUADS], w[QUADS];
        r.x = floats(x + (first + i) * x_stride);
        r.weight = floats(r.gated() ? weight + (first + i) * x_stride : weight);
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
        float factor = factors ? factor_of(block_max(most)) : 1.0f, by = 1.0f / factor;
        int end = factors ? (r.columns + 31) / 32 * 32 : r.columns;
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            int c = 4 * (thread() + q * threads());
            if (c < end) put_four(own, c, v[q], factors, by);
        }
        if (factors && thread() == 0) factors[i] = factor;
    }
}

// Staged rows (staging.h) written out: as float32, or divided by a factor each as halves, zeros up to a whole run.
// a: what they are, then rows out, their stride in bytes, the factors (0: float32), whether for the head alone.
OPERATOR void prepare(Words a, Words p, Work work) {
#ifndef EACH_TOGETHER  // there it is one row, seldom
    int64 columns = a[COLUMNS];
    if (columns % 4 == 0 && a[MAKE] != MERGED_PARTS && columns <= 32 * threads()) {
        columns <= 8 * threads() ? prepare_held<2>(a, p, work) : prepare_held<8>(a, p, work);
        return;
    }
#endif
    Words to = a + STAGED;
    int64 rows = to[3] ? p[OUT_ROWS] : p[ROWS], first = to[3] ? p[OUT_FIRST] : 0;
    for (int64 i = work.block; i < rows; i += work.blocks) {
        Row r = row_at(a, first + i);
        char *out = (char *)(to[0] + i * to[1]);
        if (!to[2]) {
            for (int c = thread(); c < r.columns; c += threads()) ((float *)out)[c] = r.at(c);
            continue;
        }
        float most = 0;
        for (int c = 4 * thread(); c < r.columns; c += 4 * threads()) most = fmaxf(most, largest_of_four(r.four(c)));
        float factor = factor_of(block_max(most)), by = 1.0f / factor;
        int end = (r.columns + 31) / 32 * 32;
        for (int c = 4 * thread(); c < end; c += 4 * threads()) put_four(out, c, r.four(c), true, by);
        if (thread() == 0) floats(to[2])[i] = factor;
    }
}
