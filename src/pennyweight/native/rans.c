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

/* Returns 0, or -1 when the words do not fit the lanes (a corrupt stream). `symbol_of` is (contexts, 2^14). */
int pw_decode(const uint8_t *contexts, int64_t count, int64_t lanes, int64_t alphabet, const uint32_t *frequency,
              const uint32_t *start, const uint8_t *symbol_of, const uint32_t *states, const uint32_t *lengths,
              const uint16_t *words, int64_t total_words, uint8_t *symbols) {
    const uint32_t mask = (1u << PROBABILITY_BITS) - 1;
    int64_t offset = 0;
    for (int64_t lane = 0; lane < lanes; lane++) {
        int64_t next = offset, end = offset + lengths[lane];
        if (end > total_words) return -1;
        uint32_t x = states[lane];
        for (int64_t at = lane; at < count; at += lanes) {
            uint32_t slot = x & mask;
            uint8_t symbol = symbol_of[((int64_t)contexts[at] << PROBABILITY_BITS) + slot];
            int64_t entry = (int64_t)contexts[at] * alphabet + symbol;
            symbols[at] = symbol;
            x = frequency[entry] * (x >> PROBABILITY_BITS) + slot - start[entry];
            if (x < LOW) {
                if (next >= end) return -1;
                x = (x << 16) | words[next++];
            }
        }
        if (next != end || x != LOW) return -1;
        offset = end;
    }
    return offset == total_words ? 0 : -1;
}
