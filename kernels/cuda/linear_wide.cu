// Products of many rows where warpgroups multiply (compute capability 9.0): in place of linear_tiles, with more than
// FEW_ROWS rows. Equation: kernels/reference/quants.py. Weights: kinds.h. Blocks of 256 threads, two warpgroups.
//
// A block makes a tile of y: HIGH rows, 128 outputs. A warpgroup has 64 of them: its threads load their weights from
// memory into registers, and unpack them there into operands, half a block of four runs a step, while the products of
// the step before are on their way. Rows come through shared memory, a panel (panels.h) a step: one thread asks for it
// several steps ahead, beyond the end of the tile. An element's sum has the same order in all tiles.

const int WIDE_OUTPUTS = 128, PANELS_HELD = 6, PANELS_AHEAD = PANELS_HELD - 2;  // panels in shared memory; asked for ahead

// Bytes of shared memory behind the desk: PANELS_HELD of 256 rows. Barriers stand in the desk.
const int WIDE_BYTES = PANELS_HELD * 256 * PANEL_BYTES;

// Panels in the order in which they are used, tile after tile: where one lies, and of which turn it is.
struct PanelTurn {
    int stage;
    unsigned parity;
    MEMBER void next() {
        if (++stage == PANELS_HELD) stage = 0, parity ^= 1;
    }
};

// The desk: barriers, and what the thread that asks for panels has to know.
struct WideDesk {
    uint64 full[PANELS_HELD], free[PANELS_HELD];
    const char *from;  // the next panel, of the tile's rows
    int64 apart;  // bytes from one panel to the next
    unsigned bytes;
    int left, item;  // panels of the tile; the tile
    PanelTurn turn;
};
static_assert(sizeof(WideDesk) <= DESK);
FUNCTION WideDesk &wide_desk() { return *(WideDesk *)shared_memory(); }

template <int HIGH> FUNCTION char *panel_of(int stage) { return room() + HIGH * PANEL_BYTES * stage; }

template <int HIGH> FUNCTION int wide_tiles(const Many &m) {
    return ((m.rows + HIGH - 1) / HIGH) * ((m.outputs + WIDE_OUTPUTS - 1) / WIDE_OUTPUTS);
}

template <int HIGH> FUNCTION void begin_panels(const Many &m, WideDesk &desk, int item) {
    int row = tile_at(m, item, HIGH, WIDE_OUTPUTS).row;
    desk.from = m.x + PANEL_BYTES * (int64)row, desk.apart = panel_at(m.rows, 1);
    desk.bytes = PANEL_BYTES * min(HIGH, (m.rows + 7) / 8 * 8 - row);
    desk.left = (m.w.runs + 3) / 4 * 2, desk.item = item;
}

// The next panel, if there is one, once nobody multiplies any more what lies there.
template <int HIGH> FUNCTION void ask_for_panel(Words a, Words p, int blocks) {
    WideDesk &desk = wide_desk();
    if (!desk.left) return;
    uint64 *full = desk.full + desk.turn.stage;
    mbarrier_wait(desk.free + desk.turn.stage, desk.turn.parity ^ 1);
    mbarrier_expect(full, desk.bytes);
    copy_whole(panel_of<HIGH>(desk.turn.stage), desk.from, desk.bytes, full);
    desk.turn.next();
    desk.from += desk.apart;
    if (--desk.left) return;
    Many m = many_at(a, p);
    if (desk.item + blocks < wide_tiles<HIGH>(m)) begin_panels<HIGH>(m, desk, desk.item + blocks);
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
            float v[32];
            unpack_loaded<K>(of[i], v);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float *four = v + 16 * half + 4 * k;
                a[k][i] = to_halves(four[0], four[1]), a[k][2 + i] = to_halves(four[2], four[3]);
            }
        }
    }
};

FUNCTION int after(int i) { return i / 2 * 8 + i % 2; }

