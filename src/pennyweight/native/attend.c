/* Causal attention of a whole prompt, in float32: six queries at a time against all keys before them.
 *
 * Scores of six queries stay in the cache between the two products, so that no matrix of scores is ever written.
 */
#include "products.h"

enum { QUERIES = 6, KEYS = 64, LANE = 16 };
typedef float Lane __attribute__((vector_size(LANE * sizeof(float)), aligned(4)));

/* y[i, 0 .. 16 c) (+)= sum over t < n of x[i][t] * w[t, 0 .. 16 c), for six rows of x; sums stay in registers. */
static inline __attribute__((always_inline)) void six_rows(const float *const *x, const float *w, int64_t stride, int n,
                                                           int c, float *y, int64_t pitch)
{
    Lane sum[QUERIES][4] = {0};
    for (int t = 0; t < n; t++) {
        const float *row = w + t * stride;
#pragma GCC unroll 6
        for (int i = 0; i < QUERIES; i++) {
            const float by = x[i][t];
#pragma GCC unroll 4
            for (int k = 0; k < c; k++)
                sum[i][k] += by * *(const Lane *)(row + k * LANE);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < QUERIES; i++)
#pragma GCC unroll 4
        for (int k = 0; k < c; k++)
            *(Lane *)(y + i * pitch + k * LANE) = sum[i][k];
}

/* Weights of the keys 0 .. last in place of their scores, and zeros up to `end`. */
static void softened(float *scores, int last, int end, float scaling)
{
    float top = scores[0], sum = 0;
    for (int t = 1; t <= last; t++)
        top = scores[t] > top ? scores[t] : top;
    for (int t = 0; t <= last; t++)
        sum += scores[t] = exponential(scaling * (scores[t] - top));
    const float by = 1 / sum;
    for (int t = 0; t <= last; t++)
        scores[t] *= by;
    for (int t = last + 1; t < end; t++)
        scores[t] = 0;
}

/* y (P, H S) in bfloat16, of queries (H, P, S), turned keys (G, S, R) and values (G, P, S), where R is P rounded up to
 * whole 64 and S is whole 16; `scaling` is positive. Returns 0, or 1 when memory ran out. */
int attend(const float *queries, const float *keys, const float *values, uint16_t *y, int heads, int groups,
           int positions, int room, int size, float scaling, int threads)
{
    const int blocks = (positions + QUERIES - 1) / QUERIES, per = heads / groups;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *scores = malloc(sizeof(float) * QUERIES * ((size_t)room + size));
        if (!scores) {
#pragma omp atomic write
            failed = 1;
        } else {
            float *found = scores + (int64_t)QUERIES * room;
#pragma omp for schedule(dynamic)
            for (int task = blocks * heads - 1; task >= 0; task--) { /* the longest first */
                const int head = task % heads, first = task / heads * QUERIES;
                const int end = first + QUERIES < positions ? first + QUERIES : positions;
                const float *key = keys + (int64_t)(head / per) * size * room;
                const float *value = values + (int64_t)(head / per) * positions * size;
                const float *x[QUERIES], *weights[QUERIES];
                for (int i = 0; i < QUERIES; i++) { /* of the last block, some are the last query again */
                    const int row = first + i < end ? first + i : end - 1;
                    x[i] = queries + ((int64_t)head * positions + row) * size;
                    weights[i] = scores + (int64_t)i * room;
                }
                for (int t = 0; t < end; t += KEYS)
                    six_rows(x, key + t, room, size, 4, scores + t, room);
                for (int i = 0; i < end - first; i++)
                    softened(scores + (int64_t)i * room, first + i, end, scaling);
                int s = 0;
                for (; s + 4 * LANE <= size; s += 4 * LANE)
                    six_rows(weights, value + s, size, end, 4, found + s, size);
                for (; s < size; s += LANE)
                    six_rows(weights, value + s, size, end, 1, found + s, size);
                for (int i = 0; i < end - first; i++)
                    to_brains(found + i * size, size, y + ((int64_t)(first + i) * heads + head) * size);
            }
        }
        free(scores);
    }
    return failed;
}
