// From logits to an id, as tcinfer/sampling/choose.py has it where only top-k, top-p, min-p and the temperature are set.
//
// A logit and its id make one key: the larger the likelier, of equal logits the lower id. So keys differ, and whatever
// is asked for (the likeliest, the k likeliest, their order) has one answer, whoever comes first.

const int ID_BITS = 24, MOST_CHOICES = 1024, GATHERED_KEYS = 2048;
const int DIGIT = 11, BINS = 1 << DIGIT, GROUP = 64;  // bins of a histogram, in groups that a warp adds up
const uint64 LAST_ID = (1 << ID_BITS) - 1, LARGEST_KEY = (1ull << (32 + ID_BITS)) - 1;

// What `choose` has in shared memory: 24,720 bytes behind the desk.
struct Choosing {
    uint64 keys[GATHERED_KEYS];
    union {  // in turn
        unsigned bins[BINS];
        double shares[MOST_CHOICES];
    };
    unsigned groups[BINS / GROUP], count;
    int kept;
    double log_sum;
};

// Unsigned numbers in the order of the floats with these bits, by integers alone: a float's arithmetic may take the
// smallest for 0. -0 is 0, and what is not finite lies above all.
FUNCTION uint64 key_of(unsigned bits, int id) {
    unsigned place = bits >> 31 ? ~bits : bits | 0x80000000u;
    if (bits == 0x80000000u) place = bits;
    if ((bits & 0x7f800000u) == 0x7f800000u) place = ~0u;
    return (uint64)place << ID_BITS | (LAST_ID - id);
}
FUNCTION bool is_finite(uint64 key) { return key >> ID_BITS != 0xffffffffu; }
FUNCTION int id_of(uint64 key) { return (int)(LAST_ID - (key & LAST_ID)); }
FUNCTION double logit_of(uint64 key) {
    unsigned place = (unsigned)(key >> ID_BITS);
    return (double)__uint_as_float(place >> 31 ? place & 0x7fffffffu : ~place);
}

// The largest key of the block's threads, in all of them: 19 bits after 19, which floats hold exactly.
FUNCTION uint64 largest(uint64 key) {
    uint64 most = 0;
    for (int shift = 38; shift >= 0; shift -= 19) {
        bool leads = key >> (shift + 19) == most >> (shift + 19);
        most |= (uint64)block_max(leads ? (float)(key >> shift & 0x7ffff) : 0.0f) << shift;
    }
    return most;
}

// Integers in the order of the floats with these bits, finite ones, in few instructions; -0 is 0.
FUNCTION int order_of(unsigned bits) {
    unsigned negative = (unsigned)((int)bits >> 31);
    return (int)(((bits & 0x7fffffffu) ^ negative) - negative);
}
FUNCTION int order_of_key(uint64 key) {
    unsigned place = (unsigned)(key >> ID_BITS);
    return order_of(place >> 31 ? place & 0x7fffffffu : ~place);
}

// A row, spread over the block: 16 bytes at a time, and several such before any is looked at.
struct Logits {
    const unsigned *bits;
    const uint4 *body;  // its aligned part, `quads` of them, begins behind `head` logits
    int size, head, quads;

    // A thread's logit before or behind those, if it has one.
    MEMBER int edge() const { return thread() < head ? thread() : thread() + 4 * quads; }
};

FUNCTION Logits logits_of(const float *row, int size) {
    const unsigned *bits = (const unsigned *)row;
    int head = min(size, (int)((0 - (uint64)row) / 4 % 4));
    return {bits, (const uint4 *)(bits + head), size, head, (size - head) / 4};
}

// The largest key of a thread's own; above all where one of them is not finite.
FUNCTION uint64 largest_own(const Logits &of) {
    const int FLIGHT = 8;
    int best = 0, at = -1;
    unsigned tallest = 0;
    for (int first = thread(); first < of.quads; first += FLIGHT * threads()) {
        uint4 v[FLIGHT];
#pragma unroll
        for (int j = 0; j < FLIGHT; j++) v[j] = of.body[min(first + j * threads(), of.quads - 1)];
#pragma unroll
        for (int j = 0; j < FLIGHT; j++) {
            int i = first + j * threads();
            int most = max(max(order_of(v[j].x), order_of(v[j].y)), max(order_of(v[j].z), order_of(v[j].w)));
            tallest = max(tallest, max(max(v[j].x & 0x7fffffffu, v[j].y & 0x7fffffffu),
                                       max(v[j].z & 0x7fffffffu, v[j].w & 0x7fffffffu)));
            if (i < of.quads && (at < 0 || most > best)) best = most, at = i;  // of equal ones the first stays
        }
    }
    uint64 own = 0;
    if (at >= 0) {
        uint4 v = of.body[at];
        unsigned bits[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int c = 0; c < 4; c++) own = max(own, key_of(bits[c], of.head + 4 * at + c));
    }
    int edge = of.edge();
    if (edge < of.size) own = max(own, key_of(of.bits[edge], edge));
    return tallest >= 0x7f800000u ? LARGEST_KEY : own;
}

