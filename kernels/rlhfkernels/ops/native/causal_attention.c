/* Causal attention over whole sequences, and its gradient, on rows of queries, keys and values as products leave them.

   A thread takes whole groups, the query heads that read one key-value head of one sequence, and goes over blocks of
   queries; a block's scores against the keys that it sees stay in the cache. The backward makes them again. */
#include "parallel.h"
#include "tiles.h"

#define BLOCK (4 * TILE_ROWS)

struct causal_attention {
    const float *qkv;      /* [batch, length, stride], rotated */
    float *out;            /* [batch, length - start, heads, size] */
    float *sums;           /* [batch, heads, length], log sum exp of the scores; null where no gradient follows */
    const float *grad_out; /* like out */
    float *grad_qkv;       /* like qkv */
    const int64_t *mask;   /* [batch, length], 0 on padding, or null */
    float *scratch;        /* [threads, scratch_size] */
    int64_t batch, length, stride, heads, kv_heads, size;
    int64_t start;                  /* the first position that attends */
    int64_t window;                 /* positions that are seen; 0 is all */
    int64_t head_stride;            /* from head to head */
    int64_t key_start, value_start; /* in a row of qkv */
    int64_t scratch_size;
    float scale;
};

/* Rows of whole vectors: of a head, and of the keys, where a vector may begin anywhere. */
INLINE int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }
INLINE int64_t row_of_keys(int64_t length) { return padded(length) + LANES; }

/* Floats of scratch memory for a thread. */
int64_t causal_attention_scratch(int64_t length, int64_t size, int64_t backward) {
    const int64_t e = padded(size), t = row_of_keys(length);
    return backward ? 5 * e * t + BLOCK * (2 * t + 3 * e) : 2 * e * t + BLOCK * (t + e);
}

