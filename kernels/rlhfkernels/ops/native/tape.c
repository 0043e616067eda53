#include "tape.h"

/* Of the OpenMP library that the host already has loaded: one pool of threads, not two that wait on each other. */
extern void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
extern void GOMP_barrier(void);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

struct replay {
    const void *const *ops;
    int64_t count;
    const struct call *call;
};

static void run_op_of(const struct replay *replay, int64_t i, int64_t thread, int64_t threads) {
    const void *op = replay->ops[i];
    (*(run_op *const *)op)(op, replay->call, thread, threads);
}

static void run_part(void *data) {
    const struct replay *replay = data;
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    for (int64_t i = 0; i < replay->count; i++) {
        run_op_of(replay, i, thread, threads);
        GOMP_barrier();
    }
}

void run_tape(const void *const *ops, int64_t count, const struct call *call, int64_t threads) {
    struct replay replay = {ops, count, call};
    if (threads > 1) {
        GOMP_parallel(run_part, &replay, (unsigned)threads, 0);
        return;
    }
    for (int64_t i = 0; i < count; i++) run_op_of(&replay, i, 0, 1);
}
