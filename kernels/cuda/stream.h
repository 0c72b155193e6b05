// Weights on their way: in a token's one launch a warp of each block does nothing but copy the weights that the block
// will need into shared memory, chunk after chunk (kinds.h), as far ahead as there is room. It waits for nobody else, so
// that memory is busy while blocks meet, attend or choose.
//
// A stream is a matrix of which each block takes every so-manieth tile (ROWS rows). Its chunks come one after the other,
// each into the next slot of a ring; `full` and `empty` of a slot are barriers in shared memory.

enum { STREAM_CHUNKS, STREAM_RUNS, STREAM_TILE, STREAM_CHUNK, STREAM_TILES, STREAM_SHIFT, STREAM_HEAD, STREAM_WORDS = 8 };

struct Stream {
    int64 slots;  // a power of two
    int64 bytes;  // of a slot
    char *at;

    MEMBER uint64 *full(unsigned n) const { return (uint64 *)at + (n & (slots - 1)); }
    MEMBER uint64 *empty(unsigned n) const { return full(n) + slots; }
    MEMBER char *slot(unsigned n) const { return at + 16 * slots + bytes * (n & (slots - 1)); }
    // Which use of its slot the n-th chunk is, as the parity of that phase.
    MEMBER unsigned turn(unsigned n) const { return (unsigned)(n / slots) & 1; }
};

FUNCTION Stream &stream_at_hand() { return *(Stream *)(shared_memory() + DESK_STREAM); }

// The first of a block's tiles. shift: tiles of steps that nobody waited for, so that other blocks go first.
FUNCTION int first_tile(int64 shift, int block, int blocks) { return (block + blocks - (int)(shift % blocks)) % blocks; }

// Of the warp that copies: all that this block will need of `count` streams.
FUNCTION void bring(const Stream &stream, Words of, int64 count, Words p, int block, int blocks) {
    unsigned n = 0;
    for (int64 i = 0; i < count; i++, of += STREAM_WORDS) {
        if (of[STREAM_HEAD] && !p[OUT_ROWS]) continue;
        int64 tile_bytes = of[STREAM_TILE], chunk_bytes = of[STREAM_CHUNK], tiles = of[STREAM_TILES];
        const char *from = (const char *)of[STREAM_CHUNKS] + 16 * lane();
        for (int64 tile = first_tile(of[STREAM_SHIFT], block, blocks); tile < tiles; tile += blocks)
            for (int64 start = 0; start < tile_bytes; start += chunk_bytes, n++) {
                int bytes = (int)min(chunk_bytes, tile_bytes - start);
                const char *chunk = from + tile * tile_bytes + start;
                char *to = stream.slot(n) + 16 * lane();
                mbarrier_wait(stream.empty(n), stream.turn(n) ^ 1);
                for (int b = 16 * lane(), i = 0; b < bytes; b += 512, i += 512) copy_later(to + i, chunk + i);
                mbarrier_arrive_copied(stream.full(n));
            }
    }
    end_group();
    wait_for_groups<0>();
}