/* One sequence and one key-value head. */
struct group {
    int64_t sequence, first_head, num_heads;
    const float *queries, *keys, *values; /* of its first position; `stride` to the next */
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

/* [count, size] of any stride to [count, padded(size)]. */
static void pack(float *to, const float *from, int64_t count, int64_t stride, int64_t size) {
    const int64_t e = padded(size);
    for (int64_t p = 0; p < count; p++) {
        memcpy(to + p * e, from + p * stride, (size_t)size * sizeof *to);
        for (int64_t i = size; i < e; i++) to[p * e + i] = 0;
    }
}

/* [count, padded(size)] to [count, size] of any stride. */
static void unpack(float *to, const float *from, int64_t count, int64_t stride, int64_t size) {
    const int64_t e = padded(size);
    for (int64_t p = 0; p < count; p++) memcpy(to + p * stride, from + p * e, (size_t)size * sizeof *to);
}

/* [count, size] of any stride to [size, t]; what is past `count` is 0. */
static void pack_transposed(float *to, const float *from, int64_t count, int64_t stride, int64_t size, int64_t t) {
    int64_t p = 0;
    for (; p + LANES <= count; p += LANES)
        for (int64_t i = 0; i < size; i++)
            for (int64_t lane = 0; lane < LANES; lane++) to[i * t + p + lane] = from[(p + lane) * stride + i];
    for (int64_t i = 0; i < size; i++)
        for (int64_t q = p; q < t; q++) to[i * t + q] = q < count ? from[q * stride + i] : 0;
}

/* The keys [first, first + count): those that any of a block's queries sees. */
struct sight {
    int64_t first, count;
};

static struct sight sight_of(const struct causal_attention *op, int64_t q, int64_t rows) {
    const int64_t first = op->window && q >= op->window ? q - op->window + 1 : 0;
    return (struct sight){first, q + rows - first};
}

/* All bits of the lanes low <= i < high. */
INLINE ivec lanes_between(int64_t low, int64_t high) {
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    ivec lane;
    memcpy(&lane, numbers, sizeof lane);
    const int32_t from = low < 0 ? 0 : (int32_t)low, to = high > LANES ? LANES : (int32_t)high;
    return (lane >= from) & (lane < to);
}

/* x[p] = e^(scale x[p] - shift) where position q sees p, [low, high) less what is masked, and 0 elsewhere, over whole
   vectors; shift is the largest where it is not given. Returns the sum; `shift` is what was taken. */
static float exponentiate(const struct causal_attention *op, const struct group *group, struct sight sight, int64_t q,
                          float *x, float *shift, int shift_is_given) {
    const int64_t low = op->window && q - op->window + 1 > sight.first ? q - op->window + 1 - sight.first : 0;
    const int64_t high = q + 1 - sight.first;
    if (op->mask) {
        const int64_t *seen = op->mask + group->sequence * op->length + sight.first;
        /* Padding sees itself, so that no row is empty. */
        for (int64_t p = low; p < high - 1; p++)
            if (!seen[p]) x[p] = -INFINITY;
    }
    if (!shift_is_given) {
        vec most = all(-INFINITY);
        for (int64_t p = low / LANES * LANES; p < high; p += LANES) {
            const vec y = pick(lanes_between(low - p, high - p), load(x + p), all(-INFINITY));
            most = pick(y > most, y, most);
        }
        *shift = largest(most) * op->scale;
    }
    vec sum = {0};
    for (int64_t p = 0; p < sight.count; p += LANES) {
        vec y = {0};
        if (p + LANES > low && p < high)
            y = exponential(pick(lanes_between(low - p, high - p), load(x + p) * op->scale - *shift, all(-INFINITY)));
        sum += y;
        store(x + p, y);
    }
    return total(sum);
}

static void attend(const void *data, int64_t thread, int64_t threads) {
    const struct causal_attention *op = data;
    const int64_t size = op->size, e = padded(size), t = row_of_keys(op->length), attending = op->length - op->start;
    const int64_t num_groups = op->batch * op->kv_heads, out_stride = op->heads * size;
    float *keys_t = op->scratch + thread * op->scratch_size, *values = keys_t + e * t;
    float *scores = values + e * t, *attended = scores + BLOCK * t;
    for (int64_t i = num_groups * thread / threads; i < num_groups * (thread + 1) / threads; i++) {
        const struct group group = group_of(op, i);
        pack_transposed(keys_t, group.keys, op->length, op->stride, size, t);
        pack(values, group.values, op->length, op->stride, size);
        for (int64_t h = 0; h < group.num_heads; h++) {
            const int64_t head = group.first_head + h;
            float *out = op->out + group.sequence * attending * out_stride + head * size;
            for (int64_t q = op->start; q < op->length; q += BLOCK) {
                const int64_t rows = op->length - q < BLOCK ? op->length - q : BLOCK;
                const struct sight sight = sight_of(op, q, rows);
                const struct left queries = {group.queries + h * op->head_stride + q * op->stride, op->stride, 1, size};
                product(rows, padded(sight.count), queries, 0, keys_t + sight.first, t, scores, t, 1.0f, 0);
                float factors[BLOCK];
                for (int64_t r = 0; r < rows; r++) {
                    float shift;
                    const float sum = exponentiate(op, &group, sight, q + r, scores + r * t, &shift, 0);
                    factors[r] = 1.0f / sum;
                    if (op->sums)
                        op->sums[(group.sequence * op->heads + head) * op->length + q + r] = shift + logf(sum);
                }
                const struct left weights = {scores, t, 1, sight.count};
                product(rows, e, weights, 0, values + sight.first * e, e, attended, e, 1.0f, 0);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t k = 0; k < e; k++) attended[r * e + k] *= factors[r];
                unpack(out + (q - op->start) * out_stride, attended, rows, out_stride, size);
            }
        }
    }
}

