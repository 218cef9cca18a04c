/* Interleaved range coding (rANS) of symbols under context tables; the twin of pennyweight/weights/rans.py.
 *
 * State x in [2^16, 2^32), 16-bit words, probabilities in 1/2^14. Lane l holds the symbols l, l + lanes, l + 2 lanes, ...
 * of the scan, and its own words, so that lanes are independent of each other.
 */
#include <stdint.h>

#define PROBABILITY_BITS 14
#define LOW (1u << 16)

/* Returns the words written to `words` (lane after lane, in the order in which the decoder reads them), or -1 when
 * `capacity` does not suffice. Symbols are encoded from last to first. */
int64_t pw_encode(const uint8_t *symbols, const uint8_t *contexts, int64_t count, int64_t lanes, int64_t alphabet,
                  const uint32_t *frequency, const uint32_t *start, uint32_t *states, uint32_t *lengths,
                  uint16_t *words, int64_t capacity) {
    int64_t written = 0;
    for (int64_t lane = 0; lane < lanes; lane++) {
        int64_t steps = (count - lane + lanes - 1) / lanes;
        int64_t first = written;
        uint32_t x = LOW;
        for (int64_t step = steps - 1; step >= 0; step--) {
            int64_t at = step * lanes + lane;
            int64_t entry = (int64_t)contexts[at] * alphabet + symbols[at];
            uint32_t f = frequency[entry];
            if (((uint64_t)f << (32 - PROBABILITY_BITS)) <= x) {
                if (written >= capacity) return -1;
                words[written++] = (uint16_t)(x & 0xFFFF);
                x >>= 16;
            }
            x = ((x / f) << PROBABILITY_BITS) + (x % f) + start[entry];
        }
        states[lane] = x;
        lengths[lane] = (uint32_t)(written - first);
        for (int64_t a = first, b = written - 1; a < b; a++, b--) {
            uint16_t swap = words[a];
            words[a] = words[b];
            words[b] = swap;
        }
    }
    return written;
}

enum { ABREAST = 16 }; /* lanes decoded in one loop */

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

