// How steps of a plan are run: all of a token's in one launch whose blocks meet where a step needs what another block
// has done, or each as a launch of its own. plan.py makes the steps, and names the operators that a plan uses.

#ifdef EACH_TOGETHER
// What the launch is given: how many steps and where their records are, the same of streams (stream.h); where in shared
// memory they are at hand and the ring of chunks behind, how many slots it has (log2), of how many bytes; how many fields a session's state has.
enum { PLAN_STEPS, PLAN_RECORDS, PLAN_STREAMS, PLAN_STREAM, PLAN_HAND, PLAN_TURNS, PLAN_SLOT_BYTES, PLAN_FIELDS };
enum { STEP_OPERATOR, STEP_WAIT, STEP_ARGUMENTS };  // of a record of RECORD words

#define NAMED(name, blocks) OP_##name,
enum { EACH_TOGETHER(NAMED) OPERATORS };
#undef NAMED

// Where a step's record is put, some steps before it is needed. hand: HAND bytes of shared memory for records and pass.
const int RECORDS = 4;
FUNCTION int64 *record(char *hand, int step) { return (int64 *)hand + RECORD * (step % RECORDS); }

FUNCTION void ask_for_record(char *hand, Words records, int step, int steps) {
    int piece = 2 * thread();
    if (step < steps && piece < RECORD) copy_later(record(hand, step) + piece, records + RECORD * step + piece);
    end_group();
}

// The pass's words in shared memory, its one sequence and the addresses of its state with them, if there is room.
FUNCTION Words pass_at_hand(char *hand, Words p, int64 fields) {
    int64 *own = (int64 *)hand + RECORDS * RECORD, *table = own + PASS, *zero = table + SEQUENCE, *at = zero + 1;
    Words of = words(p[TABLE]);
    bool fits = (char *)(at + fields) <= hand + HAND;
    for (int i = thread(); i < PASS; i += threads()) own[i] = i == TABLE ? (int64)table : i == SEQUENCE_OF ? (int64)zero : p[i];
    for (int i = thread(); i < SEQUENCE; i += threads()) table[i] = i == FIELDS && fits ? (int64)at : of[i];
    if (thread() == 0) *zero = 0;
    for (int i = thread(); fits && i < fields; i += threads()) at[i] = words(of[FIELDS])[i];
    return own;
}

// Cooperative, every block at once on the device; more threads than those that compute.
KERNEL(TOGETHER_THREADS + LOADER_THREADS, 1) together(const int64 *plan, const int64 *pass) {
    const Stream stream = {(int)plan[PLAN_TURNS], (int)plan[PLAN_SLOT_BYTES], shared_memory() + plan[PLAN_HAND] + HAND};
    for (int i = threadIdx.x; i < stream.slots(); i += blockDim.x)
        mbarrier_init(stream.full(i), LOADER_THREADS), mbarrier_init(stream.empty(i), 1);
    __syncthreads();
    if (threadIdx.x >= TOGETHER_THREADS) {
        bring(stream, words(plan[PLAN_STREAM]), (int)plan[PLAN_STREAMS], pass, blockIdx.x, gridDim.x);
        return;
    }
    char *hand = shared_memory() + plan[PLAN_HAND];
    Words p = pass_at_hand(hand, pass, plan[PLAN_FIELDS]), records = words(plan[PLAN_RECORDS]);
    if (thread() == 0) *(int *)(shared_memory() + DESK_BEGUN) = 0, stream_at_hand() = stream;
    int steps = (int)plan[PLAN_STEPS];
    for (int i = 0; i < RECORDS - 1; i++) ask_for_record(hand, records, i, steps);
    wait_for_groups<RECORDS - 2>();
    block_barrier();
    Work work = {(int)blockIdx.x, (int)gridDim.x, true};
    unsigned *arrivals = (unsigned *)(pass + ARRIVALS), goal = 0;
    for (int i = 0; i < steps; i++) {
        Words step = record(hand, i), a = step + STEP_ARGUMENTS;
        int wait = (int)step[STEP_WAIT];
        ask_for_record(hand, records, i + RECORDS - 1, steps);  // where the step before this one had its own
        switch (step[STEP_OPERATOR]) {
#define CASE(name, blocks)    \
    case OP_##name:           \
        name(a, p, work);     \
        break;
            EACH_TOGETHER(CASE)
#undef CASE
        }
        wait_for_groups<RECORDS - 2>();  // that of the next step is there
        if (wait == WAIT_FOR_GRID)
            grid_barrier(arrivals, goal += gridDim.x, threads());
        else
            block_barrier();
    }
}

#endif
#ifdef EACH_ALONE
// blocks: that share a multiprocessor, at least
#define LAUNCHED(name, blocks)                                               \
    KERNEL(ALONE_THREADS, blocks) step_##name(const int64 *a, const int64 *p) { \
        name(a, p, Work{(int)blockIdx.x, (int)gridDim.x, false});            \
    }
EACH_ALONE(LAUNCHED)
#undef LAUNCHED
#endif
