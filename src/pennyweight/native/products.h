/* Products of rows of codes with one row of numbers, for the routines of this folder.
 *
 * Products and sums are in float32; a sum's order differs from a matrix product's, so results differ by rounding.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__) || defined(__BMI2__)
#include <immintrin.h>
#endif

enum { WHOLE = 0, PACKED = 1, BRAIN = 2, SINGLE = 3 };

typedef struct {
    int32_t kind;    /* WHOLE: int8 codes under row and column scales; PACKED: a grid; BRAIN: bfloat16; SINGLE: float32 */
    int32_t m, n;
    int32_t bits;    /* PACKED */
    int32_t group;   /* PACKED: columns that share a scale */
    int32_t groups;  /* PACKED */
    const void *codes;
    int64_t stride;  /* bytes of a row of codes */
    const float *row, *column;   /* WHOLE: (M), (N) */
    const float *scale, *offset; /* PACKED: (M, G); W = scale * code + offset */
    const int64_t *far;          /* WHOLE: (F, 2) row and column of codes beyond a byte, by rising row */
    const int32_t *beyond;       /* WHOLE: (F) what the byte lacks there */
    int64_t count;               /* WHOLE: F */
} Matrix;

static float dot_i8(const int8_t *w, const float *x, int n)
{
    float a = 0, b = 0, c = 0, d = 0;
    int j = 0;
    for (; j + 256 <= n; j += 256) { /* four chains, so that additions do not wait for each other */
        float p = 0, q = 0, r = 0, s = 0;
        for (int k = 0; k < 64; k++) {
            p += w[j + k] * x[j + k];
            q += w[j + 64 + k] * x[j + 64 + k];
            r += w[j + 128 + k] * x[j + 128 + k];
            s += w[j + 192 + k] * x[j + 192 + k];
        }
        a += p, b += q, c += r, d += s;
    }
    for (; j < n; j++)
        a += w[j] * x[j];
    return (a + b) + (c + d);
}

static void dots_i8(const int8_t *w, int64_t stride, const float *x, int n, float *y)
{
    const int8_t *w1 = w + stride, *w2 = w1 + stride, *w3 = w2 + stride;
    float a = 0, b = 0, c = 0, d = 0;
    for (int j = 0; j < n; j++) {
        a += w[j] * x[j];
        b += w1[j] * x[j];
        c += w2[j] * x[j];
        d += w3[j] * x[j];
    }
    y[0] = a, y[1] = b, y[2] = c, y[3] = d;
}

/* Sixteen floats, and the few things done to them: in one register, in two, or in plain loops. */
#if defined(__AVX512F__)
typedef __m512 Floats;
static inline Floats none(void) { return _mm512_setzero_ps(); }
static inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
static inline Floats scaled(Floats sum, Floats a, float by) { return _mm512_fmadd_ps(a, _mm512_set1_ps(by), sum); }
static inline float total(Floats a) { return _mm512_reduce_add_ps(a); }
/* sum + x * (16 codes, each shifted down and masked) */
static inline Floats taken(Floats sum, const uint8_t *w, int shift, int mask, const float *x)
{
    const __m128i codes = _mm_and_si128(_mm_srli_epi16(_mm_loadu_si128((const __m128i *)w), shift), _mm_set1_epi8(mask));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)), _mm512_loadu_ps(x), sum);
}
#elif defined(__AVX2__) && defined(__FMA__)
typedef struct { __m256 low, high; } Floats;
static inline Floats none(void) { return (Floats){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline Floats add(Floats a, Floats b)
{
    return (Floats){_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
static inline Floats scaled(Floats sum, Floats a, float by)
{
    const __m256 all = _mm256_set1_ps(by);
    return (Floats){_mm256_fmadd_ps(a.low, all, sum.low), _mm256_fmadd_ps(a.high, all, sum.high)};
}
static inline float total(Floats a)
{
    float parts[8], sum = 0;
    _mm256_storeu_ps(parts, _mm256_add_ps(a.low, a.high));
    for (int j = 0; j < 8; j++)
        sum += parts[j];
    return sum;
}
static inline Floats taken(Floats sum, const uint8_t *w, int shift, int mask, const float *x)
{
    const __m128i codes = _mm_and_si128(_mm_srli_epi16(_mm_loadu_si128((const __m128i *)w), shift), _mm_set1_epi8(mask));
    const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes));
    const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8)));
    return (Floats){_mm256_fmadd_ps(low, _mm256_loadu_ps(x), sum.low),
                    _mm256_fmadd_ps(high, _mm256_loadu_ps(x + 8), sum.high)};
}
#else
typedef struct { float at[16]; } Floats;
static inline Floats none(void) { return (Floats){{0}}; }
static inline Floats add(Floats a, Floats b)
{
    for (int j = 0; j < 16; j++)
        a.at[j] += b.at[j];
    return a;
}
static inline Floats scaled(Floats sum, Floats a, float by)
{
    for (int j = 0; j < 16; j++)
        sum.at[j] += a.at[j] * by;
    return sum;
}
static inline float total(Floats a)
{
    float sum = 0;
    for (int j = 0; j < 16; j++)
        sum += a.at[j];
    return sum;
}
static inline Floats taken(Floats sum, const uint8_t *w, int shift, int mask, const float *x)
{
    for (int j = 0; j < 16; j++)
        sum.at[j] += ((w[j] >> shift) & mask) * x[j];
    return sum;
}
#endif

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
#define SPREADS
/* For each width: which bytes the lanes of eight take, and by how many bits each code of a lane is shifted. */
static uint8_t spreads[8][64], shifts[8][64];
__attribute__((constructor)) static void fill_spreads(void)
{
    for (int bits = 1; bits < 8; bits++)
        for (int k = 0; k < 64; k++) {
            spreads[bits][k] = k / 8 * bits + k % 8;
            shifts[bits][k] = k % 8 * bits;
        }
}

