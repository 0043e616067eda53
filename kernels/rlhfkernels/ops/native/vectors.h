/* SIMD vectors of the widest kind that this CPU has, by the vector extension of GCC and Clang. */
#ifndef VECTORS_H
#define VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

INLINE vec load(const float *p) { return *(const vec *)p; }

INLINE void store(float *p, vec v) { *(vec *)p = v; }

INLINE vec broadcast(float x) { return (vec){0} + x; }

/* Loads `count` lanes and fills the others. */
INLINE vec load_partial(const float *p, int64_t count, float fill) {
    if (count == LANES) return load(p);
    vec v = broadcast(fill);
    memcpy(&v, p, (size_t)count * sizeof *p);
    return v;
}

INLINE void store_partial(float *p, vec v, int64_t count) {
    if (count == LANES) store(p, v);
    else memcpy(p, &v, (size_t)count * sizeof *p);
}

/* Loops over `size` elements, vector by vector: i is the first element of a vector, `count` its number of elements. */
#define FOR_VECTORS(i, size, count)                                                                                    \
    for (int64_t i = 0, count; i < (size) && (count = (size)-i < LANES ? (size)-i : LANES); i += LANES)

/* Lanes of `a` where all bits of the mask are set, of `b` where none is. */
INLINE vec select(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

/* Sum of all lanes, by halves. */
INLINE float sum_lanes(vec v) {
    vec4 sum, other;
#if LANES == 16
    vec8 low, high;
    memcpy(&low, &v, 32);
    memcpy(&high, (char *)&v + 32, 32);
    low += high;
    memcpy(&sum, &low, 16);
    memcpy(&other, (char *)&low + 16, 16);
    sum += other;
#elif LANES == 8
    memcpy(&sum, &v, 16);
    memcpy(&other, (char *)&v + 16, 16);
    sum += other;
#else
    (void)other;
    memcpy(&sum, &v, 16);
#endif
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

INLINE float max_lanes(vec v) {
    float max = v[0];
    for (int i = 1; i < LANES; i++) max = v[i] > max ? v[i] : max;
    return max;
}

/* e^x to about two units in the last place: e^(n ln 2 + r) = 2^n e^r, |r| <= ln 2 / 2. 0 where the result would be
   subnormal, infinite above 88. */
INLINE vec vec_exp(vec x) {
    const vec max = broadcast(88.0f), min = broadcast(-87.0f), rounder = broadcast(12582912.0f); /* 1.5 * 2^23 */
    const ivec underflows = x < min, overflows = x > max;
    x = select(overflows, max, x);
    x = select(underflows, min, x);
    const vec n = (x * 1.44269504f + rounder) - rounder;
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = broadcast(1.98756915e-4f);
    p = p * r + 1.39819995e-3f;
    p = p * r + 8.33345191e-3f;
    p = p * r + 4.16657960e-2f;
    p = p * r + 1.66666655e-1f;
    p = p * r + 5.00000012e-1f;
    p = p * r * r + r + 1.0f;
    const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return select(overflows, broadcast(INFINITY), (vec)((ivec)(p * (vec)power) & ~underflows));
}

/* Largest element of a row. */
INLINE float max_of_row(const float *x, int64_t size) {
    vec max = broadcast(-INFINITY);
    FOR_VECTORS(i, size, count) {
        const vec y = load_partial(x + i, count, -INFINITY);
        max = select(y > max, y, max);
    }
    return max_lanes(max);
}

/* Sum of e^((x - shift) factor) over a row, which the exponentials replace where `replace` is set. */
INLINE float exp_row(float *x, int64_t size, float shift, float factor, int replace) {
    vec sum = {0};
    FOR_VECTORS(i, size, count) {
        const vec y = vec_exp((load_partial(x + i, count, -INFINITY) - shift) * factor);
        sum += y;
        if (replace) store_partial(x + i, y, count);
    }
    return sum_lanes(sum);
}

/* Rotates pairs (x[i], x[half + i]): x cos + (x with its halves swapped) signed_sin. `direction` is 1, or -1 for the
   inverse. cos and signed_sin are of 2 half elements; signed_sin is negative in its first half. */
INLINE void rotate_pairs(float *x, const float *cos, const float *signed_sin, int64_t half, float direction) {
    FOR_VECTORS(i, half, count) {
        const vec first = load_partial(x + i, count, 0), second = load_partial(x + half + i, count, 0);
        const vec y =
            first * load_partial(cos + i, count, 0) + second * load_partial(signed_sin + i, count, 0) * direction;
        const vec z = second * load_partial(cos + half + i, count, 0) +
                      first * load_partial(signed_sin + half + i, count, 0) * direction;
        store_partial(x + i, y, count);
        store_partial(x + half + i, z, count);
    }
}

#endif
