// How steps of a plan are run: all of a token's in one launch whose blocks meet where a step needs what another block
// has done, or each as a launch of its own. plan.py makes the steps, and names the operators that a plan uses.

#ifdef EACH_TOGETHER
// What the launch is given: how many steps and where their records are, the same of streams (stream.h); where in shared
// memory the ring of chunks begins, how many slots it has (log2), of how many bytes, how many warps take chunks and how
// many of these may be on their way; how many fields a session's state has.
enum { PLAN_STEPS, PLAN_RECORDS, PLAN_STREAMS, PLAN_STREAM, PLAN_RING, PLAN_TURNS, PLAN_SLOT, PLAN_TAKERS, PLAN_FLIGHT, PLAN_FIELDS };
enum { STEP_OPERATOR, STEP_WAIT, STEP_ARGUMENTS };  // of a record of RECORD words

#define NAMED(name, blocks) OP_##name,
enum { EACH_TOGETHER(NAMED) OPERATORS };
#undef NAMED

// What a block has at hand in shared memory, HAND bytes: the records of steps, each put there some steps before it is
// needed, and the words of the pass with its one sequence and the addresses of its state, if there is room. What a thread
// must know again after an operator is there too.
const int RECORDS = 4;
struct Hand {
    int64 records[RECORDS * RECORD];
    int64 pass[PASS], table[SEQUENCE], zero;
    const int64 *first;  // record
    int steps;
    unsigned goal;  // arrivals at the last meeting of all blocks
    int step[TOGETHER_THREADS / 32];  // each warp's own

    MEMBER int64 *record(int i) { return records + RECORD * (i % RECORDS); }
    MEMBER int &own_step() { return step[warp()]; }
};
FUNCTION Hand &hand() { return *(Hand *)(shared_memory() + DESK); }

FUNCTION void ask_for_record(Hand &own, int step) {
    int piece = 2 * thread();
    if (piece < RECORD && step < own.steps) copy_later(own.record(step) + piece, own.first + RECORD * step + piece);
    end_group();
}

FUNCTION void take_pass(Hand &own, Words p, int64 fields) {
    int64 *at = (int64 *)(&own + 1);
    bool fits = (char *)(at + fields) <= (char *)&own + HAND;
    Words of = words(p[TABLE]);
    for (int i = thread(); i < PASS; i += threads())
        own.pass[i] = i == TABLE ? (int64)own.table : i == SEQUENCE_OF ? (int64)&own.zero : p[i];
    for (int i = thread(); i < SEQUENCE; i += threads()) own.table[i] = i == FIELDS && fits ? (int64)at : of[i];
    for (int i = thread(); fits && i < fields; i += threads()) at[i] = words(of[FIELDS])[i];
    if (thread() == 0) own.zero = 0;
}

#ifndef STAMP
#define STAMP(step, met)  // who traces a launch writes down the time here
#endif

// The number of the step to be taken. This and the next are functions of their own: what the loop over steps kept over
// an operator would go to local memory, which the first cache has no more after a meeting.
OPERATOR int begin_step() {
    Hand &own = hand();
    int i = own.own_step();
    ask_for_record(own, i + RECORDS - 1);  // where the step before this one had its own
    return i;
}

// Whether there is one more. A block's threads meet after every step, whatever it ends with.
OPERATOR bool end_step(const int64 *plan, const int64 *pass) {
    Hand &own = hand();
    int step = __shfl_sync(0xffffffffu, lane() == 0 ? own.own_step() : 0, 0), wait = (int)own.record(step)[STEP_WAIT];
    wait_for_groups<RECORDS - 2>();  // the record of the next step is there
    if (lane() == 0) own.own_step() = step + 1;  // which nobody else reads before the threads have met
    STAMP(step, 0)
    if (wait == WAIT_FOR_GRID) {
        unsigned goal = thread() == 0 ? own.goal += gridDim.x : 0;  // the others need none
        grid_barrier((unsigned *)(pass + ARRIVALS), goal, threads());
    } else {
        block_barrier();
    }
    STAMP(step, 1)
    return step + 1 < own.steps;
}

// Cooperative, every block at once on the device; more threads than those that compute.
KERNEL(TOGETHER_THREADS + LOADER_THREADS, 1) together(const int64 *plan, const int64 *pass) {
    const Stream stream = {(int)plan[PLAN_TURNS], (int)plan[PLAN_SLOT], (int)plan[PLAN_TAKERS], (int)plan[PLAN_FLIGHT],
                           shared_memory() + plan[PLAN_RING]};
    for (int i = threadIdx.x; i < stream.slots(); i += blockDim.x)
        mbarrier_init(stream.full(i), CHUNK_ARRIVALS), mbarrier_init(stream.empty(i), 1);
    shared_for_copies();
    __syncthreads();
    if (threadIdx.x >= TOGETHER_THREADS) {
        bring(stream, words(plan[PLAN_STREAM]), (int)plan[PLAN_STREAMS], pass, blockIdx.x, gridDim.x);
        return;
    }
    Hand &begin = hand();
    take_pass(begin, pass, plan[PLAN_FIELDS]);
    if (thread() == 0) {
        begin.first = words(plan[PLAN_RECORDS]), begin.steps = (int)plan[PLAN_STEPS], begin.goal = 0;
        *(int *)(shared_memory() + DESK_BEGUN) = 0, stream_at_hand() = stream, kept_view().turns = -1;
    }
    if (lane() == 0) begin.own_step() = 0;
    block_barrier();
    for (int i = 0; i < RECORDS - 1; i++) ask_for_record(begin, i);
    wait_for_groups<RECORDS - 2>();
    block_barrier();
    do {
        Words step = hand().record(begin_step()), a = step + STEP_ARGUMENTS, p = hand().pass;
        Work work = {(int)blockIdx.x, (int)gridDim.x, true};
        switch (step[STEP_OPERATOR]) {
#define CASE(name, blocks)    \
    case OP_##name:           \
        name(a, p, work);     \
        break;
            EACH_TOGETHER(CASE)
#undef CASE
        }
    } while (end_step(plan, pass));
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
