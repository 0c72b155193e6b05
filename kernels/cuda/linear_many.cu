// Products with weights for many tokens: y = x Wᵀ + b on tensor cores, weights unpacked into halves on the way, sums in
// float32. Equation: kernels/reference/quants.py. Weights: kinds.h. Blocks of 256 threads.
//
// Up to FEW_ROWS rows the time goes into reading W: warps share the columns, and each makes operands of the weights in
// its own registers. With more, a block unpacks W into shared memory and multiplies a tile of y, or, where warpgroups
// multiply, unpacks it in registers too (linear_wide.cu). An element's sum has the same order in all tiles of one form,
// so neither its neighbours nor the number of blocks show in its bits; the forms differ in it. Weights of 32 bits are
// multiplied in float32.

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

// ---------------------------------------------------------------------------------------------------------------------
// Few rows. A step of a warp is 4 runs of 16 rows of W: lane (g, t) has run t of rows g and g + 8. A product does not
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

// ---------------------------------------------------------------------------------------------------------------------
// Many rows: a tile of HIGH x OUTPUTS, RUNS runs of columns a step. A thread unpacks a run of W a step into shared
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

// A kind whose scales stay the bits that they are until they are used: nobody waits for them as they are loaded.
template <class K> struct AsLoaded : K {
    static MEMBER Scales scales(const char *d, const char *s) {
        unsigned of_d = K::D == 4 ? word_at(d) : K::D == 2 ? short_at(d) : 0, of_s = K::S ? short_at(s) : 0;
        return {{__uint_as_float(of_d), __uint_as_float(of_s)}, {0, 0}};
    }
};

template <class K> FUNCTION void unpack_loaded(const Run<AsLoaded<K>> &r, float out[32]) {
    Run<K> run;
#pragma unroll
    for (int i = 0; i < K::LOADS; i++) run.low[i] = r.low[i];
    run.high = r.high;
    unsigned d = __float_as_uint(r.by.d[0]), s = __float_as_uint(r.by.d[1]);
    run.by = K::scales((const char *)&d, (const char *)&s);
    unpack(run, out);
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

enum { WIDE_OUTPUTS = 128 };  // of a tile where warpgroups multiply
template <class K, int HIGH> FUNCTION void linear_wide(Words a, Words p, Work work);

template <class K, int HIGH> FUNCTION void linear_high(Words a, Words p, Work work) {
    if constexpr (WARPGROUPS)
        linear_wide<K, HIGH>(a, p, work);
    else
        linear_tiles<K, HIGH>(a, p, work);
}

// About how long the tiles take: a step of one costs what its products cost and, for 64 rows' worth, unpacking.
template <int HIGH> FUNCTION int tiles_cost(const Many &m, Work work) {
    const int OUTPUTS = WARPGROUPS ? (int)WIDE_OUTPUTS : ManyShape<HIGH>::OUTPUTS;
    int tiles = ((m.rows + HIGH - 1) / HIGH) * ((m.outputs + OUTPUTS - 1) / OUTPUTS);
    return (tiles + work.blocks - 1) / work.blocks * OUTPUTS * (HIGH + 64);
}

// ---------------------------------------------------------------------------------------------------------------------
// Float32, for weights that are to be exact: tiles of 64 x 64, 4 runs at a time, a thread 4 x 4 of them.

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

// ---------------------------------------------------------------------------------------------------------------------

// A block on GPUs of compute capability 8.6, 8.9 and 12 has 99 KB of shared memory: too little for the largest tiles.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
const int HIGHEST = 128;
#else
const int HIGHEST = 256;
#endif

// Bytes of shared memory behind the desk: the most that any form needs.
const int EXACT_BYTES = 4 * 2 * EXACT * EXACT_PITCH;
const int MANY_BYTES = ManyShape<HIGHEST>::BYTES > EXACT_BYTES ? ManyShape<HIGHEST>::BYTES : EXACT_BYTES;
static_assert(MANY_BYTES >= ManyShape<32>::BYTES && MANY_BYTES >= ManyShape<64>::BYTES);
static_assert(MANY_BYTES >= 4 * MANY_WARPS * FEW_ROWS * FewShape<Q4_0, 2>::PITCH);

// a: W, its outputs; x: rows of halves (panels.h), zeros behind their end up to a whole run (of floats, without them, for
// weights of 32 bits), their stride in bytes, and what each row is to be multiplied by (0: nothing); y (0: the pass's
// logits), its stride in bytes, bias, a factor for each row (0: none), whether to add to y; pairs and other parts as
// linear_one has them, these parts beginning at multiples of 8; whether the rows are those whose logits are wanted (x,
// factors and y begin with the first of them); columns.
template <class K> FUNCTION void linear_many(Words a, Words p, Work work) {
    Many m = many_at(a, p);
    if (!m.rows) return;
    if constexpr (K::LOADS == 8) {
        linear_exact(a, p, work);
    } else if (m.rows <= FEW_ROWS) {
        const int TILES = K::LOADS > 2 ? 1 : 2;  // half as wide where otherwise blocks had nothing to do
        if (m.outputs < 16 * TILES * work.blocks)
            m.rows <= 8 ? linear_few<K, 1, 1>(a, p, work) : linear_few<K, 2, 1>(a, p, work);
        else
            m.rows <= 8 ? linear_few<K, 1, TILES>(a, p, work) : linear_few<K, 2, TILES>(a, p, work);
    } else {
        int narrow = tiles_cost<32>(m, work), middle = tiles_cost<64>(m, work), large = tiles_cost<128>(m, work);
        int largest = HIGHEST == 256 ? tiles_cost<256>(m, work) : large + 1;
        if (narrow <= min(middle, min(large, largest)))
            linear_high<K, 32>(a, p, work);
        else if (middle <= min(large, largest))
            linear_high<K, 64>(a, p, work);
        else if (large <= largest)
            linear_high<K, 128>(a, p, work);
        else if constexpr (HIGHEST == 256)
            linear_high<K, 256>(a, p, work);
    }
}
