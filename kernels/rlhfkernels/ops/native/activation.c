/* act(x), or act(gate) x where the first half of a row is its gate. */
#include "tape.h"
#include "vectors.h"

enum kind { SILU, GELU_TANH, GELU, RELU };

struct activation {
    run_op *run;
    const float *x; /* [rows, size], or [rows, 2 size] where gated */
    float *out;     /* [rows, size] */
    int64_t rows, size, gated, kind;
};

INLINE vec activated(int64_t kind, vec x) {
    switch (kind) {
    case SILU: return x / (1.0f + exponential(-x));
    case GELU_TANH: /* (1 + tanh u) / 2 = 1 / (1 + e^(-2u)) */
        return x / (1.0f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));
    case GELU: {
        vec y = x;
        for (int i = 0; i < LANES; i++) y[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
        return y;
    }
    default: return pick(x < all(0), all(0), x); /* what is not a number stays that */
    }
}

void run_activation(const void *data, const struct call *call, int64_t thread, int64_t threads) {
    const struct activation *op = data;
    (void)call;
    const int64_t stride = op->gated ? 2 * op->size : op->size, pieces = (op->size + LANES - 1) / LANES;
    const int64_t start = op->rows * pieces * thread / threads, stop = op->rows * pieces * (thread + 1) / threads;
    for (int64_t piece = start; piece < stop; piece++) {
        const int64_t r = piece / pieces, i = piece % pieces * LANES;
        const int64_t count = op->size - i < LANES ? op->size - i : LANES;
        const float *x = op->x + r * stride + i;
        vec y = activated(op->kind, load_some(x, count, 0));
        if (op->gated) y *= load_some(x + op->size, count, 0);
        store_some(op->out + r * op->size + i, y, count);
    }
}

int64_t size_of_activation(void) { return sizeof(struct activation); }
