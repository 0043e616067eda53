/* A program: ops with the addresses of their operands, recorded once and run in one call.

   All threads run every op together. Each takes its share, and none starts an op before all have finished the previous
   one. A sequence kernel is a program of one op. */
#ifndef PROGRAM_H
#define PROGRAM_H

#include <stdint.h>

/* What changes from decode step to decode step. */
struct step {
    const int64_t *positions; /* [rows], of this step's tokens */
    const int64_t *mask;      /* [rows, cache_len + 1], 0 on padding; null without padding */
    int64_t cache_len;        /* positions in the KV cache before this step */
    int64_t mask_stride;      /* elements from row to row */
};

typedef void run_op(const void *operands, const struct step *step, int64_t thread, int64_t num_threads);

struct command {
    run_op *run;
    const void *operands;
};

/* Rows of this thread; `thread` and `num_threads` are those of the enclosing op. */
#define FOR_THREAD_ROWS(r, rows)                                                                                       \
    for (int64_t r = (rows)*thread / num_threads; r < (rows) * (thread + 1) / num_threads; r++)

/* Lets Python check that its declaration of the struct has the same size. */
#define EXPORT_SIZE(name)                                                                                              \
    int64_t size_of_##name(void) { return sizeof(struct name); }

#endif
