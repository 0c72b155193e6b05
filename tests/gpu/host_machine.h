// What machine.h gives, on a CPU (host.h).
#pragma once

FUNCTION char *shared_memory() { return host::block->shared; }

FUNCTION float from_half(unsigned short h) {
    unsigned rest = h & 0x7FFF;
    if (rest > 0x7C00) return __uint_as_float(0x7FFFFFFF);
    float f = rest < 0x400 ? (float)rest * 0x1p-24f : __uint_as_float((rest << 13) + 0x38000000); // bias 127, not 15
    if (rest == 0x7C00) f = INFINITY;
    return h & 0x8000 ? -f : f;
}

FUNCTION unsigned short to_half(float f) {
    unsigned sign = __float_as_uint(f) >> 16 & 0x8000, rest = __float_as_uint(f) & 0x7FFFFFFF;
    if (rest > 0x7F800000) return 0x7FFF;
    if (rest >= 0x477FF000) return sign | 0x7C00; // from 65520, halfway to what would be the next
    // Below 2^-14 halves are multiples of 2^-24, as are floats from 0.5: the sum rounds.
    if (rest < 0x38800000) return sign | (__float_as_uint(fabsf(f) + 0.5f) - 0x3F000000);
    return sign | ((rest + 0xFFF + (rest >> 13 & 1) - 0x38000000) >> 13);
}

FUNCTION float from_brain(unsigned short b) { return __uint_as_float((unsigned)b << 16); }

FUNCTION unsigned to_halves(float low, float high) { return to_half(low) | (unsigned)to_half(high) << 16; }

FUNCTION unsigned multiply_add_halves(unsigned a, unsigned b, unsigned c) {
    auto one = [&](int at) {
        return (float)((double)from_half(a >> at) * from_half(b >> at) + from_half(c >> at));
    };
    return to_halves(one(0), one(16));
}

FUNCTION unsigned add_halves(unsigned a, unsigned b) { return multiply_add_halves(a, 0x3c003c00, b); }

FUNCTION uint4 load_weights(const void *p) {
    host::want_aligned(p, false, "load_weights of an address that is no multiple of 16");
    return *(const uint4 *)p;
}

FUNCTION float reciprocal(float x) { return 1 / x; }

FUNCTION int add_products(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += (signed char)(a >> i) * (signed char)(b >> i);
    return c;
}

FUNCTION float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

namespace host {

// Addition and maximum commute, so every lane of the butterfly ends with what lane 0 has.
template <class F> static void butterfly(const float *in, float *out, F f) {
    float x[32];
    memcpy(x, in, sizeof x);
    for (int i = 16; i; i >>= 1)
        for (int l = 0; l < i; l++) x[l] = f(x[l], x[l + i]);
    for (int l = 0; l < 32; l++) out[l] = x[0];
}

} // namespace host

FUNCTION float warp_sum(float x) {
    return host::meet<float>("warp_sum", x, [](float *in, float *out) {
        host::butterfly(in, out, [](float a, float b) { return a + b; });
    });
}

FUNCTION float warp_max(float x) {
    return host::meet<float>("warp_max", x, [](float *in, float *out) {
        host::butterfly(in, out, [](float a, float b) { return fmaxf(a, b); });
    });
}

FUNCTION void warp_barrier() {
    host::meet<char>("warp_barrier", '\0', [](char *, char *) {});
}

FUNCTION void load_matrices(unsigned r[4], const void *row) {
    host::want_aligned(row, true, "load_matrices of a row at no multiple of 16");
    uint4 v = host::meet<uint4>("load_matrices", row, [](const void **in, uint4 *out) {
        for (int l = 0; l < 32; l++)
            for (int m = 0; m < 4; m++) ((unsigned *)&out[l])[m] = ((const unsigned *)in[m * 8 + l / 4])[l % 4];
    });
    memcpy(r, &v, 16);
}

