// Products with weights for many tokens: y = x Wᵀ + b on tensor cores, weights unpacked into halves on the way, sums in
// float32. Equation: kernels/reference/quants.py. Weights: kinds.h. Blocks of 256 threads.
//
// Up to FEW_ROWS rows the time goes into reading W: warps share the columns, and each makes operands of the weights in
// its own registers. With more, a block unpacks W into shared memory and multiplies a tile of y. An element's sum has
// the same order in all tiles of one form, so neither its neighbours nor the number of blocks show in its bits; the two
// forms differ in it. Weights of 32 bits are multiplied in float32.

const int MANY_THREADS = ALONE_THREADS, MANY_WARPS = MANY_THREADS / 32;
const int FEW_ROWS = 16;

struct Many {
    Matrix w;
    int outputs, rows, columns;
    const char *x;
    int64 x_stride;
    const float *factors;
    float *y;
    int64 y_stride;  // in floats
    const float *bias, *gate;
    bool add;
};

FUNCTION Many many_at(Words a, Words p) {
    Words to = a + MATRIX;
    return {matrix_at(a), (int)to[0],      (int)(to[9] ? p[OUT_ROWS] : p[ROWS]),
            (int)to[10],  (char *)to[1],   to[2],
            floats(to[3]), floats(to[4] ? to[4] : p[LOGITS]), to[5] / 4,
            floats(to[6]), floats(to[7]),  to[8] != 0};
}

