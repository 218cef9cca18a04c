/* How often each range of floats occurs; the twin of `nth_largest` in pennyweight/merge/ties.py.
 *
 * Floats of one sign are ordered as their bits are, so that a range of floats is a range of whole numbers.
 */
#include <stdint.h>

/* Adds to counts[0 .. bins) how many of the `count` numbers lie in each of `bins` ranges of 2^shift, from `begin` on. */
void pw_counts(const uint32_t *numbers, int64_t count, uint32_t begin, int shift, uint32_t bins, int64_t *counts) {
    for (int64_t at = 0; at < count; at++) {
        const uint32_t place = (numbers[at] - begin) >> shift; /* below `begin` it wraps around, beyond all bins */
        if (place < bins) counts[place]++;
    }
}
