// What Tensor Cache memory adds to ring and matrix: which pair a row writes and how, and how queries read.
// Equations: equations.py; the same steps compiled for CPUs: compiled.py.

const float UNIT_EPS = 1e-5f;  // added to a norm, as kernels.reference.pointwise.unit

// 1 / (norm of x + eps), by one warp, in all its lanes.
FUNCTION float unit_scale(const float *x, int width) {
    float sum = 0;
    for (int i = lane(); i < width; i += 32) sum += x[i] * x[i];
    return 1.0f / (sqrtf(warp_sum(sum)) + UNIT_EPS);
}

// Router logits cos(x, slot key) / (sqrt(D) temperature) of all slots: each warp some of them.
FUNCTION void cosines(const float *x, int width, const float *keys, int slots, float temperature, float *out) {
    for (int s = warp(); s < slots; s += warps()) {
        const float *key = keys + s * width;
        float dot = 0;
        for (int i = lane(); i < width; i += 32) dot += x[i] * key[i];
        dot = warp_sum(dot);
        float scale = unit_scale(x, width) / (sqrtf((float)width) * temperature) * unit_scale(key, width);
        if (lane() == 0) out[s] = dot * scale;
    }
}

OPERATOR void writes(Words a, Words p, Work work) {
    namespace of = writes_at;
    const float *entering[4] = {floats(a[of::entering_k]), floats(a[of::entering_v]), floats(a[of::entering_decay]),
                                floats(a[of::entering_rate])};
    const float *leaving[4] = {floats(a[of::leaving_k]), floats(a[of::leaving_v]), floats(a[of::leaving_decay]),
                               floats(a[of::leaving_rate])};
    int G = a[of::G], D = a[of::D], timescales = a[of::timescales], slots = a[of::slots], turned = a[of::turned];
    int64 window = a[of::window], sinks = a[of::sinks];
    bool normalize = a[of::normalize], interleaved = a[of::interleaved];
    float value_scale = (float)number(a[of::value_scale]), temperature = (float)number(a[of::temperature]);
    const float *decays = floats(a[of::decays]), *rates = floats(a[of::rates]), *slot_keys = floats(a[of::slot_keys]);
    float *decay = floats(a[of::decay]), *rate = floats(a[of::rate]);
    for (int64 item = work.block; item < p[ROWS] * G; item += work.blocks) {
        int64 row = item / G;
        int g = item % G;
        bool left = leaving[0] && position(p, row) - window >= sinks, written = left || entering[0];
        const float *const *source = left ? leaving : entering;
        float *k = floats(a[of::k]) + D * item, *v = floats(a[of::v]) + D * item;
        const float *x = written ? source[0] + D * item : 0, *y = written ? source[1] + D * item : 0;
        const float *cos_back = floats(a[of::cos]) + turned / 2 * row, *sin_back = floats(a[of::sin]) + turned / 2 * row;
        bool turns = left && a[of::cos];  // the memory sees keys before rotation
        float lengths = 0;
        for (int c = thread(); c < D; c += threads()) {
            float kept = written ? x[c] : 0.0f;
            if (turns && c < turned) {
                Turn t = turn_of(c, turned, interleaved);
                kept = t.of(x[t.first], x[t.second], cos_back[t.pair], -sin_back[t.pair]);
            }
            k[c] = kept;
            v[c] = written ? y[c] * value_scale : 0.0f;
            lengths += kept * kept;
        }
        if (normalize && written) {
            float by = 1.0f / (sqrtf(block_sum(lengths)) + UNIT_EPS);
            for (int c = thread(); c < D; c += threads()) k[c] *= by;
        }
        block_barrier();
        float *logits = (float *)room();
        if (slots > 1 && written) {
            const float *chooser = a[of::route] ? floats(a[of::route]) + D * item : k;
            cosines(chooser, D, slot_keys + slots * D * g, slots, temperature, logits);
        }
        block_barrier();
        if (thread() == 0) {
            int best = 0;
            if (slots > 1 && written)
                for (int s = 1; s < slots; s++)
                    if (logits[s] > logits[best]) best = s;
            float decay_term = written && source[2] ? source[2][item] : 0.0f;
            float rate_term = written && source[3] ? source[3][item] : 0.0f;
            for (int t = 0; t < timescales; t++)
                for (int s = 0; s < slots; s++) {
                    int64 plane = (row * timescales * slots + t * slots + s) * G + g;
                    bool on = written && s == best;
                    decay[plane] = on ? sigmoid(decays[G * t + g] + decay_term) : 1.0f;
                    rate[plane] = on ? sigmoid(rates[G * t + g] + rate_term) : 0.0f;
                }
        }
        block_barrier();
    }
}

