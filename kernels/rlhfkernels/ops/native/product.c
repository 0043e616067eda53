/* A product of matrices of some hundred rows: C = s (A B + t A' B') or C += s (A B + t A' B').

   B is packed into panels, as wide as a tile, whose rows lie one after the other; threads divide panels and rows evenly,
   so that a thread packs what it reads. */
#include "parallel.h"
#include "tiles.h"

#define PANEL (TILE_VECS * LANES)
#define DEPTH 384          /* of a packed panel: it stays in the second cache */
#define GROUP (4 * TILE_ROWS) /* rows that are not divided */

struct product {
    const float *a; /* [rows, inner], any strides */
    const float *b; /* [inner, columns], of stride 1 in one way or the other */
    const float *also_a; /* A', [rows, also_inner], or null */
    const float *also_b; /* B', [also_inner, columns] */
    float *out;     /* [rows, columns], of stride 1 within a row */
    float *scratch; /* [threads, product_scratch(...)] */
    int64_t rows, columns, inner;
    int64_t a_row, a_column, b_row, b_column; /* strides */
    int64_t also_inner, also_a_row, also_a_column, also_b_row, also_b_column, out_row;
    int64_t adds; /* to what `out` holds */
    float scale, also_scale;
};

/* A matrix of any strides. */
struct matrix {
    const float *p;
    int64_t row, column;
};

/* Floats of scratch memory for a thread: a panel, and columns that fill no vector. */
int64_t product_scratch(int64_t rows, int64_t also_inner) { return (DEPTH + also_inner) * PANEL + rows * LANES; }

/* The first `depth` rows and `width` columns of `from` to [depth, PANEL], 0 in what is past the width. */
static void pack_panel(float *to, struct matrix from, int64_t depth, int64_t width) {
    if (width < PANEL) memset(to, 0, (size_t)(depth * PANEL) * sizeof *to);
    if (from.column == 1) {
        for (int64_t i = 0; i < depth; i++)
            memcpy(to + i * PANEL, from.p + i * from.row, (size_t)width * sizeof *to);
        return;
    }
    int64_t i = 0;
    for (; i + 8 <= depth; i += 8)
        for (int64_t j = 0; j < width; j++)
            for (int64_t l = 0; l < 8; l++) to[(i + l) * PANEL + j] = from.p[(i + l) * from.row + j * from.column];
    for (; i < depth; i++)
        for (int64_t j = 0; j < width; j++) to[i * PANEL + j] = from.p[i * from.row + j * from.column];
}

/* Rows [start, stop) of the columns of one panel. */
static void multiply_panel(const struct product *op, int64_t c, int64_t start, int64_t stop, float *scratch) {
    const int64_t width = op->columns - c < PANEL ? op->columns - c : PANEL, whole = width / LANES * LANES;
    const int64_t rows = stop - start;
    float *panel = scratch, *rest = scratch + (DEPTH + op->also_inner) * PANEL;
    float *out = op->out + start * op->out_row + c;
    for (int64_t k = 0; k < op->inner; k += DEPTH) {
        const int64_t depth = op->inner - k < DEPTH ? op->inner - k : DEPTH;
        const int adds = op->adds || k;
        const struct matrix b = {op->b + k * op->b_row + c * op->b_column, op->b_row, op->b_column};
        const struct left left = {op->a + start * op->a_row + k * op->a_column, op->a_row, op->a_column, depth};
        pack_panel(panel, b, depth, width);
        struct left after = {0};
        const struct left *also = 0;
        if (op->also_a && k == 0) {
            const struct matrix also_b = {op->also_b + c * op->also_b_column, op->also_b_row, op->also_b_column};
            float *to = panel + depth * PANEL;
            pack_panel(to, also_b, op->also_inner, width);
            for (int64_t i = 0; i < op->also_inner * PANEL; i++) to[i] *= op->also_scale;
            after = (struct left){op->also_a + start * op->also_a_row, op->also_a_row, op->also_a_column, op->also_inner};
            also = &after;
        }
        product(rows, whole, left, also, panel, PANEL, out, op->out_row, op->scale, adds);
        if (whole == width) continue;
        product(rows, LANES, left, also, panel + whole, PANEL, rest, LANES, op->scale, 0);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = whole; j < width; j++) {
                float *to = out + r * op->out_row + j;
                *to = (adds ? *to : 0) + rest[r * LANES + j - whole];
            }
    }
}

static void multiply(const void *data, int64_t thread, int64_t threads) {
    const struct product *op = data;
    const int64_t panels = (op->columns + PANEL - 1) / PANEL, groups = (op->rows + GROUP - 1) / GROUP;
    int64_t at = panels * groups * thread / threads;
    const int64_t end = panels * groups * (thread + 1) / threads;
    float *scratch = op->scratch + thread * product_scratch(op->rows, op->also_inner);
    while (at < end) {
        const int64_t panel = at / groups, first = at % groups;
        const int64_t last = (panel + 1) * groups < end ? groups : end - panel * groups;
        const int64_t stop = last * GROUP < op->rows ? last * GROUP : op->rows;
        multiply_panel(op, panel * PANEL, first * GROUP, stop, scratch);
        at = panel * groups + last;
    }
}

void product_of_matrices(const struct product *op, int64_t threads) { in_parallel(multiply, op, threads); }

int64_t size_of_product(void) { return sizeof(struct product); }
int64_t lanes(void) { return LANES; }
