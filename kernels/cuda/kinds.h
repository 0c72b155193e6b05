// Kinds of weights: how a run of 32 columns of one row lies in memory, and the values that it stands for.
//
// A kind says how many 16-byte loads its run takes (LOADS), the integers (or floats) of the run (`values`), and what
// each half of the run is multiplied by and what is added (`scales`): value = d q + m. packing.py writes the layout:
// in rows of up to 32 runs side by side first the first 16 bytes of each, then the second, so that a warp reads 512
// bytes in one piece; bits above the fourth and scales lie in arrays of their own.

struct Matrix {
    const char *low, *high, *d, *s;
    int runs;  // of a row
};

const int MATRIX = 5;  // words of a matrix among a step's arguments
FUNCTION Matrix matrix_at(Words a) { return {(char *)a[0], (char *)a[1], (char *)a[2], (char *)a[3], (int)a[4]}; }

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
FUNCTION unsigned short load_short(const char *at, int64 i) { return ((const unsigned short *)at)[i]; }
FUNCTION unsigned load_word(const char *at, int64 i) { return ((const unsigned *)at)[i]; }

// 32 values of 4 bits: the low nibbles of 16 bytes, then the high ones.
FUNCTION void nibbles(const uint4 *low, int q[32]) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        unsigned word = word_of(low, i / 4);
        q[i] = (word >> (8 * (i % 4))) & 15;
        q[16 + i] = (word >> (8 * (i % 4) + 4)) & 15;
    }
}

FUNCTION void as_floats(const int q[32], float out[32]) {
#pragma unroll
    for (int i = 0; i < 32; i++) out[i] = (float)q[i];
}

// Floats in place of integers: no scales.
struct F32 {
    static const int LOADS = 8, HIGH = 0;  // HIGH: bytes of the bits above the fourth
    static const bool SCALED = false;
    static MEMBER void values(const uint4 *low, uint64, float out[32]) {
#pragma unroll
        for (int i = 0; i < 32; i++) out[i] = __uint_as_float(word_of(low, i));
    }
    static MEMBER Scales scales(const Matrix &, int64, int) { return both(1, 0); }
};

template <bool BRAIN> struct Float16 {
    static const int LOADS = 4, HIGH = 0;
    static const bool SCALED = false;
    static MEMBER void values(const uint4 *low, uint64, float out[32]) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            unsigned pair = word_of(low, i);
            out[2 * i] = BRAIN ? __uint_as_float(pair << 16) : low_half(pair);
            out[2 * i + 1] = BRAIN ? __uint_as_float(pair & 0xffff0000u) : high_half(pair);
        }
    }
    static MEMBER Scales scales(const Matrix &, int64, int) { return both(1, 0); }
};
struct F16 : Float16<false> {};
struct BF16 : Float16<true> {};

struct Q8_0 {
    static const int LOADS = 2, HIGH = 0;
    static const bool SCALED = true;
    static MEMBER void values(const uint4 *low, uint64, float out[32]) {
#pragma unroll
        for (int i = 0; i < 32; i++) out[i] = (float)(signed char)(word_of(low, i / 4) >> (8 * (i % 4)));
    }
    static MEMBER Scales scales(const Matrix &w, int64 row, int run) {
        return both(from_half(load_short(w.d, row * w.runs + run)), 0);
    }
};

// Integers of 4 bits, and of 5 with one more bit each.
template <int BITS> struct Nibbles {
    static const int LOADS = 1, HIGH = BITS == 5 ? 4 : 0;
    static const bool SCALED = true;
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
    static MEMBER Scales scales(const Matrix &w, int64 row, int run) {
        float d = from_half(load_short(w.d, row * w.runs + run));
        return both(d, -d * (1 << (BITS - 1)));
    }
};
struct Q4_0 : Centred<4> {};
struct Q5_0 : Centred<5> {};

// q d + m
template <int BITS> struct Raised : Nibbles<BITS> {
    static MEMBER Scales scales(const Matrix &w, int64 row, int run) {
        unsigned pair = load_word(w.d, row * w.runs + run);
        return both(low_half(pair), high_half(pair));
    }
};
struct Q4_1 : Raised<4> {};
struct Q5_1 : Raised<5> {};

// q (scale d) - minimum dmin, scale and minimum being bytes of each run, d and dmin of eight runs.
template <int BITS> struct Blocked : Nibbles<BITS> {
    static MEMBER Scales scales(const Matrix &w, int64 row, int run) {
        unsigned pair = load_word(w.d, (row * w.runs + run) / 8), of_run = load_short(w.s, row * w.runs + run);
        return both((float)(of_run & 255) * low_half(pair), -(float)(of_run >> 8) * high_half(pair));
    }
};
struct Q4_K : Blocked<4> {};
struct Q5_K : Blocked<5> {};

// (q - 32) (scale d), a signed byte of scale for 16 columns, d of eight runs.
struct Q6_K {
    static const int LOADS = 1, HIGH = 8;
    static const bool SCALED = true;
    static MEMBER void values(const uint4 *low, uint64 high, float out[32]) {
        int q[32];
        nibbles(low, q);
#pragma unroll
        for (int i = 0; i < 32; i++) q[i] |= (int)((unsigned)(high >> (2 * i)) & 3) << 4;
        as_floats(q, out);
    }
    static MEMBER Scales scales(const Matrix &w, int64 row, int run) {
        float d = from_half(load_short(w.d, (row * w.runs + run) / 8));
        unsigned of_run = load_short(w.s, row * w.runs + run);
        float first = d * (float)(signed char)(of_run & 255), second = d * (float)(signed char)(of_run >> 8);
        return {{first, second}, {-32 * first, -32 * second}};
    }
};

// One run of one row, as it lies in memory.
template <class K> struct Run {
    uint4 low[K::LOADS];
    uint64 high;
    Scales by;
};

template <class K> FUNCTION Run<K> load_run(const Matrix &w, int64 row, int run) {
    Run<K> r;
    int before = run / 32 * 32, beside = min(32, w.runs - before);
    const char *at = w.low + 16 * (K::LOADS * (row * w.runs + before) + run - before);
#pragma unroll
    for (int i = 0; i < K::LOADS; i++) r.low[i] = load_weights(at + 16 * i * beside);
    r.high = 0;
    if (K::HIGH == 4) r.high = load_word(w.high, row * w.runs + run);
    if (K::HIGH == 8) r.high = ((const uint64 *)w.high)[row * w.runs + run];
    r.by = K::scales(w, row, run);
    return r;
}

// The 32 values of a run.
template <class K> FUNCTION void unpack(const Run<K> &r, float out[32]) {
    K::values(r.low, r.high, out);
    if (K::SCALED) {
#pragma unroll
        for (int i = 0; i < 32; i++) out[i] = r.by.d[i / 16] * out[i] + r.by.m[i / 16];
    }
}
