// Products with weights for many tokens on tensor cores, where warpgroups do not multiply: a block unpacks W into shared
// memory and multiplies a tile of y. Equation: kernels/reference/quants.py.
//
// A tile of HIGH x OUTPUTS, RUNS runs of columns a step. A thread unpacks a run of W a step into shared
// memory; it has loaded it STAGES - 1 steps before. STAGES steps of x are there or on their way.

template <int HIGH> struct ManyShape {
    static const int RUNS = HIGH == 32 ? 4 : 2, STAGES = HIGH < 128 ? 4 : 2;
    static const int OUTPUTS = MANY_THREADS / RUNS;
    static const int WARPS_DOWN = HIGH == 256 ? 4 : 2, WARPS_ACROSS = MANY_WARPS / WARPS_DOWN;
    static const int DOWN = HIGH / WARPS_DOWN / 16, ACROSS = OUTPUTS / WARPS_ACROSS / 16;  // of a warp, 16 x 16 each
    static const int PIECES = 4 * RUNS;  // of 16 bytes in a row of the step
    static const int APART = MANY_THREADS / PIECES;  // rows between those that a thread fetches a piece of
    static const int W_BYTES = 16 * PIECES * OUTPUTS, X_BYTES = 16 * PIECES * HIGH;
    static const int BYTES = 2 * W_BYTES + STAGES * X_BYTES;
};

// Where a piece of a row lies: 8 neighbouring rows, read together, have the same piece in different banks.
template <int PIECES> FUNCTION int many_piece(int row, int piece) { return 16 * (PIECES * row + (piece ^ (row % 8))); }

// The same, and what a thread brings of its rows of x: a piece of every APART-th row from its first on, of which `left`
// rows are there.
struct ManyTile {
    int row, output, left;
    const char *x;
};

template <int HIGH> FUNCTION ManyTile many_tile(const Many &m, int item) {
    typedef ManyShape<HIGH> Shape;
    Place at = tile_at(m, item, HIGH, Shape::OUTPUTS);
    int own = at.row + thread() / Shape::PIECES;
    return {at.row, at.output, m.rows - own, m.x + own * m.x_stride};
}

// A row beyond the last stays what it was, as nobody wants its sums. Of columns beyond the last anything will do that is
// a number: the weights are 0.
template <int HIGH> FUNCTION void fetch_many(const Many &m, const ManyTile &tile, int step, int steps, char *to) {
    typedef ManyShape<HIGH> Shape;
    const int PIECES = Shape::PIECES, APART = Shape::APART;
    int piece = thread() % PIECES, left = step < steps ? tile.left : 0;
    unsigned apart = APART * (unsigned)m.x_stride;
    const char *from = tile.x + (unsigned)(16 * min(PIECES * step + piece, 4 * m.w.runs - 1));
    to += many_piece<PIECES>(thread() / PIECES, piece);
#pragma unroll
    for (int i = 0; i < HIGH / APART; i++)
        if (APART * i < left) copy_later(to + 16 * PIECES * APART * i, from + apart * i);
    end_group();
}

