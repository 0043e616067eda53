/* Matmuls of blocks that stay in the caches: C = s A B or C += s A B, by outer products of columns of A and rows of B. */
#ifndef TILES_H
#define TILES_H

#include "vectors.h"

/* Rows and vectors of a tile: as many accumulators as fit into the registers beside their operands. */
#define TILE_ROWS 6
#if defined(__AVX512F__) || defined(__aarch64__)
#define TILE_VECS 4
#else
#define TILE_VECS 2
#endif

/* A matrix of any strides. */
struct matrix {
    const float *p;
    int64_t row, column; /* strides */
};

/* A left operand: a matrix and the number of its columns. */
struct left {
    struct matrix a;
    int64_t inner;
};

INLINE void accumulate_tile(int rows, int vecs, vec sums[TILE_ROWS][TILE_VECS], const struct left *left, const float *b,
                            int64_t b_stride) {
    for (int64_t k = 0; k < left->inner; k++) {
        vec right[TILE_VECS];
        for (int n = 0; n < vecs; n++) right[n] = load(b + k * b_stride + n * LANES);
        for (int m = 0; m < rows; m++) {
            const float factor = left->a.p[m * left->a.row + k * left->a.column];
            for (int n = 0; n < vecs; n++) sums[m][n] += factor * right[n];
        }
    }
}

/* The rows of B that `second` multiplies follow those that `first` multiplies. */
INLINE void matmul_tile(int rows, int vecs, const struct left *first, const struct left *second, const float *b,
                        int64_t b_stride, float *c, int64_t c_stride, float scale, int accumulate) {
    vec sums[TILE_ROWS][TILE_VECS];
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < vecs; n++) sums[m][n] = (vec){0};
    accumulate_tile(rows, vecs, sums, first, b, b_stride);
    if (second) accumulate_tile(rows, vecs, sums, second, b + first->inner * b_stride, b_stride);
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < vecs; n++) {
            float *out = c + m * c_stride + n * LANES;
            vec y = sums[m][n] * scale;
            if (accumulate) y += load(out);
            store(out, y);
        }
}

/* `vecs` vectors of columns. */
INLINE void matmul_strip(int vecs, int64_t rows, struct left first, const struct left *low_rank, const float *b,
                         int64_t b_stride, float *c, int64_t c_stride, float scale, int accumulate) {
    struct left low = low_rank ? *low_rank : first;
    struct left *second = low_rank ? &low : 0;
    int64_t m = 0;
    for (; m + TILE_ROWS <= rows; m += TILE_ROWS) {
        matmul_tile(TILE_ROWS, vecs, &first, second, b, b_stride, c, c_stride, scale, accumulate);
        first.a.p += TILE_ROWS * first.a.row;
        low.a.p += TILE_ROWS * low.a.row;
        c += TILE_ROWS * c_stride;
    }
    switch (rows - m) {
    case 5: matmul_tile(5, vecs, &first, second, b, b_stride, c, c_stride, scale, accumulate); break;
    case 4: matmul_tile(4, vecs, &first, second, b, b_stride, c, c_stride, scale, accumulate); break;
    case 3: matmul_tile(3, vecs, &first, second, b, b_stride, c, c_stride, scale, accumulate); break;
    case 2: matmul_tile(2, vecs, &first, second, b, b_stride, c, c_stride, scale, accumulate); break;
    case 1: matmul_tile(1, vecs, &first, second, b, b_stride, c, c_stride, scale, accumulate); break;
    }
}

/* [rows, inner] by [inner, columns] to [rows, columns]; `columns` is a multiple of LANES. `low_rank` is a second left
   operand for the same sums, or null. */
static void matmul_block(int64_t rows, int64_t columns, struct left first, const struct left *low_rank, const float *b,
                         int64_t b_stride, float *c, int64_t c_stride, float scale, int accumulate) {
    int64_t n = 0;
    for (; n + TILE_VECS * LANES <= columns; n += TILE_VECS * LANES)
        matmul_strip(TILE_VECS, rows, first, low_rank, b + n, b_stride, c + n, c_stride, scale, accumulate);
#if TILE_VECS > 2
    for (; n + 2 * LANES <= columns; n += 2 * LANES)
        matmul_strip(2, rows, first, low_rank, b + n, b_stride, c + n, c_stride, scale, accumulate);
#endif
    for (; n < columns; n += LANES)
        matmul_strip(1, rows, first, low_rank, b + n, b_stride, c + n, c_stride, scale, accumulate);
}

#endif
