/* The coarse index: sampled windows of the whole base, found again by a rolling hash ("gear") of 32 bytes. */
#include "_kernel.h"

#include <stdlib.h>
#include <string.h>

#define SLOTS 8
#define POSITION_BITS 40
#define POSITION_MASK ((1ULL << POSITION_BITS) - 1)
#define APART 16  /* bytes between two samples, at least */
#define ALIKE 3   /* entries of one hash that are kept */

static inline int chosen(uint64_t hash, uint32_t bits) {
    return (hash >> (64 - bits)) == 0;
}

static inline int kept(const od_coarse *coarse, uint32_t folded) {
    return (folded & ((1u << coarse->thin) - 1)) == 0;
}

od_samples *od_sample_range(const uint8_t *at, uint64_t size, uint64_t from, uint64_t to, uint32_t bits) {
    od_samples *found = calloc(1, sizeof *found);
    if (found == NULL)
        return NULL;
    uint64_t gear[256], hash = 0, room = 0, next = from;
    uint32_t last = 0;
    od_gear(gear);
    if (size > UINT32_MAX)
        size = UINT32_MAX; /* what lies beyond is found by its neighbours, or not */
    if (to > size)
        to = size;
    if (next < OD_WINDOW - 1)
        next = OD_WINDOW - 1;
    for (uint64_t i = next - (OD_WINDOW - 1); i < to; i++) {
        hash = (hash << 2) + gear[at[i]];
        if (!chosen(hash, bits) || i < next)
            continue;
        uint32_t folded = od_fold(hash);
        if (folded == last && found->count != 0)
            continue; /* runs of one byte */
        if (found->count == room) {
            room = room != 0 ? room * 2 : 1024;
            od_sample *grown = realloc(found->samples, room * sizeof *grown);
            if (grown == NULL) {
                od_free_samples(found);
                return NULL;
            }
            found->samples = grown;
        }
        found->samples[found->count++] = (od_sample){folded, (uint32_t)i};
        last = folded;
        next = i + APART;
    }
    return found;
}

void od_free_samples(od_samples *samples) {
    if (samples != NULL) {
        free(samples->samples);
        free(samples);
    }
}

od_coarse *od_coarse_new(uint64_t capacity, uint32_t bits, uint32_t thin) {
    od_coarse *coarse = malloc(sizeof *coarse);
    if (coarse == NULL)
        return NULL;
    coarse->bits = bits;
    coarse->thin = thin;
    coarse->buckets = (capacity >> thin) / (SLOTS * 5 / 8) + 1;
    coarse->entries = calloc(coarse->buckets * SLOTS, sizeof(uint64_t));
    if (coarse->entries == NULL) {
        free(coarse);
        return NULL;
    }
    return coarse;
}

void od_free_coarse(od_coarse *coarse) {
    if (coarse != NULL) {
        free(coarse->entries);
        free(coarse);
    }
}

static inline uint64_t *bucket_of(const od_coarse *coarse, uint32_t folded) {
    return coarse->entries + SLOTS * (((uint64_t)folded * coarse->buckets) >> 32);
}

static inline uint64_t tag_of(uint32_t folded) {
    return (uint64_t)((folded * 0x85ebca6bU) >> 8) << POSITION_BITS;
}

void od_coarse_add(od_coarse *coarse, const od_sample *samples, uint64_t count, uint64_t start) {
    for (uint64_t i = 0; i < count; i++) {
        if (i + 8 < count)
            __builtin_prefetch(bucket_of(coarse, samples[i + 8].hash));
        if (!kept(coarse, samples[i].hash))
            continue;
        uint64_t position = start + samples[i].position + 1, tag = tag_of(samples[i].hash);
        if (position > POSITION_MASK)
            return;
        uint64_t *bucket = bucket_of(coarse, samples[i].hash);
        int alike = 0;
        for (int slot = 0; slot < SLOTS; slot++) {
            if (bucket[slot] == 0) {
                bucket[slot] = tag | position;
                break;
            }
            if ((bucket[slot] & ~POSITION_MASK) == tag && ++alike == ALIKE)
                break;
        }
    }
}

void od_coarse_find(const od_coarse *coarse, uint64_t hash, od_found found, void *with) {
    uint32_t folded = od_fold(hash);
    uint64_t tag = tag_of(folded), *bucket = bucket_of(coarse, folded);
    for (int slot = 0; slot < SLOTS && bucket[slot] != 0; slot++)
        if ((bucket[slot] & ~POSITION_MASK) == tag && found(with, (bucket[slot] & POSITION_MASK) - 1))
            return;
}
