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
    int64 half = a[1], most = a[2], offset = a[3];
    float *c = floats(a[4]), *s = floats(a[5]);
    for (int64 i = work.block * threads() + thread(); i < p[ROWS] * half; i += work.blocks * threads()) {
        double at = (double)(min(position(p, i / half), most) + offset) * freq[i % half];
        c[i] = (float)cos(at), s[i] = (float)sin(at);
    }
}

// The power of two that brings a row's largest value between 512 and 1024: halves hold what is 2^-24 of it still.
FUNCTION float factor_of(float most) {
    int exponent = (int)(__float_as_uint(most) >> 23 & 255) - 127 - 9;
    return exponent < -100 || exponent > 100 ? 1.0f : __uint_as_float((unsigned)(127 + exponent) << 23);
}

// Staged rows (staging.h) written out: as float32, or divided by a factor each as halves, zeros up to a whole run.
// a: what they are, then rows out, their stride in bytes, the factors (0: float32), whether for the head alone.
OPERATOR void prepare(Words a, Words p, Work work) {
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
        for (int c = thread(); c < r.columns; c += threads()) most = fmaxf(most, fabsf(r.at(c)));
        float factor = factor_of(block_max(most)), by = 1.0f / factor;
        for (int c = 2 * thread(); c < (r.columns + 31) / 32 * 32; c += 2 * threads()) {
            float first_of_two = c < r.columns ? r.at(c) * by : 0.0f, second = c + 1 < r.columns ? r.at(c + 1) * by : 0.0f;
            ((unsigned *)out)[c / 2] = to_halves(first_of_two, second);
        }
        if (thread() == 0) floats(to[2])[i] = factor;
    }
}
