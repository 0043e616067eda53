/* C = s (A B + t A' B') or C += s (A B + t A' B') of at least a few dozen rows. A' B' is an adapter's low-rank term.

   B is packed into panels as wide as a tile, whose rows are adjacent. Threads divide panels and rows evenly, and every
   thread packs what it reads. */
#include "program.h"
#include "tiles.h"

#define PANEL (TILE_VECS * LANES)
#define PANEL_DEPTH 384           /* rows of a packed panel: it stays in L2 */
#define ROW_GROUP (4 * TILE_ROWS) /* rows that threads do not divide */

struct matmul {
    const float *a;     /* [rows, inner], any strides */
    const float *b;     /* [inner, columns], one stride is 1 */
    const float *low_a; /* A', [rows, rank], any strides, or null */
    const float *low_b; /* B', [rank, columns], one stride is 1, or null */
    float *out;         /* [rows, columns], column stride 1 */
    float *scratch;     /* [threads, matmul_scratch(...)] */
    int64_t rows, columns, inner;
    int64_t a_row, a_column, b_row, b_column; /* strides */
    int64_t rank, low_a_row, low_a_column, low_b_row, low_b_column, out_row;
    int64_t accumulate; /* add to out */
    float scale, low_scale;
};

/* Floats of scratch memory a thread: a panel, and columns that fill no vector. */
int64_t matmul_scratch(int64_t rows, int64_t rank) { return (PANEL_DEPTH + rank) * PANEL + rows * LANES; }

/* Packs the first `depth` rows and `width` columns of `from` as [depth, PANEL], 0 beyond the width. */
static void pack_panel(float *panel, struct matrix from, int64_t depth, int64_t width) {
    if (width < PANEL) memset(panel, 0, (size_t)(depth * PANEL) * sizeof *panel);
    if (from.column == 1) {
        for (int64_t i = 0; i < depth; i++)
            memcpy(panel + i * PANEL, from.p + i * from.row, (size_t)width * sizeof *panel);
        return;
    }
    int64_t i = 0;
    for (; i + 8 <= depth; i += 8)
        for (int64_t j = 0; j < width; j++)
            for (int64_t l = 0; l < 8; l++) panel[(i + l) * PANEL + j] = from.p[(i + l) * from.row + j * from.column];
    for (; i < depth; i++)
        for (int64_t j = 0; j < width; j++) panel[i * PANEL + j] = from.p[i * from.row + j * from.column];
}

/* Rows [start, stop) of the columns of the panel that begins at column c. */
static void multiply_panel(const struct matmul *op, int64_t c, int64_t start, int64_t stop, float *scratch) {
    const int64_t width = op->columns - c < PANEL ? op->columns - c : PANEL, full = width / LANES * LANES;
    const int64_t rows = stop - start;
    float *panel = scratch, *partial = scratch + (PANEL_DEPTH + op->rank) * PANEL;
    float *out = op->out + start * op->out_row + c;
    for (int64_t k = 0; k < op->inner; k += PANEL_DEPTH) {
        const int64_t depth = op->inner - k < PANEL_DEPTH ? op->inner - k : PANEL_DEPTH;
        const int accumulate = op->accumulate || k;
        const struct matrix b = {op->b + k * op->b_row + c * op->b_column, op->b_row, op->b_column};
        const struct left left = {{op->a + start * op->a_row + k * op->a_column, op->a_row, op->a_column}, depth};
        pack_panel(panel, b, depth, width);
        struct left low = {0};
        const struct left *low_rank = 0;
        if (op->low_a && k == 0) {
            const struct matrix low_b = {op->low_b + c * op->low_b_column, op->low_b_row, op->low_b_column};
            float *low_panel = panel + depth * PANEL;
            pack_panel(low_panel, low_b, op->rank, width);
            for (int64_t i = 0; i < op->rank * PANEL; i++) low_panel[i] *= op->low_scale;
            low = (struct left){{op->low_a + start * op->low_a_row, op->low_a_row, op->low_a_column}, op->rank};
            low_rank = &low;
        }
        matmul_block(rows, full, left, low_rank, panel, PANEL, out, op->out_row, op->scale, accumulate);
        if (full == width) continue;
        matmul_block(rows, LANES, left, low_rank, panel + full, PANEL, partial, LANES, op->scale, 0);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = full; j < width; j++) {
                float *element = out + r * op->out_row + j;
                *element = (accumulate ? *element : 0) + partial[r * LANES + j - full];
            }
    }
}

void run_matmul(const void *operands, const struct step *step, int64_t thread, int64_t num_threads) {
    const struct matmul *op = operands;
    (void)step;
    const int64_t panels = (op->columns + PANEL - 1) / PANEL, groups = (op->rows + ROW_GROUP - 1) / ROW_GROUP;
    int64_t at = panels * groups * thread / num_threads;
    const int64_t end = panels * groups * (thread + 1) / num_threads;
    float *scratch = op->scratch + thread * matmul_scratch(op->rows, op->rank);
    while (at < end) {
        const int64_t panel = at / groups, first = at % groups;
        const int64_t last = (panel + 1) * groups < end ? groups : end - panel * groups;
        const int64_t stop = last * ROW_GROUP < op->rows ? last * ROW_GROUP : op->rows;
        multiply_panel(op, panel * PANEL, first * ROW_GROUP, stop, scratch);
        at = panel * groups + last;
    }
}

EXPORT_SIZE(matmul)
