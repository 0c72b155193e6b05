// Softmax attention of rows by themselves, over ring and chunk, in float32: a block takes a row's query heads of one key
// head, each warp 32 keys at a time. Equation: kernels/reference/attention.py. Prompts: attention_many.cu.

const int HEADS = 4, CHANNELS = 128;  // that a warp has in its registers, a lane four channels

struct Keys {
    Words of;
    int64 k_field, v_field, k_new, v_new, window, sinks, stride, sinks_seen, low;

    // Address of the j-th of the keys (or values) that the query sees, sinks first.
    MEMBER const char *at(int64 j, int64 field, int64 fresh) const {
        int64 where = j < sinks_seen ? j : low + j - sinks_seen;
        if (where >= of[FIRST]) return (const char *)(fresh + (of[ROW] + where - of[FIRST]) * stride);
        return (const char *)(words(of[FIELDS])[field] + slot_of(where, window, sinks) * stride);
    }
};

template <bool HALF> FUNCTION float element(const char *at, int i) {
    return HALF ? from_half(((const unsigned short *)at)[i]) : ((const float *)at)[i];
}

// scores[r] = q[r] . key, q [HEADS, D] in shared memory.
template <bool HALF> FUNCTION void scores_of(const char *key, const float *q, int D, float scores[HEADS]) {
#pragma unroll
    for (int r = 0; r < HEADS; r++) scores[r] = 0;
    if (HALF && D % 8 == 0) {
        for (int c = 0; c < D; c += 8) {
            uint4 eight = *(const uint4 *)(key + 2 * c);
            float k[8] = {low_half(eight.x), high_half(eight.x), low_half(eight.y), high_half(eight.y),
                          low_half(eight.z), high_half(eight.z), low_half(eight.w), high_half(eight.w)};
#pragma unroll
            for (int r = 0; r < HEADS; r++) {
                const float4 *x = (const float4 *)(q + r * D + c);
                scores[r] += k[0] * x[0].x + k[1] * x[0].y + k[2] * x[0].z + k[3] * x[0].w;
                scores[r] += k[4] * x[1].x + k[5] * x[1].y + k[6] * x[1].z + k[7] * x[1].w;
            }
        }
        return;
    }
    for (int c = 0; c < D; c++) {
        float k = element<HALF>(key, c);
#pragma unroll
        for (int r = 0; r < HEADS; r++) scores[r] += k * q[r * D + c];
    }
}