/* Up to 16 neighboring lanes at once: one step of all of them is one symbol each, side by side in the scan. */
static int decode_lanes(int width, const uint8_t *contexts, int64_t count, int64_t lanes, int64_t first,
                        int64_t alphabet, const uint32_t *frequency_start, const uint8_t *symbol_of,
                        const uint32_t *states, const uint32_t *ends, const uint16_t *words, uint8_t *symbols) {
    const __mmask16 all = (__mmask16)((1u << width) - 1);
    __m512i x = _mm512_maskz_loadu_epi32(all, states + first);
    const __m512i end = _mm512_maskz_loadu_epi32(all, ends + first);
    __m512i next = _mm512_setzero_si512();
    next = _mm512_mask_loadu_epi32(next, first ? all : all & ~1, ends + first - 1); /* where the lane before ends */
    const __m512i slots = _mm512_set1_epi32((1 << PROBABILITY_BITS) - 1), low = _mm512_set1_epi32(LOW);
    const __m512i letters = _mm512_set1_epi32((int)alphabet), half = _mm512_set1_epi32(0xFFFF);
    for (int64_t at = first; at < count; at += lanes) {
        const __mmask16 live = count - at < width ? (__mmask16)((1u << (count - at)) - 1) : all;
        const __m512i context = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(live, contexts + at));
        const __m512i slot = _mm512_and_si512(x, slots);
        const __m512i place = _mm512_add_epi32(_mm512_slli_epi32(context, PROBABILITY_BITS), slot);
        const __m512i byte = _mm512_set1_epi32(0xFF), zero = _mm512_setzero_si512();
        const __m512i symbol = _mm512_and_si512(_mm512_mask_i32gather_epi32(zero, live, place, symbol_of, 1), byte);
        _mm_mask_storeu_epi8(symbols + at, live, _mm512_cvtepi32_epi8(symbol));
        const __m512i entry = _mm512_add_epi32(_mm512_mullo_epi32(context, letters), symbol);
        const __m512i both = _mm512_mask_i32gather_epi32(zero, live, entry, frequency_start, 4);
        const __m512i wide = _mm512_mullo_epi32(_mm512_srli_epi32(both, 16), _mm512_srli_epi32(x, PROBABILITY_BITS));
        x = _mm512_mask_sub_epi32(x, live, _mm512_add_epi32(wide, slot), _mm512_and_si512(both, half));
        const __mmask16 empty = _mm512_mask_cmplt_epu32_mask(live, x, low);
        if (_mm512_mask_cmpge_epu32_mask(empty, next, end)) return -1; /* no word left: a damaged stream */
        const __m512i word = _mm512_and_si512(_mm512_mask_i32gather_epi32(zero, empty, next, words, 2), half);
        x = _mm512_mask_or_epi32(x, empty, _mm512_slli_epi32(x, 16), word);
        next = _mm512_mask_add_epi32(next, empty, next, _mm512_set1_epi32(1));
    }
    return _mm512_mask_cmpneq_epi32_mask(all, next, end) || _mm512_mask_cmpneq_epi32_mask(all, x, low) ? -1 : 0;
}
#else
/* The same, lane by lane in an inner loop: each waits for its own last symbol, so together they fill the time. */
static int decode_lanes(int width, const uint8_t *contexts, int64_t count, int64_t lanes, int64_t first,
                        int64_t alphabet, const uint32_t *frequency_start, const uint8_t *symbol_of,
                        const uint32_t *states, const uint32_t *ends, const uint16_t *words, uint8_t *symbols) {
    uint32_t x[ABREAST], next[ABREAST];
    for (int j = 0; j < width; j++) {
        x[j] = states[first + j];
        next[j] = first + j ? ends[first + j - 1] : 0;
    }
    for (int64_t at = first; at < count; at += lanes) {
        int live = count - at < width ? (int)(count - at) : width; /* only the last step can be short */
        for (int j = 0; j < live; j++) {
            uint32_t slot = x[j] & ((1u << PROBABILITY_BITS) - 1);
            int64_t context = contexts[at + j];
            uint8_t symbol = symbol_of[(context << PROBABILITY_BITS) + slot];
            uint32_t both = frequency_start[context * alphabet + symbol];
            symbols[at + j] = symbol;
            x[j] = (both >> 16) * (x[j] >> PROBABILITY_BITS) + slot - (both & 0xFFFF);
            if (x[j] < LOW) {
                if (next[j] >= ends[first + j]) return -1;
                x[j] = (x[j] << 16) | words[next[j]++];
            }
        }
    }
    for (int j = 0; j < width; j++)
        if (next[j] != ends[first + j] || x[j] != LOW) return -1;
    return 0;
}
#endif

/* Returns 0, or -1 when the words do not fit the lanes (a corrupt stream). `frequency_start` holds both in one number,
 * the start in the lower half; `symbol_of` is (contexts, 2^14) and four bytes more, `words` has one more than the last
 * of `ends`, the sums of the lanes' lengths. */
int pw_decode(const uint8_t *contexts, int64_t count, int64_t lanes, int64_t alphabet,
              const uint32_t *frequency_start, const uint8_t *symbol_of, const uint32_t *states, const uint32_t *ends,
              const uint16_t *words, uint8_t *symbols) {
    for (int64_t first = 0; first < lanes; first += ABREAST) {
        int width = lanes - first < ABREAST ? (int)(lanes - first) : ABREAST;
        if (decode_lanes(width, contexts, count, lanes, first, alphabet, frequency_start, symbol_of, states, ends,
                         words, symbols))
            return -1;
    }
    return 0;
}

/* The context of every position, row after row: `of_sum` (256) of its row's and its column's byte (each below 128). */
void pw_contexts(const uint8_t *row, const uint8_t *column, int64_t rows, int64_t columns, const uint8_t *of_sum,
                 uint8_t *contexts) {
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *mine = of_sum + (row[r] & 127);
        for (int64_t c = 0; c < columns; c++) contexts[r * columns + c] = mine[column[c] & 127];
    }
}
