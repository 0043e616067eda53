/* Ops that go over the rows of a matrix once, and their gradients; a thread takes its share of the rows. */
#include "parallel.h"
#include "vectors.h"

#define ROWS_OF_THREAD(op)                                                                                             \
    (int64_t r = (op)->rows * thread / threads; r < (op)->rows * (thread + 1) / threads; r++)

struct rms_norm {
    const float *x;      /* [rows, size] */
    const float *weight; /* [size] */
    float *inverse;      /* [rows]: 1 / sqrt(mean x^2 + eps) */
    float *out;          /* [rows, size] */
    const float *grad;   /* like out */
    float *grad_x;       /* like x */
    int64_t rows, size;
    float eps;
};

static void normalise(const void *data, int64_t thread, int64_t threads) {
    const struct rms_norm *op = data;
    for ROWS_OF_THREAD(op) {
        const float *x = op->x + r * op->size;
        vec squares = {0};
        EACH(i, op->size, some) {
            const vec v = load_some(x + i, some, 0);
            squares += v * v;
        }
        const float inverse = 1.0f / sqrtf(total(squares) / (float)op->size + op->eps);
        op->inverse[r] = inverse;
        EACH(i, op->size, some)
        store_some(op->out + r * op->size + i,
                   load_some(x + i, some, 0) * inverse * load_some(op->weight + i, some, 0), some);
    }
}

/* With u = x inverse and g = grad weight: inverse (g - u mean(g u)). */
static void normalise_backward(const void *data, int64_t thread, int64_t threads) {
    const struct rms_norm *op = data;
    for ROWS_OF_THREAD(op) {
        const float *x = op->x + r * op->size, *grad = op->grad + r * op->size, inverse = op->inverse[r];
        vec products = {0};
        EACH(i, op->size, some)
        products += load_some(grad + i, some, 0) * load_some(op->weight + i, some, 0) * load_some(x + i, some, 0);
        const float mean = total(products) / (float)op->size * inverse * inverse;
        EACH(i, op->size, some) {
            const vec g = load_some(grad + i, some, 0) * load_some(op->weight + i, some, 0);
            store_some(op->grad_x + r * op->size + i, (g - load_some(x + i, some, 0) * mean) * inverse, some);
        }
    }
}

struct swiglu {
    const float *gate_up; /* [rows, 2 size] */
    float *out;           /* [rows, size] */
    const float *grad;    /* like out */
    float *grad_gate_up;  /* like gate_up */
    int64_t rows, size;
};

static void gate(const void *data, int64_t thread, int64_t threads) {
    const struct swiglu *op = data;
    for ROWS_OF_THREAD(op) {
        const float *gates = op->gate_up + 2 * r * op->size, *ups = gates + op->size;
        EACH(i, op->size, some) {
            const vec g = load_some(gates + i, some, 0);
            store_some(op->out + r * op->size + i, g / (1.0f + exponential(-g)) * load_some(ups + i, some, 0), some);
        }
    }
}

static void gate_backward(const void *data, int64_t thread, int64_t threads) {
    const struct swiglu *op = data;
    for ROWS_OF_THREAD(op) {
        const float *gates = op->gate_up + 2 * r * op->size, *ups = gates + op->size, *grad = op->grad + r * op->size;
        float *to = op->grad_gate_up + 2 * r * op->size;
        EACH(i, op->size, some) {
            const vec g = load_some(gates + i, some, 0), up = load_some(ups + i, some, 0);
            const vec dy = load_some(grad + i, some, 0), sigmoid = 1.0f / (1.0f + exponential(-g));
            store_some(to + i, dy * up * sigmoid * (1.0f + g * (1.0f - sigmoid)), some);
            store_some(to + op->size + i, dy * g * sigmoid, some);
        }
    }
}

struct rotary {
    float *x;         /* [rows, blocks, groups, size]; of each block the first `rotated` groups are turned */
    const float *cos; /* [table_rows, turned] */
    const float *sin; /* likewise; negative in the first half */
    int64_t rows, table_rows, blocks, groups, rotated, size, turned;
    float way; /* 1, or -1 for the inverse */
};

static void turn(const void *data, int64_t thread, int64_t threads) {
    const struct rotary *op = data;
    const int64_t half = op->turned / 2;
    for ROWS_OF_THREAD(op) {
        const float *cos = op->cos + r % op->table_rows * op->turned, *sin = op->sin + r % op->table_rows * op->turned;
        for (int64_t block = 0; block < op->blocks; block++)
            for (int64_t group = 0; group < op->rotated; group++) {
                float *x = op->x + ((r * op->blocks + block) * op->groups + group) * op->size;
                EACH(i, half, some) {
                    const vec first = load_some(x + i, some, 0), second = load_some(x + half + i, some, 0);
                    const vec y = first * load_some(cos + i, some, 0) + second * load_some(sin + i, some, 0) * op->way;
                    const vec z = second * load_some(cos + half + i, some, 0) +
                                  first * load_some(sin + half + i, some, 0) * op->way;
                    store_some(x + i, y, some);
                    store_some(x + half + i, z, some);
                }
            }
    }
}

