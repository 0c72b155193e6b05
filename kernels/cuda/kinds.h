// Kinds of weights: how a matrix lies in memory, and the values that a run of 32 columns of one row stands for.
//
// A matrix is cut into chunks of ROWS rows and up to 32 runs, one after the other (cuda/packing.py writes them). Of each row
// a chunk has first the 16-byte loads of its runs, the first load of all runs, then the second, so that a warp reads 512
// bytes in one piece; then the bits above the fourth (HIGH bytes a run), then scales (D bytes for each D_RUNS runs, and
// S bytes a run). A kind says how many loads its run takes (LOADS), the integers or floats of the run (`values`), and
// what each half of the run is multiplied by and what is added (`scales`, the same for both halves unless HALVED, m none unless ADDED):
// value = d q + m. `integers` are the run's as bytes, four a word.

struct Matrix {
    const char *chunks;
    int runs;  // of a row
    int64 tile;  // bytes of the chunks of ROWS rows
    int chunk;  // bytes of one with 32 runs
};

const int MATRIX = 4;  // words of a matrix among a step's arguments
FUNCTION Matrix matrix_at(Words a) { return {(const char *)a[0], (int)a[1], a[2], (int)a[3]}; }

struct Scales {
    float d[2], m[2];  // of columns 0 to 15 and 16 to 31
};

FUNCTION Scales both(float d, float m) { return {{d, d}, {m, m}}; }
FUNCTION float low_half(unsigned pair) { return from_half((unsigned short)(pair & 0xffff)); }
FUNCTION float high_half(unsigned pair) { return from_half((unsigned short)(pair >> 16)); }
FUNCTION unsigned word_of(const uint4 *low, int i) {
    const uint4 &v = low[i / 4];
    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
}
FUNCTION unsigned short short_at(const char *at) { return *(const unsigned short *)at; }
FUNCTION unsigned word_at(const char *at) { return *(const unsigned *)at; }

// 32 values of 4 bits: the low nibbles of 16 bytes, then the high ones.
FUNCTION void nibbles(const uint4 *low, int q[32]) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        unsigned word = word_of(low, i / 4);
        q[i] = (word >> (8 * (i % 4))) & 15;
        q[16 + i] = (word >> (8 * (i % 4) + 4)) & 15;
    }
}

// The same four in a word, as bytes.
FUNCTION void nibbles_in_bytes(const uint4 *low, int q[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        q[i] = word_of(low, i) & 0x0f0f0f0f;
        q[4 + i] = word_of(low, i) >> 4 & 0x0f0f0f0f;
    }
}

FUNCTION void as_floats(const int q[32], float out[32]) {
#pragma unroll
    for (int i = 0; i < 32; i++) out[i] = (float)q[i];
}

// Floats in place of integers: no scales.
struct F32 {
    static const int ROWS = 1, LOADS = 8, HIGH = 0, D = 0, D_RUNS = 1, S = 0;
    static const bool SCALED = false;
    static MEMBER void values(const uint4 *low, uint64, float out[32]) {
#pragma unroll
        for (int i = 0; i < 32; i++) out[i] = __uint_as_float(word_of(low, i));
    }
    static MEMBER Scales scales(const char *, const char *) { return both(1, 0); }
};

template <bool BRAIN> struct Float16 {
    static const int ROWS = 2, LOADS = 4, HIGH = 0, D = 0, D_RUNS = 1, S = 0;
    static const bool SCALED = false, HALVES = !BRAIN;
    static MEMBER void values(const uint4 *low, uint64, float out[32]) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            unsigned pair = word_of(low, i);
            out[2 * i] = BRAIN ? __uint_as_float(pair << 16) : low_half(pair);
            out[2 * i + 1] = BRAIN ? __uint_as_float(pair & 0xffff0000u) : high_half(pair);
        }
    }
    static MEMBER Scales scales(const char *, const char *) { return both(1, 0); }
};
struct F16 : Float16<false> {};
struct BF16 : Float16<true> {};

struct Q8_0 {
    static const int ROWS = 4, LOADS = 2, HIGH = 0, D = 2, D_RUNS = 1, S = 0;
    static const bool SCALED = true, HALVED = false, ADDED = false;
    static MEMBER void integers(const uint4 *low, uint64, int q[8]) {
#pragma unroll
        for (int i = 0; i < 8; i++) q[i] = (int)word_of(low, i);
    }
    static MEMBER void values(const uint4 *low, uint64, float out[32]) {
#pragma unroll
        for (int i = 0; i < 32; i++) out[i] = (float)(signed char)(word_of(low, i / 4) >> (8 * (i % 4)));
    }
    static MEMBER Scales scales(const char *d, const char *) { return both(from_half(short_at(d)), 0); }
};