/* 64 codes, a byte each: to each lane of eight the bytes that its codes lie in, from which each takes its bits. */
static inline __m512i spread(const uint8_t *w, int bits)
{
    __builtin_prefetch(w + 1024); /* masked loads are not foreseen: without it memory takes thrice as long */
    const __m512i packed = _mm512_maskz_loadu_epi8(((__mmask64)1 << (8 * bits)) - 1, w);
    const __m512i lanes = _mm512_permutexvar_epi8(_mm512_loadu_si512(spreads[bits]), packed);
    const __m512i found = _mm512_multishift_epi64_epi8(_mm512_loadu_si512(shifts[bits]), lanes);
    return _mm512_and_si512(found, _mm512_set1_epi8((1 << bits) - 1));
}

static inline __m512 sixteen(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)); }

/* Sum over groups of scale * (codes . x), codes of 1 to 7 bits; groups are multiples of 64. */
static float grouped_spread(const uint8_t *w, int bits, const float *x, const float *scale, int groups, int group)
{
    Floats sum = none();
    for (int g = 0; g < groups; g++) {
        Floats a = none(), b = none();
        for (int j = 0; j < group; j += 64, w += 8 * bits, x += 64) {
            const __m512i codes = spread(w, bits);
            a = _mm512_fmadd_ps(sixteen(_mm512_castsi512_si128(codes)), _mm512_loadu_ps(x), a);
            b = _mm512_fmadd_ps(sixteen(_mm512_extracti32x4_epi32(codes, 1)), _mm512_loadu_ps(x + 16), b);
            a = _mm512_fmadd_ps(sixteen(_mm512_extracti32x4_epi32(codes, 2)), _mm512_loadu_ps(x + 32), a);
            b = _mm512_fmadd_ps(sixteen(_mm512_extracti32x4_epi32(codes, 3)), _mm512_loadu_ps(x + 48), b);
        }
        sum = scaled(sum, add(a, b), scale[g]);
    }
    return total(sum);
}
#endif

/* Sum over groups of scale * (codes . x), codes a byte each; groups are multiples of 16. */
static float grouped_u8(const uint8_t *w, const float *x, const float *scale, int groups, int group)
{
    Floats sum = none();
    for (int g = 0; g < groups; g++, w += group, x += group) {
        Floats a = none(), b = none();
        int j = 0;
        for (; j + 32 <= group; j += 32) {
            a = taken(a, w + j, 0, 255, x + j);
            b = taken(b, w + j + 16, 0, 255, x + j + 16);
        }
        if (j < group)
            a = taken(a, w + j, 0, 255, x + j);
        sum = scaled(sum, add(a, b), scale[g]);
    }
    return total(sum);
}

