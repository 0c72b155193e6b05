// Products of many rows where warpgroups multiply (compute capability 9.0): in place of linear_tiles, with more than
// FEW_ROWS rows. Equation: kernels/reference/quants.py. Weights: kinds.h. Blocks of 256 threads, two warpgroups.
//
// A block makes a tile of y: HIGH rows, 128 outputs. A warpgroup has 64 of them: its threads load their weights from
// memory into registers, and unpack them there into operands, half a block of four runs a step, while the products of
// the step before are on their way. Rows come through shared memory, a panel (panels.h) a step: one thread asks for it
// several steps ahead, beyond the end of the tile. An element's sum has the same order in all tiles.

enum { WIDE_OUTPUTS = 128 };  // of a tile
enum { PANELS_HELD = 6, PANELS_AHEAD = PANELS_HELD - 2 };  // in shared memory; asked for ahead

static_assert(PANELS_HELD * 256 * PANEL_BYTES == 196608);  // bytes of shared memory behind the desk, as in table.py

// Where a panel lies, and of which turn it is: panels follow each other from tile to tile.
struct PanelTurn {
    int stage;
    unsigned parity;
    MEMBER PanelTurn after(int panels) const {
        int next = stage + panels;
        return next < PANELS_HELD ? PanelTurn{next, parity} : PanelTurn{next - PANELS_HELD, parity ^ 1};
    }
};

// A panel of a tile's rows in memory, and how many the tile has from there on.
struct alignas(16) PanelSource {
    const char *from;
    unsigned bytes;
    int left;
};

// The desk: barriers of the panels in shared memory, which are there or free, and what is asked for next.
struct WideDesk {
    uint64 full[PANELS_HELD], free[PANELS_HELD];
    Many m;
    PanelSource next;  // to be asked for
    int item;  // its tile
};
static_assert(sizeof(WideDesk) <= DESK);
FUNCTION WideDesk &wide_desk() { return *(WideDesk *)shared_memory(); }

template <int HIGH> FUNCTION char *panel_of(int stage) { return room() + HIGH * PANEL_BYTES * stage; }

template <int HIGH> FUNCTION int wide_tiles(const Many &m) {
    return ((m.rows + HIGH - 1) / HIGH) * ((m.outputs + WIDE_OUTPUTS - 1) / WIDE_OUTPUTS);
}

template <int HIGH> FUNCTION PanelSource first_panel(const Many &m, int item) {
    int row = tile_at(m, item, HIGH, WIDE_OUTPUTS).row, rows = min(HIGH, (m.rows + 7) / 8 * 8 - row);
    return {m.x + PANEL_BYTES * (int64)row, (unsigned)(PANEL_BYTES * rows), (m.w.runs + 3) / 4 * 2};
}

// The next panel, if there is one, once nobody multiplies any more what lies there. One thread, at every step.
template <int HIGH> FUNCTION void ask_for_panel(PanelTurn turn, int blocks) {
    WideDesk &desk = wide_desk();
    PanelSource next = desk.next;
    if (!next.left) return;
    uint64 *full = desk.full + turn.stage;
    mbarrier_wait(desk.free + turn.stage, turn.parity ^ 1);
    mbarrier_expect(full, next.bytes);
    copy_whole(panel_of<HIGH>(turn.stage), next.from, next.bytes, full);
    next.from += panel_at(desk.m.rows, 1), next.left--;
    if (!next.left && desk.item + blocks < wide_tiles<HIGH>(desk.m))
        next = first_panel<HIGH>(desk.m, desk.item += blocks);
    desk.next = next;
}

