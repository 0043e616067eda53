/* Causal attention over whole sequences, and its gradient, on the output of the QKV projection.

   A thread takes whole groups: the query heads that share one key-value head of one sequence. It goes over blocks of
   queries, whose scores stay in the cache. The backward recomputes the scores. */
#include "program.h"
#include "tiles.h"

#define BLOCK (4 * TILE_ROWS)

struct causal_attention {
    const float *qkv;      /* [batch, length, stride], rotated */
    float *out;            /* [batch, length - start, heads, size] */
    float *logsumexp;      /* [batch, heads, length], of the scores; null if no backward follows */
    const float *grad_out; /* gradient of out */
    float *grad_qkv;       /* gradient of qkv */
    const int64_t *mask;   /* [batch, length], 0 on padding; null without padding */
    float *scratch;        /* [threads, scratch_size] */
    int64_t batch, length, stride, heads, kv_heads, size;
    int64_t start;                  /* first query position */
    int64_t window;                 /* positions that a query sees; 0 is all */
    int64_t head_stride;            /* from head to head */
    int64_t key_start, value_start; /* in a row of qkv */
    int64_t scratch_size;
    float scale;
};

/* Sizes in whole vectors: of a head, and of a row of transposed keys, in which a vector may start anywhere. */
INLINE int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }
INLINE int64_t key_row_size(int64_t length) { return padded(length) + LANES; }

/* Floats of scratch memory a thread. */
int64_t causal_attention_scratch(int64_t length, int64_t size, int64_t backward) {
    const int64_t e = padded(size), t = key_row_size(length);
    return backward ? 5 * e * t + BLOCK * (2 * t + 3 * e) : 2 * e * t + BLOCK * (t + e);
}

/* One sequence and one key-value head. */
struct group {
    int64_t sequence, first_head, num_heads;
    const float *queries, *keys, *values; /* at the first position; `stride` to the next */
};

static struct group group_of(const struct causal_attention *op, int64_t i) {
    const int64_t sequence = i / op->kv_heads, j = i % op->kv_heads, num_heads = op->heads / op->kv_heads;
    const float *rows = op->qkv + sequence * op->length * op->stride;
    return (struct group){sequence,
                          j * num_heads,
                          num_heads,
                          rows + j * num_heads * op->head_stride,
                          rows + op->key_start + j * op->head_stride,
                          rows + op->value_start + j * op->head_stride};
}

/* Copies [count, size] of any stride to [count, padded(size)]. */
static void pack(float *to, const float *from, int64_t count, int64_t stride, int64_t size) {
    const int64_t e = padded(size);
    for (int64_t p = 0; p < count; p++) {
        memcpy(to + p * e, from + p * stride, (size_t)size * sizeof *to);
        for (int64_t i = size; i < e; i++) to[p * e + i] = 0;
    }
}

/* Copies [count, padded(size)] to [count, size] of any stride. */
static void unpack(float *to, const float *from, int64_t count, int64_t stride, int64_t size) {
    const int64_t e = padded(size);
    for (int64_t p = 0; p < count; p++) memcpy(to + p * stride, from + p * e, (size_t)size * sizeof *to);
}

/* Transposes [count, size] of any stride to [size, t], 0 beyond `count`. */
static void pack_transposed(float *to, const float *from, int64_t count, int64_t stride, int64_t size, int64_t t) {
    int64_t p = 0;
    for (; p + LANES <= count; p += LANES)
        for (int64_t i = 0; i < size; i++)
            for (int64_t lane = 0; lane < LANES; lane++) to[i * t + p + lane] = from[(p + lane) * stride + i];
    for (int64_t i = 0; i < size; i++)
        for (int64_t q = p; q < t; q++) to[i * t + q] = q < count ? from[q * stride + i] : 0;
}

/* The keys [first, first + count) that at least one query of a block sees. */
struct span {
    int64_t first, count;
};

static struct span span_of(const struct causal_attention *op, int64_t q, int64_t rows) {
    const int64_t first = op->window && q >= op->window ? q - op->window + 1 : 0;
    return (struct span){first, q + rows - first};
}

/* Mask with all bits set in the lanes low <= i < high. */
INLINE ivec lanes_between(int64_t low, int64_t high) {
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    ivec lane;
    memcpy(&lane, numbers, sizeof lane);
    const int32_t from = low < 0 ? 0 : (int32_t)low, to = high > LANES ? LANES : (int32_t)high;
    return (lane >= from) & (lane < to);
}

