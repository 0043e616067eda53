/* y = scale (x Wᵀ + low Bᵀ) + bias, or y += that, for the few rows of a decode step. Reading W is the bound: it is read
   once, for all rows. low Bᵀ is the second half of an adapter, in segments of outputs that have one. */
#include "program.h"
#include "vectors.h"

/* Outputs and rows of a tile: as many accumulators as fit into the registers beside their operands. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define TILE_OUTPUTS 4
#else
#define TILE_OUTPUTS 2
#endif
#define TILE_ROWS 4
/* Prefetch distance in tiles, into L2: L1 has too few fill buffers. */
#define PREFETCH_TILES 4

/* Outputs [start, stop) that share a scale and an adapter. */
struct segment {
    const float *up; /* [stop - start, rank], or null */
    int64_t start, stop;
    int64_t low_offset; /* first of its columns of `low` */
    int64_t rank;
    float scale;
};

struct skinny_linear {
    const float *x;      /* [rows, inputs] */
    const float *weight; /* [outputs, inputs], or [inputs, outputs] if transposed; null: low Bᵀ alone */
    const float *bias;   /* [outputs], or null */
    float *out;          /* [rows, outputs] */
    const float *low;    /* [rows, low_stride], or null */
    const struct segment *segments;
    int64_t num_segments, rows, inputs, outputs, low_stride;
    int64_t accumulate; /* add to out */
};

/* sums[o][r] += w[o] x[r] over `inputs`. Prefetches the weights that follow. */
INLINE void accumulate_dots(int outputs, int rows, vec sums[TILE_OUTPUTS][TILE_ROWS], const float *w, const float *x,
                            int64_t inputs, int64_t x_stride) {
    int64_t i = 0;
    for (; i + LANES <= inputs; i += LANES) {
        vec weights[TILE_OUTPUTS];
        for (int o = 0; o < outputs; o++) {
            weights[o] = load(w + o * inputs + i);
            __builtin_prefetch(w + PREFETCH_TILES * outputs * inputs + i * outputs + o * LANES, 0, 2);
        }
        for (int r = 0; r < rows; r++) {
            const vec row = load(x + r * x_stride + i);
            for (int o = 0; o < outputs; o++) sums[o][r] += weights[o] * row;
        }
    }
    if (i == inputs) return;
    for (int r = 0; r < rows; r++) {
        const vec row = load_partial(x + r * x_stride + i, inputs - i, 0);
        for (int o = 0; o < outputs; o++) sums[o][r] += load_partial(w + o * inputs + i, inputs - i, 0) * row;
    }
}

INLINE void run_tile(int outputs, int rows, const struct skinny_linear *op, const struct segment *segment, int64_t o,
                     int64_t r) {
    vec sums[TILE_OUTPUTS][TILE_ROWS];
    for (int a = 0; a < outputs; a++)
        for (int b = 0; b < rows; b++) sums[a][b] = (vec){0};
    if (op->weight)
        accumulate_dots(outputs, rows, sums, op->weight + o * op->inputs, op->x + r * op->inputs, op->inputs,
                        op->inputs);
    if (segment->up)
        accumulate_dots(outputs, rows, sums, segment->up + (o - segment->start) * segment->rank,
                        op->low + r * op->low_stride + segment->low_offset, segment->rank, op->low_stride);
    for (int b = 0; b < rows; b++)
        for (int a = 0; a < outputs; a++) {
            float y = sum_lanes(sums[a][b]) * segment->scale;
            if (op->bias) y += op->bias[o + a];
            float *out = op->out + (r + b) * op->outputs + o + a;
            *out = op->accumulate ? *out + y : y;
        }
}