/* The same of two codes a byte, even columns in the low half; groups are multiples of 32. */
static float grouped_u4(const uint8_t *w, const float *even, const float *odd, const float *scale, int groups, int group)
{
    Floats sum = none();
    const int half = group / 2;
    for (int g = 0; g < groups; g++, w += half, even += half, odd += half) {
        Floats a = none(), b = none();
        for (int j = 0; j < half; j += 16) {
            a = taken(a, w + j, 0, 15, even + j);
            b = taken(b, w + j, 4, 15, odd + j);
        }
        sum = scaled(sum, add(a, b), scale[g]);
    }
    return total(sum);
}

/* The same of four codes a byte; groups are multiples of 64. */
static float grouped_u2(const uint8_t *w, const float *const x[4], const float *scale, int groups, int group)
{
    Floats sum = none();
    const int quarter = group / 4;
    for (int g = 0; g < groups; g++, w += quarter) {
        Floats a = none(), b = none();
        for (int j = 0; j < quarter; j += 16) {
            const int at = g * quarter + j;
            a = taken(a, w + j, 0, 3, x[0] + at);
            b = taken(b, w + j, 2, 3, x[1] + at);
            a = taken(a, w + j, 4, 3, x[2] + at);
            b = taken(b, w + j, 6, 3, x[3] + at);
        }
        sum = scaled(sum, add(a, b), scale[g]);
    }
    return total(sum);
}

/* The same, groups of any length. */
static float any_u8(const uint8_t *w, const float *x, const float *scale, int groups, int group, int n)
{
    float sum = 0;
    for (int g = 0; g < groups; g++) {
        const int end = (g + 1) * group < n ? (g + 1) * group : n;
        float part = 0;
        for (int j = g * group; j < end; j++)
            part += w[j] * x[j];
        sum += scale[g] * part;
    }
    return sum;
}

/* A row of codes of 1 to 7 bits, one byte each; ``codes`` has room for n + 8. */
static void unpack(const uint8_t *w, int64_t bytes, int bits, int n, uint8_t *codes)
{
    const uint64_t mask = (1u << bits) - 1;
    int j = 0;
#ifdef SPREADS
    for (; j + 64 <= n; j += 64)
        _mm512_storeu_si512(codes + j, spread(w + (int64_t)j / 8 * bits, bits));
#endif
    for (; j < n; j += 8) {
        const int64_t at = (int64_t)j / 8 * bits;
        uint64_t word = 0, apart;
        if (at + 8 <= bytes)
            memcpy(&word, w + at, 8);
        else
            memcpy(&word, w + at, bytes - at);
#ifdef __BMI2__
        apart = _pdep_u64(word, mask * 0x0101010101010101u);
#else
        apart = 0;
        for (int k = 0; k < 8; k++)
            apart |= ((word >> (bits * k)) & mask) << (8 * k);
#endif
        memcpy(codes + j, &apart, 8);
    }
}

static float brain(uint16_t half)
{
    union { uint32_t bits; float value; } u = {(uint32_t)half << 16};
    return u.value;
}

static uint16_t to_brain(float value)
{
    union { float value; uint32_t bits; } u = {value};
    return (u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16;
}

/* n numbers, rounded to bfloat16. */
static void to_brains(const float *x, int n, uint16_t *y)
{
    int j = 0;
#ifdef __AVX512BF16__
    for (; j + 32 <= n; j += 32) {
        const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + j + 16), _mm512_loadu_ps(x + j));
        memcpy(y + j, &both, sizeof both);
    }
#endif
    for (; j < n; j++)
        y[j] = to_brain(x[j]);
}

/* Within 2e-7 of exp, and a loop of it fits the vector units. */
static inline float exponential(float x)
{
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    const float whole = rintf(x * 1.44269504f);
    float r = x - whole * 0.693359375f;
    r += whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    union { int32_t bits; float value; } power = {((int32_t)whole + 127) << 23};
    return p * power.value;
}

static float dot_bf16(const uint16_t *w, const float *x, int n)
{
    float a = 0;
    for (int j = 0; j < n; j++)
        a += brain(w[j]) * x[j];
    return a;
}