// Each head divided by its norm.
OPERATOR void unit(Words a, Words p, Work work) {
    int width = a[unit_at::width];
    int64 G = p[KEY_HEADS], heads = a[unit_at::heads] / G;
    const float *x = floats(a[unit_at::x]);
    float *y = floats(a[unit_at::y]);
    for (int64 item = work.block; item < p[ROWS] * G; item += work.blocks)
        for (int64 h = heads * item + warp(); h < heads * (item + 1); h += warps()) {
            float by = unit_scale(x + width * h, width);
            for (int c = lane(); c < width; c += 32) y[width * h + c] = x[width * h + c] * by;
        }
}

// How much of each plane a query reads: softmax over its best slots, sigmoid(alpha) of the slow ones.
OPERATOR void mix(Words a, Words p, Work work) {
    int G = a[1], R = a[2], D = a[3], timescales = a[4], slots = a[5], topk = a[6];
    float temperature = (float)number(a[7]), *out = floats(a[10]);
    float *logits = (float *)room(), *weights = logits + slots;
    for (int64 item = work.block; item < p[ROWS] * G; item += work.blocks) {
        int64 row = item / G;
        int g = item % G;
        float slow = timescales == 2 ? sigmoid(floats(a[9])[g]) : 1.0f;
        for (int r = 0; r < R; r++) {
            block_barrier();
            if (slots > 1)
                cosines(floats(a[0]) + D * (item * R + r), D, floats(a[8]) + slots * D * g, slots, temperature, logits);
            else if (thread() == 0)
                logits[0] = 0;
            block_barrier();
            if (thread()) continue;
            float total = 0, top = 0;
            for (int s = 0; s < slots; s++) weights[s] = 0;
            for (int n = 0; n < min(topk, slots); n++) {  // the best ones, the first of equals before the others
                int best = -1;
                for (int s = 0; s < slots; s++)
                    if (weights[s] == 0 && (best < 0 || logits[s] > logits[best])) best = s;
                if (n == 0) top = logits[best];
                weights[best] = expf(logits[best] - top);
                total += weights[best];
            }
            for (int t = 0; t < timescales; t++)
                for (int s = 0; s < slots; s++)
                    out[((row * timescales * slots + t * slots + s) * G + g) * R + r] = (t ? slow : 1.0f) * weights[s] / total;
        }
    }
}

// x [heads, width] /= max(|by [heads]|, eps), in place.
OPERATOR void divide(Words a, Words p, Work work) {
    int width = a[divide_at::width];
    int64 G = p[KEY_HEADS], part = a[divide_at::heads] / G * width;
    float eps = (float)number(a[divide_at::eps]);
    for (int64 item = work.block; item < p[ROWS] * G; item += work.blocks)
        for (int64 i = part * item + thread(); i < part * (item + 1); i += threads())
            floats(a[0])[i] /= fmaxf(fabsf(floats(a[1])[i / width]), eps);
}

// sigmoid(logit + bias) of each row; no logit: 0.
OPERATOR void gate(Words a, Words p, Work work) {
    const float *logit = floats(a[gate_at::logit]);
    float bias = floats(a[gate_at::bias])[0];
    for (int64 row = work.block * threads() + thread(); row < p[ROWS]; row += work.blocks * threads())
        floats(a[gate_at::gate])[row] = sigmoid(logit ? logit[row] + bias : bias);
}