// 8 values of a thread's run, unpacked, to their place.
template <int HIGH, class K> FUNCTION void put_weights(const Run<AsLoaded<K>> &r, bool there, int quarter, char *to) {
    typedef ManyShape<HIGH> Shape;
    float v[32];
    unsigned pair[4];
    unpack_loaded(r, v);
#pragma unroll
    for (int i = 0; i < 4; i++) pair[i] = there ? to_halves(v[8 * quarter + 2 * i], v[8 * quarter + 2 * i + 1]) : 0;
    int at = many_piece<Shape::PIECES>(thread() / Shape::RUNS, 4 * (thread() % Shape::RUNS) + quarter);
    *(uint4 *)(to + at) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

// What becomes of a tile's sums, with the same rounding in every tile: of every 8th row and every 4th pair of outputs
// from here on. Eight outputs side by side go to the same rows.
template <int HIGH, class Shape = ManyShape<HIGH>>
FUNCTION void put_sums(const Many &m, Words p, int row, int output, float sums[Shape::DOWN][2 * Shape::ACROSS][4]) {
    const int ROWS = 2 * Shape::DOWN, PAIRS = 2 * Shape::ACROSS;
    float factors[ROWS], gates[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        bool there = row + 8 * r < m.rows;
        factors[r] = m.factors && there ? m.factors[row + 8 * r] : 1.0f;
        gates[r] = m.gate && there ? m.gate[row + 8 * r] : 1.0f;
    }
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        int at = output + 8 * j;
        if (at >= m.outputs) break;
        bool both = at + 1 < m.outputs;
        Column c = m.column(at, p[LOGITS]);
        bool side_by_side = both && c.stride % 2 == 0 && (int64)c.y % 8 == 0;
        float2 bias = make_float2(0, 0), old[ROWS];
        if (c.bias) bias = make_float2(c.bias[0], both ? c.bias[1] : 0.0f);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float *y = c.y + (row + 8 * r) * c.stride;
            old[r] = make_float2(0, 0);
            if (!m.add || row + 8 * r >= m.rows) continue;
            if (side_by_side)
                old[r] = *(const float2 *)y;
            else
                old[r] = make_float2(y[0], both ? y[1] : 0.0f);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float *sum = sums[r / 2][j] + r % 2 * 2;
            float *y = c.y + (row + 8 * r) * c.stride;
            float first = fmaf(factors[r], sum[0], bias.x), second = fmaf(factors[r], sum[1], bias.y);
            if (row + 8 * r >= m.rows) continue;
            if (m.pair) {
                y[0] = activated(m.pair, first) * second;
                continue;
            }
            first = fmaf(gates[r], first, old[r].x), second = fmaf(gates[r], second, old[r].y);
            if (side_by_side) {
                *(float2 *)y = make_float2(first, second);
            } else {
                y[0] = first;
                if (both) y[1] = second;
            }
        }
    }
}

