// Softmax attention of a prompt's chunk on tensor cores: one sequence, a block takes 128 queries (tokens times the heads
// that read one key head) through all the keys that any of them sees, a tile at a time, and no score leaves its
// registers. Equation: kernels/reference/attention.py. Blocks of 256 threads.
//
// Tiles begin at multiples of their size in the stream, and one of which a query sees nothing leaves its sums as they
// are: so the chunk that a token came in does not show in its attention's bits.

// WIDE: channels of a head, rounded up.
template <int WIDE> struct FlashShape {
    static const int QUERIES = 128, OF_WARP = 16;
    static const int KEYS = WIDE > 128 ? 32 : 64;
    static const int PIECES = WIDE / 8;  // of 16 bytes in a row
    static const int BYTES = 2 * WIDE * (QUERIES + 2 * KEYS);
};

// Bytes of shared memory behind the desk.
const int FLASH_BYTES = FlashShape<256>::BYTES;
static_assert(FLASH_BYTES >= FlashShape<128>::BYTES);

const float UNSEEN = -1e30f;  // a maximum before the first score

// Where a piece of a row lies: 8 neighbouring rows, read together, have the same piece in different banks.
template <int PIECES> FUNCTION char *flash_piece(char *at, int row, int piece) {
    return at + 16 * (PIECES * row + (piece ^ (PIECES < 8 ? row / 2 % 4 : row % 8)));
}

// What a step's words say, and where it finds itself.
struct Flash {
    const char *q, *q_far;
    int64 q_stride;
    Words of;
    int64 k_field, v_field, k_new, v_new, window, sinks;
    int group, G, D, rows;  // group: query heads of a key head
    char *out;
};

FUNCTION Flash flash_at(Words a, Words p) {
    return {(char *)a[0], (char *)(a[1] ? a[1] : a[0]), a[2], sequence(p, 0), a[3], a[4], a[5], a[6], a[10], a[11],
            (int)(a[7] / a[8]), (int)a[8], (int)a[9], (int)p[ROWS], (char *)a[12]};
}

// The i-th query of key head g, token by token (beyond the last: the last): where its channels lie, in bytes.
FUNCTION int64 flash_row(const Flash &f, int g, int i) {
    i = min(i, f.rows * f.group - 1);
    return i / f.group * f.q_stride + 4 * f.D * (g * f.group + i % f.group);
}

// Where in the stream its token stands, and the first position that the window of a token there holds.
FUNCTION int64 flash_position(const Flash &f, int i) { return f.of[FIRST] + min(i, f.rows * f.group - 1) / f.group; }
FUNCTION int64 flash_low(const Flash &f, int64 at) { return f.window ? max(f.sinks, at - f.window + 1) : 0; }

// Queries from `first` on as halves, in units in which a score is the exponent of 2.
template <int WIDE> FUNCTION void put_queries(const Flash &f, const char *q, int g, int first, char *to) {
    typedef FlashShape<WIDE> Shape;
    float scale = 1.44269504f / sqrtf((float)f.D);
    for (int i = thread(); i < Shape::QUERIES * Shape::PIECES; i += threads()) {
        int query = i / Shape::PIECES, piece = i % Shape::PIECES;
        const float *x = (const float *)(q + flash_row(f, g, first + query));
        unsigned pair[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int c = 8 * piece + 2 * k;
            pair[k] = c < f.D ? to_halves(scale * x[c], scale * x[c + 1]) : 0;
        }
        *(uint4 *)flash_piece<Shape::PIECES>(to, query, piece) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
    }
}