// Columns 0 to 15 of a run, or 16 to 31, as halves, two in a word. Integers become numbers as the low bits of larger
// ones, whose difference from them is known: instructions that convert take four times as long.
template <class K> FUNCTION void halves_of(const Run<AsLoaded<K>> &r, int half, unsigned out[8]) {
    if constexpr (!K::SCALED) {
        float v[32];
        K::values(r.low, 0, v);
#pragma unroll
        for (int i = 0; i < 8; i++)  // adds -0: around mere copies ptxas has products wait for each other (C7513)
            out[i] = K::HALVES ? add_halves(word_of(r.low, 8 * half + i), 0x80008000)
                               : to_halves(v[16 * half + 2 * i], v[16 * half + 2 * i + 1]);
    } else {
        const bool SIGNED = K::LOADS == 2;  // bytes; else without a sign, and below 128
        int q[8];
        K::integers(r.low, r.high, q);
        unsigned d = __float_as_uint(r.by.d[0]), s = __float_as_uint(r.by.d[1]);
        Scales by = K::scales((const char *)&d, (const char *)&s);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned four = (unsigned)q[4 * half + i] ^ (SIGNED ? 0x80808080 : 0);
            if constexpr (K::S == 0) {  // d and m are halves themselves: 1024 + q is one
                unsigned less = SIGNED ? 0xe480e480 : 0xe400e400;  // -1024, and the 128 that make a byte positive
                unsigned scale = to_halves(by.d[0], by.d[0]), more = to_halves(by.m[0], by.m[0]);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    unsigned pair = __byte_perm(four, 0x64646464, j ? 0x4342 : 0x4140);
                    out[2 * i + j] = multiply_add_halves(add_halves(pair, less), scale, more);
                }
            } else {  // 1 + q / 128
                float scale = 128 * by.d[half], more = by.m[half] - scale, v[4];
                four |= 0x80808080;
#pragma unroll
                for (int j = 0; j < 4; j++)
                    v[j] = fmaf(scale, __uint_as_float(__byte_perm(four, 0x3f000000, 0x7044 + 256 * j)), more);
                out[2 * i] = to_halves(v[0], v[1]), out[2 * i + 1] = to_halves(v[2], v[3]);
            }
        }
    }
}

// Where the runs of two neighbouring outputs lie: in the same chunks, of which the first one is at hand.
template <class K> struct PairSource {
    const char *chunk;
    int row;  // of the chunk
    MEMBER PairSource(const Many &m, int output) {
        int even = min(output, (m.outputs - 1) / 2 * 2);  // outputs beyond the last are not put
        chunk = m.w.chunks + even / K::ROWS * m.w.tile, row = even % K::ROWS;
    }
};

template <class K> struct RunPair {
    Run<AsLoaded<K>> of[2];
    // A lane's run of a block of four. Where there are no such columns any will do, for x is 0 there.
    MEMBER void load(const Matrix &w, const PairSource<K> &from, int block) {
        int run = min(4 * block + lane() % 4, w.runs - 1), before = run / 32 * 32;
        const char *chunk = from.chunk + run / 32 * w.chunk;
#pragma unroll
        for (int i = 0; i < 2; i++)
            of[i] = run_of<AsLoaded<K>, false>(chunk, min(32, w.runs - before), from.row + i, run - before);
    }
    // Columns 0 to 15 of the runs, or 16 to 31, as operands of four products.
    MEMBER void unpacked(int half, unsigned a[4][4]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            unsigned pairs[8];
            halves_of<K>(of[i], half, pairs);
#pragma unroll
            for (int k = 0; k < 4; k++) a[k][i] = pairs[2 * k], a[k][2 + i] = pairs[2 * k + 1];
        }
    }
};

FUNCTION int after(int i) { return i / 2 * 8 + i % 2; }

// What becomes of sums, with the same rounding everywhere: two neighbouring outputs of COUNT rows, row + after(i).
// `sums` are as multiply_wide has them, the outputs its rows g and g + 8.
template <int COUNT> FUNCTION void put_pairs(const Many &m, Words p, int row, int output, const float *sums) {
    int left = m.rows - row;
    bool both = output + 1 < m.outputs;
    if (output >= m.outputs) return;
    Column c = m.column(output, p[LOGITS]);
    bool together = both && c.stride % 2 == 0 && (int64)c.y % 8 == 0;
    char *y = (char *)(c.y + row * c.stride);
    unsigned stride = 4 * (unsigned)c.stride;
    float bias[2] = {c.bias ? c.bias[0] : 0.0f, c.bias && both ? c.bias[1] : 0.0f};
    float factors[COUNT], gates[COUNT];
    float2 values[COUNT];
#define EACH_ROW _Pragma("unroll") for (int i = 0; i < COUNT; i++)
    EACH_ROW factors[i] = gates[i] = 1, values[i] = make_float2(0, 0);
    if (m.factors) EACH_ROW if (after(i) < left) factors[i] = m.factors[row + after(i)];
    if (m.gate) EACH_ROW if (after(i) < left) gates[i] = m.gate[row + after(i)];
    if (m.add && together) EACH_ROW if (after(i) < left) values[i] = *(const float2 *)(y + after(i) * stride);
    if (m.add && !together) EACH_ROW {
        const float *own = (const float *)(y + after(i) * stride);
        if (after(i) < left) values[i].x = own[0];
        if (after(i) < left && both) values[i].y = own[1];
    }
    EACH_ROW {
        const float *own = sums + i / 2 * 4 + i % 2;
        float first = fmaf(factors[i], own[0], bias[0]), second = fmaf(factors[i], own[2], bias[1]);
        values[i].x = m.pair ? activated(m.pair, first) * second : fmaf(gates[i], first, values[i].x);
        values[i].y = fmaf(gates[i], second, values[i].y);
    }
    if (together && !m.pair) EACH_ROW if (after(i) < left) *(float2 *)(y + after(i) * stride) = values[i];
    if (!together || m.pair) EACH_ROW {
        float *own = (float *)(y + after(i) * stride);
        if (after(i) < left) own[0] = values[i].x;
        if (after(i) < left && both && !m.pair) own[1] = values[i].y;
    }
#undef EACH_ROW
}

