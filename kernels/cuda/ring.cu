// The first level: what enters the ring, what leaves it, what stays (kernels/reference/ring.py, kernels/cpu/ring.py).
// In a token's launch one block does what belongs to one row and one key head.

// A channel's part in a rotation: which pair it belongs to, the pair's two channels, and whether it is the upper one.
struct Turn {
    int pair, first, second;
    bool upper;

    // The channel of (low, high) turned by an angle's cosine and sine.
    MEMBER float of(float low, float high, float c, float s) const { return upper ? low * s + high * c : low * c - high * s; }
};

FUNCTION Turn turn_of(int channel, int D, bool interleaved) {
    int half = D / 2, pair = interleaved ? channel / 2 : channel % half;
    if (interleaved) return {pair, 2 * pair, 2 * pair + 1, channel % 2 == 1};
    return {pair, pair, half + pair, channel >= half};
}

// A channel of key or value as the ring keeps it, and as float32 what it has become by that.
FUNCTION float keep(char *to, int i, float x, bool half) {
    if (!half) return ((float *)to)[i] = x;
    unsigned short h = to_half(x);
    ((unsigned short *)to)[i] = h;
    return from_half(h);
}

// What `push` is told; a 0 where something is not asked for. Addresses are read where they are used: in registers there is
// no room for all of them.
struct Pushing {
    Words a;
    int G, D, R, pairs, turned;  // R: query heads of a key head; pairs of channels of a head, and those that rotate
    int key_columns;
    bool half, interleaved, rotates, far;
    MEMBER char *at(int word) const { return (char *)a[word]; }
    MEMBER int new_stride() const { return (half ? 2 : 4) * key_columns; }
};

FUNCTION Pushing pushing_at(Words a) {
    using namespace push_at;
    int heads = a[H], key_heads = a[G], width = a[D];
    return {a, key_heads, width, quotient(heads, key_heads), (width + 1) / 2, (int)a[turned] / 2, key_heads * width,
            a[half] != 0, a[interleaved] != 0, a[push_at::cos] != 0, a[q_far] != 0};
}

// Two channels of a head that turn together, all that is needed of them loaded.
struct Pushed {
    bool there, key, two;  // two: the second channel is there
    int row, head, first, second;
    float low, high, c, s, c_far, s_far, v_low, v_high;
};

// The i-th pair of an item, the key's behind those of its queries.
FUNCTION Pushed load_pair(const Pushing &m, Words p, unsigned item, unsigned i, bool there) {
    Pushed t = {};
    t.there = there;
    if (!there) return t;
    int of = quotient(i, m.pairs), pair = i - of * m.pairs, row = quotient(item, m.G), g = item - row * m.G;
    t.row = row, t.key = of == m.R, t.head = t.key ? g : g * m.R + of;
    // channels that do not rotate pair with their neighbours, behind those that do
    bool beside = m.interleaved || pair >= m.turned || !m.rotates;
    t.first = beside ? 2 * pair : pair, t.second = beside ? t.first + 1 : pair + m.turned;
    t.two = t.second < m.D;
    const float *x = (const float *)m.at(t.key ? push_at::k : push_at::q);
    x += (int64)row * m.key_columns * (t.key ? 1 : m.R) + m.D * t.head;
    t.low = x[t.first], t.high = t.two ? x[t.second] : 0.0f;
    t.c = t.c_far = 1, t.s = t.s_far = 0;
    if (m.rotates && pair < m.turned) {
        int64 angle = (int64)m.turned * row + pair;
        t.c = floats(m.a[push_at::cos])[angle], t.s = floats(m.a[push_at::sin])[angle];
        if (m.far && !t.key) t.c_far = floats(m.a[push_at::cos_far])[angle], t.s_far = floats(m.a[push_at::sin_far])[angle];
    }
    if (!t.key) return t;
    const float *v = (const float *)m.at(push_at::v) + (int64)row * m.key_columns + m.D * g;
    t.v_low = v[t.first], t.v_high = t.two ? v[t.second] : 0.0f;
    if (m.a[push_at::taps]) {  // k'_t = w_0 k_t + w_1 k_{t-1}
        const float *now = floats(m.a[push_at::taps]) + m.D * g, *then = now + m.key_columns;
        const float *before = (const float *)m.at(push_at::k) + (int64)(row - 1) * m.key_columns;
        Words of_row = sequence_of(p, row);
        if (row == of_row[ROW]) before = floats(words(of_row[FIELDS])[m.a[push_at::last]]);
        before += m.D * g;
        t.low = now[t.first] * t.low + then[t.first] * before[t.first];
        if (t.two) t.high = now[t.second] * t.high + then[t.second] * before[t.second];
    }
    return t;
}

