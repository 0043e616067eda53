/* Threads of the OpenMP library that the host already has loaded: one pool, not two that wait on each other. */
#ifndef PARALLEL_H
#define PARALLEL_H

#include <stdint.h>

typedef void parallel_body(const void *data, int64_t thread, int64_t threads);

/* Runs `body` on every thread. */
void in_parallel(parallel_body *body, const void *data, int64_t threads);

/* Within a body: waits until every thread is here. */
void wait_for_all(void);

#endif
