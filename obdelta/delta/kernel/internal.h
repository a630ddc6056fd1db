/* Helpers and types that the kernel's own files share, besides its contract. */
#ifndef OBDELTA_INTERNAL_H
#define OBDELTA_INTERNAL_H

#include "kernel.h"

#include <string.h>

/* Returns eight bytes as a number; the first byte is the lowest. */
static inline uint64_t od_load64(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

/* Returns the layer that holds a base position below base->size. */
const od_layer *od_layer_of(const od_base *base, uint64_t position);

/* Return how many bytes are equal, at most `limit`, from the two positions on, or before them. */
uint64_t od_equal_after(const uint8_t *a, const uint8_t *b, uint64_t limit);
uint64_t od_equal_before(const uint8_t *a, const uint8_t *b, uint64_t limit);

/* Bytes per window of every rolling "gear" hash: h = (h << 2) + gear[byte]. */
#define OD_WINDOW 32
void od_gear(uint64_t gear[256]);

/* Looks up a window's hash: calls `found` for each candidate's last position until it returns
 * nonzero. */
typedef int (*od_found)(void *with, uint64_t position);
void od_sampled_find(const od_sampled *sampled, uint64_t hash, od_found found, void *with);

struct od_sampled {
    uint64_t *entries; /* buckets of eight: tag << 40 | position + 1; 0 is an empty one */
    uint64_t buckets;
    uint32_t bits, thin;
};

static inline uint32_t od_fold(uint64_t hash) {
    return (uint32_t)((hash * 0x9e3779b97f4a7c15ULL) >> 32);
}

/* Returns whether windows with this hash are in the index. */
static inline int od_is_sample(const od_sampled *sampled, uint64_t hash) {
    return (hash >> (64 - sampled->bits)) == 0 &&
           (od_fold(hash) & ((1u << sampled->thin) - 1)) == 0;
}

struct od_blocks {
    od_sampled *index;  /* positions of blocks' first bytes */
    uint64_t *bits;    /* one for each block's hash, or shared */
    uint64_t mask;     /* of the bits' numbers */
    uint64_t leaving;  /* factor of a byte's value as it leaves the window */
};

static inline uint64_t od_block_bit(const od_blocks *blocks, uint32_t folded) {
    return (folded * 0x9e3779b97f4a7c15ULL) >> 20 & blocks->mask;
}

/* Returns a window's hash, and that of the window one byte on. */
uint64_t od_block_hash(const uint8_t *at);
static inline uint64_t od_block_roll(const od_blocks *blocks, uint64_t hash, const uint8_t *at) {
    return hash * 0x9e3779b97f4a7c15ULL + at[OD_BLOCK] - at[0] * blocks->leaving;
}

static inline int od_is_block(const od_blocks *blocks, uint64_t hash) {
    uint64_t bit = od_block_bit(blocks, od_fold(hash));
    return blocks->bits[bit / 64] >> (bit % 64) & 1;
}

/* A growing list of spans. */
typedef struct {
    od_span *spans;
    uint64_t count, room;
} od_span_list;
int od_span_push(od_span_list *list, uint64_t at, uint64_t size, uint64_t source);
void od_sort_spans(od_span *spans, uint64_t count); /* by at, then longest first, then source */

#endif