// columns: of the rows.
FUNCTION void put_pair(char *rows, int columns, const Pushed &t, int D, float low, float high) {
    float *y = (float *)rows + (int64)t.row * columns + D * t.head;
    y[t.first] = low;
    if (t.two) y[t.second] = high;
}

FUNCTION void push_pair(const Pushing &m, Words p, const Pushed &t) {
    using namespace push_at;
    if (!t.there) return;
    float low = m.rotates ? t.low * t.c - t.high * t.s : t.low, high = m.rotates ? t.low * t.s + t.high * t.c : t.high;
    if (!t.key) {
        put_pair(m.at(q_out), m.R * m.key_columns, t, m.D, low, high);
        low = t.low * t.c_far - t.high * t.s_far, high = t.low * t.s_far + t.high * t.c_far;
        if (m.rotates && m.far) put_pair(m.at(q_far), m.R * m.key_columns, t, m.D, low, high);
        return;
    }
    if (m.a[k_plain]) put_pair(m.at(k_plain), m.key_columns, t, m.D, t.low, t.high);
    int64 own = (m.half ? 2 : 4) * m.D * t.head, head = (int64)t.row * m.new_stride() + own;
    char *to_k = m.at(k_new) + head, *to_v = m.at(v_new) + head;
    float k_low = keep(to_k, t.first, low, m.half), v_low = keep(to_v, t.first, t.v_low, m.half);
    float k_high = 0, v_high = 0;
    if (t.two) k_high = keep(to_k, t.second, high, m.half), v_high = keep(to_v, t.second, t.v_high, m.half);
    if (m.a[k_field] >= 0) {  // a token's pass, which has one sequence
        Words fields = words(sequence(p, 0)[FIELDS]);
        own += slot_of(position(p, 0), m.a[push_at::window], m.a[push_at::sinks]) * m.new_stride();
        char *k_ring = (char *)fields[m.a[k_field]] + own, *v_ring = (char *)fields[m.a[v_field]] + own;
        keep(k_ring, t.first, low, m.half), keep(v_ring, t.first, t.v_low, m.half);
        if (t.two) keep(k_ring, t.second, high, m.half), keep(v_ring, t.second, t.v_high, m.half);
    }
    if (!m.a[k_out]) return;
    put_pair(m.at(k_out), m.key_columns, t, m.D, k_low, k_high);
    put_pair(m.at(v_out), m.key_columns, t, m.D, v_low, v_high);
}

// A thread takes pairs of channels; in a launch of its own, of any row and head, and two of them at a time.
OPERATOR void push(Words a, Words p, Work work) {
    const Pushing m = pushing_at(a);
    unsigned items = p[ROWS] * m.G, each = (m.R + 1) * m.pairs;
    if (work.by_head) {
        for (unsigned item = work.block; item < items; item += work.blocks)
            for (unsigned i = thread(); i < each; i += threads()) push_pair(m, p, load_pair(m, p, item, i, true));
        return;
    }
    unsigned apart = work.blocks * threads(), count = items * each;
    for (unsigned i = work.block * threads() + thread(); i < count; i += 2 * apart) {
        unsigned j = i + apart;
        unsigned of_i = quotient(i, each), of_j = quotient(j, each);
        Pushed one = load_pair(m, p, of_i, i - of_i * each, true), other = load_pair(m, p, of_j, j - of_j * each, j < count);
        push_pair(m, p, one);
        push_pair(m, p, other);
    }
}

