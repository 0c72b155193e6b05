// A row of activations on its way into a product: as it is, or what a norm or an activation makes of it. Computed by
// every block that needs it, which takes less time than to meet once more. Equations: kernels/reference/pointwise.py.

// Words of a staged row: what is made of it (PLAIN, RMS_NORM, LAYER_NORM, SWIGLU, GELU, GEGLU or MERGED_PARTS), rows x,
// their stride in bytes, their columns, then weight, bias and epsilon of a norm, or the rows that gate x. FRESH: 0 where
// the step before has staged the same. MERGED_PARTS: x are parts of one row (attention.cu), instead of the stride the
// channels of a head, instead of the weight how many parts it has.
enum { MAKE, X, X_STRIDE, COLUMNS, WEIGHT, BIAS, EPSILON, FRESH, STAGED };

// Where four columns lie in shared memory: a lane reads a run of 32 columns, and no two lanes the same bank; the 33 keeps
// them apart while they are written, too.
FUNCTION int place_of(int run, int quarter) { return 33 * (8 * (run / 32) + quarter) + run % 32; }

// Four channels of a head, put together from what `splits` blocks have found of it.
FUNCTION float4 merged(const float *parts, int D, int splits, int c) {
    const float *part = parts + (c / D) * splits * (D + PART_END);
    float4 v[MOST_MERGED], sum = make_float4(0, 0, 0, 0);
    float by[MOST_MERGED], most = lowest(), whole = 0;
#pragma unroll
    for (int k = 0; k < MOST_MERGED; k++) {
        const float *of = part + min(k, splits - 1) * (D + PART_END);
        v[k] = *(const float4 *)(of + c % D);
        by[k] = of[D + 1];
        most = fmaxf(most, by[k]);
    }
#pragma unroll
    for (int k = 0; k < MOST_MERGED; k++) {
        by[k] = k < splits && by[k] != lowest() ? expf(by[k] - most) : 0.0f;
        if (k < splits) whole += by[k] * part[k * (D + PART_END) + D];
        sum.x += by[k] * v[k].x, sum.y += by[k] * v[k].y, sum.z += by[k] * v[k].z, sum.w += by[k] * v[k].w;
    }
    float scale = reciprocal(whole);
    return make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale);
}

// What gates a value, of the number that it gates by.
FUNCTION float activated(int make, float x) {
    return x * sigmoid(make == SWIGLU ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x));
}

struct Row {
    int make, columns;
    const float *x, *weight, *bias;
    float mean, scale;
    int D, splits;  // of parts

    // What one value becomes.
    template <int MAKE> MEMBER float made_as(float v, float w, float b) const {
        if (MAKE == RMS_NORM) return v * scale * w;
        if (MAKE == LAYER_NORM) return (v - mean) * scale * w + b;
        if (MAKE == SWIGLU || MAKE == GEGLU) return activated(MAKE, w) * v;
        if (MAKE == GELU) return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
        return v;
    }
    MEMBER float made(float v, float w, float b) const {
        if (make == RMS_NORM) return made_as<RMS_NORM>(v, w, b);
        if (make == LAYER_NORM) return made_as<LAYER_NORM>(v, w, b);
        if (make == SWIGLU) return made_as<SWIGLU>(v, w, b);
        if (make == GEGLU) return made_as<GEGLU>(v, w, b);
        return make == GELU ? made_as<GELU>(v, w, b) : v;
    }
    MEMBER bool gated() const { return make == SWIGLU || make == GEGLU; }
    MEMBER float at(int c) const { return made(x[c], weight ? weight[c] : 0.0f, bias ? bias[c] : 0.0f); }

    // The four columns from c on, c a multiple of 4; zeros behind the end.
    MEMBER float4 four(int c) const {
        if (make == MERGED_PARTS) return c < columns ? merged(x, D, splits, c) : make_float4(0, 0, 0, 0);
        if (columns % 4) {
            float v[4];
            for (int k = 0; k < 4; k++) v[k] = c + k < columns ? at(c + k) : 0.0f;
            return make_float4(v[0], v[1], v[2], v[3]);
        }
        float4 none = make_float4(0, 0, 0, 0);
        if (c >= columns) return none;
        float4 v = *(const float4 *)(x + c), w = weight ? *(const float4 *)(weight + c) : none;
        float4 b = bias ? *(const float4 *)(bias + c) : none;
        return make_float4(made(v.x, w.x, b.x), made(v.y, w.y, b.y), made(v.z, w.z, b.z), made(v.w, w.w, b.w));
    }
};

