// Softmax attention of a prompt's chunk on tensor cores: one sequence. A block takes 128 queries (tokens times heads
// of a key head) through all the keys that any of them sees, a tile at a time, and no score leaves the registers.
// Equation: kernels/reference/attention.py. Blocks of 256 threads.
//
// Tiles begin at multiples of their size in the stream, and one of which a query sees nothing leaves its sums as they
// are: so the chunk that a token came in does not show in its attention's bits.

// WIDE: channels of a head, rounded up.
template <int WIDE> struct FlashShape {
    static const int QUERIES = 128;  // 16 of each warp
    static const int KEYS = WIDE > 128 ? 32 : 64;
    static const int PIECES = WIDE / 8;  // of 16 bytes in a row
    static const int BYTES = 2 * WIDE * (QUERIES + 2 * KEYS);
};

// Shared memory behind the desk is what kernels/table.py says: no form may need more.
static_assert(FlashShape<256>::BYTES <= 98304 && FlashShape<128>::BYTES <= 512 * 128);

const float UNSEEN = -1e30f;  // a maximum before the first score

// Where a piece of a row lies, the first or the second of a pair: 8 neighbouring rows, read together, have the same
// piece in different banks. Pairs are told apart so that few addresses have to be kept in registers.
template <int PIECES> FUNCTION char *flash_piece(char *at, int row, int pair, int second) {
    int turn = PIECES < 8 ? row / 2 % 4 : row % 8;
    return at + 16 * PIECES * row + pair / 4 * 128 + 16 * (pair % 4 * 2 ^ second ^ turn);
}

// What a step's words say; those seldom asked for stay where they are.
struct Flash {
    Words a, of;  // of: the sequence
    int group, G, D, total;  // query heads of a key head; how many queries a key head has
    int slot;  // behind the sinks, of the pass's first position

    MEMBER int64 q_stride() const { return a[2]; }
    MEMBER int64 window() const { return a[10]; }
    MEMBER int64 sinks() const { return a[11]; }
};

FUNCTION Flash flash_at(Words a, Words p) {
    Words of = sequence(p, 0);
    int group = a[7] / a[8], slot = a[10] ? (of[FIRST] - a[11]) % a[10] : 0;
    return {a, of, group, (int)a[8], (int)a[9], (int)p[ROWS] * group, slot};
}

// The i-th query of key head g, token by token (beyond the last: the last): where its channels lie, in bytes.
FUNCTION int64 flash_row(const Flash &f, int g, int i) {
    i = min(i, f.total - 1);
    return i / f.group * f.q_stride() + 4 * f.D * (g * f.group + i % f.group);
}

// Where in the stream its token stands, and the first position that the window of a token there holds.
FUNCTION int64 flash_position(const Flash &f, int i) { return f.of[FIRST] + min(i, f.total - 1) / f.group; }
FUNCTION int64 flash_low(const Flash &f, int64 at) { return f.window() ? max(f.sinks(), at - f.window() + 1) : 0; }

// Keys of a block, either sinks or those in windows, counted from one that begins a tile.
struct Reach {
    bool far;
    int64 origin;  // its position
    int low, stop;  // which of them any query sees
    int fresh;  // from which on they are the pass's own
    int slot, window, sinks;  // where the origin lies in the ring, and that behind the sinks; window 0: no ring

    // A position as such a count; far ones may be nearer, but never among these keys.
    MEMBER int count(int64 at) const { return (int)min(at - origin, (int64)1 << 30); }
};

template <int KEYS> FUNCTION Reach reach_of(const Flash &f, bool far, int64 earliest, int64 latest) {
    int64 low = far ? 0 : flash_low(f, earliest);
    int64 stop = !far ? latest + 1 : f.window() ? min(f.sinks(), latest + 1) : 0;
    Reach r = {far, low / KEYS * KEYS, 0, 0, 0, 0, 0, 0};
    r.low = r.count(low), r.stop = r.count(stop), r.fresh = r.count(f.of[FIRST]);
    if (far || !f.window()) {
        r.slot = (int)r.origin;
    } else {
        r.window = (int)f.window(), r.sinks = (int)f.sinks();
        r.slot = (f.slot - r.fresh) % r.window;
        if (r.slot < 0) r.slot += r.window;
    }
    return r;
}

// What the i-th query sees of them.
struct Sight {
    int low, high;
};

FUNCTION Sight sight_of(const Flash &f, const Reach &r, int i) {
    int64 at = flash_position(f, i);
    return {r.far ? 0 : r.count(flash_low(f, at)), min(r.count(at), r.stop - 1)};
}

// Queries from `first` on as halves, in units in which a score is an exponent of 2.
template <int WIDE> FUNCTION void put_queries(const Flash &f, int64 q, int g, int first, char *to) {
    typedef FlashShape<WIDE> Shape;
    float scale = 1.44269504f * rsqrtf((float)f.D);
    for (int i = thread(); i < Shape::QUERIES * Shape::PIECES; i += threads()) {
        int query = i / Shape::PIECES, piece = i % Shape::PIECES;
        const float *x = floats(q + flash_row(f, g, first + query));
        unsigned pair[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int c = 8 * piece + 2 * k;
            pair[k] = c < f.D ? to_halves(scale * x[c], scale * x[c + 1]) : 0;
        }
        uint4 *own = (uint4 *)flash_piece<Shape::PIECES>(to, query, piece / 2, piece % 2);
        *own = make_uint4(pair[0], pair[1], pair[2], pair[3]);
    }
}