INLINE void run_outputs(int outputs, const struct skinny_linear *op, const struct segment *segment, int64_t o) {
    int64_t r = 0;
    for (; r + TILE_ROWS <= op->rows; r += TILE_ROWS) run_tile(outputs, TILE_ROWS, op, segment, o, r);
    switch (op->rows - r) {
    case 3: run_tile(outputs, 3, op, segment, o, r); break;
    case 2: run_tile(outputs, 2, op, segment, o, r); break;
    case 1: run_tile(outputs, 1, op, segment, o, r); break;
    }
}

/* This thread's share of `count`, divided at multiples of `unit`. */
INLINE void share_of(int64_t count, int64_t unit, int64_t thread, int64_t num_threads, int64_t *start, int64_t *stop) {
    const int64_t units = (count + unit - 1) / unit;
    *start = units * thread / num_threads * unit;
    *stop = units * (thread + 1) / num_threads * unit;
    if (*stop > count) *stop = count;
}

void run_skinny_linear(const void *operands, const struct step *step, int64_t thread, int64_t num_threads) {
    const struct skinny_linear *op = operands;
    (void)step;
    for (int64_t i = 0; i < op->num_segments; i++) {
        const struct segment *segment = op->segments + i;
        int64_t o, stop;
        share_of(segment->stop - segment->start, TILE_OUTPUTS, thread, num_threads, &o, &stop);
        o += segment->start;
        stop += segment->start;
        for (; o + TILE_OUTPUTS <= stop; o += TILE_OUTPUTS) run_outputs(TILE_OUTPUTS, op, segment, o);
        for (; o < stop; o++) run_outputs(1, op, segment, o);
    }
}

/* Columns [o, o + 4 LANES) of x W for up to four rows, W stored as inputs by outputs. */
INLINE void run_columns(int rows, const struct skinny_linear *op, int64_t o, int64_t r) {
    vec sums[TILE_ROWS][4];
    for (int b = 0; b < rows; b++)
        for (int c = 0; c < 4; c++) sums[b][c] = (vec){0};
    const float *w = op->weight + o;
    for (int64_t i = 0; i < op->inputs; i++, w += op->outputs) {
        vec weights[4];
        for (int c = 0; c < 4; c++) {
            weights[c] = load(w + c * LANES);
            __builtin_prefetch(w + 8 * op->outputs + c * LANES, 0, 3);
        }
        for (int b = 0; b < rows; b++)
            for (int c = 0; c < 4; c++) sums[b][c] += weights[c] * op->x[(r + b) * op->inputs + i];
    }
    for (int b = 0; b < rows; b++)
        for (int c = 0; c < 4; c++) {
            float *out = op->out + (r + b) * op->outputs + o + c * LANES;
            vec y = sums[b][c];
            if (op->bias) y += load(op->bias + o + c * LANES);
            if (op->accumulate) y += load(out);
            store(out, y);
        }
}

static void run_column(const struct skinny_linear *op, int64_t o) {
    for (int64_t r = 0; r < op->rows; r++) {
        float y = op->bias ? op->bias[o] : 0;
        for (int64_t i = 0; i < op->inputs; i++) y += op->weight[i * op->outputs + o] * op->x[r * op->inputs + i];
        float *out = op->out + r * op->outputs + o;
        *out = op->accumulate ? *out + y : y;
    }
}

/* Without scale and segments. */
void run_skinny_linear_transposed(const void *operands, const struct step *step, int64_t thread, int64_t num_threads) {
    const struct skinny_linear *op = operands;
    (void)step;
    int64_t o, stop;
    share_of(op->outputs, 4 * LANES, thread, num_threads, &o, &stop);
    for (; o + 4 * LANES <= stop; o += 4 * LANES) {
        int64_t r = 0;
        for (; r + TILE_ROWS <= op->rows; r += TILE_ROWS) run_columns(TILE_ROWS, op, o, r);
        for (; r < op->rows; r++) run_columns(1, op, o, r);
    }
    for (; o < stop; o++) run_column(op, o);
}

EXPORT_SIZE(segment)
EXPORT_SIZE(skinny_linear)