template <class K, int HIGH> FUNCTION void linear_wide(Words a, Words p, Work work) {
    const int DEPTH = K::LOADS > 2 ? 1 : 2;  // blocks of weights that are loaded ahead
    Many m = many_at(a, p);
    Matrix w = m.w;
    WideDesk &desk = wide_desk();
    int tiles = wide_tiles<HIGH>(m), blocks = (w.runs + 3) / 4;
    int own = 16 * warp() + 2 * (lane() / 4);  // of the tile's outputs, and the one after it
    if (work.block >= tiles) return;
    if (thread() == 0) {
        for (int i = 0; i < PANELS_HELD; i++) mbarrier_init(desk.full + i, 1), mbarrier_init(desk.free + i, MANY_WARPS);
        desk.m = m, desk.item = work.block, desk.next = first_panel<HIGH>(m, work.block);
    }
    shared_for_copies();
    block_barrier();
    PanelTurn now = {0, 0};
    if (thread() == 0)
        for (int i = 0; i < PANELS_AHEAD; i++) ask_for_panel<HIGH>(now.after(i), work.blocks);

    RunPair<K> pairs[DEPTH];
    PairSource<K> source(m, tile_at(m, work.block, HIGH, WIDE_OUTPUTS).output + own);
#pragma unroll
    for (int d = 0; d < DEPTH; d++) pairs[d].load(w, source, d);
    for (int item = work.block; item < tiles; item += work.blocks) {
        float sums[HIGH / 2];
        unsigned operands[2][4][4];  // of the products that are on their way, and of the next ones
#pragma unroll
        for (int i = 0; i < HIGH / 2; i++) sums[i] = 0;
        pairs[0].unpacked(0, operands[0]);
        int before = -1;  // where the panel of the step before lies
        for (int from = 0; from < blocks; from += DEPTH) {
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                int block = from + d;
                if (block >= blocks) break;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const char *panel = panel_of<HIGH>(now.stage);
                    mbarrier_wait(desk.full + now.stage, now.parity);
                    begin_products();
#pragma unroll
                    for (int k = 0; k < 4; k++) multiply_wide(sums, operands[half][k], panel_descriptor(panel, k));
                    end_products();
                    wait_for_products<1>();
                    if (before >= 0 && lane() == 0) mbarrier_arrive(desk.free + before);
                    if (thread() == 0) ask_for_panel<HIGH>(now.after(PANELS_AHEAD), work.blocks);
                    warp_barrier();
                    before = now.stage, now = now.after(1);
                    pairs[half ? (d + 1) % DEPTH : d].unpacked(1 - half, operands[1 - half]);
                    if (half == 0) pairs[d].load(w, source, block + DEPTH);
                }
            }
        }
        wait_for_products<0>();
        products_are_done(sums);
        if (lane() == 0) mbarrier_arrive(desk.free + before);
        Many again = desk.m;  // there is no register to keep it in
        Place at = tile_at(again, item, HIGH, WIDE_OUTPUTS);
        int next = min(item + work.blocks, tiles - 1);
        source = PairSource<K>(again, tile_at(again, next, HIGH, WIDE_OUTPUTS).output + own);
#pragma unroll
        for (int d = 0; d < DEPTH; d++) pairs[d].load(w, source, d);
#pragma unroll
        for (int i = 0; i < HIGH / 2; i += 16)
            put_pairs<8>(again, p, at.row + 2 * i + lane() % 4 * 2, at.output + own, sums + i);
    }
}
