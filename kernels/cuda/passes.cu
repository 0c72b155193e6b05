// How steps of a plan are run: all of a token's in one launch whose blocks meet where a step needs what another block
// has done, or each as a launch of its own. plan.py makes the steps, and names the operators that a plan uses.

#ifdef EACH_TOGETHER
enum { STEP_OPERATOR, STEP_ARGUMENTS, STEP_WAIT, STEP_WORDS };

#define NAMED(name, blocks) OP_##name,
enum { EACH_TOGETHER(NAMED) OPERATORS };
#undef NAMED

// steps: how many, then STEP_WORDS each. Cooperative, every block at once on the device.
KERNEL(TOGETHER_THREADS, 1) together(const int64 *steps, const int64 *p) {
    Work work = {(int)blockIdx.x, (int)gridDim.x, true};
    unsigned *arrivals = (unsigned *)(p + ARRIVALS), goal = 0;
    for (int64 i = 0; i < steps[0]; i++) {
        Words step = steps + 1 + STEP_WORDS * i;
        switch (step[STEP_OPERATOR]) {
#define CASE(name, blocks)                            \
    case OP_##name:                                   \
        name(words(step[STEP_ARGUMENTS]), p, work);   \
        break;
            EACH_TOGETHER(CASE)
#undef CASE
        }
        if (step[STEP_WAIT] == WAIT_FOR_BLOCK) __syncthreads();
        if (step[STEP_WAIT] == WAIT_FOR_GRID) grid_barrier(arrivals, goal += gridDim.x);
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