// Row `row` of the pass, with what its norm needs of the whole row. All threads of the block.
FUNCTION Row row_at(Words a, int64 row) {
    Row r = {(int)a[MAKE], (int)a[COLUMNS], floats(a[X] + row * a[X_STRIDE]), floats(a[WEIGHT]), floats(a[BIAS]), 0, 1, 1, 1};
    if (r.make == MERGED_PARTS) r.x = floats(a[X]), r.D = a[X_STRIDE], r.splits = a[WEIGHT], r.weight = 0;
    if (r.gated()) r.weight = floats(a[WEIGHT] + row * a[X_STRIDE]);
    if (r.make == RMS_NORM || r.make == LAYER_NORM) {
        float sum = 0;
        if (r.make == LAYER_NORM) {
            for (int c = thread(); c < r.columns; c += threads()) sum += r.x[c];
            r.mean = block_sum(sum) / (float)r.columns;
        }
        sum = 0;
        for (int c = thread(); c < r.columns; c += threads()) sum += (r.x[c] - r.mean) * (r.x[c] - r.mean);
        r.scale = 1.0f / sqrtf(block_sum(sum) / (float)r.columns + (float)number(a[EPSILON]));
    }
    return r;
}

// A run of the row in 24 bits each for products with integers: x = scale (65536 high + 256 middle + low), as signed
// bytes of four columns a word. The largest keeps all the bits of its float.
struct Bytes {
    int high[8], middle[8], low[8];
    float scale, sums[2];  // sums: of x over each half
};

const float MOST_24 = 127 * 65536;  // and a little more: what rounds up still has 127 as its high byte

// Where: of every 32 runs, 16 bytes of each run side by side: two of high, of middle, of low, then scale and sums.
FUNCTION uint4 *place_of_bytes(int run, int piece) { return (uint4 *)room() + 32 * (7 * (run / 32) + piece) + run % 32; }

FUNCTION Bytes bytes_of(int run) {
    uint4 v[7];
#pragma unroll
    for (int i = 0; i < 7; i++) v[i] = *place_of_bytes(run, i);
    Bytes x;
#pragma unroll
    for (int i = 0; i < 8; i++)
        x.high[i] = (int)word_of(v, i), x.middle[i] = (int)word_of(v + 2, i), x.low[i] = (int)word_of(v + 4, i);
    x.scale = __uint_as_float(v[6].x), x.sums[0] = __uint_as_float(v[6].y), x.sums[1] = __uint_as_float(v[6].z);
    return x;
}

FUNCTION float largest_of_four(float4 v) { return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))); }

// Eight threads of a warp have four columns each of a run.
FUNCTION void put_bytes(int run, int quarter, float4 v, bool there) {
    float most = largest_of_four(v);
    for (int apart = 1; apart < 8; apart *= 2) most = fmaxf(most, shuffle(most, lane() ^ apart));
    float by = most > 1e-30f ? MOST_24 * reciprocal(most) : 0.0f, x[4] = {v.x, v.y, v.z, v.w}, sum = v.x + v.y + (v.z + v.w);
    unsigned high = 0, middle = 0, low = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int q = __float2int_rn(x[i] * by), last = (signed char)q, rest = (q - last) >> 8, next = (signed char)rest;
        high |= (unsigned)((rest - next) >> 8 & 255) << 8 * i, middle |= (unsigned)(next & 255) << 8 * i;
        low |= (unsigned)(last & 255) << 8 * i;
    }
    sum += shuffle(sum, lane() ^ 1), sum += shuffle(sum, lane() ^ 2);
    if (!there) return;
    int half = quarter / 4, word = quarter % 4;
    ((unsigned *)place_of_bytes(run, half))[word] = high;
    ((unsigned *)place_of_bytes(run, 2 + half))[word] = middle;
    ((unsigned *)place_of_bytes(run, 4 + half))[word] = low;
    float *rest = (float *)place_of_bytes(run, 6);
    if (quarter == 0) rest[0] = most * (1.0f / MOST_24);
    if (word == 0) rest[1 + half] = sum;
}

// Four columns of the row from c on as they are read, and of what they are made with; zeros behind the end.
struct Four {
    float4 v, w, b;
};

