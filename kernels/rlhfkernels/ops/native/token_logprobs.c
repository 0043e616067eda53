/* Log-probabilities of given tokens from the raw outputs of the head, and their gradient. A thread takes whole rows. */
#include "program.h"
#include "vectors.h"

struct token_logprobs {
    float *raw;             /* [rows, size]: outputs of the head; replaced by their gradient if `with_gradient` */
    const int64_t *targets; /* [rows] */
    float *out;             /* [rows] */
    const float *weights;   /* [rows]: gradient of out; null is 1 */
    int64_t rows, size, with_gradient;
    float factor; /* logits = factor raw, factor > 0 */
};

void run_token_logprobs(const void *operands, const struct step *step, int64_t thread, int64_t num_threads) {
    const struct token_logprobs *op = operands;
    (void)step;
    FOR_THREAD_ROWS(r, op->rows) {
        float *raw = op->raw + r * op->size;
        const int64_t target = op->targets[r];
        const int is_token = target >= 0 && target < op->size; /* else NaN, and no access outside the row */
        const float max = max_of_row(raw, op->size), chosen = is_token ? raw[target] : NAN;
        const float sum = op->with_gradient ? exp_row(raw, op->size, max, op->factor, 1)
                                            : exp_row(raw, op->size, max, op->factor, 0);
        op->out[r] = (chosen - max) * op->factor - logf(sum);
        if (!op->with_gradient) continue;
        /* d logprob / d raw = factor (onehot - softmax) */
        const float weight = (op->weights ? op->weights[r] : 1.0f) * op->factor, scale = -weight / sum;
        FOR_VECTORS(i, op->size, count) store_partial(raw + i, load_partial(raw + i, count, 0) * scale, count);
        if (is_token) raw[target] += weight;
    }
}

EXPORT_SIZE(token_logprobs)