// Integers of 4 bits, and of 5 with one more bit each.
template <int BITS> struct Nibbles {
    static const int ROWS = BITS == 4 ? 8 : 4, LOADS = 1, HIGH = BITS == 5 ? 4 : 0;
    static const bool SCALED = true, HALVED = false, ADDED = true;
    static MEMBER void integers(const uint4 *low, uint64 high, int q[8]) {
        nibbles_in_bytes(low, q);
        if (BITS == 5) {
#pragma unroll
            for (int i = 0; i < 8; i++) q[i] |= ((unsigned)high >> 4 * i & 15) * 0x02040810 & 0x10101010;  // a bit a byte
        }
    }
    static MEMBER void values(const uint4 *low, uint64 high, float out[32]) {
        int q[32];
        nibbles(low, q);
        if (BITS == 5) {
#pragma unroll
            for (int i = 0; i < 32; i++) q[i] |= (int)(((unsigned)high >> i) & 1) << 4;
        }
        as_floats(q, out);
    }
};

// (q - half of the range) d
template <int BITS> struct Centred : Nibbles<BITS> {
    static const int D = 2, D_RUNS = 1, S = 0;
    static MEMBER Scales scales(const char *d, const char *) {
        float by = from_half(short_at(d));
        return both(by, -by * (1 << (BITS - 1)));
    }
};
struct Q4_0 : Centred<4> {};
struct Q5_0 : Centred<5> {};

// q d + m
template <int BITS> struct Raised : Nibbles<BITS> {
    static const int ROWS = 4, D = 4, D_RUNS = 1, S = 0;
    static MEMBER Scales scales(const char *d, const char *) {
        unsigned pair = word_at(d);
        return both(low_half(pair), high_half(pair));
    }
};
struct Q4_1 : Raised<4> {};
struct Q5_1 : Raised<5> {};

// q (scale d) - minimum dmin, scale and minimum being bytes of each run, d and dmin of eight runs.
template <int BITS> struct Blocked : Nibbles<BITS> {
    static const int D = 4, D_RUNS = 8, S = 2;
    static MEMBER Scales scales(const char *d, const char *s) {
        unsigned pair = word_at(d), of_run = short_at(s);
        return both((float)(of_run & 255) * low_half(pair), -(float)(of_run >> 8) * high_half(pair));
    }
};
struct Q4_K : Blocked<4> {};
struct Q5_K : Blocked<5> {};

// (q - 32) (scale d), a signed byte of scale for 16 columns, d of eight runs.
struct Q6_K {
    static const int ROWS = 4, LOADS = 1, HIGH = 8, D = 2, D_RUNS = 8, S = 2;
    static const bool SCALED = true, HALVED = true, ADDED = true;
    static MEMBER void integers(const uint4 *low, uint64 high, int q[8]) {
        nibbles_in_bytes(low, q);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            unsigned pairs = (unsigned)(high >> 8 * i) & 255;
            pairs = (pairs | pairs << 12) & 0x000f000f;
            q[i] |= ((pairs | pairs << 6) & 0x03030303) << 4;
        }
    }
    static MEMBER void values(const uint4 *low, uint64 high, float out[32]) {
        int q[32];
        nibbles(low, q);
#pragma unroll
        for (int i = 0; i < 32; i++) q[i] |= (int)((unsigned)(high >> (2 * i)) & 3) << 4;
        as_floats(q, out);
    }
    static MEMBER Scales scales(const char *d, const char *s) {
        unsigned of_run = short_at(s);
        float by = from_half(short_at(d));
        float first = by * (float)(signed char)(of_run & 255), second = by * (float)(signed char)(of_run >> 8);
        return {{first, second}, {-32 * first, -32 * second}};
    }
};

// One run of one row, as it lies in memory.
template <class K> struct Run {
    uint4 low[K::LOADS];
    uint64 high;
    Scales by;
};

// Run `run` of row `row` of a chunk with `runs` of them; SHARED: which lies in shared memory.
template <class K, bool SHARED> FUNCTION Run<K> run_of(const char *chunk, int runs, int row, int run) {
    Run<K> r;
    const char *low = chunk + 16 * (K::LOADS * runs * row + run);
#pragma unroll
    for (int i = 0; i < K::LOADS; i++)
        r.low[i] = SHARED ? *(const uint4 *)(low + 16 * i * runs) : load_weights(low + 16 * i * runs);
    int at = runs * row + run;
    const char *high = chunk + 16 * K::LOADS * K::ROWS * runs, *d = high + K::HIGH * K::ROWS * runs;
    const char *s = d + K::D * K::ROWS * (runs / K::D_RUNS);
    r.high = 0;
    if (K::HIGH == 4) r.high = word_at(high + 4 * at);
    if (K::HIGH == 8) r.high = *(const uint64 *)(high + 8 * at);
    r.by = K::scales(d + K::D * (at / K::D_RUNS), s + K::S * at);
    return r;
}

template <class K> FUNCTION Run<K> load_run(const Matrix &w, int64 row, int run) {
    int before = run / 32 * 32;
    const char *chunk = w.chunks + row / K::ROWS * w.tile + run / 32 * w.chunk;
    return run_of<K, false>(chunk, min(32, w.runs - before), row % K::ROWS, run - before);
}

// The 32 values of a run.
template <class K> FUNCTION void unpack(const Run<K> &r, float out[32]) {
    K::values(r.low, r.high, out);
    if (K::SCALED) {
#pragma unroll
        for (int i = 0; i < 32; i++) out[i] = r.by.d[i / 16] * out[i] + r.by.m[i / 16];
    }
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
