// Weights on their way: in a token's one launch a warp of each block does nothing but copy the weights that the block
// will need into shared memory, chunk after chunk (kinds.h), as far ahead as there is room. It waits for nobody else, so
// that memory is busy while blocks meet, attend or choose.
//
// A stream is a matrix of which each block takes every so-manieth tile (ROWS rows). Its chunks come one after the other,
// each into the next slot of a ring; `full` and `empty` of a slot are barriers in shared memory.

// On the desk: parts of sums, how many chunks have come before the present step, the stream itself, and what attention
// keeps (attention.cu); in bytes.
enum { DESK_PARTS = 256, DESK_BEGUN = 768, DESK_STREAM = 784, DESK_VIEW = 832 };

enum { STREAM_CHUNKS, STREAM_RUNS, STREAM_TILE, STREAM_CHUNK, STREAM_HEAD, STREAM_SHARE, STREAM_WORDS = 10 };

struct Stream {
    int turns;  // log2 of the slots
    int bytes;  // of a slot
    int takers;  // warps that take chunks
    int flight;  // how many chunks are on their way at most
    char *at;

    MEMBER int slots() const { return 1 << turns; }
    MEMBER uint64 *full(unsigned n) const { return (uint64 *)at + (n & (slots() - 1)); }
    MEMBER uint64 *empty(unsigned n) const { return full(n) + slots(); }
    MEMBER char *slot(unsigned n) const { return at + 16 * slots() + bytes * (n & (slots() - 1)); }
    // Which use of its slot the n-th chunk is, as the parity of that phase.
    MEMBER unsigned turn(unsigned n) const { return n >> turns & 1; }
};

FUNCTION Stream &stream_at_hand() { return *(Stream *)(shared_memory() + DESK_STREAM); }

// A block's part of a stream. Its warps take a tile each, as often as there is one for all; `sharers` of them share each of
// the tiles that are left, and a warp takes every so-manieth of its chunks. Chunks come in the order in which warps then
// ask for them: the first of all these tiles, then the second. So of a step's chunks a warp takes one in any `takers`, and
// all of the steps before are taken when it begins. A phase's parity cannot tell chunk n from the one that has its slot two
// turns before, and of chunks on their way any may come first: therefore the one that has the slot before, n - slots, must
// have come by the time a warp waits for n. It has: chunk m is only asked for once chunk m - flight has come, the chunk
// that the warp had before is not before n - takers, and takers + flight are no more than slots.
struct Share {
    int first, tiles;  // its first tile, how many
    int sharers, left;  // how many are left over, and how many warps share each of these
    unsigned inverse;  // 4096 / left, rounded up

    MEMBER int at_once(int tile, int takers) const { return min(takers, tiles - tile); }
};

// Words of a share: by how many blocks the first tile is put off, since steps that nobody waited for have given those
// something to do; how many tiles each block has, which ones have one more; and for both kinds of blocks sharers, left,
// and 4096 / left rounded up, in 8, 8 and 16 bits.
enum { SHARE_SHIFT, SHARE_EACH, SHARE_MORE, SHARE_LESS, SHARE_LARGER };

FUNCTION Share share_of(Words a, int block, int blocks) {
    int first = block - (int)a[SHARE_SHIFT];
    if (first < 0) first += blocks;
    bool larger = first < a[SHARE_MORE];
    unsigned how = larger ? (unsigned)a[SHARE_LARGER] : (unsigned)a[SHARE_LESS];
    return {first, (int)a[SHARE_EACH] + larger, (int)(how & 255), (int)(how >> 8 & 255), how >> 16};
}

// Of the warp that copies: all that this block will need of `count` streams, one chunk after the other. Lanes that asked
// for a chunk each would ask faster, and waited with each other, which cost more.
FUNCTION void bring(const Stream &stream, Words of, int count, Words p, int block, int blocks) {
    bool head = p[OUT_ROWS] != 0;
    unsigned n = 0, flight = stream.flight;
    for (int i = 0; i < count; i++, of += STREAM_WORDS) {
        if (of[STREAM_HEAD] && !head) continue;
        Share share = share_of(of + STREAM_SHARE, block, blocks);
        int chunk_bytes = (int)of[STREAM_CHUNK], chunks = ((int)of[STREAM_RUNS] + 31) / 32;
        int64 tile_bytes = of[STREAM_TILE], apart = tile_bytes * blocks;  // from one tile of the block to its next
        int last_bytes = (int)tile_bytes - (chunks - 1) * chunk_bytes;
        const char *first = (const char *)of[STREAM_CHUNKS] + share.first * tile_bytes;
        for (int tile = 0; tile < share.tiles; tile += stream.takers, first += stream.takers * apart) {
            int beside = share.at_once(tile, stream.takers);
            for (int c = 0; c < chunks; c++) {
                const char *from = first + c * chunk_bytes;
                int bytes = c + 1 < chunks ? chunk_bytes : last_bytes;
                for (int j = 0; j < beside; j++, n++, from += apart) {
                    if (n >= flight) mbarrier_wait(stream.full(n - flight), stream.turn(n - flight));
                    mbarrier_wait(stream.empty(n), stream.turn(n) ^ 1);
                    copy_chunk(stream.slot(n), from, bytes, stream.full(n));
                }
            }
        }
    }
    end_group();
    wait_for_groups<0>();
}