// Of the tokens that leave the window while each row enters it, a key head's part of a per-token field.
OPERATOR void take(Words a, Words p, Work work) {
    int64 field = a[take_at::field], width = a[take_at::width], window = a[take_at::window], sinks = a[take_at::sinks];
    bool half = a[take_at::half];
    int64 size = half ? 2 : 4;
    int64 G = p[KEY_HEADS], part = width / G;
    for (int64 item = work.block; item < p[ROWS] * G; item += work.blocks) {
        int64 row = item / G, first = item % G * part;
        Words of = sequence_of(p, row);
        int64 leaving = position(p, row) - window;
        if (leaving < sinks) continue;
        int64 at = a[take_at::rows] + (leaving - of[FIRST] + of[ROW]) * width * size;
        if (leaving < of[FIRST]) at = words(of[FIELDS])[field] + slot_of(leaving, window, sinks) * width * size;
        for (int64 i = first + thread(); i < first + part; i += threads())
            floats(a[take_at::out])[width * row + i] = half ? from_half(shorts(at)[i]) : floats(at)[i];
    }
}

// What `insert` is told. A row is moved in units: 16 bytes, where they lie so, or 2.
struct Inserting {
    int64 field, from, size, window, sinks;
    bool wide;
};

FUNCTION void insert_unit(const Inserting &m, Words p, int64 row, unsigned unit) {
    const char *from = (const char *)m.from + row * m.size;
    uint4 sixteen = {};
    unsigned short two = 0;
    if (m.wide) sixteen = ((const uint4 *)from)[unit];
    else two = ((const unsigned short *)from)[unit];
    Words of = sequence_of(p, row);
    int64 first = of[FIRST], at = first + row - of[ROW];
    if (m.window && at >= m.sinks && at < first + of[COUNT] - m.window) return;
    char *to = (char *)words(of[FIELDS])[m.field] + slot_of(at, m.window, m.sinks) * m.size;
    if (m.wide) ((uint4 *)to)[unit] = sixteen;
    else ((unsigned short *)to)[unit] = two;
}

// The rows that stay, into their slots; in a token's launch a key head's part of `size` bytes by its block.
OPERATOR void insert(Words a, Words p, Work work) {
    using namespace insert_at;
    Inserting m = {a[field], a[insert_at::rows], a[width] * (a[half] ? 2 : 4), a[window], a[sinks], false};
    int G = p[KEY_HEADS], count = p[ROWS];
    unsigned part = (unsigned)m.size / G;
    m.wide = part % 16 == 0 && (m.from | m.size) % 16 == 0;
    unsigned units = part / (m.wide ? 16 : 2), each = units * G;
    if (work.by_head) {
        for (unsigned item = work.block; item < (unsigned)count * G; item += work.blocks)
            for (unsigned i = thread(); i < units; i += threads()) insert_unit(m, p, item / G, item % G * units + i);
        return;
    }
    for (unsigned i = work.block * threads() + thread(); i < count * each; i += work.blocks * threads())
        insert_unit(m, p, i / each, i % each);
}

// The last row of each sequence into a field of its state.
OPERATOR void keep_last(Words a, Words p, Work work) {
    int64 G = p[KEY_HEADS], width = a[keep_last_at::width], part = width / G;
    for (int64 item = work.block; item < p[SEQUENCES] * G; item += work.blocks) {
        Words of = sequence(p, item / G);
        int64 first = item % G * part;
        for (int64 i = first + thread(); i < first + part; i += threads())
            floats(words(of[FIELDS])[a[keep_last_at::field]])[i] =
                floats(a[keep_last_at::x])[(of[ROW] + of[COUNT] - 1) * width + i];
    }
}
