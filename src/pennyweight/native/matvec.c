/* One row times a compact matrix, y = x W^T, read straight from the codes; and the matrix itself in bfloat16, for many.
 *
 * Rows are shared among the threads.
 */
#include "products.h"

/* y (M) = x (N) W^T. Returns 0, or 1 when memory ran out. */
int matvec(const Matrix *a, const float *x, float *y, int threads)
{
    float *held = malloc(sizeof(float) * room(a->n));
    int failed = !held;
    if (held)
        prepare(a, x, held);
    const int strips = (a->m + 31) / 32;
#pragma omp parallel num_threads(threads) if (!failed && (int64_t)a->m * a->n > 32768)
    {
        uint8_t *codes = malloc((size_t)a->n + 8);
        if (failed || !codes) {
#pragma omp atomic write
            failed = 1;
        } else {
#pragma omp for schedule(static)
            for (int strip = 0; strip < strips; strip++)
                rows(a, x, held, codes, strip * 32, strip * 32 + 32 < a->m ? strip * 32 + 32 : a->m, y);
        }
        free(codes);
    }
    free(held);
    return failed;
}

/* Row i of W into x, with `codes` to unpack into. */
static void expanded_row(const Matrix *a, int i, uint8_t *codes, float *x)
{
    const int n = a->n;
    if (a->kind == WHOLE) {
        const int8_t *w = (const int8_t *)a->codes + i * a->stride;
        for (int j = 0; j < n; j++)
            x[j] = a->row[i] * (a->column[j] * w[j]);
        return;
    }
    const uint8_t *w = (const uint8_t *)a->codes + i * a->stride;
    if (a->bits != 8) {
        unpack(w, a->stride, a->bits, n, codes);
        w = codes;
    }
    for (int g = 0; g < a->groups; g++) {
        const int end = (g + 1) * a->group < n ? (g + 1) * a->group : n;
        const float scale = a->scale[(int64_t)i * a->groups + g], offset = a->offset[(int64_t)i * a->groups + g];
        for (int j = g * a->group; j < end; j++)
            x[j] = scale * w[j] + offset;
    }
}

/* y (all rows, N) = the matrices of forms with codes, one below the other, in bfloat16. Returns 0, or 1 when memory ran
 * out. */
int expand(const Matrix *const *all, int count, uint16_t *y, int threads)
{
    const int n = all[0]->n;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *x = malloc((size_t)n * (sizeof *x + 1) + 8);
        if (!x) {
#pragma omp atomic write
            failed = 1;
        } else {
            uint16_t *into = y;
            for (int k = 0; k < count; into += (int64_t)all[k++]->m * n) {
#pragma omp for schedule(static) nowait
                for (int i = 0; i < all[k]->m; i++) {
                    expanded_row(all[k], i, (uint8_t *)(x + n), x);
                    to_brains(x, n, into + (int64_t)i * n);
                }
            }
        }
        free(x);
    }
    for (int k = 0; k < count; y += (int64_t)all[k++]->m * n) {
        const Matrix *a = all[k];
        if (a->kind != WHOLE)
            continue;
        for (int64_t f = 0; f < a->count; f++) {
            const int64_t i = a->far[2 * f], j = a->far[2 * f + 1];
            const int code = ((const int8_t *)a->codes)[i * a->stride + j] + a->beyond[f];
            y[i * n + j] = to_brain(a->row[i] * (a->column[j] * code));
        }
    }
    return failed;
}
