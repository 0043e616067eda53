/* Products of blocks that stay in the caches: C = s A B or C += s A B, the elements of A spread over vectors of B's rows. */
#ifndef TILES_H
#define TILES_H

#include "vectors.h"

/* Rows and vectors of a tile: as many sums as stay in registers beside what they are made of. */
#define TILE_ROWS 6
#if defined(__AVX512F__) || defined(__aarch64__)
#define TILE_VECS 4
#else
#define TILE_VECS 2
#endif

/* A[m][k] at a + m * row + k * column, and how many k. */
struct left {
    const float *a;
    int64_t row, column, inner;
};

INLINE void add_to_tile(int rows, int vecs, vec sums[TILE_ROWS][TILE_VECS], const struct left *left, const float *b,
                        int64_t b_stride) {
    for (int64_t k = 0; k < left->inner; k++) {
        vec right[TILE_VECS];
        for (int n = 0; n < vecs; n++) right[n] = load(b + k * b_stride + n * LANES);
        for (int m = 0; m < rows; m++) {
            const float factor = left->a[m * left->row + k * left->column];
            for (int n = 0; n < vecs; n++) sums[m][n] += factor * right[n];
        }
    }
}

/* The rows of B for `second` follow those for `first`. */
INLINE void product_tile(int rows, int vecs, const struct left *first, const struct left *second, const float *b,
                         int64_t b_stride, float *c, int64_t c_stride, float scale, int adds) {
    vec sums[TILE_ROWS][TILE_VECS];
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < vecs; n++) sums[m][n] = (vec){0};
    add_to_tile(rows, vecs, sums, first, b, b_stride);
    if (second) add_to_tile(rows, vecs, sums, second, b + first->inner * b_stride, b_stride);
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < vecs; n++) {
            float *to = c + m * c_stride + n * LANES;
            vec y = sums[m][n] * scale;
            if (adds) y += load(to);
            store(to, y);
        }
}

INLINE void product_strip(int vecs, int64_t rows, struct left first, const struct left *also, const float *b,
                          int64_t b_stride, float *c, int64_t c_stride, float scale, int adds) {
    struct left after = also ? *also : first;
    struct left *second = also ? &after : 0;
    int64_t m = 0;
    for (; m + TILE_ROWS <= rows; m += TILE_ROWS) {
        product_tile(TILE_ROWS, vecs, &first, second, b, b_stride, c, c_stride, scale, adds);
        first.a += TILE_ROWS * first.row;
        after.a += TILE_ROWS * after.row;
        c += TILE_ROWS * c_stride;
    }
    switch (rows - m) {
    case 5: product_tile(5, vecs, &first, second, b, b_stride, c, c_stride, scale, adds); break;
    case 4: product_tile(4, vecs, &first, second, b, b_stride, c, c_stride, scale, adds); break;
    case 3: product_tile(3, vecs, &first, second, b, b_stride, c, c_stride, scale, adds); break;
    case 2: product_tile(2, vecs, &first, second, b, b_stride, c, c_stride, scale, adds); break;
    case 1: product_tile(1, vecs, &first, second, b, b_stride, c, c_stride, scale, adds); break;
    }
}

/* [rows, inner] by [inner, columns] to [rows, columns]; `columns` is a multiple of LANES. `also` may be null: what is
   added to the same sums. */
static void product(int64_t rows, int64_t columns, struct left first, const struct left *also, const float *b,
                    int64_t b_stride, float *c, int64_t c_stride, float scale, int adds) {
    int64_t n = 0;
    for (; n + TILE_VECS * LANES <= columns; n += TILE_VECS * LANES)
        product_strip(TILE_VECS, rows, first, also, b + n, b_stride, c + n, c_stride, scale, adds);
#if TILE_VECS > 2
    for (; n + 2 * LANES <= columns; n += 2 * LANES)
        product_strip(2, rows, first, also, b + n, b_stride, c + n, c_stride, scale, adds);
#endif
    for (; n < columns; n += LANES)
        product_strip(1, rows, first, also, b + n, b_stride, c + n, c_stride, scale, adds);
}

#endif