// What becomes of sums, with the same rounding everywhere: two neighbouring outputs of COUNT rows, row + after(i). `sums` are as multiply_wide has them, the outputs its rows g and g + 8.
template <int COUNT> FUNCTION void put_pairs(const Many &m, int row, int output, const float *sums) {
    int left = m.rows - row;
    bool first = output < m.outputs, second = output + 1 < m.outputs;
    bool together = second && m.y_stride % 2 == 0 && (int64)m.y % 8 == 0;
    char *y = (char *)(m.y + row * m.y_stride + output);
    unsigned stride = 4 * (unsigned)m.y_stride;
    float bias[2] = {m.bias && first ? m.bias[output] : 0.0f, m.bias && second ? m.bias[output + 1] : 0.0f};
    float factors[COUNT], gates[COUNT];
    float2 values[COUNT];
#define EACH_ROW _Pragma("unroll") for (int i = 0; i < COUNT; i++)
    EACH_ROW factors[i] = gates[i] = 1, values[i] = make_float2(0, 0);
    if (m.factors) EACH_ROW if (after(i) < left) factors[i] = m.factors[row + after(i)];
    if (m.gate) EACH_ROW if (after(i) < left) gates[i] = m.gate[row + after(i)];
    if (m.add && together) EACH_ROW if (after(i) < left) values[i] = *(const float2 *)(y + after(i) * stride);
    if (m.add && !together) EACH_ROW {
        const float *own = (const float *)(y + after(i) * stride);
        if (after(i) < left && first) values[i].x = own[0];
        if (after(i) < left && second) values[i].y = own[1];
    }
    EACH_ROW {
        const float *own = sums + i / 2 * 4 + i % 2;
        values[i].x = fmaf(gates[i], fmaf(factors[i], own[0], bias[0]), values[i].x);
        values[i].y = fmaf(gates[i], fmaf(factors[i], own[2], bias[1]), values[i].y);
    }
    if (together) EACH_ROW if (after(i) < left) *(float2 *)(y + after(i) * stride) = values[i];
    if (!together) EACH_ROW {
        float *own = (float *)(y + after(i) * stride);
        if (after(i) < left && first) own[0] = values[i].x;
        if (after(i) < left && second) own[1] = values[i].y;
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
        desk.turn = {0, 0};
        begin_panels<HIGH>(m, desk, work.block);
    }
    shared_for_copies();
    block_barrier();
    if (thread() == 0)
        for (int i = 0; i < PANELS_AHEAD; i++) ask_for_panel<HIGH>(a, p, work.blocks);

    RunPair<K> pairs[DEPTH];
    PairSource<K> source(m, tile_at(m, work.block, HIGH, WIDE_OUTPUTS).output + own);
#pragma unroll
    for (int d = 0; d < DEPTH; d++) pairs[d].load(w, source, d);
    PanelTurn now = {0, 0};
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
                    before = now.stage;
                    now.next();
                    if (thread() == 0) ask_for_panel<HIGH>(a, p, work.blocks);
                    warp_barrier();
                    pairs[half ? (d + 1) % DEPTH : d].unpacked(1 - half, operands[1 - half]);
                    if (half == 0) pairs[d].load(w, source, block + DEPTH);
                }
            }
        }
        wait_for_products<0>();
        products_are_done(sums);
        if (lane() == 0) mbarrier_arrive(desk.free + before);
        Many again = many_at(a, p);  // there is no register to keep it in
        Place at = tile_at(again, item, HIGH, WIDE_OUTPUTS);
        source = PairSource<K>(again, tile_at(again, min(item + work.blocks, tiles - 1), HIGH, WIDE_OUTPUTS).output + own);
#pragma unroll
        for (int d = 0; d < DEPTH; d++) pairs[d].load(w, source, d);
#pragma unroll
        for (int i = 0; i < HIGH / 2; i += 16)
            put_pairs<8>(again, at.row + 2 * i + lane() % 4 * 2, at.output + own, sums + i);
    }
}
