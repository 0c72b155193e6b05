// Softmax attention of rows by themselves, over ring and chunk, in float32: a block takes up to four of a row's query
// heads that share a key head, its warps the keys in tiles. Equation: kernels/reference/attention.py. Prompts:
// attention_many.cu.
//
// Lanes share a key: each has 16 bytes of it, and of its value, so that a warp reads whole rows. A lane asks for its
// parts of all keys and values of a tile before it uses any.

const float SLACK = 8;  // a score may be above what its weight is relative to by so much

// What a query sees, counted from the oldest, sinks first, and which part of it a block takes.
struct View {
    int sinks, old;  // how many of the keys are sinks, how many are in the ring
    int slot, stop, window;  // added to j behind the sinks; where the ring ends, how far it then goes back
    int sink_row, row;  // added to j for the pass's own rows: of sinks, of others
    int begin, seam, end;  // of the block's keys: the first, the first that q[0] is for, the end
    int far_tiles, tiles;  // how many tiles are for q[1], and all

    // Where the j-th key lies, as a row of ring or pass.
    MEMBER int at(int j) const {
        if (j >= old) return j + (j < sinks ? sink_row : row);
        int s = j < sinks ? j : j + slot;
        return s < stop ? s : s - window;
    }
};

// The same with where it lies. In shared memory, a copy for each warp, as registers are for keys.
struct Seen {
    const char *q[2], *k_ring, *k_new, *v_ring, *v_new;  // of the key head
    int stride;  // bytes of a row
    float scale;  // of scores
    View view;
};

const int SEEN_ROOM = 128;  // bytes
static_assert(sizeof(Seen) <= SEEN_ROOM);

// What a block takes at once: of a row's query heads that share key head g those from the first on, of their keys a part.
struct Item {
    int row, g, split, first;
};

FUNCTION Item item_at(Words a, int item, int first) {
    int of_row = quotient(item, (int)a[13]), row = quotient(of_row, (int)a[8]);
    return {row, of_row - row * (int)a[8], item - of_row * (int)a[13], first};
}

// turns: log2 of the keys of a tile.
FUNCTION void find_view(View &v, Words a, Words p, const Item &item, int turns) {
    Words of = sequence_of(p, item.row);
    int64 t = of[FIRST] + item.row - of[ROW], low = 0;
    int window = (int)a[10], sinks = (int)a[11], splits = (int)a[13];
    int in_front = window ? (int)min((int64)sinks, t + 1) : 0;  // sinks
    if (window) low = max((int64)sinks, t - window + 1);
    v.sinks = in_front, v.stop = window ? sinks + window : 0x7fffffff, v.window = window;
    v.slot = window ? (int)(slot_of(low, window, sinks) - in_front) : 0;
    int count = in_front + (int)max((int64)0, t - low + 1);
    v.sink_row = (int)(of[ROW] - of[FIRST]), v.row = (int)(of[ROW] - of[FIRST] + low - in_front);
    v.old = (int)min((int64)count, of[FIRST] < in_front ? of[FIRST] : in_front + max((int64)0, of[FIRST] - low));
    int each = quotient(count, splits), more = count - each * splits;
    int begin = each * item.split + min(item.split, more), end = begin + each + (item.split < more);
    int seam = a[1] ? max(begin, min(end, in_front)) : begin, far_tiles = (seam - begin + (1 << turns) - 1) >> turns;
    v.begin = begin, v.end = end, v.seam = seam, v.far_tiles = far_tiles;
    v.tiles = far_tiles + ((end - seam + (1 << turns) - 1) >> turns);
}

// In a token's launch, which has one row, a block that takes a part of a row's keys keeps what it has seen for the next
// layer, which mostly sees the same.
struct Kept {
    int window, sinks, splits, split, turns;
    bool far;  // whether sinks are met by a query of their own
    View view;
    MEMBER bool is_of(Words a, const Item &item, int tile) const {
        return window == a[10] && sinks == a[11] && splits == a[13] && split == item.split && turns == tile && far == (a[1] != 0);
    }
};
#ifdef EACH_TOGETHER
static_assert(DESK_VIEW + sizeof(Kept) <= DESK);
FUNCTION Kept &kept_view() { return *(Kept *)(shared_memory() + DESK_VIEW); }
#endif

// size: bytes of a channel.
FUNCTION void see(Seen &s, Words a, Words p, const Item &item, int size, int turns) {
    int G = a[8], D = a[9], R = quotient((int)a[7], G), row = item.row, beside = size * D * item.g;
    Words fields = words(sequence_of(p, row)[FIELDS]);
    for (int far = 0; far < 2; far++) s.q[far] = (const char *)(a[far] + row * a[2] + 4 * D * (item.g * R + item.first));
    s.k_ring = (const char *)fields[a[3]] + beside, s.k_new = (const char *)a[5] + beside;
    s.v_ring = (const char *)fields[a[4]] + beside, s.v_new = (const char *)a[6] + beside;
    s.stride = size * G * D, s.scale = rsqrtf((float)D);
#ifdef EACH_TOGETHER
    if (kept_view().is_of(a, item, turns)) {
        s.view = kept_view().view;
        return;
    }
#endif
    find_view(s.view, a, p, item, turns);
}

