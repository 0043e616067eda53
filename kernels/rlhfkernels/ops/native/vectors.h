/* Vectors of the widest kind that this processor has, by the compilers' own extension (GCC, Clang). */
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

INLINE vec all(float x) { return (vec){0} + x; }

/* The first `count` lanes from memory, the others `rest`. */
INLINE vec load_some(const float *p, int64_t count, float rest) {
    if (count == LANES) return load(p);
    vec v = all(rest);
    memcpy(&v, p, (size_t)count * sizeof *p);
    return v;
}

INLINE void store_some(float *p, vec v, int64_t count) {
    if (count == LANES) store(p, v);
    else memcpy(p, &v, (size_t)count * sizeof *p);
}

/* Over `size` numbers, vector by vector: i is where one begins, `some` how many numbers it has. */
#define EACH(i, size, some)                                                                                            \
    for (int64_t i = 0, some; i < (size) && (some = (size)-i < LANES ? (size)-i : LANES); i += LANES)

/* The lanes of `a` where the mask's bits are set, of `b` where they are not. */
INLINE vec pick(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

/* The sum of all lanes, by halves. */
INLINE float total(vec v) {
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

/* The largest of all lanes. */
INLINE float largest(vec v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}

/* e^x to about two units in the last place: e^(n ln 2 + r) = 2^n e^r, |r| <= ln 2 / 2. 0 below the normal numbers,
   infinite above 88. */
INLINE vec exponential(vec x) {
    const vec most = all(88.0f), least = all(-87.0f), rounder = all(12582912.0f); /* 1.5 * 2^23 */
    const ivec vanishes = x < least, overflows = x > most;
    x = pick(overflows, most, x);
    x = pick(vanishes, least, x);
    const vec n = (x * 1.44269504f + rounder) - rounder;
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = all(1.98756915e-4f);
    p = p * r + 1.39819995e-3f;
    p = p * r + 8.33345191e-3f;
    p = p * r + 4.16657960e-2f;
    p = p * r + 1.66666655e-1f;
    p = p * r + 5.00000012e-1f;
    p = p * r * r + r + 1.0f;
    const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return pick(overflows, all(INFINITY), (vec)((ivec)(p * (vec)power) & ~vanishes));
}

#endif