// The keys (or values) of the tile that begins at `begin`, zeros where no query sees them.
template <int WIDE>
FUNCTION void fetch_keys(const Flash &f, const Reach &r, int64 ring, int64 fresh, int begin, char *to) {
    typedef FlashShape<WIDE> Shape;
    const int SHARERS = 256 / Shape::KEYS;  // threads of a key
    int key = thread() / SHARERS, at = begin + key;
    bool there = r.low <= at && at < r.stop;
    int64 slot = r.window ? (unsigned)(r.slot + at) % (unsigned)r.window + r.sinks : r.slot + at;
    int64 row = at < r.fresh ? slot : at - r.fresh;
    const char *from = (const char *)(at < r.fresh ? ring : fresh) + 2 * f.G * f.D * row;
    for (int piece = thread() % SHARERS; piece < Shape::PIECES; piece += SHARERS) {
        char *own = flash_piece<Shape::PIECES>(to, key, piece / 2, piece % 2);
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
    int blocks = (f.total + Shape::QUERIES - 1) / Shape::QUERIES;
    for (int item = work.block; item < blocks * f.G; item += work.blocks) {
        // The latest first: they see the most.
        int g = item % f.G, first = (blocks - 1 - item / f.G) * Shape::QUERIES;
        int64 beside = 2 * f.D * g, ahead = beside + 2 * f.G * f.D * f.of[ROW];
        int64 k_ring = words(f.of[FIELDS])[a[3]] + beside, v_ring = words(f.of[FIELDS])[a[4]] + beside;
        int64 k_new = a[5] + ahead, v_new = a[6] + ahead;
        int of_warp = 16 * warp(), own = first + of_warp + lane() / 4;

        float out[OUT_TILES][4], top[2] = {UNSEEN, UNSEEN}, sum[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < OUT_TILES * 4; i++) out[i / 4][i % 4] = 0;
        for (int far = 1; far >= 0; far--) {
            Reach r = reach_of<KEYS>(f, far, flash_position(f, first), flash_position(f, first + Shape::QUERIES - 1));
            if (r.low >= r.stop) continue;
            Sight early = sight_of(f, r, first + of_warp), late = sight_of(f, r, first + of_warp + 15);
            put_queries<WIDE>(f, far && a[1] ? a[1] : a[0], g, first, queries);
            fetch_keys<WIDE>(f, r, k_ring, k_new, 0, keys);
            for (int begin = 0; begin < r.stop; begin += KEYS) {
                wait_for_groups<0>();
                block_barrier();  // the keys are there, the values of the tile before are no longer needed
                fetch_keys<WIDE>(f, r, v_ring, v_new, begin, values);

                float scores[KEY_TILES][4];
                bool seen = begin <= late.high && begin + KEYS > early.low;
                if (seen) {
#pragma unroll
                    for (int i = 0; i < KEY_TILES * 4; i++) scores[i / 4][i % 4] = 0;
#pragma unroll(WIDE > 128 ? 1 : 4)
                    for (int c = 0; c < WIDE / 16; c++) {
                        unsigned A[4];
                        load_matrices(A, flash_piece<PIECES>(queries, of_warp + lane() % 16, c, lane() / 16));
#pragma unroll
                        for (int j = 0; j < KEY_TILES / 2; j++) {
                            unsigned B[4];
                            int key = 16 * j + lane() / 16 * 8 + lane() % 8;
                            load_matrices(B, flash_piece<PIECES>(keys, key, c, lane() / 8 % 2));
                            multiply(scores[2 * j], A, B);
                            multiply(scores[2 * j + 1], A, B + 2);
                        }
                    }
                    if (begin < late.low || begin + KEYS - 1 > early.high) {
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            Sight mine = sight_of(f, r, own + 8 * h);
#pragma unroll
                            for (int i = 0; i < KEY_TILES * 2; i++) {
                                int key = begin + 8 * (i / 2) + 2 * (lane() % 4) + i % 2;
                                if (key < mine.low || key > mine.high) scores[i / 2][2 * h + i % 2] = 2 * UNSEEN;
                            }
                        }
                    }
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        float most = top[h];
#pragma unroll
                        for (int i = 0; i < KEY_TILES * 2; i++) most = fmaxf(most, scores[i / 2][2 * h + i % 2]);
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
                block_barrier();  // the values are there, the keys are no longer needed
                if (begin + KEYS < r.stop) fetch_keys<WIDE>(f, r, k_ring, k_new, begin + KEYS, keys);
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
                        load_matrices_turned(B, flash_piece<PIECES>(values, 16 * k + lane() % 16, j, lane() / 16));
                        multiply(out[2 * j], A, B);
                        multiply(out[2 * j + 1], A, B + 2);
                    }
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float root = rsqrtf(of_four_sum(sum[h])), part = root * root;  // a division may call, with no register free
            if (own + 8 * h >= f.total) continue;
            float *y = floats(a[12] + flash_row(f, g, own + 8 * h));
#pragma unroll
            for (int i = 0; i < OUT_TILES * 2; i++) {
                int c = 8 * (i / 2) + 2 * (lane() % 4) + i % 2;
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