// The keys (or values) of a tile that begins at a position, zeros from `stop` on.
template <int WIDE>
FUNCTION void fetch_keys(const Flash &f, int64 field, int64 fresh, int g, int64 begin, int64 stop, char *to) {
    typedef FlashShape<WIDE> Shape;
    const int SHARERS = 256 / Shape::KEYS;  // threads of a key
    int key = thread() / SHARERS;
    int64 at = begin + key, first = f.of[FIRST];
    bool there = at < stop;
    int64 place = at >= first ? fresh + 2 * f.G * f.D * (f.of[ROW] + at - first)
                              : words(f.of[FIELDS])[field] + 2 * f.G * f.D * slot_of(at, f.window, f.sinks);
    const char *from = (const char *)(place + 2 * f.D * g);
    for (int piece = thread() % SHARERS; piece < Shape::PIECES; piece += SHARERS) {
        char *own = flash_piece<Shape::PIECES>(to, key, piece);
        if (there && 8 * piece < f.D && f.D % 8 == 0) {
            copy_later(own, from + 16 * piece);
        } else {
            unsigned pair[4];
#pragma unroll
            for (int k = 0; k < 4; k++)
                pair[k] = there && 8 * piece + 2 * k < f.D ? ((const unsigned *)from)[4 * piece + k] : 0;
            *(uint4 *)own = make_uint4(pair[0], pair[1], pair[2], pair[3]);
        }
    }
    end_group();
}

// Over the four lanes that have the scores of a query.
FUNCTION float of_four_max(float x) {
    x = fmaxf(x, shuffle(x, lane() ^ 1));
    return fmaxf(x, shuffle(x, lane() ^ 2));
}
FUNCTION float of_four_sum(float x) {
    x += shuffle(x, lane() ^ 1);
    return x + shuffle(x, lane() ^ 2);
}