// 16 bytes of a row from its channel c on. PLAIN: rows consist of such pieces; else they may end within one.
template <bool HALF, bool PLAIN> FUNCTION uint4 piece_at(const char *row, int c, int D) {
    const int WIDE = HALF ? 8 : 4;
    if (PLAIN || D % WIDE == 0) return *(const uint4 *)(row + 16 / WIDE * min(c, D - WIDE));
    unsigned words[4] = {};
#pragma unroll
    for (int i = 0; i < WIDE; i++) {
        if (c + i >= D) continue;
        if (HALF)
            words[i / 2] |= (unsigned)((const unsigned short *)row)[c + i] << 16 * (i % 2);
        else
            words[i % 4] = ((const unsigned *)row)[c + i];
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

template <bool HALF> FUNCTION void channels_of(const uint4 &piece, float *x) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned word = word_of(&piece, i);
        if (HALF)
            x[2 * i] = low_half(word), x[2 * i + 1] = high_half(word);
        else
            x[i] = __uint_as_float(word);
    }
}

// `halve` for each head.
template <int N, int HEADS, int ROOM> FUNCTION void fold(float (&x)[HEADS][ROOM], int apart) {
#pragma unroll
    for (int r = 0; r < HEADS; r++) halve<N>(x[r], apart);
}

// How a warp's lanes share rows of D channels, each lane WIDE of them: log2 of how many do.
template <int WIDE> FUNCTION int sharing(int D) {
    return 2 + (D > 4 * WIDE) + (D > 8 * WIDE) + (D > 16 * WIDE);
}
template <int WIDE> FUNCTION int width_of(int D) { return WIDE << sharing<WIDE>(D); }

// What a warp finds of an item, for each head: `width` sums of weighted values, the sum of weights, and what their
// scores are relative to.
FUNCTION float *found_by(int warp, int head, int heads, int width) {
    return (float *)(room() + SEEN_ROOM * warps()) + (warp * heads + head) * (width + 2);
}

// log2 of the keys of a tile.
template <bool HALF, int HEADS> FUNCTION int tile_turns(int D) {
    const int WIDE = HALF ? 8 : 4;
    return (HEADS * WIDE <= 16 ? 2 : 1) + 5 - sharing<WIDE>(D);
}

// A warp's part of the item, channels from c0 on.
template <bool HALF, int HEADS, bool PLAIN>
FUNCTION void attend_keys(Words a, Words p, const Item &item, int c0) {
    const int WIDE = HALF ? 8 : 4;  // channels of a lane
    const int AT_ONCE = HEADS * WIDE <= 16 ? 4 : 2;  // keys of a tile, for each group of lanes that share a key
    const int LOG = AT_ONCE / 2;  // of that
    int D = a[9], heads = min(quotient((int)a[7], (int)a[8]) - item.first, HEADS);
    int turns = sharing<WIDE>(D), sharers = 1 << turns, groups = 32 >> turns;
    int alike = sharers / AT_ONCE, width = sharers * WIDE, own = (lane() & (sharers - 1)) * WIDE;
    Seen &seen = *(Seen *)(room() + SEEN_ROOM * warp());
    if (lane() == 0) see(seen, a, p, item, 16 / WIDE, tile_turns<HALF, HEADS>(D));
    warp_barrier();

    float q[HEADS][WIDE], sums[HEADS][WIDE] = {}, total[HEADS] = {}, top[HEADS];
#pragma unroll
    for (int r = 0; r < HEADS; r++) top[r] = lowest();
    auto ask = [&](bool far, int c) {
#pragma unroll
        for (int r = 0; r < HEADS; r++) {
            const char *x = seen.q[far] + 4 * D * min(r, heads - 1);
#pragma unroll
            for (int i = 0; i < WIDE; i += 4) {
                channels_of<false>(piece_at<false, PLAIN>(x, c + i, D), q[r] + i);
#pragma unroll
                for (int l = i; l < i + 4; l++) q[r][l] *= c + i < D ? seen.scale : 0.0f;
            }
        }
    };

    for (int n = warp(); n < seen.view.tiles; n += warps()) {
        bool far = n < seen.view.far_tiles;
        int from = AT_ONCE * groups * (far ? n : n - seen.view.far_tiles) + (lane() >> turns);
        from += far ? seen.view.begin : seen.view.seam;
        int stop = far ? seen.view.seam : seen.view.end, at[AT_ONCE];
        bool old[AT_ONCE];
        uint4 k[AT_ONCE], v[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            int j = min(from + u * groups, stop - 1);
            old[u] = j < seen.view.old, at[u] = seen.view.at(j);
        }
        float scores[HEADS][AT_ONCE] = {};
        for (int c = own; c < (PLAIN ? own + 1 : D + own); c += width) {
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++) {
                const char *of = old[u] ? seen.k_ring : seen.k_new;
                k[u] = piece_at<HALF, PLAIN>(of + (int64)at[u] * seen.stride, c, D);
            }
            if (!PLAIN || n < warps() || (!far && n - warps() < seen.view.far_tiles)) ask(far, c);
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++) {
                const char *of = old[u] ? seen.v_ring : seen.v_new;
                v[u] = piece_at<HALF, PLAIN>(of + (int64)at[u] * seen.stride, c0 + own, D);
            }
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++) {
                float x[WIDE];
                channels_of<HALF>(k[u], x);
#pragma unroll
                for (int i = 0; i < HEADS * WIDE; i++) scores[i / WIDE][u] += q[i / WIDE][i % WIDE] * x[i % WIDE];
            }
        }
        // Of its group's keys each lane gets one, `alike` lanes the same.
        fold<AT_ONCE>(scores, sharers / 2);
        if (AT_ONCE == 4) fold<2>(scores, sharers / 4);
        for (int apart = alike / 2; apart; apart /= 2) fold<1>(scores, apart);
        bool there = from + ((lane() & (sharers - 1)) >> (turns - LOG)) * groups < stop, above = false;
