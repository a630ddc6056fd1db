/* The block index: finds aligned 512-byte blocks of the base at any target position, as librsync
 * does.
 *
 * Each aligned block of the base has a polynomial hash, h = sum of byte[i] * FACTOR^(OD_BLOCK - 1 -
 * i) modulo 2^64. The target's windows of the same size are hashed by rolling: one multiplication a
 * byte. So every equal range of two blocks' size is found, at any position in base and target. A
 * bit table in front of the index answers most look-ups without a cache miss. */
#include "internal.h"

#include <stdlib.h>

#define FACTOR 0x9e3779b97f4a7c15ULL
#define LANES 4
#define BITS_PER_BLOCK 8 /* least number of bits in the table */

static uint64_t factor_to(unsigned power) {
    uint64_t result = 1;
    while (power-- != 0)
        result *= FACTOR;
    return result;
}

uint64_t od_block_hash(const uint8_t *at) {
    uint64_t hash = 0;
    for (int i = 0; i < OD_BLOCK; i++)
        hash = hash * FACTOR + at[i];
    return hash;
}

void od_block_hashes(const uint8_t *at, uint64_t first, uint64_t count, uint32_t *hashes) {
    const uint64_t by4 = factor_to(4), by3 = factor_to(3), by2 = factor_to(2);
    for (uint64_t block = first; block < first + count;) {
        int lanes = first + count - block < LANES ? (int)(first + count - block) : LANES;
        const uint8_t *begins[LANES];
        uint64_t sums[LANES] = {0};
        for (int n = 0; n < LANES; n++)
            begins[n] = at + (block + (uint64_t)(n < lanes ? n : 0)) * OD_BLOCK;
        for (int i = 0; i < OD_BLOCK; i += 4) {
#pragma GCC unroll 4
            for (int n = 0; n < LANES; n++) {
                const uint8_t *p = begins[n] + i;
                sums[n] = sums[n] * by4 + (p[0] * by3 + p[1] * by2) + (p[2] * FACTOR + p[3]);
            }
        }
        for (int n = 0; n < lanes; n++)
            hashes[block + (uint64_t)n - first] = od_fold(sums[n]);
        block += (uint64_t)lanes;
    }
}

od_blocks *od_blocks_new(uint64_t capacity) {
    od_blocks *blocks = calloc(1, sizeof *blocks);
    if (blocks == NULL)
        return NULL;
    uint64_t bits = 1024;
    while (bits < capacity * BITS_PER_BLOCK)
        bits *= 2;
    blocks->mask = bits - 1;
    blocks->bits = calloc(bits / 64, sizeof *blocks->bits);
    /* larger, so that hardly any block is left out */
    blocks->index = od_sampled_new(capacity + capacity / 2, 0, 0);
    blocks->leaving = factor_to(OD_BLOCK);
    if (blocks->bits == NULL || blocks->index == NULL) {
        od_free_blocks(blocks);
        return NULL;
    }
    return blocks;
}

void od_free_blocks(od_blocks *blocks) {
    if (blocks != NULL) {
        od_free_sampled(blocks->index);
        free(blocks->bits);
        free(blocks);
    }
}

void od_blocks_add(od_blocks *blocks, const uint32_t *hashes, uint64_t count, uint64_t start) {
    enum { BATCH = 256 };
    od_sample batch[BATCH];
    uint64_t taken = 0, origin = 0; /* positions in a batch: 32 bits, from its first block */
    for (uint64_t i = 0; i < count; i++) {
        if (i != 0 && hashes[i] == hashes[i - 1]) /* keeps the first of a run of equal blocks */
            continue;
        if (taken == BATCH || (i - origin) * OD_BLOCK > UINT32_MAX) {
            od_sampled_add(blocks->index, batch, taken, start + origin * OD_BLOCK);
            taken = 0;
        }
        if (taken == 0)
            origin = i;
        uint64_t bit = od_block_bit(blocks, hashes[i]);
        blocks->bits[bit / 64] |= 1ULL << (bit % 64);
        batch[taken++] = (od_sample){hashes[i], (uint32_t)((i - origin) * OD_BLOCK)};
    }
    od_sampled_add(blocks->index, batch, taken, start + origin * OD_BLOCK);
}
