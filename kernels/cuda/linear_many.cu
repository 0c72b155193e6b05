// Products with weights for many tokens: y = x Wᵀ + b on tensor cores, weights unpacked into halves on the way, sums in
// float32. Equation: kernels/reference/quants.py. Weights: kinds.h. Blocks of 256 threads.
//
// Up to FEW_ROWS rows by linear_few; with more in tiles, by linear_wide where warpgroups multiply, else by linear_tiles.
// An element's sum has the same order in all tiles of one form, so neither its neighbours nor the number of blocks show in
// its bits; the forms differ in it. Weights of 32 bits are multiplied in float32 (linear_exact).

template <class K, int HIGH> FUNCTION void linear_high(Words a, Words p, Work work) {
    if constexpr (WARPGROUPS)
        linear_wide<K, HIGH>(a, p, work);
    else
        linear_tiles<K, HIGH>(a, p, work);
}

// About how long the tiles take: a step of one costs what its products cost and, for 64 rows' worth, unpacking.
template <int HIGH> FUNCTION int tiles_cost(const Many &m, Work work) {
    const int OUTPUTS = WARPGROUPS ? (int)WIDE_OUTPUTS : ManyShape<HIGH>::OUTPUTS;
    int tiles = ((m.rows + HIGH - 1) / HIGH) * ((m.outputs + OUTPUTS - 1) / OUTPUTS);
    return (tiles + work.blocks - 1) / work.blocks * OUTPUTS * (HIGH + 64);
}

// A block on GPUs of compute capability 8.6, 8.9 and 12 has 99 KB of shared memory: too little for the largest tiles.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
const int HIGHEST = 128;
#else
const int HIGHEST = 256;
#endif

// Shared memory behind the desk is what kernels/table.py says: no form may need more.
static_assert(ManyShape<HIGHEST>::BYTES <= 98304 && ManyShape<32>::BYTES <= 98304 && ManyShape<64>::BYTES <= 98304);
static_assert(8 * EXACT * EXACT_PITCH <= 98304 && 4 * MANY_WARPS * FEW_ROWS * FewShape<Q4_0, 2>::PITCH <= 98304);

// a: W, its outputs; x: rows of halves (panels.h), zeros behind their end up to a whole run (of floats, without them, for
// weights of 32 bits), their stride in bytes, and what each row is to be multiplied by (0: nothing); y (0: the pass's
// logits), its stride in bytes, bias, a factor for each row (0: none), whether to add to y; pairs and other parts as
// linear_one has them, these parts beginning at multiples of 8; whether the rows are those whose logits are wanted (x,
// factors and y begin with the first of them); columns.
template <class K> FUNCTION void linear_many(Words a, Words p, Work work) {
    Many m = many_at(a, p);
    if (!m.rows) return;
    if constexpr (K::LOADS == 8) {
        linear_exact(a, p, work);
    } else if (m.rows <= FEW_ROWS) {
        const int TILES = K::LOADS > 2 ? 1 : 2;  // half as wide where otherwise blocks had nothing to do
        if (m.outputs < 16 * TILES * work.blocks)
            m.rows <= 8 ? linear_few<K, 1, 1>(a, p, work) : linear_few<K, 2, 1>(a, p, work);
        else
            m.rows <= 8 ? linear_few<K, 1, TILES>(a, p, work) : linear_few<K, 2, TILES>(a, p, work);
    } else {
        int narrow = tiles_cost<32>(m, work), middle = tiles_cost<64>(m, work), large = tiles_cost<128>(m, work);
        int largest = HIGHEST == 256 ? tiles_cost<256>(m, work) : large + 1;
        if (narrow <= min(middle, min(large, largest)))
            linear_high<K, 32>(a, p, work);
        else if (middle <= min(large, largest))
            linear_high<K, 64>(a, p, work);
        else if (large <= largest)
            linear_high<K, 128>(a, p, work);
        else if constexpr (HIGHEST == 256)
            linear_high<K, 256>(a, p, work);
    }
}