// Keys of a row of finite logits: at least those that reach `least`, and few others.
template <class Visit> FUNCTION void each_key(const Logits &of, uint64 least, Visit visit) {
    const int FLIGHT = 4;
    int goal = order_of_key(least);
    for (int first = thread(); first < of.quads; first += FLIGHT * threads()) {
        uint4 v[FLIGHT];
#pragma unroll
        for (int j = 0; j < FLIGHT; j++) v[j] = of.body[min(first + j * threads(), of.quads - 1)];
#pragma unroll
        for (int j = 0; j < FLIGHT; j++) {
            int i = first + j * threads(), id = of.head + 4 * i;
            if (i >= of.quads) break;
            if (order_of(v[j].x) >= goal) visit(key_of(v[j].x, id));
            if (order_of(v[j].y) >= goal) visit(key_of(v[j].y, id + 1));
            if (order_of(v[j].z) >= goal) visit(key_of(v[j].z, id + 2));
            if (order_of(v[j].w) >= goal) visit(key_of(v[j].w, id + 3));
        }
    }
    int edge = of.edge();
    if (edge < of.size) visit(key_of(of.bits[edge], edge));
}

// A key that at least k and at most GATHERED_KEYS of a row reach, of which the largest is `most`, and `floor` one that
// k reach. Keys from the floor on are counted in bins; the bin that holds the k-th is divided again until it is small.
FUNCTION uint64 threshold(Choosing &on, const Logits &of, int k, uint64 floor, uint64 most) {
    int width = 0, above = 0, reached;  // bits of what a key in question is above the floor; keys above all of those
    while ((most - floor) >> width) width++;
    do {
        int shift = max(width - DIGIT, 0), group = BINS / GROUP - 1, bin;
        for (int i = thread(); i < BINS; i += threads()) on.bins[i] = 0;
        block_barrier();
        each_key(of, floor, [&](uint64 key) {
            if (!((key - floor) >> width)) atomicAdd(on.bins + ((key - floor) >> shift), 1u);
        });
        block_barrier();
        for (int i = warp(); i < BINS / GROUP; i += warps()) {
            float sum = warp_sum((float)(on.bins[GROUP * i + lane()] + on.bins[GROUP * i + 32 + lane()]));
            if (lane() == 0) on.groups[i] = (unsigned)sum;
        }
        block_barrier();
        while (above + (int)on.groups[group] < k) above += on.groups[group--];
        for (bin = GROUP * group + GROUP - 1; above + (int)on.bins[bin] < k; bin--) above += on.bins[bin];
        reached = above + on.bins[bin];
        floor += (uint64)bin << shift;
        width = shift;
        block_barrier();
    } while (reached > GATHERED_KEYS);
    return floor;
}

// The largest first. A bitonic network (Batcher 1968) over a power of two, to which zeros fill up.
FUNCTION void sort_keys(Choosing &on) {
    int count = on.count, size = 1;
    while (size < count) size *= 2;
    for (int i = count + thread(); i < size; i += threads()) on.keys[i] = 0;
    block_barrier();
    for (int run = 2; run <= size; run *= 2) {
        for (int gap = run / 2; gap; gap /= 2) {
            for (int i = thread(); i < size / 2; i += threads()) {
                int at = 2 * i - (i & (gap - 1));
                uint64 one = on.keys[at], other = on.keys[at + gap];
                if ((one < other) == !(at & run)) on.keys[at] = other, on.keys[at + gap] = one;
            }
            block_barrier();
        }
    }
}

// The keys that reach `floor`, if they are no more than there is room for; how many there are.
FUNCTION int gather(Choosing &on, const Logits &of, uint64 floor) {
    block_barrier();  // nobody reads what is there
    if (thread() == 0) on.count = 0;
    block_barrier();
    each_key(of, floor, [&](uint64 key) {
        if (key < floor) return;
        unsigned at = atomicAdd(&on.count, 1u);
        if (at < GATHERED_KEYS) on.keys[at] = key;
    });
    block_barrier();
    return on.count;
}

// The k-th largest of what each thread brings: k keys reach it, and of a large row few more. For k up to the threads.
FUNCTION uint64 kth_largest(Choosing &on, uint64 own, int k) {
    on.keys[thread()] = own;
    if (thread() == 0) on.count = threads();
    block_barrier();
    sort_keys(on);
    return on.keys[k - 1];
}