static float dot_f32(const float *w, const float *x, int n)
{
    float a = 0;
    for (int j = 0; j < n; j++)
        a += w[j] * x[j];
    return a;
}

/* Numbers of room that `prepare` needs for a matrix of n columns; groups are never more than columns. */
static size_t room(int n) { return 2 * (size_t)n + 8; }

/* What rows of a matrix need of x, made once for all of them. */
static void prepare(const Matrix *a, const float *x, float *held)
{
    const int n = a->n;
    float *sums = held + n + 4;
    if (a->kind == WHOLE) {
        for (int j = 0; j < n; j++)
            held[j] = x[j] * a->column[j];
    } else if (a->kind == PACKED) {
        const int planes = a->bits == 4 ? 2 : a->bits == 2 ? 4 : 1, length = (n + planes - 1) / planes;
        if (planes == 1)
            memcpy(held, x, sizeof(float) * n);
        else
            for (int plane = 0; plane < planes; plane++)
                for (int j = plane, at = plane * length; j < n; j += planes, at++)
                    held[at] = x[j];
        for (int g = 0; g < a->groups; g++) {
            const int end = (g + 1) * a->group < n ? (g + 1) * a->group : n;
            float sum = 0;
            for (int j = g * a->group; j < end; j++)
                sum += x[j];
            sums[g] = sum;
        }
    }
}

static float packed_row(const Matrix *a, const float *x, const float *held, int i, uint8_t *codes)
{
    const int n = a->n, group = a->group, whole = n % group == 0;
    const uint8_t *w = (const uint8_t *)a->codes + i * a->stride;
    const float *scale = a->scale + (int64_t)i * a->groups, *offset = a->offset + (int64_t)i * a->groups;
    const float *sums = held + n + 4;
    float sum = 0;
    for (int g = 0; g < a->groups; g++)
        sum += offset[g] * sums[g];
    if (a->bits == 4 && whole && group % 32 == 0) {
        sum += grouped_u4(w, held, held + n / 2, scale, a->groups, group);
    } else if (a->bits == 2 && whole && group % 64 == 0) {
        const float *const planes[4] = {held, held + n / 4, held + n / 2, held + n / 4 * 3};
        sum += grouped_u2(w, planes, scale, a->groups, group);
#ifdef SPREADS
    } else if (a->bits < 8 && whole && group % 64 == 0) {
        sum += grouped_spread(w, a->bits, x, scale, a->groups, group);
#endif
    } else {
        if (a->bits != 8) {
            unpack(w, a->stride, a->bits, n, codes);
            w = codes;
        }
        sum += whole && group % 16 == 0 ? grouped_u8(w, x, scale, a->groups, group)
                                        : any_u8(w, x, scale, a->groups, group, n);
    }
    return sum;
}

/* y[i] = (x W^T)[i] for from <= i < to; ``held`` as `prepare` made it of x, ``codes`` with room for n + 8. */
static void rows(const Matrix *a, const float *x, const float *held, uint8_t *codes, int from, int to, float *y)
{
    int i = from;
    if (a->kind == WHOLE) {
        const int8_t *w = a->codes;
        for (; i + 4 <= to; i += 4)
            dots_i8(w + i * a->stride, a->stride, held, a->n, y + i);
        for (; i < to; i++)
            y[i] = dot_i8(w + i * a->stride, held, a->n);
        int64_t low = 0, high = a->count; /* the first code beyond a byte that lies in these rows */
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (a->far[2 * middle] < from)
                low = middle + 1;
            else
                high = middle;
        }
        for (int64_t f = low; f < a->count && a->far[2 * f] < to; f++)
            y[a->far[2 * f]] += a->beyond[f] * held[a->far[2 * f + 1]];
        for (i = from; i < to; i++)
            y[i] *= a->row[i];
    } else if (a->kind == PACKED) {
        for (; i < to; i++)
            y[i] = packed_row(a, x, held, i, codes);
    } else if (a->kind == BRAIN) {
        for (; i < to; i++)
            y[i] = dot_bf16((const uint16_t *)((const char *)a->codes + i * a->stride), x, a->n);
    } else {
        for (; i < to; i++)
            y[i] = dot_f32((const float *)((const char *)a->codes + i * a->stride), x, a->n);
    }
}
