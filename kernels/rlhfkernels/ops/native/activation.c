/* act(x), or act(gate) x where the first half of a row is its gate, and the gradient of the gated SiLU (SwiGLU). */
#include "program.h"
#include "vectors.h"

enum kind { SILU, GELU_TANH, GELU, RELU };

struct activation {
    const float *x;    /* [rows, size], or [rows, 2 size] if gated */
    float *out;        /* [rows, size] */
    const float *grad; /* gradient of out */
    float *grad_x;     /* gradient of x */
    int64_t rows, size, gated, kind;
};

INLINE vec activate(int kind, vec x) {
    switch (kind) {
    case SILU: return x / (1.0f + vec_exp(-x));
    case GELU_TANH: /* (1 + tanh u) / 2 = 1 / (1 + e^(-2u)) */
        return x / (1.0f + vec_exp(-1.5957691216f * (x + 0.044715f * x * x * x)));
    case GELU: {
        vec y = x;
        for (int i = 0; i < LANES; i++) y[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
        return y;
    }
    default: return select(x < broadcast(0), broadcast(0), x); /* NaN stays NaN */
    }
}

/* Divides vectors, not rows, among the threads: a decode step has fewer rows than some machines have threads. */
INLINE void activate_share(const struct activation *op, int kind, int gated, int64_t thread, int64_t num_threads) {
    const int64_t stride = gated ? 2 * op->size : op->size, row_vectors = (op->size + LANES - 1) / LANES;
    const int64_t start = op->rows * row_vectors * thread / num_threads;
    const int64_t stop = op->rows * row_vectors * (thread + 1) / num_threads;
    int64_t r = start / row_vectors, i = start % row_vectors * LANES;
    for (int64_t n = start; n < stop; n++) {
        const int64_t count = op->size - i < LANES ? op->size - i : LANES;
        const float *x = op->x + r * stride + i;
        vec y = activate(kind, load_partial(x, count, 0));
        if (gated) y *= load_partial(x + op->size, count, 0);
        store_partial(op->out + r * op->size + i, y, count);
        i += LANES;
        if (i >= op->size) i = 0, r++;
    }
}

void run_activation(const void *operands, const struct step *step, int64_t thread, int64_t num_threads) {
    const struct activation *op = operands;
    (void)step;
    switch (op->kind) {
    case SILU:
        if (op->gated) activate_share(op, SILU, 1, thread, num_threads);
        else activate_share(op, SILU, 0, thread, num_threads);
        break;
    case GELU_TANH: activate_share(op, GELU_TANH, op->gated != 0, thread, num_threads); break;
    case GELU: activate_share(op, GELU, op->gated != 0, thread, num_threads); break;
    case RELU: activate_share(op, RELU, op->gated != 0, thread, num_threads); break;
    }
}

void run_swiglu_backward(const void *operands, const struct step *step, int64_t thread, int64_t num_threads) {
    const struct activation *op = operands;
    (void)step;
    FOR_THREAD_ROWS(r, op->rows) {
        const float *gates = op->x + 2 * r * op->size, *ups = gates + op->size, *grad = op->grad + r * op->size;
        float *out = op->grad_x + 2 * r * op->size;
        FOR_VECTORS(i, op->size, count) {
            const vec gate = load_partial(gates + i, count, 0), up = load_partial(ups + i, count, 0);
            const vec dy = load_partial(grad + i, count, 0), sigmoid = 1.0f / (1.0f + vec_exp(-gate));
            store_partial(out + i, dy * up * sigmoid * (1.0f + gate * (1.0f - sigmoid)), count);
            store_partial(out + op->size + i, dy * gate * sigmoid, count);
        }
    }
}

EXPORT_SIZE(activation)
