// Products with weights of 32 bits for many tokens, in float32. Equation: kernels/reference/quants.py.
//
// Tiles of 64 x 64, 4 runs at a time, a thread 4 x 4 of them.

const int EXACT = 64, EXACT_RUNS = MANY_THREADS / EXACT, EXACT_COLUMNS = 32 * EXACT_RUNS;
const int EXACT_PITCH = EXACT_COLUMNS + 4;  // floats

OPERATOR void linear_exact(Words a, Words p, Work work) {
    Many m = many_at(a, p);
    float *w = (float *)room(), *x = w + EXACT * EXACT_PITCH;
    int high = (m.rows + EXACT - 1) / EXACT, wide = (m.outputs + EXACT - 1) / EXACT;
    int down = thread() / 16, across = thread() % 16;  // and every 16th on
    for (int item = work.block; item < high * wide; item += work.blocks) {
        int first = item % high * EXACT, output = item / high * EXACT;
        float sums[4][4] = {};
        for (int run = 0; run < m.w.runs; run += EXACT_RUNS) {
            int own = run + thread() % EXACT_RUNS, row = thread() / EXACT_RUNS;
            Run<F32> r = load_run<F32>(m.w, min(output + row, m.outputs - 1), min(own, m.w.runs - 1));
            block_barrier();  // nobody reads the columns before any more
            uint4 *to = (uint4 *)(w + row * EXACT_PITCH + 32 * (own - run));
#pragma unroll
            for (int i = 0; i < 8; i++) to[i] = own < m.w.runs ? r.low[i] : make_uint4(0, 0, 0, 0);
            for (int i = thread(); i < EXACT * EXACT_COLUMNS; i += MANY_THREADS) {
                int of = i / EXACT_COLUMNS, c = i % EXACT_COLUMNS, from = 32 * run + c;
                const float *at = (const float *)(m.x + min(first + of, m.rows - 1) * m.x_stride);
                x[of * EXACT_PITCH + c] = from < m.columns ? at[from] : 0.0f;
            }
            block_barrier();
            float part[4][4] = {};  // sums of sums lose less
            for (int c = 0; c < EXACT_COLUMNS; c += 4) {
                float4 u[4], v[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    u[i] = *(const float4 *)(x + (down + 16 * i) * EXACT_PITCH + c);
                    v[i] = *(const float4 *)(w + (across + 16 * i) * EXACT_PITCH + c);
                }
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    const float4 &s = u[i / 4], &t = v[i % 4];
                    float &sum = part[i / 4][i % 4];
                    sum = fmaf(s.w, t.w, fmaf(s.z, t.z, fmaf(s.y, t.y, fmaf(s.x, t.x, sum))));
                }
            }
#pragma unroll
            for (int i = 0; i < 16; i++) sums[i / 4][i % 4] += part[i / 4][i % 4];
        }
#pragma unroll
        for (int i = 0; i < 16; i++)
            put_sum(m, p, first + down + i / 4 * 16, output + across + i % 4 * 16, sums[i / 4][i % 4]);
    }
}
