// How the halves of prepared rows lie, which products of many rows read. Row after row; or, where warpgroups multiply
// (WARPGROUPS) and there are more than FEW_ROWS rows, in panels: 64 columns of all rows, 128 bytes a row, as they are
// copied into shared memory and read there by multiply_wide.
//
// Columns come in the order in which a lane has its weights: lane (g, t) of a warp loads run t of every four runs, and
// of these 128 columns the k-th product of 16 takes four of each run, 4k and on: at 2t, 2t + 1, 2t + 8 and 2t + 9.

const int FEW_ROWS = 16;
FUNCTION bool in_panels(int rows) { return WARPGROUPS && rows > FEW_ROWS; }

const int PANEL_BYTES = 128;  // of a row in a panel
FUNCTION int64 panel_at(int rows, int panel) { return (int64)PANEL_BYTES * ((rows + 7) / 8 * 8) * panel; }

// Columns c to c + 3 of a row, c a multiple of four, two in a word. Of 8 neighbouring rows, read together, a piece of
// 16 bytes lies in different banks: the swizzle of 128 bytes that descriptors know.
FUNCTION void put_in_panel(char *x, int rows, int row, int c, uint2 four) {
    int run = c / 32 % 4, product = c / 4 % 8, piece = 2 * (product % 4);
    char *own = x + panel_at(rows, c / 128 * 2 + product / 4) + PANEL_BYTES * (int64)row + 4 * run;
    *(unsigned *)(own + 16 * (piece ^ row % 8)) = four.x;
    *(unsigned *)(own + 16 * ((piece + 1) ^ row % 8)) = four.y;
}

// Of rows in a panel in shared memory, at a multiple of 1024 bytes, for multiply_wide: the k-th 16 columns. Bits 0 to
// 13: address / 16; 16 to 29: not used; 32 to 45: bytes / 16 from 8 rows to the next; 62 and 63: the swizzle.
FUNCTION uint64 panel_descriptor(const char *panel, int k) {
    uint64 from = (shared_address(panel) + 32 * k) >> 4, apart = 8 * PANEL_BYTES >> 4;
    return from | 1ull << 16 | apart << 32 | 1ull << 62;
}