FUNCTION void load_matrices_turned(unsigned r[4], const void *row) {
    host::want_aligned(row, true, "load_matrices_turned of a row at no multiple of 16");
    uint4 v = host::meet<uint4>("load_matrices_turned", row, [](const void **in, uint4 *out) {
        for (int l = 0; l < 32; l++)
            for (int m = 0; m < 4; m++) {
                const unsigned short *const *rows = (const unsigned short **)in + m * 8 + l % 4 * 2;
                ((unsigned *)&out[l])[m] = rows[0][l / 4] | (unsigned)rows[1][l / 4] << 16;
            }
    });
    memcpy(r, &v, 16);
}

namespace host {

struct Product {
    unsigned a[4], b[2];
    float c[4];
};

// Products of halves are exact in float; each element's sum is rounded once. Tests spend most of their time here.
[[maybe_unused, gnu::no_sanitize("alignment", "bounds", "shift")]] static void multiply_all(Product *in, float4 *out) {
    double a[16][16], b[16][8], c[16][8];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 2; i++) {
            int g = l / 4, t = l % 4 * 2 + i;
            for (int m = 0; m < 4; m++) a[g + m % 2 * 8][t + m / 2 * 8] = from_half(in[l].a[m] >> i * 16);
            for (int m = 0; m < 2; m++) b[t + m * 8][g] = from_half(in[l].b[m] >> i * 16);
            for (int m = 0; m < 2; m++) c[g + m * 8][t] = in[l].c[m * 2 + i];
        }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) ((float *)&out[l])[i] = (float)c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

} // namespace host

FUNCTION void multiply(float c[4], const unsigned a[4], const unsigned b[2]) {
    host::Product in;
    memcpy(in.a, a, 16), memcpy(in.b, b, 8), memcpy(in.c, c, 16);
    float4 sum = host::meet<float4>("multiply", in, host::multiply_all);
    memcpy(c, &sum, 16);
}

// Products of a warpgroup: each of its warps has 16 rows of a and c by itself.
FUNCTION unsigned shared_address(const void *p) { return (unsigned)((const char *)p - host::block->shared); }
FUNCTION void begin_products() { warp_barrier(); }

FUNCTION void end_products() {
    host::meet<char>("end_products", '\0', [](char *, char *) { host::warp->group++; });
}

namespace host {

struct WideOperands {
    const unsigned *a;
    float *c;
    uint64 b;
    int rows;
};

// What the descriptor says of b: rows of 16 halves, eight rows 128 bytes apart, then eight more a stride further, the
// address's bits 4 to 6 swizzled by its bits 7 to 9.
static void multiply_wide_now(const WideProduct &p) {
    if (p.b >> 62 != 1 || (p.b >> 49 & 7)) fault("multiply_wide of a matrix that is not swizzled by 128 bytes");
    unsigned start = (p.b & 0x3fff) << 4, stride = (p.b >> 32 & 0x3fff) << 4;
    double b[256][16];
    for (int n = 0; n < p.rows; n++)
        for (int k = 0; k < 16; k++) {
            unsigned at = start + n / 8 * stride + n % 8 * 128 + 2 * k;
            at ^= (at >> 7 & 7) << 4;
            if (at >= shared_bytes) fault("multiply_wide of what is not in shared memory");
            b[n][k] = from_half(*(const unsigned short *)(block->shared + at));
        }
    for (int l = 0; l < 32; l++)
        for (int half = 0; half < 2; half++) {
            double a[16];  // row g or g + 8
            for (int k = 0; k < 16; k++)
                a[k] = from_half(p.a[l / 4 * 4 + k % 8 / 2][half + k / 8 * 2] >> k % 2 * 16);
            for (int i = 0; i < p.rows / 4; i++) {
                int n = i / 2 * 8 + l % 4 * 2 + i % 2;
                float &c = p.c[l][i / 2 * 4 + half * 2 + i % 2];
                double sum = c;
                for (int k = 0; k < 16; k++) sum += a[k] * b[n][k];
                c = (float)sum;
            }
        }
}

} // namespace host