/* x[p] = e^(scale x[p] - shift) for the keys p that query q sees, 0 for the others, over whole vectors. Without a given
   shift, it is the maximum, which is written to `shift`. Returns the sum. */
static float exp_scores(const struct causal_attention *op, const struct group *group, struct span span, int64_t q,
                        float *x, float *shift, int has_shift) {
    const int64_t low = op->window && q - op->window + 1 > span.first ? q - op->window + 1 - span.first : 0;
    const int64_t high = q + 1 - span.first;
    if (op->mask) {
        const int64_t *mask = op->mask + group->sequence * op->length + span.first;
        /* Padding sees itself: the softmax of an empty row would be NaN. */
        for (int64_t p = low; p < high - 1; p++)
            if (!mask[p]) x[p] = -INFINITY;
    }
    if (!has_shift) {
        vec max = broadcast(-INFINITY);
        for (int64_t p = low / LANES * LANES; p < high; p += LANES) {
            const vec y = select(lanes_between(low - p, high - p), load(x + p), broadcast(-INFINITY));
            max = select(y > max, y, max);
        }
        *shift = max_lanes(max) * op->scale;
    }
    vec sum = {0};
    for (int64_t p = 0; p < span.count; p += LANES) {
        vec y = {0};
        if (p + LANES > low && p < high)
            y = vec_exp(
                select(lanes_between(low - p, high - p), load(x + p) * op->scale - *shift, broadcast(-INFINITY)));
        sum += y;
        store(x + p, y);
    }
    return sum_lanes(sum);
}

void run_causal_attention(const void *operands, const struct step *step, int64_t thread, int64_t num_threads) {
    const struct causal_attention *op = operands;
    (void)step;
    const int64_t size = op->size, e = padded(size), t = key_row_size(op->length), num_queries = op->length - op->start;
    const int64_t out_stride = op->heads * size;
    float *keys_t = op->scratch + thread * op->scratch_size, *values = keys_t + e * t;
    float *scores = values + e * t, *attended = scores + BLOCK * t;
    FOR_THREAD_ROWS(i, op->batch * op->kv_heads) {
        const struct group group = group_of(op, i);
        pack_transposed(keys_t, group.keys, op->length, op->stride, size, t);
        pack(values, group.values, op->length, op->stride, size);
        for (int64_t h = 0; h < group.num_heads; h++) {
            const int64_t head = group.first_head + h;
            float *out = op->out + group.sequence * num_queries * out_stride + head * size;
            for (int64_t q = op->start; q < op->length; q += BLOCK) {
                const int64_t rows = op->length - q < BLOCK ? op->length - q : BLOCK;
                const struct span span = span_of(op, q, rows);
                const float *head_queries = group.queries + h * op->head_stride + q * op->stride;
                const struct left queries = {{head_queries, op->stride, 1}, size};
                matmul_block(rows, padded(span.count), queries, 0, keys_t + span.first, t, scores, t, 1.0f, 0);
                float factors[BLOCK];
                for (int64_t r = 0; r < rows; r++) {
                    float shift;
                    const float sum = exp_scores(op, &group, span, q + r, scores + r * t, &shift, 0);
                    factors[r] = 1.0f / sum;
                    if (op->logsumexp)
                        op->logsumexp[(group.sequence * op->heads + head) * op->length + q + r] = shift + logf(sum);
                }
                const struct left weights = {{scores, t, 1}, span.count};
                matmul_block(rows, e, weights, 0, values + span.first * e, e, attended, e, 1.0f, 0);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t k = 0; k < e; k++) attended[r * e + k] *= factors[r];
                unpack(out + (q - op->start) * out_stride, attended, rows, out_stride, size);
            }
        }
    }
}

/* Scratch memory of one thread's backward. */
struct backward {
    float *keys_t, *values_t, *keys, *grad_keys, *grad_values;       /* of a group */
    float *queries, *grad_out, *grad_queries, *weights, *grad_scores; /* of a block */
};

static struct backward backward_of(const struct causal_attention *op, int64_t thread) {
    const int64_t e = padded(op->size), t = key_row_size(op->length);
    float *p = op->scratch + thread * op->scratch_size;
    return (struct backward){p,
                             p + e * t,
                             p + 2 * e * t,
                             p + 3 * e * t,
                             p + 4 * e * t,
                             p + 5 * e * t,
                             p + 5 * e * t + BLOCK * e,
                             p + 5 * e * t + 2 * BLOCK * e,
                             p + 5 * e * t + 3 * BLOCK * e,
                             p + 5 * e * t + 3 * BLOCK * e + BLOCK * t};
}