template <int WIDE> OPERATOR void flash(Words a, Words p, Work work) {
    typedef FlashShape<WIDE> Shape;
    const int KEYS = Shape::KEYS, PIECES = Shape::PIECES, KEY_TILES = KEYS / 8, OUT_TILES = WIDE / 8;
    Flash f = flash_at(a, p);
    char *queries = room(), *keys = queries + 2 * WIDE * Shape::QUERIES, *values = keys + 2 * WIDE * KEYS;
    int total = f.rows * f.group, blocks = (total + Shape::QUERIES - 1) / Shape::QUERIES;
    int own = warp() * Shape::OF_WARP, g8 = lane() / 4, t = lane() % 4;
    for (int item = work.block; item < blocks * f.G; item += work.blocks) {
        // The latest first: they see the most.
        int g = item % f.G, first = (blocks - 1 - item / f.G) * Shape::QUERIES;
        int64 earliest = flash_position(f, first), latest = flash_position(f, first + Shape::QUERIES - 1);
        // Of the warp's first and last query, and of the lane's two.
        int64 from = flash_position(f, first + own), upto = flash_position(f, first + own + Shape::OF_WARP - 1);
        int64 at[2] = {flash_position(f, first + own + g8), flash_position(f, first + own + g8 + 8)};

        float out[OUT_TILES][4], top[2] = {UNSEEN, UNSEEN}, sum[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < OUT_TILES * 4; i++) out[i / 4][i % 4] = 0;
        for (int far = 1; far >= 0; far--) {
            // First the sinks, then what the windows hold.
            int64 stop = !far ? latest + 1 : f.window ? min(f.sinks, latest + 1) : 0;
            int64 low = far ? 0 : flash_low(f, earliest), begin = low / KEYS * KEYS;
            if (low >= stop) continue;
            put_queries<WIDE>(f, far ? f.q_far : f.q, g, first, queries);
            fetch_keys<WIDE>(f, f.k_field, f.k_new, g, begin, stop, keys);
            for (; begin < stop; begin += KEYS) {
                wait_for_groups<0>();
                __syncthreads();  // the keys are there, the values of the tile before are no longer needed
                fetch_keys<WIDE>(f, f.v_field, f.v_new, g, begin, stop, values);

                float scores[KEY_TILES][4];
                bool seen = begin <= upto && (far || begin + KEYS > flash_low(f, from));
                if (seen) {
#pragma unroll
                    for (int i = 0; i < KEY_TILES * 4; i++) scores[i / 4][i % 4] = 0;
#pragma unroll
                    for (int c = 0; c < WIDE / 16; c++) {
                        unsigned A[4];
                        load_matrices(A, flash_piece<PIECES>(queries, own + lane() % 16, 2 * c + lane() / 16));
#pragma unroll
                        for (int j = 0; j < KEY_TILES / 2; j++) {
                            unsigned B[4];
                            int key = 16 * j + lane() / 16 * 8 + lane() % 8;
                            load_matrices(B, flash_piece<PIECES>(keys, key, 2 * c + lane() / 8 % 2));
                            multiply(scores[2 * j], A, B);
                            multiply(scores[2 * j + 1], A, B + 2);
                        }
                    }
                    bool whole = begin + KEYS <= min(stop, from + 1) && (far || begin >= flash_low(f, upto));
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        int lowest = far ? 0 : (int)(flash_low(f, at[h]) - begin);
                        int highest = (int)(min(at[h], stop - 1) - begin);
                        float most = top[h];
#pragma unroll
                        for (int i = 0; i < KEY_TILES * 2; i++) {
                            float &s = scores[i / 2][2 * h + i % 2];
                            int key = 8 * (i / 2) + 2 * t + i % 2;
                            if (!whole && (key < lowest || key > highest)) s = 2 * UNSEEN;
                            most = fmaxf(most, s);
                        }
                        most = of_four_max(most);
                        float shrink = exp2f(top[h] - most);
                        top[h] = most;
                        sum[h] *= shrink;
#pragma unroll
                        for (int i = 0; i < KEY_TILES * 2; i++) {
                            float &s = scores[i / 2][2 * h + i % 2];
                            s = exp2f(s - most);
                            sum[h] += s;
                        }
#pragma unroll
                        for (int i = 0; i < OUT_TILES * 2; i++) out[i / 2][2 * h + i % 2] *= shrink;
                    }
                }

                wait_for_groups<0>();
                __syncthreads();  // the values are there, the keys are no longer needed
                if (begin + KEYS < stop) fetch_keys<WIDE>(f, f.k_field, f.k_new, g, begin + KEYS, stop, keys);
                if (!seen) continue;
#pragma unroll
                for (int k = 0; k < KEYS / 16; k++) {
                    unsigned A[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float *pair = scores[2 * k + i / 2] + i % 2 * 2;
                        A[i] = to_halves(pair[0], pair[1]);
                    }
#pragma unroll
                    for (int j = 0; j < OUT_TILES / 2; j++) {
                        unsigned B[4];
                        load_matrices_turned(B, flash_piece<PIECES>(values, 16 * k + lane() % 16, 2 * j + lane() / 16));
                        multiply(out[2 * j], A, B);
                        multiply(out[2 * j + 1], A, B + 2);
                    }
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int query = first + own + g8 + 8 * h;
            float part = 1.0f / of_four_sum(sum[h]);
            if (query >= total) continue;
            float *y = (float *)(f.out + flash_row(f, g, query));
#pragma unroll
            for (int i = 0; i < OUT_TILES * 2; i++) {
                int c = 8 * (i / 2) + 2 * t + i % 2;
                if (c < f.D) y[c] = part * out[i / 2][2 * h + i % 2];
            }
        }
    }
}

// a: queries (float32 rows [H, D]), those turned for the sinks (0: the same), stride of both in bytes; keys and values:
// the fields of the ring, and the pass's own (halves [rows, G, D]); H, G, D, window, sinks; out, rows like the queries.
OPERATOR void attend_many(Words a, Words p, Work work) {
    int64 D = a[9];
    if (D <= 32)
        flash<32>(a, p, work);
    else if (D <= 64)
        flash<64>(a, p, work);
    else if (D <= 128)
        flash<128>(a, p, work);
    else
        flash<256>(a, p, work);
}