template <bool HALF> FUNCTION void attend(Words a, Words p, Work work) {
    int64 q_stride = a[2], window = a[10], sinks = a[11];
    int H = a[7], G = a[8], D = a[9], R = H / G, splits = a[14];
    int size = HALF ? 2 : 4;
    float *near = (float *)room(), *far = near + HEADS * D;  // [HEADS, D] each
    float *found = far + HEADS * D;  // [warps, HEADS, CHANNELS + 2]: weighted values, sum, maximum
    float *weights = found + warps() * HEADS * (CHANNELS + 2) + warp() * HEADS * 32;  // [HEADS, 32] of the warp
    int64 *places = (int64 *)(found + warps() * HEADS * (CHANNELS + 2 + 32)) + 32 * warp();  // [32] of the warp
    float scale = 1.0f / sqrtf((float)D);
    for (int64 item = work.block; item < p[ROWS] * G * splits; item += work.blocks) {
        int64 row = item / (G * splits), t = position(p, row);
        int g = item / splits % G, split = item % splits;
        Keys keys = {sequence_of(p, row), a[3], a[4], a[5], a[6], window, sinks, (int64)size * G * D, 0, 0};
        if (window) keys.sinks_seen = min(sinks, t + 1), keys.low = max(sinks, t - window + 1);
        int64 count = keys.sinks_seen + max((int64)0, t - keys.low + 1);
        int64 begin = count * split / splits, end = count * (split + 1) / splits;
        for (int first = 0; first < R; first += HEADS) {
            __syncthreads();
            for (int i = thread(); i < HEADS * D; i += threads()) {
                int h = g * R + min(first + i / D, R - 1);
                near[i] = (floats(a[0] + row * q_stride) + D * h)[i % D] * scale;
                if (a[1]) far[i] = (floats(a[1] + row * q_stride) + D * h)[i % D] * scale;
            }
            __syncthreads();
            for (int c0 = 0; c0 < D; c0 += CHANNELS) {
                float sums[HEADS][4] = {}, total[HEADS] = {}, top[HEADS];
#pragma unroll
                for (int r = 0; r < HEADS; r++) top[r] = lowest();
                for (int64 tile = begin + 32 * warp(); tile < end; tile += 32 * warps()) {
                    int64 j = tile + lane();
                    float s[HEADS];
                    warp_barrier();  // the weights and places of the tile before have been read
                    if (j < end) {
                        const char *key = keys.at(j, keys.k_field, keys.k_new) + size * D * g;
                        scores_of<HALF>(key, a[1] && j < keys.sinks_seen ? far : near, D, s);
                        places[lane()] = (int64)keys.at(j, keys.v_field, keys.v_new) + size * D * g;
                    }
#pragma unroll
                    for (int r = 0; r < HEADS; r++) {
                        float score = j < end ? s[r] : lowest(), most = fmaxf(top[r], warp_max(score));
                        float weight = expf(score - most), before = expf(top[r] - most);
                        weights[32 * r + lane()] = weight;
                        total[r] = total[r] * before + warp_sum(weight);
                        top[r] = most;
#pragma unroll
                        for (int i = 0; i < 4; i++) sums[r][i] *= before;
                    }
                    warp_barrier();
                    for (int k = 0; k < (int)min((int64)32, end - tile); k++) {
                        const char *value = (const char *)places[k];
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            int c = c0 + 32 * i + lane();
                            float v = c < D ? element<HALF>(value, c) : 0.0f;
#pragma unroll
                            for (int r = 0; r < HEADS; r++) sums[r][i] += weights[32 * r + k] * v;
                        }
                    }
                }
                __syncthreads();
#pragma unroll
                for (int r = 0; r < HEADS; r++) {
                    float *own = found + (warp() * HEADS + r) * (CHANNELS + 2);
#pragma unroll
                    for (int i = 0; i < 4; i++) own[32 * i + lane()] = sums[r][i];
                    if (lane() == 0) own[CHANNELS] = total[r], own[CHANNELS + 1] = top[r];
                }
                __syncthreads();
                int channels = min(CHANNELS, D - c0);
                for (int i = thread(); i < min(HEADS, R - first) * channels; i += threads()) {
                    int r = i / channels, c = i % channels;
                    float most = lowest(), sum = 0, whole = 0;
                    for (int w = 0; w < warps(); w++)
                        most = fmaxf(most, found[(w * HEADS + r) * (CHANNELS + 2) + CHANNELS + 1]);
                    for (int w = 0; w < warps(); w++) {
                        const float *of = found + (w * HEADS + r) * (CHANNELS + 2);
                        float by = of[CHANNELS + 1] == lowest() ? 0.0f : expf(of[CHANNELS + 1] - most);
                        sum += by * of[c], whole += by * of[CHANNELS];
                    }
                    int h = g * R + first + r;
                    if (splits == 1) {
                        (floats(a[12] + row * q_stride) + D * h)[c0 + c] = sum / whole;
                    } else {
                        float *part = floats(a[15]) + ((row * H + h) * splits + split) * (D + 2);
                        part[c0 + c] = sum;
                        if (c0 + c == 0) part[D] = whole, part[D + 1] = most;
                    }
                }
            }
        }
    }
}

// a: q, q_far, q_stride, k_field, v_field, k_new, v_new, H, G, D, window, sinks, out, whether the ring holds halves,
// into how many parts keys are split, the parts (see combine).
OPERATOR void attend_rows(Words a, Words p, Work work) {
    if (a[13])
        attend<true>(a, p, work);
    else
        attend<false>(a, p, work);
}

// The same with the parts of a row and head in several blocks.
OPERATOR void attend_splits(Words a, Words p, Work work) { attend_rows(a, p, work); }

// Puts together what the splits of a row's keys have found.  a: parts [rows, H, splits, D + 2], out, stride, H, D,
// splits.
OPERATOR void combine(Words a, Words p, Work work) {
    int H = a[3], D = a[4], splits = a[5];
    for (int64 i = work.block * threads() + thread(); i < p[ROWS] * H * D; i += work.blocks * threads()) {
        const float *part = floats(a[0]) + i / D * splits * (D + 2);
        float most = lowest(), sum = 0, whole = 0;
        for (int k = 0; k < splits; k++) most = fmaxf(most, part[k * (D + 2) + D + 1]);
        for (int k = 0; k < splits; k++) {
            const float *of = part + k * (D + 2);
            float by = of[D + 1] == lowest() ? 0.0f : expf(of[D + 1] - most);
            sum += by * of[i % D], whole += by * of[D];
        }
        floats(a[1] + i / (H * D) * a[2])[i % (H * D)] = sum / whole;
    }
}
