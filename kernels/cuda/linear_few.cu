// Products with weights for few tokens, up to FEW_ROWS rows, on tensor cores: the time goes into reading W, so warps share
// the columns, and each makes operands of the weights in its own registers. Equation: kernels/reference/quants.py.
//
// A step of a warp is 4 runs of 16 rows of W: lane (g, t) has run t of rows g and g + 8. A product does not
// ask in which order columns come, if it is the same in both: so each of the 8 products of a run takes 4 columns that a
// lane has anyway, and of x the same ones.

// TILES of 16 outputs and STEPS for each of them are in a lane's registers at once.
template <class K, int TILES> struct FewShape {
    static const int STEPS = (K::LOADS > 2 ? 1 : 2) / TILES;
    static const int OUTPUTS = 16 * TILES;
    static const int PITCH = OUTPUTS + 4;  // floats; lanes that put sums down together meet no bank twice
};

template <class K, int TILES>
FUNCTION void load_few(const Many &m, int tile, int step, Run<K> to[FewShape<K, TILES>::STEPS][2 * TILES]) {
    typedef FewShape<K, TILES> Shape;
#pragma unroll
    for (int s = 0; s < Shape::STEPS; s++) {
        int run = min(4 * (MANY_WARPS * (Shape::STEPS * step + s) + warp()) + lane() % 4, m.w.runs - 1);
#pragma unroll
        for (int r = 0; r < 2 * TILES; r++)
            to[s][r] = load_run<K>(m.w, min(Shape::OUTPUTS * tile + 8 * r + lane() / 4, m.outputs - 1), run);
    }
}

// Up to 8 EIGHTS rows of x with all of W.
template <class K, int EIGHTS, int TILES> OPERATOR void linear_few(Words a, Words p, Work work) {
    typedef FewShape<K, TILES> Shape;
    const int STEPS = Shape::STEPS, OUTPUTS = Shape::OUTPUTS, PITCH = Shape::PITCH;
    Many m = many_at(a, p);
    float *desk = (float *)room(), *own = desk + warp() * 8 * EIGHTS * PITCH;
    int g = lane() / 4, t = lane() % 4;
    int tiles = (m.outputs + OUTPUTS - 1) / OUTPUTS, together = 4 * MANY_WARPS * STEPS;
    int steps = (m.w.runs + together - 1) / together;
    const char *x[EIGHTS];
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) x[e] = m.x + min(8 * e + g, m.rows - 1) * m.x_stride;

    Run<K> next[STEPS][2 * TILES];
    if (work.block < tiles) load_few<K, TILES>(m, work.block, 0, next);
    for (int tile = work.block; tile < tiles; tile += work.blocks) {
        float sums[TILES][EIGHTS][4];
#pragma unroll
        for (int i = 0; i < TILES * EIGHTS * 4; i++) sums[i / (EIGHTS * 4)][i / 4 % EIGHTS][i % 4] = 0;
        for (int step = 0; step < steps; step++) {
            Run<K> now[STEPS][2 * TILES];
#pragma unroll
            for (int i = 0; i < STEPS * 2 * TILES; i++) {
                int of = i / (2 * TILES), r = i % (2 * TILES);
                now[of][r] = next[of][r];
            }
            bool last = step + 1 == steps;
            if (!last || tile + work.blocks < tiles)
                load_few<K, TILES>(m, last ? tile + work.blocks : tile, last ? 0 : step + 1, next);
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                int run = 4 * (MANY_WARPS * (STEPS * step + s) + warp()) + t;
                uint4 v[EIGHTS][4];
#pragma unroll
                for (int i = 0; i < 4 * EIGHTS; i++) {
                    const uint4 *of_run = (const uint4 *)(x[i / 4] + 64 * (int64)run);
                    v[i / 4][i % 4] = run < m.w.runs ? of_run[i % 4] : make_uint4(0, 0, 0, 0);
                }
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    float upper[32], lower[32];
                    unpack(now[s][2 * i], upper);
                    unpack(now[s][2 * i + 1], lower);
#pragma unroll
                    for (int k = 0; k < 8; k++) {
                        int c = 4 * k;
                        unsigned w[4] = {to_halves(upper[c], upper[c + 1]), to_halves(lower[c], lower[c + 1]),
                                         to_halves(upper[c + 2], upper[c + 3]), to_halves(lower[c + 2], lower[c + 3])};
#pragma unroll
                        for (int e = 0; e < EIGHTS; e++) {
                            const uint4 &four = v[e][k / 2];
                            unsigned b[2] = {k % 2 ? four.z : four.x, k % 2 ? four.w : four.y};
                            multiply(sums[i][e], w, b);
                        }
                    }
                }
            }
        }
        block_barrier();  // the sums of the tile before are read
#pragma unroll
        for (int i = 0; i < TILES * EIGHTS * 4; i++) {
            int of = i / (EIGHTS * 4), e = i / 4 % EIGHTS, c = i % 4;
            own[(8 * e + 2 * t + c % 2) * PITCH + 16 * of + g + c / 2 * 8] = sums[of][e][c];
        }
        block_barrier();
        for (int i = thread(); i < 8 * EIGHTS * OUTPUTS; i += MANY_THREADS) {
            int row = i / OUTPUTS, output = i % OUTPUTS;
            float sum = 0, beside = 0;
            if (m.pair && output % 2) continue;
#pragma unroll
            for (int w = 0; w < MANY_WARPS; w++) {
                const float *of = desk + (8 * EIGHTS * w + row) * PITCH + output;
                sum += of[0], beside += m.pair ? of[1] : 0.0f;
            }
            put_sum(m, p, row, OUTPUTS * tile + output, sum, beside);
        }
    }
}
