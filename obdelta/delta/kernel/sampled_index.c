/* The sampled index: finds long equal ranges anywhere in the base, from 32-byte windows chosen by
 * content.
 *
 * A rolling "gear" hash runs over base and target. Windows whose hash has zeros in its upper bits
 * are samples. */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

#define SLOTS 8
#define BUCKETS 2 /* in which a hash may lie */
#define POSITION_BITS 40
#define POSITION_MASK ((1ULL << POSITION_BITS) - 1)
#define APART 16  /* bytes between two samples, at least */
#define LANES 4
#define ALIKE 3   /* entries of one hash that are kept */

static inline int chosen(uint64_t hash, uint32_t bits) {
    return (hash >> (64 - bits)) == 0;
}

static inline int kept(const od_sampled *sampled, uint32_t folded) {
    return (folded & ((1u << sampled->thin) - 1)) == 0;
}

/* One of the parts that are hashed side by side, because each step of a rolling hash waits for the
 * step before. */
typedef struct {
    uint64_t at;   /* where it begins */
    uint64_t next; /* the first position that may be taken */
    uint32_t last;
} lane;

typedef struct {
    od_samples *found;
    uint64_t room;
    int failed;
} sink;

static void take(sink *s, lane *l, uint64_t hash, uint64_t position) {
    uint32_t folded = od_fold(hash);
    if (position < l->next || folded == l->last) /* too near, or a run of one byte */
        return;
    if (s->found->count == s->room) {
        uint64_t room = s->room != 0 ? s->room * 2 : 1024;
        od_sample *grown = realloc(s->found->samples, room * sizeof *grown);
        if (grown == NULL) {
            s->failed = 1;
            return;
        }
        s->found->samples = grown;
        s->room = room;
    }
    s->found->samples[s->found->count++] = (od_sample){folded, (uint32_t)position};
    l->last = folded;
    l->next = position + APART;
}

od_samples *od_sample_range(const uint8_t *at, uint64_t size, uint64_t from, uint64_t to,
                            uint32_t bits) {
    od_samples *found = calloc(1, sizeof *found);
    if (found == NULL)
        return NULL;
    sink s = {.found = found};
    uint64_t gear[256];
    od_gear(gear);
    if (size > UINT32_MAX)
        size = UINT32_MAX; /* only neighbouring matches can cover bytes beyond */
    if (to > size)
        to = size;
    if (from < OD_WINDOW - 1)
        from = OD_WINDOW - 1;
    if (from >= to)
        return found;
    lane lanes[LANES];
    const uint8_t *begins[LANES];
    uint64_t hashes[LANES] = {0};
    uint64_t each = (to - from) / LANES;
    for (int n = 0; n < LANES; n++) {
        uint64_t begin = from + each * (uint64_t)n;
        lanes[n] = (lane){.at = begin, .next = begin};
        begins[n] = at + begin;
        for (uint64_t i = begin - (OD_WINDOW - 1); i < begin; i++)
            hashes[n] = (hashes[n] << 2) + gear[at[i]];
    }
    for (uint64_t i = 0; i < each && !s.failed; i++) {
#pragma GCC unroll 4
        for (int n = 0; n < LANES; n++) {
            hashes[n] = (hashes[n] << 2) + gear[begins[n][i]];
            if (__builtin_expect(chosen(hashes[n], bits), 0))
                take(&s, &lanes[n], hashes[n], lanes[n].at + i);
        }
    }
    uint64_t rest = lanes[LANES - 1].at + each, hash = hashes[LANES - 1];
    for (; rest < to && !s.failed; rest++) {
        hash = (hash << 2) + gear[at[rest]];
        if (chosen(hash, bits))
            take(&s, &lanes[LANES - 1], hash, rest);
    }
    if (s.failed) {
        od_free_samples(found);
        return NULL;
    }
    return found;
}

void od_free_samples(od_samples *samples) {
    if (samples != NULL) {
        free(samples->samples);
        free(samples);
    }
}

od_sampled *od_sampled_new(uint64_t capacity, uint32_t bits, uint32_t thin) {
    od_sampled *sampled = malloc(sizeof *sampled);
    if (sampled == NULL)
        return NULL;
    sampled->bits = bits;
    sampled->thin = thin;
    sampled->buckets = (capacity >> thin) / (SLOTS * 5 / 8) + 1;
    sampled->entries = calloc(sampled->buckets * SLOTS, sizeof(uint64_t));
    if (sampled->entries == NULL) {
        free(sampled);
        return NULL;
    }
    return sampled;
}

void od_free_sampled(od_sampled *sampled) {
    if (sampled != NULL) {
        free(sampled->entries);
        free(sampled);
    }
}

static inline uint64_t *bucket_of(const od_sampled *sampled, uint32_t folded) {
    return sampled->entries + SLOTS * (((uint64_t)folded * sampled->buckets) >> 32);
}

static inline uint64_t tag_of(uint32_t folded) {
    return (uint64_t)((folded * 0x85ebca6bU) >> 8) << POSITION_BITS;
}

/* Entries without room in their bucket go to the next one; without room there, they are left out.
 */
static inline uint64_t *bucket_after(const od_sampled *sampled, const uint64_t *bucket) {
    uint64_t number = (uint64_t)(bucket - sampled->entries) / SLOTS + 1;
    return sampled->entries + (number < sampled->buckets ? number * SLOTS : 0);
}

static void add_entry(od_sampled *sampled, uint32_t folded, uint64_t tag, uint64_t position) {
    uint64_t *bucket = bucket_of(sampled, folded);
    int alike = 0;
    for (int turn = 0; turn < BUCKETS; turn++, bucket = bucket_after(sampled, bucket)) {
        for (int slot = 0; slot < SLOTS; slot++) {
            if (bucket[slot] == 0) {
                bucket[slot] = tag | position;
                return;
            }
            if ((bucket[slot] & ~POSITION_MASK) == tag && ++alike == ALIKE)
                return;
        }
    }
}

void od_sampled_add(od_sampled *sampled, const od_sample *samples, uint64_t count, uint64_t start) {
    for (uint64_t i = 0; i < count; i++) {
        if (i + 8 < count)
            __builtin_prefetch(bucket_of(sampled, samples[i + 8].hash));
        if (!kept(sampled, samples[i].hash))
            continue;
        uint64_t position = start + samples[i].position + 1, tag = tag_of(samples[i].hash);
        if (position > POSITION_MASK)
            return;
        add_entry(sampled, samples[i].hash, tag, position);
    }
}

void od_sampled_find(const od_sampled *sampled, uint64_t hash, od_found found, void *with) {
    uint32_t folded = od_fold(hash);
    uint64_t tag = tag_of(folded);
    const uint64_t *bucket = bucket_of(sampled, folded);
    for (int turn = 0; turn < BUCKETS; turn++, bucket = bucket_after(sampled, bucket)) {
        for (int slot = 0; slot < SLOTS; slot++) {
            if (bucket[slot] == 0)
                return;
            if ((bucket[slot] & ~POSITION_MASK) == tag &&
                found(with, (bucket[slot] & POSITION_MASK) - 1))
                return;
        }
    }
}
