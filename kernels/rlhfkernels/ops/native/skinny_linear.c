/* y = scale x Wᵀ + bias, or added to y, for a few rows: bound by reading W once, so every row is served as it passes.

   With the low-rank second half: where a segment has `up`, B low is part of the same sums. */
#include "tape.h"
#include "vectors.h"

/* Outputs and rows of a tile: as many sums as stay in registers beside what they are made of. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define TALL 4
#else
#define TALL 2
#endif
#define WIDE 4
/* Tiles whose weights are asked for beforehand, in the order in which they lie, and into the second cache: the first has
   places for too few that are on their way. */
#define AHEAD 4

/* Outputs [start, stop) and what is theirs alone. */
struct segment {
    const float *up; /* [stop - start, rank], or null */
    int64_t start, stop;
    int64_t low_offset; /* where its columns of `low` begin */
    int64_t rank;
    float scale;
};

struct skinny_linear {
    run_op *run;
    const float *x;      /* [rows, inputs] */
    const float *weight; /* [outputs, inputs]; [inputs, outputs] where transposed; null: low-rank part alone */
    const float *bias;   /* [outputs], or null */
    float *out;          /* [rows, outputs] */
    const float *low;    /* [rows, low_stride], or null */
    const struct segment *segments;
    int64_t num_segments, rows, inputs, outputs, low_stride;
    int64_t adds; /* to what `out` holds */
};

/* sums[o][r] += w[o] x[r] over `inputs`; what comes after these weights in memory is asked for early. */
INLINE void add_products(int tall, int wide, vec sums[TALL][WIDE], const float *w, const float *x, int64_t inputs,
                         int64_t x_stride) {
    int64_t i = 0;
    for (; i + LANES <= inputs; i += LANES) {
        vec weights[TALL];
        for (int o = 0; o < tall; o++) {
            weights[o] = load(w + o * inputs + i);
            __builtin_prefetch(w + AHEAD * tall * inputs + i * tall + o * LANES, 0, 2);
        }
        for (int r = 0; r < wide; r++) {
            const vec row = load(x + r * x_stride + i);
            for (int o = 0; o < tall; o++) sums[o][r] += weights[o] * row;
        }
    }
    if (i == inputs) return;
    for (int r = 0; r < wide; r++) {
        const vec row = load_some(x + r * x_stride + i, inputs - i, 0);
        for (int o = 0; o < tall; o++) sums[o][r] += load_some(w + o * inputs + i, inputs - i, 0) * row;
    }
}

INLINE void run_tile(int tall, int wide, const struct skinny_linear *op, const struct segment *segment, int64_t o,
                     int64_t r) {
    vec sums[TALL][WIDE];
    for (int a = 0; a < tall; a++)
        for (int b = 0; b < wide; b++) sums[a][b] = (vec){0};
    if (op->weight)
        add_products(tall, wide, sums, op->weight + o * op->inputs, op->x + r * op->inputs, op->inputs, op->inputs);
    if (segment->up)
        add_products(tall, wide, sums, segment->up + (o - segment->start) * segment->rank,
                     op->low + r * op->low_stride + segment->low_offset, segment->rank, op->low_stride);
    for (int b = 0; b < wide; b++)
        for (int a = 0; a < tall; a++) {
            float y = total(sums[a][b]) * segment->scale;
            if (op->bias) y += op->bias[o + a];
            float *to = op->out + (r + b) * op->outputs + o + a;
            *to = op->adds ? *to + y : y;
        }
}

INLINE void run_outputs(int tall, const struct skinny_linear *op, const struct segment *segment, int64_t o) {
    int64_t r = 0;
    for (; r + WIDE <= op->rows; r += WIDE) run_tile(tall, WIDE, op, segment, o, r);
    switch (op->rows - r) {
    case 3: run_tile(tall, 3, op, segment, o, r); break;
    case 2: run_tile(tall, 2, op, segment, o, r); break;
    case 1: run_tile(tall, 1, op, segment, o, r); break;
    }
}

/* A thread's part of `count`, in whole multiples of `unit` but for the last. */
INLINE void part_of(int64_t count, int64_t unit, int64_t thread, int64_t threads, int64_t *start, int64_t *stop) {
    const int64_t units = (count + unit - 1) / unit;
    *start = units * thread / threads * unit;
    *stop = units * (thread + 1) / threads * unit;
    if (*stop > count) *stop = count;
}

void run_skinny_linear(const void *data, const struct call *call, int64_t thread, int64_t threads) {
    const struct skinny_linear *op = data;
    (void)call;
    for (int64_t i = 0; i < op->num_segments; i++) {
        const struct segment *segment = op->segments + i;
        int64_t o, stop;
        part_of(segment->stop - segment->start, TALL, thread, threads, &o, &stop);
        o += segment->start;
        stop += segment->start;
        for (; o + TALL <= stop; o += TALL) run_outputs(TALL, op, segment, o);
        for (; o < stop; o++) run_outputs(1, op, segment, o);
    }
}

/* Columns [o, o + 4 LANES) of x W for up to four rows, W stored as inputs by outputs. */
INLINE void run_columns(int wide, const struct skinny_linear *op, int64_t o, int64_t r) {
    vec sums[WIDE][4];
    for (int b = 0; b < wide; b++)
        for (int c = 0; c < 4; c++) sums[b][c] = (vec){0};
    const float *w = op->weight + o;
    for (int64_t i = 0; i < op->inputs; i++, w += op->outputs) {
        vec weights[4];
        for (int c = 0; c < 4; c++) {
            weights[c] = load(w + c * LANES);
            __builtin_prefetch(w + 8 * op->outputs + c * LANES, 0, 3);
        }
        for (int b = 0; b < wide; b++)
            for (int c = 0; c < 4; c++) sums[b][c] += weights[c] * op->x[(r + b) * op->inputs + i];
    }
    for (int b = 0; b < wide; b++)
        for (int c = 0; c < 4; c++) {
            float *to = op->out + (r + b) * op->outputs + o + c * LANES;
            vec y = sums[b][c];
            if (op->bias) y += load(op->bias + o + c * LANES);
            if (op->adds) y += load(to);
            store(to, y);
        }
}

static void run_column(const struct skinny_linear *op, int64_t o) {
    for (int64_t r = 0; r < op->rows; r++) {
        float y = op->bias ? op->bias[o] : 0;
        for (int64_t i = 0; i < op->inputs; i++) y += op->weight[i * op->outputs + o] * op->x[r * op->inputs + i];
        float *to = op->out + r * op->outputs + o;
        *to = op->adds ? *to + y : y;
    }
}

/* Unscaled, without segments. */
void run_skinny_linear_transposed(const void *data, const struct call *call, int64_t thread, int64_t threads) {
    const struct skinny_linear *op = data;
    (void)call;
    int64_t o, stop;
    part_of(op->outputs, 4 * LANES, thread, threads, &o, &stop);
    for (; o + 4 * LANES <= stop; o += 4 * LANES) {
        int64_t r = 0;
        for (; r + WIDE <= op->rows; r += WIDE) run_columns(WIDE, op, o, r);
        for (; r < op->rows; r++) run_columns(1, op, o, r);
    }
    for (; o < stop; o++) run_column(op, o);
}

int64_t size_of_segment(void) { return sizeof(struct segment); }
int64_t size_of_skinny_linear(void) { return sizeof(struct skinny_linear); }
