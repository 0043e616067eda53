/* Draws a token from softmax(logits) by inverting its cumulative distribution. A thread takes whole rows. */
#include "program.h"
#include "vectors.h"

struct sample {
    float *logits;        /* [rows, size], overwritten */
    const float *uniform; /* [rows], in [0, 1) */
    int64_t *tokens;      /* [rows] */
    float *logprobs;      /* [rows] */
    int64_t rows, size;
};

enum { CHUNK = 16 * LANES };

/* The first token whose cumulative probability exceeds the uniform number, so never one of probability 0. Sums of whole
   chunks come first: most of the row is passed in vectors. */
void run_sample(const void *operands, const struct step *step, int64_t thread, int64_t num_threads) {
    const struct sample *op = operands;
    (void)step;
    FOR_THREAD_ROWS(r, op->rows) {
        float *x = op->logits + r * op->size;
        const float max = max_of_row(x, op->size);
        double sum = 0;
        for (int64_t start = 0; start < op->size; start += CHUNK)
            sum += exp_row(x + start, op->size - start < CHUNK ? op->size - start : CHUNK, max, 1.0f, 1);
        const double threshold = sum * op->uniform[r];
        double passed = 0;
        int64_t start = 0, token = -1;
        for (int64_t next = CHUNK; next < op->size; start = next, next += CHUNK) {
            vec chunk = {0};
            for (int64_t i = 0; i < CHUNK; i += LANES) chunk += load(x + start + i);
            if (passed + sum_lanes(chunk) > threshold) break;
            passed += sum_lanes(chunk);
        }
        for (int64_t i = start; i < op->size && passed <= threshold; i++)
            if (x[i] > 0) {
                passed += x[i];
                token = i;
            }
        /* Rounding can leave the threshold above the sum of the last chunk: take the last token of probability > 0. */
        for (int64_t i = start; token < 0; i--)
            if (i == 0 || x[i - 1] > 0) token = i ? i - 1 : 0;
        op->tokens[r] = token;
        op->logprobs[r] = logf(x[token]) - (float)log(sum);
    }
}

EXPORT_SIZE(sample)