// Happens as late as it may, with what a, b and c hold then.
template <int COUNT> FUNCTION void multiply_wide(float (&c)[COUNT], const unsigned (&a)[4], uint64 b) {
    host::WideOperands in = {a, c, b, 2 * COUNT};
    host::meet<char>("multiply_wide", in, [](host::WideOperands *in, char *) {
        host::WideProduct p = {{}, {}, in[0].b, in[0].rows, host::warp->group};
        for (int l = 0; l < 32; l++) {
            if (in[l].b != p.b) host::fault("lanes of a warp with several matrices in multiply_wide");
            p.a[l] = in[l].a, p.c[l] = in[l].c;
        }
        host::warp->products.push_back(p);
    });
}

template <int left> FUNCTION void wait_for_products() {
    host::meet<char>("wait_for_products", '\0', [](char *, char *) {
        std::vector<host::WideProduct> &products = host::warp->products;
        auto at = products.begin();
        for (; at != products.end() && at->group < host::warp->group - left; at++) host::multiply_wide_now(*at);
        products.erase(products.begin(), at);
    });
}

template <int COUNT> FUNCTION void products_are_done(float (&)[COUNT]) {}

// Happens as late as it may. Until then its room holds garbage, for who still reads there what was before is too late.
FUNCTION void copy_later(void *to, const void *from) {
    host::want_aligned(to, true, "copy_later to an address that is no multiple of 16");
    host::want_aligned(from, false, "copy_later from an address that is no multiple of 16");
    memset(to, 0xFF, 16);
    host::fiber->copies.push_back({to, from, host::fiber->group});
}

FUNCTION void end_group() { host::fiber->group++; }

template <int left> FUNCTION void wait_for_groups() {
    std::vector<host::Copy> &copies = host::fiber->copies;
    auto at = copies.begin();
    for (; at != copies.end() && at->group < host::fiber->group - left; at++) memcpy(at->to, at->from, 16);
    copies.erase(copies.begin(), at);
}

FUNCTION void mbarrier_init(uint64 *at, unsigned arrivals) {
    *(host::Mbarrier *)at = {arrivals & 0x7fff, arrivals & 0x7fff, 0, 0};
}

FUNCTION void mbarrier_arrive(uint64 *at) {
    host::Mbarrier &b = *(host::Mbarrier *)at;
    if (!b.left) host::fault("an arrival at no mbarrier, or a second one in a phase");
    b.left--;
    host::end_phase(b);
}

FUNCTION void mbarrier_expect(uint64 *at, unsigned bytes) {
    ((host::Mbarrier *)at)->bytes += bytes;
    mbarrier_arrive(at);
}

// Such copies come as late as they may, in the order of the seed. Until then their room holds garbage.
FUNCTION void copy_whole(void *to, const void *from, unsigned bytes, uint64 *at) {
    host::want_aligned(to, true, "copy_whole to an address that is no multiple of 16");
    host::want_aligned(from, false, "copy_whole from an address that is no multiple of 16");
    if (bytes % 16) host::fault("copy_whole of bytes that are no multiple of 16");
    memset(to, 0xFF, bytes);
    host::chunks.push_back({host::block, (char *)to, (const char *)from, bytes, (host::Mbarrier *)at});
}

FUNCTION void shared_for_copies() {}

enum { CHUNK_ARRIVALS = 1 };
FUNCTION void copy_chunk(void *to, const void *from, unsigned bytes, uint64 *full) {
    if (threadIdx.x % 32 == 0) mbarrier_expect(full, bytes), copy_whole(to, from, bytes, full);
}

FUNCTION void mbarrier_wait(uint64 *at, unsigned parity) {
    host::Mbarrier *b = (host::Mbarrier *)at;
    if (b->parity != (parity & 1)) return; // another phase runs: that one has ended
    host::waiters.push_back({host::warp, threadIdx.x % 32, b, parity & 1});
    host::unready();
    host::park();
}

// Thread 0 always waits a round, so that blocks leave in the order of the seed too.
FUNCTION void grid_barrier(unsigned *arrivals, unsigned goal, int threads) {
    first_threads_meet(threads);
    if (threadIdx.x == 0) {
        atomicAdd(arrivals, 1u);
        host::block->arrivals = arrivals;
        host::block->goal = goal;
        host::unready();
        host::park();
    }
    first_threads_meet(threads);
}
