// The matrix memory over many rows of a sequence, 32 tokens at a time: products in place of a pass over A a token.
// Equation: kernels/reference/matrix_memory.py, `_chunk`. Blocks of 256 threads.
//
// Moment n of a chunk is before its token n; fade(m, n) is the product of the decays of tokens m .. n - 1, 0 if m > n.
//     (I + L) U = rate (V - c fade(0, i) K A)          L_ij = rate_i c_i fade(j + 1, i) k_i·k_j
//     o_i = fade(0, n) q_i A + Σ_j fade(j + 1, n) (q_i·k_j) u_j          n = i + 1 (write first) or i
//     A'  = fade(0, 32) A + Σ_j fade(j + 1, 32) k_j ⊗ u_j
// Fades are multiplied up from the decays as in the recurrence: they lose no more than it does, need no logarithms in
// float64, and a decay of 0 is a decay like any other. Beyond the last row are tokens that write nothing.
//
// Every column of A changes by itself: a block takes a strip of them, transposed, through the whole pass. So all
// products are of rows with rows whose numbers lie side by side. Of either a thread has every 16th: the lanes of a warp
// read neighbouring rows, 4 of one and 8 of the other, which begin in different banks.
//
// Without retrieval all is linear: what a wedge writes besides, -v ⊗ k, is a scan of its own that begins with A = 0.

const int TOKENS = 32;  // of a chunk
const int EDGE = TOKENS + 4;  // floats of a row of 32 numbers: neighbouring rows begin 4 banks apart
const int FADES = TOKENS + 8;  // the same for fades, which 4 x 8 lanes read one by one
const int NARROW = 16, WIDE = 32;  // columns of a strip
const int NARROW_AHEAD = 128, WIDE_AHEAD = 64;  // the most floats of a key with which there is room to fetch ahead

// sum[m][n] += x_m·y_n; x has the first of M rows that are 16 apart, y the N rows.
template <int M, int N>
FUNCTION void add_products(float (&sum)[M][N], const float *x, int pitch, const float *const (&y)[N], int width) {
#pragma unroll 4
    for (int c = 0; c < width; c += 4) {
        float4 u[M], v[N];
#pragma unroll
        for (int m = 0; m < M; m++) u[m] = *(const float4 *)(x + 16 * pitch * m + c);
#pragma unroll
        for (int n = 0; n < N; n++) v[n] = *(const float4 *)(y[n] + c);
#pragma unroll
        for (int i = 0; i < M * N; i++) {
            const float4 &s = u[i / N], &t = v[i % N];
            float &to = sum[i / N][i % N];
            to = fmaf(s.w, t.w, fmaf(s.z, t.z, fmaf(s.y, t.y, fmaf(s.x, t.x, to))));
        }
    }
}

FUNCTION float4 plus(float by, const float4 &x, const float4 &y) {  // by x + y
    return make_float4(fmaf(by, x.x, y.x), fmaf(by, x.y, y.y), fmaf(by, x.z, y.z), fmaf(by, x.w, y.w));
}

// Rows of a chunk on their way to shared memory, in the background where their alignment allows: the first `count` are
// there and `width` wide, the rest is zeros, up to a width of whole fours.
FUNCTION void fetch_rows(float *to, int pitch, int whole_width, const float *from, int64 stride, int count, int width) {
    bool aligned = ((int64)from | 4 * stride) % 16 == 0;
    for (int row = thread() / 16; row < TOKENS; row += 16)
        for (int c = thread() % 16 * 4; c < whole_width; c += 64) {
            float *at = to + pitch * row + c;
            const float *of = from + stride * row + c;
            if (aligned && row < count && c + 4 <= width) copy_later(at, of);
            else
                for (int i = 0; i < 4; i++) at[i] = row < count && c + i < width ? of[i] : 0.0f;
        }
}