#pragma unroll
        for (int r = 0; r < HEADS; r++) {
            if (!there) scores[r][0] = lowest();
            above |= scores[r][0] > top[r] + SLACK;
        }
        if (__ballot_sync(0xffffffffu, above)) {
#pragma unroll
            for (int r = 0; r < HEADS; r++) {
                float most = fmaxf(top[r], warp_max(scores[r][0])), before = expf(top[r] - most);
                top[r] = most, total[r] *= before;
#pragma unroll
                for (int i = 0; i < WIDE; i++) sums[r][i] *= before;
            }
        }
#pragma unroll
        for (int r = 0; r < HEADS; r++) total[r] += scores[r][0] = expf(scores[r][0] - top[r]);
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            float x[WIDE];
            channels_of<HALF>(v[u], x);
#pragma unroll
            for (int r = 0; r < HEADS; r++) {
                float weight = shuffle(scores[r][0], (lane() & -sharers) + u * alike);
#pragma unroll
                for (int i = 0; i < WIDE; i++) sums[r][i] += weight * x[i];
            }
        }
        warp_barrier();  // the compiler reads what is seen anew
    }

    // The groups of the warp together: a lane keeps `left` of its channels.
    int left = WIDE, place = own;
    if (sharers <= 16) fold<WIDE>(sums, 16), left /= 2, place += lane() & 16 ? left : 0;
    if (sharers <= 8) fold<WIDE / 2>(sums, 8), left /= 2, place += lane() & 8 ? left : 0;
    if (sharers <= 4) fold<WIDE / 4>(sums, 4), left = max(1, left / 2), place += WIDE > 4 && lane() & 4 ? left : 0;
#pragma unroll
    for (int r = 0; r < HEADS; r++) {
        float *to = found_by(warp(), r, HEADS, width);
#pragma unroll
        for (int i = 0; i < WIDE; i++)
            if (i < left) to[place + i] = sums[r][i];
        float whole = warp_sum(total[r]) * reciprocal((float)alike);
        if (lane() == 0) to[width] = whole, to[width + 1] = top[r];
    }
}

// The warps' parts together.
FUNCTION void attend_end(Words a, const Item &item, int heads, int c0, int width) {
    int G = a[8], D = a[9], R = quotient((int)a[7], G), splits = a[13], channels = min(width, D - c0);
    for (int i = thread(); i < min(heads, R - item.first) * channels; i += threads()) {
        int r = quotient(i, channels), c = i - r * channels, h = item.g * R + item.first + r;
        float most = lowest(), sum = 0, whole = 0;
#pragma unroll 5
        for (int w = 0; w < warps(); w++) most = fmaxf(most, found_by(w, r, heads, width)[width + 1]);
#pragma unroll 5
        for (int w = 0; w < warps(); w++) {
            const float *part = found_by(w, r, heads, width);
            float by = part[width + 1] == lowest() ? 0.0f : expf(part[width + 1] - most);
            sum += by * part[c], whole += by * part[width];
        }
        if (splits == 1) {
            (floats(a[12] + item.row * a[2]) + D * h)[c0 + c] = sum / whole;
        } else {
            float *part = floats(a[14]) + ((item.row * (int)a[7] + h) * splits + item.split) * (D + PART_END);
            part[c0 + c] = sum;
            if (c0 + c == 0) part[D] = whole, part[D + 1] = most;
        }
    }
}

