/* One new position a row: turns its queries and its key, writes key and value into the cache, attends over the cache.

   A thread takes whole groups: the query heads that read one key-value head of one row. */
#include "tape.h"
#include "vectors.h"

struct decode_attention {
    run_op *run;
    float *qkv;        /* [rows, stride]; queries and keys are turned in place */
    float *out;        /* [rows, heads, size] */
    float *keys;       /* [rows, kv_heads, capacity, size] */
    float *values;     /* likewise */
    const float *cos;  /* [capacity, rotated], or null */
    const float *sin;  /* likewise; negative in the first half */
    float *scores;     /* [rows, heads, capacity] */
    int64_t rows, heads, kv_heads, size, capacity, rotated, stride;
    int64_t head_stride;             /* from query head to query head, and from key head to key head */
    int64_t key_start, value_start;  /* in a row of qkv */
    int64_t window;                  /* positions that are seen; 0 is all */
    float scale;
};

/* x cos + (its halves exchanged) sin. */
static void turn(float *x, const float *cos, const float *sin, int64_t rotated) {
    const int64_t half = rotated / 2;
    for (int64_t i = 0; i < half; i++) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cos[i] + second * sin[i];
        x[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

INLINE float dot(const float *a, const float *b, int64_t size) {
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) sum += load(a + i) * load(b + i);
    if (i < size) sum += load_some(a + i, size - i, 0) * load_some(b + i, size - i, 0);
    return total(sum);
}

/* Softmax of x[0..count) without its division; returns what to divide by. */
static float exponentiate(float *x, int64_t count) {
    float most = x[0];
    for (int64_t i = 1; i < count; i++) most = x[i] > most ? x[i] : most;
    vec sum = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t some = count - i < LANES ? count - i : LANES;
        const vec y = exponential(load_some(x + i, some, -INFINITY) - most);
        sum += y;
        store_some(x + i, y, some);
    }
    return total(sum);
}

/* `columns` vectors of the weighted sum of the values. */
INLINE void add_values(int columns, float *out, const float *weights, const float *values, int64_t count, int64_t size,
                       float factor) {
    vec sums[4] = {{0}};
    for (int64_t p = 0; p < count; p++)
        for (int c = 0; c < columns; c++) sums[c] += weights[p] * load(values + p * size + c * LANES);
    for (int c = 0; c < columns; c++) store(out + c * LANES, sums[c] * factor);
}

static void weigh(float *out, const float *weights, const float *values, int64_t count, int64_t size, float factor) {
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES) add_values(4, out + i, weights, values + i, count, size, factor);
    for (; i + LANES <= size; i += LANES) add_values(1, out + i, weights, values + i, count, size, factor);
    for (; i < size; i++) {
        float sum = 0;
        for (int64_t p = 0; p < count; p++) sum += weights[p] * values[p * size + i];
        out[i] = sum * factor;
    }
}

void run_decode_attention(const void *data, const struct call *call, int64_t thread, int64_t threads) {
    const struct decode_attention *op = data;
    const int64_t size = op->size, group = op->heads / op->kv_heads, n = call->written + 1;
    const int64_t first = op->window && n > op->window ? n - op->window : 0, count = n - first;
    const int64_t groups = op->rows * op->kv_heads;
    for (int64_t i = groups * thread / threads; i < groups * (thread + 1) / threads; i++) {
        const int64_t r = i / op->kv_heads, j = i % op->kv_heads;
        float *row = op->qkv + r * op->stride;
        float *key = row + op->key_start + j * op->head_stride, *value = row + op->value_start + j * op->head_stride;
        float *keys = op->keys + i * op->capacity * size, *values = op->values + i * op->capacity * size;
        const float *cos = 0, *sin = 0;
        if (op->cos) {
            cos = op->cos + call->positions[r] * op->rotated;
            sin = op->sin + call->positions[r] * op->rotated;
            turn(key, cos, sin, op->rotated);
        }
        memcpy(keys + call->written * size, key, (size_t)size * sizeof *key);
        memcpy(values + call->written * size, value, (size_t)size * sizeof *value);
        for (int64_t head = j * group; head < (j + 1) * group; head++) {
            float *query = row + head * op->head_stride;
            float *scores = op->scores + (r * op->heads + head) * op->capacity;
            if (cos) turn(query, cos, sin, op->rotated);
            for (int64_t p = 0; p < count; p++) {
                const int hidden = call->mask && !call->mask[r * call->mask_stride + first + p];
                scores[p] = hidden ? -INFINITY : op->scale * dot(query, keys + (first + p) * size, size);
            }
            const float sum = exponentiate(scores, count);
            weigh(op->out + (r * op->heads + head) * size, scores, values + first * size, count, size, 1.0f / sum);
        }
    }
}

int64_t size_of_decode_attention(void) { return sizeof(struct decode_attention); }
