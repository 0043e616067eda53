/* A tape: ops with their operands' addresses, written once and replayed at every step of a generation.

   Every op begins with a `run_op`; what follows is its own. All threads go through the tape together, each does its part
   of every op, and none begins an op before all have ended the one before. */
#ifndef TAPE_H
#define TAPE_H

#include <stdint.h>

/* What differs from step to step. */
struct call {
    const int64_t *positions; /* [rows], of the tokens of this step */
    const int64_t *mask;      /* [rows, written + 1], 0 on padding; null where nothing is padded */
    int64_t written;          /* positions in the cache before this step */
    int64_t mask_stride;      /* from row to row */
};

typedef void run_op(const void *op, const struct call *call, int64_t thread, int64_t threads);

#endif
