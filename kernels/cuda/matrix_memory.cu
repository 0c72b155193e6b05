// The matrix memory's recurrence, one pass over A a token. Equation: kernels/reference/matrix_memory.py.
//
// Every column of A changes by itself: a block takes a strip of 32 columns of one head of one sequence into shared
// memory, a lane a column, a warp every so many rows, and all tokens of the pass go through it.

const int STRIP = 32;
const int TOGETHER = 8;  // vectors whose products with the strip are computed side by side

// The products of vectors (key first, then the queries of its group) with a strip.
struct Strip {
    float *A, *partial;  // [D, STRIP], [warps, TOGETHER, STRIP]
    int D;

    MEMBER void sum_up(const float *const x[TOGETHER], int count) const {
        float sums[TOGETHER] = {};
        for (int d = warp(); d < D; d += warps()) {
            float entry = A[STRIP * d + lane()];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++)
                if (i < count) sums[i] += x[i][d] * entry;
        }
        block_barrier();  // what was there before has been read
#pragma unroll
        for (int i = 0; i < TOGETHER; i++)
            if (i < count) partial[STRIP * (TOGETHER * warp() + i) + lane()] = sums[i];
        block_barrier();
    }

    MEMBER float total(int i, int column) const {
        float sum = 0;
        for (int w = 0; w < warps(); w++) sum += partial[STRIP * (TOGETHER * w + i) + column];
        return sum;
    }
};

OPERATOR void scan(Words a, Words p, Work work) {
    int64 field = a[0];
    int P = a[1], G = a[2], R = a[3], D = a[4], E = a[5], strips = (E + STRIP - 1) / STRIP;
    const float *decay = floats(a[9]), *rate = floats(a[10]), *retrieve = floats(a[11]), *mix = floats(a[12]);
    bool wedge = a[14], write_first = a[15];
    float *A = (float *)room(), *u = A + STRIP * D;
    Strip strip = {A, u + STRIP, D};
    int at_once = work.by_head ? strips : 1;  // strips of a head that this block does one after the other
    int64 items = p[SEQUENCES] * G * (strips / at_once);
    for (int64 item = work.block; item < items; item += work.blocks)
        for (int k = 0; k < at_once * P; k++) {
            int plane = k % P, e = STRIP * (work.by_head ? k / P : item % strips);
            int64 head = work.by_head ? item : item / strips;
            int g = head % G, columns = min(STRIP, E - e);
            Words of = sequence(p, head / G);
            float *whole = floats(words(of[FIELDS])[field]) + (int64)D * E * (plane * G + g) + e;
            bool inside = lane() < columns;
            for (int d = warp(); d < D; d += warps()) A[STRIP * d + lane()] = inside ? whole[(int64)E * d + lane()] : 0.0f;
            for (int64 row = of[ROW]; row < of[ROW] + of[COUNT]; row++) {
                int64 at = G * row + g, entry = (row * P + plane) * G + g;
                const float *key = floats(a[7]) + D * at, *value = floats(a[8]) + E * at, *queries = floats(a[6]) + D * R * at;
                float *out = floats(a[13]) + E * R * at + e, eta = rate[entry], lam = decay[entry];
                float again = retrieve ? retrieve[at] : 0.0f;
                bool writes = eta != 0 || lam != 1;
                for (int moment = 0; moment < 2; moment++) {
                    if (moment == write_first) {  // read
                        for (int first = 0; first < R; first += TOGETHER) {
                            const float *x[TOGETHER];
                            int count = min(TOGETHER, R - first);
#pragma unroll
                            for (int i = 0; i < TOGETHER; i++) x[i] = queries + D * (first + min(i, count - 1));
                            strip.sum_up(x, count);
                            for (int i = thread(); i < STRIP * count; i += threads()) {
                                int r = first + i / STRIP, c = i % STRIP;
                                if (c >= columns) continue;
                                float read = strip.total(i / STRIP, c);
                                if (mix) read *= mix[entry * R + r];
                                out[E * r + c] = plane ? out[E * r + c] + read : read;
                            }
                        }
                    } else if (writes) {
                        const float *x[TOGETHER];
#pragma unroll
                        for (int i = 0; i < TOGETHER; i++) x[i] = key;
                        if (again != 0) strip.sum_up(x, 1);
                        else block_barrier();
                        if (thread() < columns)
                            u[thread()] = eta * (value[e + thread()] - (again != 0 ? again * strip.total(0, thread()) : 0.0f));
                        block_barrier();
                        if (inside)
                            for (int d = warp(); d < D; d += warps()) {
                                float change = key[d] * u[lane()];
                                if (wedge) change -= eta * value[d] * key[e + lane()];
                                A[STRIP * d + lane()] = lam * A[STRIP * d + lane()] + change;
                            }
                    }
                }
            }
            if (inside)
                for (int d = warp(); d < D; d += warps()) whole[(int64)E * d + lane()] = A[STRIP * d + lane()];
            block_barrier();
        }
}
