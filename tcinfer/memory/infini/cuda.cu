// What Infini-attention adds to ring and matrix: its feature map, its normaliser, its gate.
// Equations: equations.py; the same steps compiled for CPUs: compiled.py.

FUNCTION float feature(float x) { return x > 0 ? x + 1.0f : expf(x); }

OPERATOR void features(Words a, Words p, Work work) {
    int64 field = a[2];
    int G = a[3], R = a[4], D = a[5];
    float eps = (float)number(a[6]), *retrieve = floats(a[10]), *norm = floats(a[11]);
    for (int64 item = work.block; item < p[SEQUENCES] * G; item += work.blocks) {
        Words of = sequence(p, item / G);
        int g = item % G;
        float *z = floats(words(of[FIELDS])[field]) + D * g;
        for (int64 row = of[ROW]; row < of[ROW] + of[COUNT]; row++) {
            int64 at = G * row + g;
            for (int r = warp(); r <= R; r += warps()) {  // the queries, then the key
                const float *x = r < R ? floats(a[0]) + D * (at * R + r) : floats(a[1]) + D * at;
                float *y = r < R ? floats(a[8]) + D * (at * R + r) : floats(a[9]) + D * at, dot = 0;
                for (int c = lane(); c < D; c += 32) {
                    y[c] = feature(x[c]);
                    dot += y[c] * z[c];
                }
                dot = warp_sum(dot);
                if (lane()) continue;
                if (r < R) norm[at * R + r] = dot + eps;
                else retrieve[at] = a[7] ? 1.0f / (dot + eps) : 0.0f;
            }
            block_barrier();
            for (int c = thread(); c < D; c += threads()) z[c] += (floats(a[9]) + D * at)[c];
            block_barrier();
        }
    }
}

// sigmoid(beta) far / norm + (1 - sigmoid(beta)) near for each head, in place of near.
OPERATOR void blend(Words a, Words p, Work work) {
    float *near = floats(a[0]);
    const float *far = floats(a[1]), *norm = floats(a[2]), *betas = floats(a[3]);
    int64 H = a[4], D = a[5], G = p[KEY_HEADS], part = H / G * D;
    for (int64 item = work.block; item < p[ROWS] * G; item += work.blocks)
        for (int64 i = part * item + thread(); i < part * (item + 1); i += threads()) {
            int64 head = i / D;
            float share = sigmoid(betas[head % H]);
            near[i] = share / norm[head] * far[i] + (1.0f - share) * near[i];
        }
}
