// What CUDA itself gives to kernels, on a CPU (host.h).
#pragma once

FUNCTION float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
FUNCTION unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
// Counts up, and says nothing of time.
FUNCTION int64 clock64() {
    static int64 count = 0;
    return ++count;
}
FUNCTION double __longlong_as_double(int64 x) { return std::bit_cast<double>(x); }
FUNCTION int __float2int_rn(float x) { return (int)rintf(x); }
FUNCTION int __ffs(int x) { return __builtin_ffs(x); }
FUNCTION int __popc(unsigned x) { return std::popcount(x); }
FUNCTION unsigned __byte_perm(unsigned a, unsigned b, unsigned which) {
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= (unsigned)(((uint64)b << 32 | a) >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
FUNCTION int __clz(int x) { return std::countl_zero((unsigned)x); }
FUNCTION float rsqrtf(float x) { return (float)(1 / sqrt((double)x)); }

template <class A, class B> FUNCTION std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return fmin((T)a, (T)b);
    else return (T)b < (T)a ? (T)b : (T)a;
}

template <class A, class B> FUNCTION std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return fmax((T)a, (T)b);
    else return (T)a < (T)b ? (T)b : (T)a;
}

FUNCTION int atomicAdd(int *p, int x) { return std::exchange(*p, (int)((unsigned)*p + (unsigned)x)); }
FUNCTION unsigned atomicAdd(unsigned *p, unsigned x) { return std::exchange(*p, *p + x); }
FUNCTION unsigned atomicMax(unsigned *p, unsigned x) { return std::exchange(*p, max(*p, x)); }
FUNCTION unsigned atomicMin(unsigned *p, unsigned x) { return std::exchange(*p, min(*p, x)); }

FUNCTION void first_threads_meet(int threads) {
    host::block->wanted = threads;
    host::block->arrived++;
    host::unready();
    host::park();
}

FUNCTION void __syncthreads() { first_threads_meet(blockDim.x); }

namespace host {

template <class T> struct Parcel {
    T x;
    int from;
};

// Each lane's x goes to the lanes that ask for it.
template <class T> static T carry(const char *where, unsigned mask, T x, int from) {
    static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4);
    if (~mask) fault("a warp's function without all of its lanes");
    return meet<T>(where, Parcel<T>{x, from}, [](Parcel<T> *in, T *out) {
        for (int l = 0; l < 32; l++) out[l] = in[in[l].from].x;
    });
}

static int lane() { return threadIdx.x % 32; }

} // namespace host

template <class T> FUNCTION T __shfl_sync(unsigned mask, T x, int from) {
    return host::carry("__shfl_sync", mask, x, from & 31);
}
template <class T> FUNCTION T __shfl_xor_sync(unsigned mask, T x, int n) {
    return host::carry("__shfl_xor_sync", mask, x, (host::lane() ^ n) & 31);
}
template <class T> FUNCTION T __shfl_up_sync(unsigned mask, T x, unsigned n) {
    int from = host::lane() - (int)n;
    return host::carry("__shfl_up_sync", mask, x, from < 0 ? host::lane() : from);
}
template <class T> FUNCTION T __shfl_down_sync(unsigned mask, T x, unsigned n) {
    int from = host::lane() + (int)n;
    return host::carry("__shfl_down_sync", mask, x, from > 31 ? host::lane() : from);
}

FUNCTION unsigned __ballot_sync(unsigned mask, int predicate) {
    if (~mask) host::fault("a warp's function without all of its lanes");
    return host::meet<unsigned>("__ballot_sync", predicate != 0, [](bool *in, unsigned *out) {
        unsigned votes = 0;
        for (int l = 0; l < 32; l++) votes |= (unsigned)in[l] << l;
        for (int l = 0; l < 32; l++) out[l] = votes;
    });
}
