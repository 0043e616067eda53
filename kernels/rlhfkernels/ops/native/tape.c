#include "tape.h"

#include "parallel.h"

struct replay {
    const void *const *ops;
    int64_t count;
    const struct call *call;
};

static void run_part(const void *data, int64_t thread, int64_t threads) {
    const struct replay *replay = data;
    for (int64_t i = 0; i < replay->count; i++) {
        const void *op = replay->ops[i];
        (*(run_op *const *)op)(op, replay->call, thread, threads);
        if (threads > 1) wait_for_all();
    }
}

void run_tape(const void *const *ops, int64_t count, const struct call *call, int64_t threads) {
    const struct replay replay = {ops, count, call};
    in_parallel(run_part, &replay, threads);
}

int64_t size_of_call(void) { return sizeof(struct call); }
