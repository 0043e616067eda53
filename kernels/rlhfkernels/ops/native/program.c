/* Runs programs on the threads of the OpenMP library that torch has already loaded: a second pool would compete with
   torch's for the same cores. */
#include "program.h"

extern void GOMP_parallel(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);
extern void GOMP_barrier(void);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

struct run {
    const struct command *commands;
    int64_t count;
    const struct step *step;
};

static void run_commands(const struct run *run, int64_t thread, int64_t num_threads) {
    for (int64_t i = 0; i < run->count; i++) {
        run->commands[i].run(run->commands[i].operands, run->step, thread, num_threads);
        if (num_threads > 1 && i + 1 < run->count) GOMP_barrier();
    }
}

static void run_thread(void *run) { run_commands(run, omp_get_thread_num(), omp_get_num_threads()); }

void run_program(const struct command *commands, int64_t count, const struct step *step, int64_t num_threads) {
    struct run run = {commands, count, step};
    if (num_threads > 1) GOMP_parallel(run_thread, &run, (unsigned)num_threads, 0);
    else run_commands(&run, 0, 1);
}

EXPORT_SIZE(step)
EXPORT_SIZE(command)
