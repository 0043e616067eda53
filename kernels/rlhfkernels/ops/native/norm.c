/* Root-mean-square normalisation, or layer normalisation where it is centred; a thread takes whole rows. */
#include "tape.h"
#include "vectors.h"

struct norm {
    run_op *run;
    const float *x;      /* [rows, size] */
    const float *weight; /* [size], or null */
    const float *bias;   /* [size], or null */
    float *out;          /* [rows, size] */
    int64_t rows, size, centred;
    float eps;
};

void run_norm(const void *data, const struct call *call, int64_t thread, int64_t threads) {
    const struct norm *op = data;
    (void)call;
    const int64_t whole = op->size / LANES * LANES, left = op->size - whole;
    for (int64_t r = thread; r < op->rows; r += threads) {
        const float *x = op->x + r * op->size;
        float *out = op->out + r * op->size;
        float mean = 0;
        if (op->centred) {
            vec sum = load_some(x + whole, left, 0);
            for (int64_t i = 0; i < whole; i += LANES) sum += load(x + i);
            mean = total(sum) / (float)op->size;
        }
        vec last = load_some(x + whole, left, mean) - mean, squares = last * last;
        for (int64_t i = 0; i < whole; i += LANES) {
            const vec distance = load(x + i) - mean;
            squares += distance * distance;
        }
        const float factor = 1.0f / sqrtf(total(squares) / (float)op->size + op->eps);
        for (int64_t i = 0; i < op->size; i += LANES) {
            const int64_t count = i < whole ? LANES : left;
            vec y = (load_some(x + i, count, mean) - mean) * factor;
            if (op->weight) y *= load_some(op->weight + i, count, 0);
            if (op->bias) y += load_some(op->bias + i, count, 0);
            store_some(out + i, y, count);
        }
    }
}

int64_t size_of_norm(void) { return sizeof(struct norm); }