template <class K, int HIGH> OPERATOR void linear_tiles(Words a, Words p, Work work) {
    typedef ManyShape<HIGH> Shape;
    const int RUNS = Shape::RUNS, PIECES = Shape::PIECES, STAGES = Shape::STAGES, LAST = 2 * RUNS - 1;
    const int DOWN = Shape::DOWN, ACROSS = Shape::ACROSS, HALF = ACROSS > 1 ? ACROSS / 2 : 1;
    Many all = many_at(a, p);
    char *weights = room(), *rows = weights + 2 * Shape::W_BYTES;
    int tiles = ((all.rows + HIGH - 1) / HIGH) * ((all.outputs + Shape::OUTPUTS - 1) / Shape::OUTPUTS);
    int steps = (all.w.runs + RUNS - 1) / RUNS, own_run = thread() % RUNS;
    int down = warp() / Shape::WARPS_ACROSS * (16 * DOWN), across = warp() % Shape::WARPS_ACROSS * (16 * ACROSS);
    // A lane's row of each 16 x 16, and which half of a pair of pieces it names: of the k-th pair, at ^ 32 k.
    int x_at = many_piece<PIECES>(down + lane() % 16, lane() / 16);
    int w_at = many_piece<PIECES>(across + lane() / 16 * 8 + lane() % 8, lane() / 8 % 2);

    for (int item = work.block; item < tiles; item += work.blocks) {
        block_barrier();  // nobody multiplies the tile before any more
        Many m = many_at(a, p);  // each time: there is no register to keep in what comes of it
        ManyTile tile = many_tile<HIGH>(m, item);
        int64 row = min(tile.output + thread() / RUNS, m.outputs - 1);
        Run<AsLoaded<K>> runs[STAGES];
        float sums[DOWN][2 * ACROSS][4];
        unsigned A[2][DOWN][4], B[2][ACROSS][4];  // of the products that are made, and of the next ones
#pragma unroll
        for (int i = 0; i < STAGES; i++) {
            fetch_many<HIGH>(m, tile, i, steps, rows + i * Shape::X_BYTES);
            runs[i] = load_run<AsLoaded<K>>(m.w, row, min(RUNS * i + own_run, m.w.runs - 1));
        }
#pragma unroll
        for (int i = 0; i < 4; i++) put_weights<HIGH, K>(runs[0], own_run < m.w.runs, i, weights);
        runs[0] = load_run<AsLoaded<K>>(m.w, row, min(RUNS * STAGES + own_run, m.w.runs - 1));
        put_weights<HIGH, K>(runs[1], RUNS + own_run < m.w.runs, 0, weights + Shape::W_BYTES);
#pragma unroll
        for (int i = 0; i < DOWN * ACROSS * 8; i++) sums[i / (ACROSS * 8)][i / 4 % (2 * ACROSS)][i % 4] = 0;
        wait_for_groups<STAGES - 1>();
        block_barrier();
#pragma unroll
        for (int i = 0; i < DOWN; i++) load_matrices(A[0][i], rows + 256 * PIECES * i + x_at);
#pragma unroll
        for (int j = 0; j < ACROSS; j++) load_matrices(B[0][j], weights + 256 * PIECES * j + w_at);

        for (int from = 0; from < steps; from += STAGES) {
#pragma unroll
            for (int s = 0; s < STAGES; s++) {
                int step = from + s;
                if (step >= steps) break;
                char *w_now = weights + s % 2 * Shape::W_BYTES, *w_next = weights + (s + 1) % 2 * Shape::W_BYTES;
                char *x_now = rows + s * Shape::X_BYTES, *x_next = rows + (s + 1) % STAGES * Shape::X_BYTES;
#pragma unroll
                for (int k = 0; k <= LAST; k++) {
                    // Between products, which leave the other units idle: operands of the next ones, and unpacking.
                    const char *x = k < LAST ? x_now + (x_at ^ 32 * (k + 1)) : x_next + x_at;
                    const char *w = k < LAST ? w_now + (w_at ^ 32 * (k + 1)) : w_next + w_at;
#pragma unroll
                    for (int j = 0; j < ACROSS; j++) {
#pragma unroll
                        for (int i = 0; i < DOWN; i++) {
                            multiply(sums[i][2 * j], A[k % 2][i], B[k % 2][j]);
                            multiply(sums[i][2 * j + 1], A[k % 2][i], B[k % 2][j] + 2);
                        }
                        if (j == 0 && k == LAST) {
                            wait_for_groups<STAGES - 2>();
                            block_barrier();  // what the next step multiplies is there, and what this one did is free
                            fetch_many<HIGH>(m, tile, step + STAGES, steps, x_now);
                            int run = RUNS * (step + 1 + STAGES) + own_run;
                            runs[(s + 1) % STAGES] = load_run<AsLoaded<K>>(m.w, row, min(run, m.w.runs - 1));
                        }
#pragma unroll
                        for (int i = 0; i < DOWN; i++)
                            if (i * HALF / DOWN == j) load_matrices(A[(k + 1) % 2][i], x + 256 * PIECES * i);
                        load_matrices(B[(k + 1) % 2][j], w + 256 * PIECES * j);
                        if (j == 0 && (k < 3 || k == LAST)) {
                            int ahead = k == LAST ? 2 : 1;  // the next one's last quarters, the first of the one behind
                            bool there = RUNS * (step + ahead) + own_run < m.w.runs;
                            char *to = k == LAST ? w_now : w_next;
                            put_weights<HIGH, K>(runs[(s + ahead) % STAGES], there, (k + 1) % (LAST + 1), to);
                        }
                    }
                }
            }
        }
        Many again = many_at(a, p);
        ManyTile same = many_tile<HIGH>(again, item);
        put_sums<HIGH>(again, p, same.row + down + lane() / 4, same.output + across + lane() % 4 * 2, sums);
    }
}