/* grad_scores = weights (grad_weights - sum(weights grad_weights)) scale, in place of grad_weights. */
static void softmax_backward(const float *weights, float *grads, int64_t count, float scale) {
    vec sum = {0};
    for (int64_t p = 0; p < count; p += LANES) sum += load(weights + p) * load(grads + p);
    const float mean = sum_lanes(sum);
    for (int64_t p = 0; p < count; p += LANES) store(grads + p, load(weights + p) * (load(grads + p) - mean) * scale);
}

/* Gradient of a block of queries of one head, and its contribution to that of the keys and values. */
static void backward_block(const struct causal_attention *op, const struct group *group, const struct backward *at,
                           int64_t h, int64_t q) {
    const int64_t size = op->size, e = padded(size), t = key_row_size(op->length), num_queries = op->length - op->start;
    const int64_t head = group->first_head + h, out_stride = op->heads * size;
    const int64_t rows = op->length - q < BLOCK ? op->length - q : BLOCK;
    const struct span span = span_of(op, q, rows);
    const int64_t columns = padded(span.count);
    const float *grads = op->grad_out + (group->sequence * num_queries + q - op->start) * out_stride + head * size;
    pack(at->queries, group->queries + h * op->head_stride + q * op->stride, rows, op->stride, size);
    pack(at->grad_out, grads, rows, out_stride, size);
    const struct left queries = {{at->queries, e, 1}, size}, grad_out = {{at->grad_out, e, 1}, size};
    matmul_block(rows, columns, queries, 0, at->keys_t + span.first, t, at->weights, t, 1.0f, 0);
    matmul_block(rows, columns, grad_out, 0, at->values_t + span.first, t, at->grad_scores, t, 1.0f, 0);
    for (int64_t r = 0; r < rows; r++) {
        float shift = op->logsumexp[(group->sequence * op->heads + head) * op->length + q + r];
        exp_scores(op, group, span, q + r, at->weights + r * t, &shift, 1);
        softmax_backward(at->weights + r * t, at->grad_scores + r * t, span.count, op->scale);
    }
    const struct left grad_scores = {{at->grad_scores, t, 1}, span.count};
    const struct left grad_scores_t = {{at->grad_scores, 1, t}, rows}, weights_t = {{at->weights, 1, t}, rows};
    matmul_block(rows, e, grad_scores, 0, at->keys + span.first * e, e, at->grad_queries, e, 1.0f, 0);
    matmul_block(span.count, e, grad_scores_t, 0, at->queries, e, at->grad_keys + span.first * e, e, 1.0f, 1);
    matmul_block(span.count, e, weights_t, 0, at->grad_out, e, at->grad_values + span.first * e, e, 1.0f, 1);
    float *to = op->grad_qkv + (group->queries - op->qkv) + h * op->head_stride + q * op->stride;
    unpack(to, at->grad_queries, rows, op->stride, size);
}

void run_causal_attention_backward(const void *operands, const struct step *step, int64_t thread,
                                   int64_t num_threads) {
    const struct causal_attention *op = operands;
    (void)step;
    const int64_t size = op->size, e = padded(size), t = key_row_size(op->length);
    const struct backward at = backward_of(op, thread);
    FOR_THREAD_ROWS(i, op->batch * op->kv_heads) {
        const struct group group = group_of(op, i);
        pack_transposed(at.keys_t, group.keys, op->length, op->stride, size, t);
        pack_transposed(at.values_t, group.values, op->length, op->stride, size, t);
        pack(at.keys, group.keys, op->length, op->stride, size);
        memset(at.grad_keys, 0, (size_t)(2 * e * t) * sizeof *at.grad_keys);
        for (int64_t h = 0; h < group.num_heads; h++) {
            float *to = op->grad_qkv + (group.queries - op->qkv) + h * op->head_stride;
            for (int64_t q = 0; q < op->start; q++) memset(to + q * op->stride, 0, (size_t)size * sizeof *to);
            for (int64_t q = op->start; q < op->length; q += BLOCK) backward_block(op, &group, &at, h, q);
        }
        unpack(op->grad_qkv + (group.keys - op->qkv), at.grad_keys, op->length, op->stride, size);
        unpack(op->grad_qkv + (group.values - op->qkv), at.grad_values, op->length, op->stride, size);
    }
}

EXPORT_SIZE(causal_attention)