/* Memory of one thread's backward. */
struct backward {
    float *keys_t, *values_t, *keys, *grad_keys, *grad_values;       /* of a group */
    float *queries, *grad_out, *grad_queries, *weights, *grad_scores; /* of a block */
};

static struct backward backward_of(const struct causal_attention *op, int64_t thread) {
    const int64_t e = padded(op->size), t = row_of_keys(op->length);
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

/* grad_scores = weights (grad_weights - sum(weights grad_weights)) scale, in place of grad_weights, over whole
   vectors. */
static void softmax_backward(const float *weights, float *grads, int64_t count, float scale) {
    vec sum = {0};
    for (int64_t p = 0; p < count; p += LANES) sum += load(weights + p) * load(grads + p);
    const float mean = total(sum);
    for (int64_t p = 0; p < count; p += LANES) store(grads + p, load(weights + p) * (load(grads + p) - mean) * scale);
}

/* Of a block of queries of one head: its gradient, and its share of the keys' and values'. */
static void backward_block(const struct causal_attention *op, const struct group *group, const struct backward *at,
                           int64_t h, int64_t q) {
    const int64_t size = op->size, e = padded(size), t = row_of_keys(op->length), attending = op->length - op->start;
    const int64_t head = group->first_head + h, out_stride = op->heads * size;
    const int64_t rows = op->length - q < BLOCK ? op->length - q : BLOCK;
    const struct sight sight = sight_of(op, q, rows);
    const int64_t columns = padded(sight.count);
    const float *grads = op->grad_out + (group->sequence * attending + q - op->start) * out_stride + head * size;
    pack(at->queries, group->queries + h * op->head_stride + q * op->stride, rows, op->stride, size);
    pack(at->grad_out, grads, rows, out_stride, size);
    const struct left queries = {at->queries, e, 1, size}, grad_out = {at->grad_out, e, 1, size};
    product(rows, columns, queries, 0, at->keys_t + sight.first, t, at->weights, t, 1.0f, 0);
    product(rows, columns, grad_out, 0, at->values_t + sight.first, t, at->grad_scores, t, 1.0f, 0);
    for (int64_t r = 0; r < rows; r++) {
        float shift = op->sums[(group->sequence * op->heads + head) * op->length + q + r];
        exponentiate(op, group, sight, q + r, at->weights + r * t, &shift, 1);
        softmax_backward(at->weights + r * t, at->grad_scores + r * t, sight.count, op->scale);
    }
    const struct left grad_scores = {at->grad_scores, t, 1, sight.count};
    const struct left grad_scores_t = {at->grad_scores, 1, t, rows}, weights_t = {at->weights, 1, t, rows};
    product(rows, e, grad_scores, 0, at->keys + sight.first * e, e, at->grad_queries, e, 1.0f, 0);
    product(sight.count, e, grad_scores_t, 0, at->queries, e, at->grad_keys + sight.first * e, e, 1.0f, 1);
    product(sight.count, e, weights_t, 0, at->grad_out, e, at->grad_values + sight.first * e, e, 1.0f, 1);
    float *to = op->grad_qkv + (group->queries - op->qkv) + h * op->head_stride + q * op->stride;
    unpack(to, at->grad_queries, rows, op->stride, size);
}

static void attend_backward(const void *data, int64_t thread, int64_t threads) {
    const struct causal_attention *op = data;
    const int64_t size = op->size, e = padded(size), t = row_of_keys(op->length);
    const int64_t num_groups = op->batch * op->kv_heads;
    const struct backward at = backward_of(op, thread);
    for (int64_t i = num_groups * thread / threads; i < num_groups * (thread + 1) / threads; i++) {
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

void causal_attention(const struct causal_attention *op, int64_t threads) { in_parallel(attend, op, threads); }

void causal_attention_backward(const struct causal_attention *op, int64_t threads) {
    in_parallel(attend_backward, op, threads);
}

int64_t size_of_causal_attention(void) { return sizeof(struct causal_attention); }
