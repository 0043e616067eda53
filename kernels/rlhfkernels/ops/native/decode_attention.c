/* One new position a row: rotates its queries and key, writes key and value into the KV cache, attends over the cache.

   A thread takes whole groups: the query heads that share one key-value head of one row. */
#include "program.h"
#include "vectors.h"

struct decode_attention {
    float *qkv;              /* [rows, stride]; queries and keys are rotated in place */
    float *out;              /* [rows, heads, size] */
    float *keys;             /* [rows, kv_heads, capacity, size] */
    float *values;           /* [rows, kv_heads, capacity, size] */
    const float *cos;        /* [capacity, rotary_size], or null */
    const float *signed_sin; /* [capacity, rotary_size], negative in the first half, or null */
    float *scores;           /* [rows, heads, capacity], scratch */
    int64_t rows, heads, kv_heads, size, capacity, rotary_size, stride;
    int64_t head_stride;            /* from query head to query head, and from key head to key head */
    int64_t key_start, value_start; /* in a row of qkv */
    int64_t window;                 /* positions that a query sees; 0 is all */
    float scale;
};

INLINE float dot(const float *a, const float *b, int64_t size) {
    vec sum = {0};
    FOR_VECTORS(i, size, count) sum += load_partial(a + i, count, 0) * load_partial(b + i, count, 0);
    return sum_lanes(sum);
}

/* `num_vectors` vectors of the weighted sum of the values. */
INLINE void sum_vectors(int num_vectors, float *out, const float *weights, const float *values, int64_t count,
                        int64_t size, float factor) {
    vec sums[4] = {{0}};
    for (int64_t p = 0; p < count; p++)
        for (int c = 0; c < num_vectors; c++) sums[c] += weights[p] * load(values + p * size + c * LANES);
    for (int c = 0; c < num_vectors; c++) store(out + c * LANES, sums[c] * factor);
}

/* out = factor weights values, with `count` weights and [count, size] values. */
static void sum_values(float *out, const float *weights, const float *values, int64_t count, int64_t size,
                       float factor) {
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES) sum_vectors(4, out + i, weights, values + i, count, size, factor);
    for (; i + LANES <= size; i += LANES) sum_vectors(1, out + i, weights, values + i, count, size, factor);
    for (; i < size; i++) {
        float sum = 0;
        for (int64_t p = 0; p < count; p++) sum += weights[p] * values[p * size + i];
        out[i] = sum * factor;
    }
}

void run_decode_attention(const void *operands, const struct step *step, int64_t thread, int64_t num_threads) {
    const struct decode_attention *op = operands;
    const int64_t size = op->size, group = op->heads / op->kv_heads, n = step->cache_len + 1;
    const int64_t half = op->rotary_size / 2;
    const int64_t first = op->window && n > op->window ? n - op->window : 0, count = n - first;
    FOR_THREAD_ROWS(i, op->rows * op->kv_heads) {
        const int64_t r = i / op->kv_heads, j = i % op->kv_heads;
        float *row = op->qkv + r * op->stride;
        float *key = row + op->key_start + j * op->head_stride, *value = row + op->value_start + j * op->head_stride;
        float *keys = op->keys + i * op->capacity * size, *values = op->values + i * op->capacity * size;
        const float *cos = 0, *signed_sin = 0;
        if (op->cos) {
            int64_t position = step->positions[r] < 0 ? 0 : step->positions[r]; /* -1 in a row of padding alone */
            if (position >= op->capacity) position = op->capacity - 1;
            cos = op->cos + position * op->rotary_size;
            signed_sin = op->signed_sin + position * op->rotary_size;
            rotate_pairs(key, cos, signed_sin, half, 1.0f);
        }
        memcpy(keys + step->cache_len * size, key, (size_t)size * sizeof *key);
        memcpy(values + step->cache_len * size, value, (size_t)size * sizeof *value);
        for (int64_t head = j * group; head < (j + 1) * group; head++) {
            float *query = row + head * op->head_stride;
            float *scores = op->scores + (r * op->heads + head) * op->capacity;
            if (cos) rotate_pairs(query, cos, signed_sin, half, 1.0f);
            for (int64_t p = 0; p < count; p++) {
                const int is_padding = step->mask && !step->mask[r * step->mask_stride + first + p];
                scores[p] = is_padding ? -INFINITY : op->scale * dot(query, keys + (first + p) * size, size);
            }
            const float sum = exp_row(scores, count, max_of_row(scores, count), 1.0f, 1);
            sum_values(op->out + (r * op->heads + head) * size, scores, values + first * size, count, size, 1.0f / sum);
        }
    }
}

EXPORT_SIZE(decode_attention)
