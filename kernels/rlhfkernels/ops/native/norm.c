/* RMS norm, or layer norm where `centered` is set, and the gradient of RMS norm. A thread takes whole rows. */
#include "program.h"
#include "vectors.h"

struct norm {
    const float *x;      /* [rows, size] */
    const float *weight; /* [size], or null */
    const float *bias;   /* [size], or null */
    float *inverse;      /* [rows]: 1 / sqrt(mean x^2 + eps); null if unwanted */
    float *out;          /* [rows, size] */
    const float *grad;   /* gradient of out */
    float *grad_x;       /* gradient of x */
    int64_t rows, size, centered;
    float eps;
};

INLINE float norm_row(const struct norm *op, const float *x, float *out, int centered) {
    float mean = 0;
    if (centered) {
        vec sum = {0};
        FOR_VECTORS(i, op->size, count) sum += load_partial(x + i, count, 0);
        mean = sum_lanes(sum) / (float)op->size;
    }
    vec squares = {0};
    FOR_VECTORS(i, op->size, count) {
        const vec v = load_partial(x + i, count, mean) - mean;
        squares += v * v;
    }
    const float inverse = 1.0f / sqrtf(sum_lanes(squares) / (float)op->size + op->eps);
    FOR_VECTORS(i, op->size, count) {
        vec y = (load_partial(x + i, count, mean) - mean) * inverse;
        if (op->weight) y *= load_partial(op->weight + i, count, 0);
        if (op->bias) y += load_partial(op->bias + i, count, 0);
        store_partial(out + i, y, count);
    }
    return inverse;
}

void run_norm(const void *operands, const struct step *step, int64_t thread, int64_t num_threads) {
    const struct norm *op = operands;
    (void)step;
    FOR_THREAD_ROWS(r, op->rows) {
        const float *x = op->x + r * op->size;
        float *out = op->out + r * op->size;
        const float inverse = op->centered ? norm_row(op, x, out, 1) : norm_row(op, x, out, 0);
        if (op->inverse) op->inverse[r] = inverse;
    }
}

/* With u = x inverse and g = grad weight: grad_x = inverse (g - u mean(g u)). */
void run_rms_norm_backward(const void *operands, const struct step *step, int64_t thread, int64_t num_threads) {
    const struct norm *op = operands;
    (void)step;
    FOR_THREAD_ROWS(r, op->rows) {
        const float *x = op->x + r * op->size, *grad = op->grad + r * op->size, inverse = op->inverse[r];
        vec dots = {0};
        FOR_VECTORS(i, op->size, count) {
            const vec g = load_partial(grad + i, count, 0) * load_partial(op->weight + i, count, 0);
            dots += g * load_partial(x + i, count, 0);
        }
        const float mean = sum_lanes(dots) / (float)op->size * inverse * inverse;
        FOR_VECTORS(i, op->size, count) {
            const vec g = load_partial(grad + i, count, 0) * load_partial(op->weight + i, count, 0);
            store_partial(op->grad_x + r * op->size + i, (g - load_partial(x + i, count, 0) * mean) * inverse, count);
        }
    }
}

EXPORT_SIZE(norm)