template <int MAKE> FUNCTION Four four_of(const Row &r, int c) {
    float4 none = make_float4(0, 0, 0, 0);
    Four f = {none, none, none};
    if (c >= r.columns) return f;
    if (MAKE == MERGED_PARTS) {
        f.v = merged(r.x, r.D, r.splits, c);
    } else if (r.columns % 4 == 0) {
        f.v = *(const float4 *)(r.x + c);
        if (MAKE == RMS_NORM || MAKE == LAYER_NORM || MAKE == SWIGLU || MAKE == GEGLU) f.w = *(const float4 *)(r.weight + c);
        if (MAKE == LAYER_NORM && r.bias) f.b = *(const float4 *)(r.bias + c);
    } else {
        for (int k = 0; k < 4 && c + k < r.columns; k++) {
            ((float *)&f.v)[k] = r.x[c + k];
            if (r.weight) ((float *)&f.w)[k] = r.weight[c + k];
            if (r.bias) ((float *)&f.b)[k] = r.bias[c + k];
        }
    }
    return f;
}

// What a norm needs of the whole row, whose first columns are held.
template <int MAKE> FUNCTION void measure(Row &r, const Four held[2], float epsilon) {
    float part = 1.0f / (float)r.columns;
    for (int moment = MAKE == LAYER_NORM ? 0 : 1; moment < 2; moment++) {
        float sum = 0;
        for (int c = 4 * thread(), j = 0; c < r.columns; c += 4 * threads(), j++) {
            float4 v = j == 0 ? held[0].v : j == 1 ? held[1].v : four_of<PLAIN>(r, c).v;
            float x[4] = {v.x, v.y, v.z, v.w};
            for (int k = 0; k < 4; k++) {
                float d = x[k] - r.mean;
                if (c + k < r.columns) sum += moment ? d * d : d;
            }
        }
        sum = block_sum(sum) * part;
        if (moment)
            r.scale = rsqrtf(sum + epsilon);
        else
            r.mean = sum;
    }
}

template <int MAKE> FUNCTION void stage_as(Words a, bool bytes) {
    // times four columns that a thread reads before it uses any
    const int HELD = MAKE == MERGED_PARTS ? 1 : MAKE == PLAIN || MAKE == GELU ? 4 : 2;
    Row r = {MAKE, (int)a[COLUMNS], floats(a[X]), floats(a[WEIGHT]), floats(a[BIAS]), 0, 1, (int)a[X_STRIDE], (int)a[WEIGHT]};
    float epsilon = (float)number(a[EPSILON]);
    int runs = (r.columns + 31) / 32, all = (8 * runs + 31) / 32 * 32, first = thread();
    float4 *out = (float4 *)room();
    do {
        Four held[HELD];
#pragma unroll
        for (int j = 0; j < HELD; j++) held[j] = four_of<MAKE>(r, 4 * (first + j * threads()));
        if constexpr (MAKE == RMS_NORM || MAKE == LAYER_NORM)
            if (first == thread()) measure<MAKE>(r, held, epsilon);
#pragma unroll
        for (int j = 0; j < HELD; j++) {
            int i = first + j * threads();
            const float4 &v = held[j].v, &w = held[j].w, &b = held[j].b;
            if (i >= all) break;  // a whole warp
            float4 y = make_float4(r.made_as<MAKE>(v.x, w.x, b.x), r.made_as<MAKE>(v.y, w.y, b.y),
                                   r.made_as<MAKE>(v.z, w.z, b.z), r.made_as<MAKE>(v.w, w.w, b.w));
            if (MAKE == LAYER_NORM && 4 * i >= r.columns) y = make_float4(0, 0, 0, 0);
            if (bytes) put_bytes(i / 8, i % 8, y, i < 8 * runs);
            if (i < 8 * runs && !bytes) out[place_of(i / 8, i % 8)] = y;
        }
        first += HELD * threads();
    } while (first < all);
    block_barrier();
}

// The pass's one row into shared memory, zeros behind its end up to a whole run; as floats, or as bytes.
OPERATOR void stage(Words a, bool bytes) {
    if (!a[FRESH]) return;
    switch (a[MAKE]) {
    case PLAIN: return stage_as<PLAIN>(a, bytes);
    case RMS_NORM: return stage_as<RMS_NORM>(a, bytes);
    case LAYER_NORM: return stage_as<LAYER_NORM>(a, bytes);
    case SWIGLU: return stage_as<SWIGLU>(a, bytes);
    case GELU: return stage_as<GELU>(a, bytes);
    case GEGLU: return stage_as<GEGLU>(a, bytes);
    case MERGED_PARTS: return stage_as<MERGED_PARTS>(a, bytes);
    }
}
