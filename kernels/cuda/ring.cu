// The first level: what enters the ring, what leaves it, what stays (tcinfer/memory/local.py, kernels/cpu/ring.py).
// One block does what belongs to one row and one key head.

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

OPERATOR void push(Words a, Words p, Work work) {
    int64 q_stride = a[1], kv_stride = a[4], new_stride = a[18], last_field = a[23];
    int H = a[5], G = a[6], D = a[7], R = H / G;
    bool half = a[8], interleaved = a[9], turns = a[10] != 0;
    for (int64 item = work.block; item < p[ROWS] * G; item += work.blocks) {
        int64 row = item / G;
        int g = item % G;
        const float *c = floats(a[10]) + D / 2 * row, *s = floats(a[11]) + D / 2 * row;
        const float *c_far = floats(a[12]) + D / 2 * row, *s_far = floats(a[13]) + D / 2 * row;
        for (int i = thread(); i < R * D; i += threads()) {  // each thread one channel of a pair
            int h = g * R + i / D, channel = i % D;
            const float *x = floats(a[0] + row * q_stride) + D * h;
            float *y = floats(a[14] + row * q_stride) + D * h;
            if (!turns) {
                y[channel] = x[channel];
                continue;
            }
            Turn t = turn_of(channel, D, interleaved);
            y[channel] = t.of(x[t.first], x[t.second], c[t.pair], s[t.pair]);
            if (a[15])
                (floats(a[15] + row * q_stride) + D * h)[channel] =
                    t.of(x[t.first], x[t.second], c_far[t.pair], s_far[t.pair]);
        }
        const float *x = floats(a[2] + row * kv_stride) + D * g, *v = floats(a[3] + row * kv_stride) + D * g;
        const float *now = 0, *then = 0, *before = 0;
        if (a[22]) {  // k'_t = w_0 k_t + w_1 k_{t-1}
            Words of = sequence_of(p, row);
            now = floats(a[22]) + D * g, then = floats(a[22]) + D * (G + g);
            before = row > of[ROW] ? floats(a[2] + (row - 1) * kv_stride) + D * g : floats(words(of[FIELDS])[last_field]) + D * g;
        }
        char *to_k = (char *)(a[16] + row * new_stride) + (half ? 2 : 4) * D * g;
        char *to_v = (char *)(a[17] + row * new_stride) + (half ? 2 : 4) * D * g;
        float *k_out = a[19] ? floats(a[19] + row * kv_stride) + D * g : 0;
        float *v_out = a[20] ? floats(a[20] + row * kv_stride) + D * g : 0;
        float *plain = a[21] ? floats(a[21] + row * kv_stride) + D * g : 0;
        for (int channel = thread(); channel < D; channel += threads()) {
            Turn t = turns ? turn_of(channel, D, interleaved) : Turn{0, channel, channel, false};
            float low = now ? now[t.first] * x[t.first] + then[t.first] * before[t.first] : x[t.first];
            float high = now ? now[t.second] * x[t.second] + then[t.second] * before[t.second] : x[t.second];
            if (plain) plain[channel] = t.upper ? high : low;
            float turned = turns ? t.of(low, high, c[t.pair], s[t.pair]) : low;
            float k_kept = keep(to_k, channel, turned, half), v_kept = keep(to_v, channel, v[channel], half);
            if (k_out) k_out[channel] = k_kept, v_out[channel] = v_kept;
        }
    }
}

// Of the tokens that leave the window while each row enters it, a key head's part of a per-token field.
OPERATOR void take(Words a, Words p, Work work) {
    int64 field = a[0], stride = a[2], width = a[3], window = a[5], sinks = a[6];
    bool half = a[4];
    int64 G = p[KEY_HEADS], part = width / G;
    for (int64 item = work.block; item < p[ROWS] * G; item += work.blocks) {
        int64 row = item / G, first = item % G * part;
        Words of = sequence_of(p, row);
        int64 leaving = position(p, row) - window;
        if (leaving < sinks) continue;
        int64 at = a[1] + (leaving - of[FIRST] + of[ROW]) * stride;
        if (leaving < of[FIRST]) at = words(of[FIELDS])[field] + slot_of(leaving, window, sinks) * width * (half ? 2 : 4);
        for (int64 i = first + thread(); i < first + part; i += threads())
            floats(a[7])[width * row + i] = half ? from_half(shorts(at)[i]) : floats(at)[i];
    }
}

// The rows that stay, into their slots; a key head's part of `size` bytes.
OPERATOR void insert(Words a, Words p, Work work) {
    int64 field = a[0], stride = a[2], size = a[3], window = a[4], sinks = a[5];
    int64 G = p[KEY_HEADS], part = size / 2 / G;  // in units of 2 bytes
    for (int64 item = work.block; item < p[ROWS] * G; item += work.blocks) {
        int64 row = item / G, first = item % G * part, at = position(p, row);
        Words of = sequence_of(p, row);
        if (window != 0 && at >= sinks && at < of[FIRST] + of[COUNT] - window) continue;
        unsigned short *to = (unsigned short *)(words(of[FIELDS])[field] + slot_of(at, window, sinks) * size);
        for (int64 i = first + thread(); i < first + part; i += threads()) to[i] = shorts(a[1] + row * stride)[i];
    }
}

// The last row of each sequence into a field of its state.
OPERATOR void keep_last(Words a, Words p, Work work) {
    int64 G = p[KEY_HEADS], part = a[3] / G;
    for (int64 item = work.block; item < p[SEQUENCES] * G; item += work.blocks) {
        Words of = sequence(p, item / G);
        int64 first = item % G * part;
        for (int64 i = first + thread(); i < first + part; i += threads())
            floats(words(of[FIELDS])[a[0]])[i] = floats(a[1] + (of[ROW] + of[COUNT] - 1) * a[2])[i];
    }
}
