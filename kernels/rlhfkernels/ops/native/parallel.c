#include "parallel.h"

extern void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
extern void GOMP_barrier(void);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

struct work {
    parallel_body *body;
    const void *data;
};

static void run_part(void *data) {
    const struct work *work = data;
    work->body(work->data, omp_get_thread_num(), omp_get_num_threads());
}

void in_parallel(parallel_body *body, const void *data, int64_t threads) {
    if (threads <= 1) {
        body(data, 0, 1);
        return;
    }
    struct work work = {body, data};
    GOMP_parallel(run_part, &work, (unsigned)threads, 0);
}

void wait_for_all(void) { GOMP_barrier(); }