// A form of the operator: the ring's type, how many query heads of a key head are taken at a time, and whether D is a
// multiple of a lane's channels and not beyond what a warp's lanes hold at once (PLAIN); else scores are made anew for as
// many channels as they do hold. Each is compiled by itself, for all of them in one take twice the registers.
template <bool half, int heads, bool plain> struct Form {
    static const bool HALF = half, PLAIN = plain;
    static const int HEADS = heads;
};
struct Half1 : Form<true, 1, true> {};
struct Half2 : Form<true, 2, true> {};
struct Half3 : Form<true, 3, true> {};
struct Half4 : Form<true, 4, true> {};
struct HalfAny : Form<true, 2, false> {};
struct Float1 : Form<false, 1, true> {};
struct Float2 : Form<false, 2, true> {};
struct Float3 : Form<false, 3, true> {};
struct Float4 : Form<false, 4, true> {};
struct FloatAny : Form<false, 2, false> {};

// a: q, q_far, q_stride, k_field, v_field, k_new, v_new, H, G, D, window, sinks, out, into how many parts keys are split,
// the parts (see combine).
template <class F> FUNCTION void attend_rows(Words a, Words p, Work work) {
    for (int first = 0; first < a[7] / a[8]; first += F::HEADS)
        for (int i = work.block; i < p[ROWS] * a[8] * a[13]; i += work.blocks)
            for (int c0 = 0, width; c0 < (F::PLAIN ? 1 : (int)a[9]); c0 += width) {
                Item item = item_at(a, i, first);
                width = width_of<F::HALF ? 8 : 4>(a[9]);
                block_barrier();  // nobody reads what lay there
                attend_keys<F::HALF, F::HEADS, F::PLAIN>(a, p, item, c0);
                block_barrier();
                attend_end(a, item, F::HEADS, c0, width);
            }
}

// The same with the parts of a row in several blocks, and so, if the form has fewer, with heads that share a key head.
template <class F> FUNCTION void attend_splits(Words a, Words p, Work work) {
    int each = (quotient((int)a[7], (int)a[8]) + F::HEADS - 1) / F::HEADS, D = a[9], width = width_of<F::HALF ? 8 : 4>(D);
    for (int i = work.block; i < (int)(p[ROWS] * a[8] * a[13]) * each; i += work.blocks)
        for (int c0 = 0; c0 < (F::PLAIN ? 1 : D); c0 += width) {
            int of = quotient(i, each);
            Item item = item_at(a, of, (i - of * each) * F::HEADS);
            block_barrier();  // nobody reads what lay there
            attend_keys<F::HALF, F::HEADS, F::PLAIN>(a, p, item, c0);
            block_barrier();
#ifdef EACH_TOGETHER
            int turns = tile_turns<F::HALF, F::HEADS>(D);
            if (thread() == 0 && !kept_view().is_of(a, item, turns))
                kept_view() = {(int)a[10], (int)a[11], (int)a[13], item.split, turns, a[1] != 0, ((Seen *)room())->view};
#endif
            attend_end(a, item, F::HEADS, c0, width);
        }
}

// Puts together what the splits of a row's keys have found, a warp 32 channels of a head.  a: parts [rows, H, splits,
// D + PART_END], out, stride, H, D, splits.
OPERATOR void combine(Words a, Words p, Work work) {
    int H = a[3], D = a[4], splits = a[5], pieces = (D + 31) / 32;
    for (int64 item = work.block + warp() * work.blocks; item < p[ROWS] * H * pieces; item += warps() * work.blocks) {
        int64 head = item / pieces;
        const float *parts = floats(a[0]) + head * splits * (D + PART_END);
        int c = item % pieces * 32 + lane(), near = min(c, D - 1);
        float most = lowest(), sum = 0, whole = 0;
        for (int k = lane(); k < splits; k += 32) most = fmaxf(most, parts[k * (D + PART_END) + D + 1]);
        most = warp_max(most);
        for (int first = 0; first < splits; first += 32) {
            int own = first + lane();
            const float *part = parts + min(own, splits - 1) * (D + PART_END);
            float by = own < splits && part[D + 1] != lowest() ? expf(part[D + 1] - most) : 0.0f;
            whole += by * part[D];
#pragma unroll 16
            for (int k = 0; k < min(32, splits - first); k++)
                sum += shuffle(by, k) * parts[(first + k) * (D + PART_END) + near];
        }
        whole = warp_sum(whole);
        if (c < D) (floats(a[1] + head / H * a[2]) + head % H * D)[c] = sum / whole;
    }
}