// u of (I + L) u = rhs, in its place. L is 0 where the column is not before the row.
FUNCTION void solve_forward(const float *L, float (&u)[TOKENS]) {
#pragma unroll
    for (int j = 0; j < TOKENS; j += 4) {
#pragma unroll
        for (int i = j + 1; i < TOKENS; i++) {
            float4 l = *(const float4 *)(L + EDGE * i + j);
            u[i] = fmaf(-l.w, u[j + 3], fmaf(-l.z, u[j + 2], fmaf(-l.y, u[j + 1], fmaf(-l.x, u[j], u[i]))));
        }
    }
}

// A step is a chunk's queries of one head. ahead: 1 where the next step's rows have room of their own and are fetched
// meanwhile, or 0.
template <int COLUMNS> OPERATOR void scan_strips(Words a, Words p, Work work, int ahead) {
    const int EACH = COLUMNS / 16;  // columns of a thread
    int64 field = a[0];
    int P = a[1], G = a[2], R = a[3], D = a[4], E = a[5], strips = (E + COLUMNS - 1) / COLUMNS;
    const float *retrieve = floats(a[11]), *mix = floats(a[12]);
    bool write_first = a[15];
    int turns = a[14] ? 2 : 1;  // of a plane: k ⊗ u, then what a wedge writes besides
    int width = (D + 3) / 4 * 4, pitch = width | 4, stages = 1 + ahead;
    int key_room = TOKENS * pitch, query_room = TOKENS * max(pitch, EDGE), value_room = COLUMNS * EDGE;

    float *A = (float *)room();                   // [COLUMNS, pitch]: transposed
    float *keys = A + COLUMNS * pitch;            // [stages, TOKENS, pitch]
    float *queries = keys + stages * key_room;    // [stages, TOKENS, pitch]; then scores [TOKENS, EDGE]
    float *values = queries + stages * query_room;  // [stages, TOKENS, COLUMNS]; then of U what is left at the end
    float *U = values + stages * value_room;      // [COLUMNS, EDGE]: transposed
    float *L = U + value_room;                    // [TOKENS, EDGE]
    float *fade = L + TOKENS * EDGE;              // [TOKENS + 1, FADES]: fade(m, n) in row n
    float *decay = fade + (TOKENS + 1) * FADES, *rate = decay + TOKENS, *again = rate + TOKENS;  // of tokens; c

    int tx = warp() % 2 * 8 + lane() % 8, ty = warp() / 2 * 4 + lane() / 8;
    for (int64 item = work.block; item < p[SEQUENCES] * G * strips; item += work.blocks)
        for (int k = 0; k < P * turns; k++) {
            int64 head = item / strips;
            int plane = k / turns, g = head % G, e = COLUMNS * (item % strips), columns = min(COLUMNS, E - e);
            bool turned = k % turns;
            Words of = sequence(p, head / G);
            int64 first = of[ROW];
            int count = of[COUNT], chunks = (count + TOKENS - 1) / TOKENS;
            float *whole = floats(words(of[FIELDS])[field]) + (int64)D * E * (plane * G + g) + e;
            const float *all_keys = floats(a[turned ? 8 : 7]), *all_values = floats(a[turned ? 7 : 8]) + e;

            auto fetch = [&](int chunk, int r) {
                if (chunk == chunks) return;
                int there = min(TOKENS, count - TOKENS * chunk);
                int64 at = G * (first + TOKENS * chunk) + g;
                float *x = queries + ((R * chunk + r) & ahead) * query_room;
                fetch_rows(x, pitch, width, floats(a[6]) + D * (R * at + r), (int64)D * R * G, there, D);
                if (r) return;
                float *key = keys + (chunk & ahead) * key_room, *value = values + (chunk & ahead) * value_room;
                fetch_rows(key, pitch, width, all_keys + D * at, (int64)D * G, there, D);
                fetch_rows(value, COLUMNS, COLUMNS, all_values + E * at, (int64)E * G, there, columns);
            };
            auto term = [&](int chunk) {  // this thread's: the decay, rate or c of a token
                int token = TOKENS * chunk + lane();
                int64 row = first + token, entry = (row * P + plane) * G + g;
                if (token >= count) return warp() ? 0.0f : 1.0f;
                if (warp() == 0) return floats(a[9])[entry];
                if (warp() == 1) return turned ? -floats(a[10])[entry] : floats(a[10])[entry];
                return warp() == 2 && retrieve ? retrieve[G * row + g] : 0.0f;
            };

            fetch(0, 0);
            end_group();
            float next_term = term(0);
            for (int d = thread() / COLUMNS; d < width; d += threads() / COLUMNS) {
                int c = thread() % COLUMNS;
                A[pitch * c + d] = d < D && c < columns && !turned ? whole[(int64)E * d + c] : 0.0f;
            }
            for (int step = 0, chunk = 0, r = 0; chunk < chunks; step++) {
                int next_r = r + 1 < R ? r + 1 : 0, next_chunk = chunk + !next_r;
                float *key = keys + (chunk & ahead) * key_room, *value = values + (chunk & ahead) * value_room;
                float *x = queries + (step & ahead) * query_room;
                const float *y[2 + EACH], *u[EACH];  // this thread's rows of keys and A, of U
#pragma unroll
                for (int n = 0; n < 2; n++) y[n] = key + pitch * (tx + 16 * n);
#pragma unroll
                for (int n = 0; n < EACH; n++) y[2 + n] = A + pitch * (tx + 16 * n), u[n] = U + EDGE * (tx + 16 * n);
                if (r == 0 && warp() < 3) decay[thread()] = next_term;  // rate and c lie behind
                wait_for_groups<0>();
                block_barrier();
                if (ahead) fetch(next_chunk, next_r), end_group();

                if (r == 0) {  // what the chunk writes
                    next_term = term(chunk + 1);
                    int m = threads() - 1 - thread();  // in other warps than will solve
                    if (m <= TOKENS) {
                        float f = 0;
#pragma unroll
                        for (int n = 0; n <= TOKENS; n++) {
                            if (n) f *= decay[n - 1];
                            if (n == m) f = 1;
                            fade[FADES * n + m] = f;
                        }
                    }
                    float sums[2][2 + EACH] = {};
                    if (retrieve) add_products(sums, key + pitch * ty, pitch, y, width);
                    block_barrier();
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        int t = ty + 16 * i;
                        float eta = rate[t], c = again[t], start = fade[FADES * t];
#pragma unroll
                        for (int n = 0; n < 2; n++) {
                            int j = tx + 16 * n;
                            L[EDGE * t + j] = eta * c * fade[FADES * t + j + 1] * sums[i][n];
                        }
#pragma unroll
                        for (int n = 0; n < EACH; n++) {
                            int column = tx + 16 * n;
                            float found = start * sums[i][2 + n];
                            U[EDGE * column + t] = eta * fmaf(-c, found, value[COLUMNS * t + column]);
                        }
                    }
                    block_barrier();
                    if (thread() < COLUMNS) {  // while the others go on to the queries
                        float column[TOKENS];
                        float4 *own = (float4 *)(U + EDGE * thread()), *faded = (float4 *)(value + EDGE * thread());
#pragma unroll
                        for (int i = 0; i < TOKENS; i += 4) {
                            float4 four = own[i / 4];
                            column[i] = four.x, column[i + 1] = four.y, column[i + 2] = four.z, column[i + 3] = four.w;
                        }
                        if (retrieve) solve_forward(L, column);
                        const float *end = fade + FADES * TOKENS + 1;
#pragma unroll
                        for (int i = 0; i < TOKENS; i += 4) {
                            const float *c = column + i, *f = end + i;
                            own[i / 4] = make_float4(c[0], c[1], c[2], c[3]);
                            faded[i / 4] = make_float4(f[0] * c[0], f[1] * c[1], f[2] * c[2], f[3] * c[3]);
                        }
                    }
                }

                float sums[2][2 + EACH] = {}, read[2][EACH], before[2][EACH], share[2];
                add_products(sums, x + pitch * ty, pitch, y, width);
                block_barrier();  // U is there, and scores can take the queries' place
                int64 row = first + TOKENS * chunk + ty;
                float *out = floats(a[13]) + E * ((G * row + g) * R + r) + e + tx;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int t = ty + 16 * i;
                    bool there = TOKENS * chunk + t < count;
                    const float *faded = fade + FADES * (t + write_first);
#pragma unroll
                    for (int n = 0; n < 2; n++) x[EDGE * t + tx + 16 * n] = faded[tx + 16 * n + 1] * sums[i][n];
                    share[i] = mix && there ? mix[(((row + 16 * i) * P + plane) * G + g) * R + r] : 1.0f;
#pragma unroll
                    for (int n = 0; n < EACH; n++) {
                        read[i][n] = faded[0] * sums[i][2 + n];
                        bool add = k && there && tx + 16 * n < columns;  // to what other planes have read
                        before[i][n] = add ? out[(int64)E * R * G * 16 * i + 16 * n] : 0.0f;
                    }
                }
                block_barrier();
                add_products(read, x + EDGE * ty, EDGE, u, TOKENS);
#pragma unroll
                for (int i = 0; i < 2; i++) {
#pragma unroll
                    for (int n = 0; n < EACH; n++)
                        if (TOKENS * chunk + ty + 16 * i < count && tx + 16 * n < columns)
                            out[(int64)E * R * G * 16 * i + 16 * n] = fmaf(share[i], read[i][n], before[i][n]);
                }

                if (!next_r)  // A is read no more
                    for (int c = 4 * tx; c < width; c += 64) {
                        float4 sum[EACH] = {};
#pragma unroll
                        for (int t = 0; t < TOKENS; t += 4) {
                            float4 four[4];
#pragma unroll
                            for (int i = 0; i < 4; i++) four[i] = *(const float4 *)(key + pitch * (t + i) + c);
#pragma unroll
                            for (int n = 0; n < EACH; n++) {
                                float4 by = *(const float4 *)(value + EDGE * (ty + 16 * n) + t);
                                sum[n] = plus(by.x, four[0], sum[n]), sum[n] = plus(by.y, four[1], sum[n]);
                                sum[n] = plus(by.z, four[2], sum[n]), sum[n] = plus(by.w, four[3], sum[n]);
                            }
                        }
#pragma unroll
                        for (int n = 0; n < EACH; n++) {
                            float4 *to = (float4 *)(A + pitch * (ty + 16 * n) + c);
                            *to = plus(fade[FADES * TOKENS], *to, sum[n]);
                        }
                    }
                if (!ahead) {
                    block_barrier();  // the step's rows are read
                    fetch(next_chunk, next_r);
                    end_group();
                }
                chunk = next_chunk, r = next_r;
            }
            block_barrier();  // from here a thread touches those places of the strip alone that it fills for the next
            for (int d = thread() / COLUMNS; d < D; d += threads() / COLUMNS) {
                int c = thread() % COLUMNS;
                if (c < columns) whole[(int64)E * d + c] = A[pitch * c + d] + (turned ? whole[(int64)E * d + c] : 0.0f);
            }
        }
}

// a: as of `scan`. While no block has more than one of them, narrow strips are done soonest; wide ones are less work in
// all. A block has a multiprocessor for itself.
OPERATOR void scan_many(Words a, Words p, Work work) {
    int64 D = a[4], E = a[5], narrow = p[SEQUENCES] * a[2] * ((E + NARROW - 1) / NARROW);
    if (D <= NARROW_AHEAD && E > NARROW && narrow > work.blocks) scan_strips<WIDE>(a, p, work, D <= WIDE_AHEAD);
    else scan_strips<NARROW>(a, p, work, D <= NARROW_AHEAD);
}