static float largest_of(const float *x, int64_t size) {
    vec most = all(-INFINITY);
    EACH(i, size, some) {
        const vec y = load_some(x + i, some, -INFINITY);
        most = pick(y > most, y, most);
    }
    return largest(most);
}

struct logprobs {
    float *raw;             /* [rows, size]: products of the head; turned into their gradients where these are asked */
    const int64_t *targets; /* [rows] */
    float *out;             /* [rows] */
    const float *weights;   /* [rows]: of the log-probabilities in what is differentiated; null is 1 */
    int64_t rows, size, slope;
    float factor; /* of the products in the logits */
};

static void read_logprobs(const void *data, int64_t thread, int64_t threads) {
    const struct logprobs *op = data;
    for ROWS_OF_THREAD(op) {
        float *raw = op->raw + r * op->size;
        const float most = largest_of(raw, op->size);
        const float chosen = raw[op->targets[r]];
        vec sum = {0};
        EACH(i, op->size, some) {
            const vec y = exponential((load_some(raw + i, some, -INFINITY) - most) * op->factor);
            sum += y;
            if (op->slope) store_some(raw + i, y, some);
        }
        op->out[r] = (chosen - most) * op->factor - logf(total(sum));
        if (!op->slope) continue;
        const float weight = (op->weights ? op->weights[r] : 1.0f) * op->factor, scale = -weight / total(sum);
        EACH(i, op->size, some) store_some(raw + i, load_some(raw + i, some, 0) * scale, some);
        raw[op->targets[r]] += weight;
    }
}

struct sample {
    float *logits;        /* [rows, size], overwritten */
    const float *uniform; /* [rows], in [0, 1) */
    int64_t *tokens;      /* [rows] */
    float *logprobs;      /* [rows] */
    int64_t rows, size;
};

/* The first token at which the summed probabilities pass a uniform number; of probability 0 is none, since it passes
   nothing. Summed by stretches first: most of the row is walked over in vectors. */
static void draw(const void *data, int64_t thread, int64_t threads) {
    const struct sample *op = data;
    enum { STRETCH = 16 * LANES };
    for ROWS_OF_THREAD(op) {
        float *x = op->logits + r * op->size;
        const float most = largest_of(x, op->size);
        double whole = 0;
        for (int64_t start = 0; start < op->size; start += STRETCH) {
            const int64_t count = op->size - start < STRETCH ? op->size - start : STRETCH;
            vec sum = {0};
            EACH(i, count, some) {
                const vec y = exponential(load_some(x + start + i, some, -INFINITY) - most);
                sum += y;
                store_some(x + start + i, y, some);
            }
            whole += total(sum);
        }
        const double point = whole * op->uniform[r];
        double passed = 0;
        int64_t start = 0, token = -1;
        for (int64_t next = STRETCH; next < op->size; start = next, next += STRETCH) {
            vec sum = {0};
            for (int64_t i = 0; i < STRETCH; i += LANES) sum += load(x + start + i);
            if (passed + total(sum) > point) break;
            passed += total(sum);
        }
        for (int64_t i = start; i < op->size && passed <= point; i++)
            if (x[i] > 0) {
                passed += x[i];
                token = i;
            }
        /* Rounding: the row's sum was passed by none of its last numbers. */
        for (int64_t i = start; token < 0; i--)
            if (i == 0 || x[i - 1] > 0) token = i ? i - 1 : 0;
        op->tokens[r] = token;
        op->logprobs[r] = logf(x[token]) - (float)log(whole);
    }
}

#define EXPORT(name, body)                                                                                             \
    void name(const void *op, int64_t threads) { in_parallel(body, op, threads); }

EXPORT(rms_norm, normalise)
EXPORT(rms_norm_backward, normalise_backward)
EXPORT(swiglu, gate)
EXPORT(swiglu_backward, gate_backward)
EXPORT(rotary, turn)
EXPORT(logprobs, read_logprobs)
EXPORT(sample, draw)

int64_t size_of_rms_norm(void) { return sizeof(struct rms_norm); }
int64_t size_of_swiglu(void) { return sizeof(struct swiglu); }
int64_t size_of_rotary(void) { return sizeof(struct rotary); }
int64_t size_of_logprobs(void) { return sizeof(struct logprobs); }
int64_t size_of_sample(void) { return sizeof(struct sample); }