// shares = softmax(logits / t) of the first n keys. One thread adds, in their order, here and below: as NumPy's cumsum.
FUNCTION void share_out(Choosing &on, int n, double t) {
    double most = logit_of(on.keys[0]) / t;
    for (int i = thread(); i < n; i += threads()) on.shares[i] = exp(logit_of(on.keys[i]) / t - most);
    block_barrier();
    if (thread() == 0) {
        double sum = 0;
        for (int i = 0; i < n; i++) sum += on.shares[i];
        on.log_sum = log(sum);
    }
    block_barrier();
    for (int i = thread(); i < n; i += threads()) on.shares[i] = exp(logit_of(on.keys[i]) / t - most - on.log_sum);
    block_barrier();
}

FUNCTION int top_p(Choosing &on, int n, double mass) {
    if (mass >= 1) return n;
    share_out(on, n, 1);
    if (thread() == 0) {
        int last = 0;
        for (double sum = on.shares[0]; sum < mass && last < n - 1; sum += on.shares[last]) last++;
        on.kept = last + 1;
    }
    block_barrier();
    return on.kept;
}

FUNCTION int min_p(Choosing &on, int n, double share) {
    if (share <= 0) return n;
    double most = logit_of(on.keys[0]), least = log(share);
    float count = 0;
    for (int i = thread(); i < n; i += threads()) count += logit_of(on.keys[i]) - most >= least ? 1.0f : 0.0f;
    return (int)block_sum(count);
}

// One of the first n keys; in thread 0 alone.
FUNCTION int draw(Choosing &on, int n, double t, double at) {
    share_out(on, n, max(t, 1e-60));  // COLDEST in filters.py
    if (thread()) return -1;
    double sum = 0, reached = on.shares[0];
    for (int i = 0; i < n; i++) sum += on.shares[i];
    int i = 0;
    for (double goal = at * sum; reached <= goal && i < n - 1; reached += on.shares[i]) i++;
    return id_of(on.keys[i]);
}

// Of a token's logits each block looks at a part, and leaves the largest key there.  a: the vocabulary; keys [blocks].
OPERATOR void leaders(Words a, Words p, Work work) {
    if (!p[CHOICES] || !p[OUT_ROWS]) return;
    int size = a[leaders_at::vocabulary], each = (size / work.blocks + 4) / 4 * 4, first = min(size, each * work.block);
    uint64 most = largest(largest_own(logits_of(floats(p[LOGITS]) + first, min(each, size - first))));
    if (is_finite(most) && most) most -= first;  // the ids began with 0
    if (thread() == 0) ((uint64 *)a[leaders_at::leaders])[work.block] = most;
}

// The next id of each row of logits, -1 where one is not finite; each block some of the rows.
// a: the vocabulary, at most 2^24; what `leaders` has found in a token's row, 0 in other passes. At p[HOW] float64
// [OUT_ROWS, HOW_MANY]: temperature, top_k (up to MOST_CHOICES; 0 is off, for vocabularies no larger), top_p, min_p, and a
// draw from [0, 1).
OPERATOR void choose(Words a, Words p, Work work) {
    if (!p[CHOICES]) return;
    Choosing &on = *(Choosing *)room();
    int size = a[choose_at::vocabulary];
    const uint64 *led = (const uint64 *)a[choose_at::leaders];
    for (int64 item = work.block; item < p[OUT_ROWS]; item += work.blocks) {
        Logits of = logits_of(floats(p[LOGITS]) + size * item, size);
        const double *how = (const double *)p[HOW] + HOW_MANY * item;
        uint64 own = !led ? largest_own(of) : thread() < work.blocks ? led[thread()] : 0, most = largest(own);
        int id = is_finite(most) ? id_of(most) : -1;
        if (is_finite(most) && how[0] != 0) {
            int k = min(how[1] >= 1 && how[1] < size ? (int)how[1] : size, MOST_CHOICES);
            bool few = k <= (led ? work.blocks : threads());
            uint64 floor = size > GATHERED_KEYS && few ? kth_largest(on, own, k) : 0;
            if (size > GATHERED_KEYS && !few) floor = threshold(on, of, k, 0, most);
            if (gather(on, of, floor) > GATHERED_KEYS) gather(on, of, threshold(on, of, k, floor, most));
            sort_keys(on);
            id = draw(on, min_p(on, top_p(on, k, how[2]), how[3]), how[0], how[4]);
        }
        if (thread() == 0) ((int64 *)p[CHOICES])[item] = id;
    }
}