FUNCTION void put_sum(const Many &m, int row, int output, float sum) {
    if (row >= m.rows || output >= m.outputs) return;
    float value = (m.factors ? m.factors[row] * sum : sum) + (m.bias ? m.bias[output] : 0.0f);
    if (m.gate) value *= m.gate[row];
    float *y = m.y + row * m.y_stride + output;
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
            float sum = 0;
#pragma unroll
            for (int w = 0; w < MANY_WARPS; w++) sum += desk[(8 * EIGHTS * w + row) * PITCH + output];
            put_sum(m, row, OUTPUTS * tile + output, sum);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Many rows: a tile of ROWS x OUTPUTS, RUNS runs of columns at a time. A thread unpacks a run of W a step, which it has
// loaded two steps before; rows of x come in the background, three steps of them having room.

template <int HIGH, int RUNS> struct ManyShape {
    static const int OUTPUTS = MANY_THREADS / RUNS;
    static const int PIECES = 4 * RUNS;  // of 16 bytes in a row of the step
    static const int STAGES = 3;
    static const int W_BYTES = 16 * PIECES * OUTPUTS, X_BYTES = 16 * PIECES * HIGH;
    static const int BYTES = 2 * W_BYTES + STAGES * X_BYTES;
};

// Where a piece of a row lies: 8 neighbouring rows, read together, have the same piece in different banks.
template <int PIECES> FUNCTION char *many_piece(char *at, int row, int piece) {
    return at + 16 * (PIECES * row + (piece ^ (row % 8)));
}

template <int HIGH, int RUNS> FUNCTION void fetch_many(const Many &m, int first, int step, char *to) {
    const int PIECES = 4 * RUNS;
    for (int i = thread(); i < HIGH * PIECES; i += MANY_THREADS) {
        int row = i / PIECES, piece = i % PIECES;
        // Beyond the last row and column anything will do that is a number: the row is not wanted, the weights are 0.
        int64 of = min(first + row, m.rows - 1), at = min(PIECES * step + piece, 4 * m.w.runs - 1);
        copy_later(many_piece<PIECES>(to, row, piece), m.x + of * m.x_stride + 16 * at);
    }
}

// 8 values of a thread's run, unpacked, to their place.
template <int PIECES>
FUNCTION void put_weights(const float v[32], bool there, int quarter, char *to, int row, int run) {
    unsigned pair[4];
#pragma unroll
    for (int i = 0; i < 4; i++) pair[i] = there ? to_halves(v[8 * quarter + 2 * i], v[8 * quarter + 2 * i + 1]) : 0;
    *(uint4 *)many_piece<PIECES>(to, row, 4 * run + quarter) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

template <class K, int HIGH, int RUNS> OPERATOR void linear_tiles(Words a, Words p, Work work) {
    typedef ManyShape<HIGH, RUNS> Shape;
    const int OUTPUTS = Shape::OUTPUTS, PIECES = Shape::PIECES, STAGES = Shape::STAGES, BAND = 8;
    const int DOWN = HIGH / 32, ACROSS = OUTPUTS / 32;  // tiles of 16 x 8 of a warp; 2 x 4 warps
    Many m = many_at(a, p);
    char *weights = room(), *rows = weights + 2 * Shape::W_BYTES;
    int high = (m.rows + HIGH - 1) / HIGH, wide = (m.outputs + OUTPUTS - 1) / OUTPUTS;
    int steps = (m.w.runs + RUNS - 1) / RUNS;
    int own_row = thread() / RUNS, own_run = thread() % RUNS;
    int down = warp() / 4 * (HIGH / 2), across = warp() % 4 * (OUTPUTS / 4);
    for (int item = work.block; item < high * wide; item += work.blocks) {
        // In bands of a few tiles of rows: blocks at work together share rows of x and of W in the second cache.
        int band = item / (BAND * wide), in_band = min(BAND, high - BAND * band), within = item - BAND * wide * band;
        int first = HIGH * (BAND * band + within % in_band), output = within / in_band * OUTPUTS;
        int64 row = min(output + own_row, m.outputs - 1);

        float sums[DOWN][ACROSS][4], v[32];
#pragma unroll
        for (int i = 0; i < DOWN * ACROSS * 4; i++) sums[i / (ACROSS * 4)][i / 4 % ACROSS][i % 4] = 0;
        block_barrier();  // nobody multiplies the tile before any more
        fetch_many<HIGH, RUNS>(m, first, 0, rows);
        end_group();
        if (steps > 1) fetch_many<HIGH, RUNS>(m, first, 1, rows + Shape::X_BYTES);
        end_group();
        Run<K> next = load_run<K>(m.w, row, min(own_run, m.w.runs - 1)), after;
        unpack(next, v);
#pragma unroll
        for (int i = 0; i < 4; i++) put_weights<PIECES>(v, own_run < m.w.runs, i, weights, own_row, own_run);
        next = load_run<K>(m.w, row, min(RUNS + own_run, m.w.runs - 1));

        for (int step = 0; step < steps; step++) {
            char *x = rows + step % STAGES * Shape::X_BYTES, *w = weights + step % 2 * Shape::W_BYTES;
            char *w_next = weights + (step + 1) % 2 * Shape::W_BYTES;
            bool there = RUNS * (step + 1) + own_run < m.w.runs;
            wait_for_groups<1>();
            block_barrier();  // what this step multiplies is there, and what the one before did is free
            if (step + 2 < steps) {
                after = load_run<K>(m.w, row, min(RUNS * (step + 2) + own_run, m.w.runs - 1));
                fetch_many<HIGH, RUNS>(m, first, step + 2, rows + (step + 2) % STAGES * Shape::X_BYTES);
            }
            end_group();
            unpack(next, v);
#pragma unroll
            for (int k = 0; k < 2 * RUNS; k++) {
                unsigned A[DOWN][4], B[ACROSS / 2][4];
#pragma unroll
                for (int i = 0; i < DOWN; i++)
                    load_matrices(A[i], many_piece<PIECES>(x, down + 16 * i + lane() % 16, 2 * k + lane() / 16));
#pragma unroll
                for (int j = 0; j < ACROSS / 2; j++) {
                    int of = across + 16 * j + lane() / 16 * 8 + lane() % 8;
                    load_matrices(B[j], many_piece<PIECES>(w, of, 2 * k + lane() / 8 % 2));
                }
#pragma unroll
                for (int i = 0; i < DOWN; i++) {
#pragma unroll
                    for (int j = 0; j < ACROSS; j++) multiply(sums[i][j], A[i], B[j / 2] + j % 2 * 2);
                }
                // Between products, which leave the other units idle.
                if (k < 4) put_weights<PIECES>(v, there, k, w_next, own_row, own_run);
            }
            next = after;
        }
#pragma unroll
        for (int i = 0; i < DOWN; i++) {
#pragma unroll
            for (int j = 0; j < ACROSS; j++) {
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    int r = first + down + 16 * i + lane() / 4 + c / 2 * 8;
                    put_sum(m, r, output + across + 8 * j + lane() % 4 * 2 + c % 2, sums[i][j][c]);
                }
            }
        }
    }
}

// About how long the tiles take: a step of one costs what its products cost and, for 64 rows' worth, unpacking.
FUNCTION int tiles_cost(const Many &m, Work work, int high, int wide) {
    int tiles = ((m.rows + high - 1) / high) * ((m.outputs + wide - 1) / wide);
    return (tiles + work.blocks - 1) / work.blocks * wide * (high + 64);
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
            put_sum(m, first + down + i / 4 * 16, output + across + i % 4 * 16, sums[i / 4][i % 4]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------

// Bytes of shared memory behind the desk: the most that any form needs.
const int MANY_BYTES = ManyShape<128, 2>::BYTES;
static_assert(MANY_BYTES >= 4 * MANY_WARPS * FEW_ROWS * FewShape<Q4_0, 2>::PITCH);
static_assert(MANY_BYTES >= 4 * 2 * EXACT * EXACT_PITCH);

// a: W, its outputs; x: rows of halves, zeros behind their end up to a whole run (of floats, without them, for weights
// of 32 bits), their stride in bytes, and what each row is to be multiplied by (0: nothing); y (0: the pass's logits),
// its stride in bytes, bias, a factor for each row (0: none), whether to add to y, whether the rows are those whose
// logits are wanted (x, factors and y begin with the first of them); columns.
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
        int narrow = tiles_cost(m, work, 32, 64), middle = tiles_cost(m, work, 64, 128);
        int large = tiles_cost(m, work, 128, 128);
        if (narrow <= middle && narrow <= large)
            linear_tiles<K, 32, 4>(a, p, work);
        else if (middle <= large)
            linear_tiles<K, 64, 2>(a, p, work);
        else
            linear_tiles<K, 128, 2>(a, p, work);
    }
}
