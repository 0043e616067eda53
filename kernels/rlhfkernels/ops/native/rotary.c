/* Rotary position embedding, in place. A thread takes whole rows. */
#include "program.h"
#include "vectors.h"

struct rotary {
    float *x;                /* [rows, blocks, groups, size]; the first `rotated_groups` of every block are rotated */
    const float *cos;        /* [table_rows, rotary_size] */
    const float *signed_sin; /* [table_rows, rotary_size]; negative in the first half */
    int64_t rows, table_rows, blocks, groups, rotated_groups, size, rotary_size;
    float direction; /* 1, or -1 for the inverse */
};

void run_rotary(const void *operands, const struct step *step, int64_t thread, int64_t num_threads) {
    const struct rotary *op = operands;
    (void)step;
    FOR_THREAD_ROWS(r, op->rows) {
        const int64_t entry = r % op->table_rows * op->rotary_size;
        for (int64_t block = 0; block < op->blocks; block++)
            for (int64_t group = 0; group < op->rotated_groups; group++) {
                float *x = op->x + ((r * op->blocks + block) * op->groups + group) * op->size;
                rotate_pairs(x, op->cos + entry, op->signed_sin + entry, op->rotary_size / 2, op->direction);
            }
    }
}

EXPORT_SIZE(rotary)
