/* The coarse index: sampled windows of the whole base, found again by a rolling hash ("gear") of 32 bytes. */
#include "_kernel.h"

#include <stdlib.h>
#include <string.h>

#define SLOTS 8
#define POSITION_BITS 40
#define POSITION_MASK ((1ULL << POSITION_BITS) - 1)
#define APART 16  /* bytes between two samples, at least */
#define ALIKE 3   /* entries of one hash that are kept */

/* Entries are tag << 40 | position + 1, eight to a bucket; 0 is an empty one. */
struct od_coarse {
    uint64_t *entries;
    uint64_t buckets;
    uint32_t bits, thin;
};

static inline int chosen(uint64_t hash, uint32_t bits) {
    return (hash >> (64 - bits)) == 0;
}

static inline uint32_t fold(uint64_t hash) {
    return (uint32_t)((hash * 0x9e3779b97f4a7c15ULL) >> 32);
}

static inline int kept(const od_coarse *coarse, uint32_t folded) {
    return (folded & ((1u << coarse->thin) - 1)) == 0;
}

int od_is_sample(const od_coarse *coarse, uint64_t hash) {
    return chosen(hash, coarse->bits) && kept(coarse, fold(hash));
}

od_samples *od_sample_layer(const uint8_t *at, uint64_t size, uint32_t bits) {
    od_samples *found = calloc(1, sizeof *found);
    if (found == NULL)
        return NULL;
    uint64_t gear[256], hash = 0, room = 0, next = OD_WINDOW - 1;
    uint32_t last = 0;
    od_gear(gear);
    if (size > UINT32_MAX)
        size = UINT32_MAX; /* what lies beyond is found by its neighbours, or not */
    for (uint64_t i = 0; i < size; i++) {
        hash = (hash << 2) + gear[at[i]];
        if (!chosen(hash, bits) || i < next)
            continue;
        uint32_t folded = fold(hash);
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
    uint32_t folded = fold(hash);
    uint64_t tag = tag_of(folded), *bucket = bucket_of(coarse, folded);
    for (int slot = 0; slot < SLOTS && bucket[slot] != 0; slot++)
        if ((bucket[slot] & ~POSITION_MASK) == tag && found(with, (bucket[slot] & POSITION_MASK) - 1))
            return;
}

/* ---- voting ---- */

typedef struct {
    const od_base *base;
    const uint8_t *window; /* the target's 32 bytes */
    uint64_t *keys;        /* region number + 1 */
    uint64_t *votes;
    uint64_t room, used, weight;
    uint32_t granule_bits;
    int full;
} poll_box;

static int resize(poll_box *box, uint64_t room) {
    uint64_t *keys = calloc(room, sizeof *keys), *votes = calloc(room, sizeof *votes);
    if (keys == NULL || votes == NULL) {
        free(keys);
        free(votes);
        return 0;
    }
    for (uint64_t i = 0; i < box->room; i++) {
        if (box->keys[i] == 0)
            continue;
        uint64_t at = (box->keys[i] * 0x9e3779b97f4a7c15ULL >> 20) & (room - 1);
        while (keys[at] != 0)
            at = (at + 1) & (room - 1);
        keys[at] = box->keys[i];
        votes[at] = box->votes[i];
    }
    free(box->keys);
    free(box->votes);
    box->keys = keys;
    box->votes = votes;
    box->room = room;
    return 1;
}

static int cast_vote(void *with, uint64_t position) {
    poll_box *box = with;
    if (position >= box->base->size)
        return 0;
    const od_layer *layer = od_layer_of(box->base, position);
    uint64_t inside = position - layer->start;
    if (inside < OD_WINDOW - 1 || memcmp(layer->at + inside - (OD_WINDOW - 1), box->window, OD_WINDOW) != 0)
        return 0;
    uint64_t key = (position >> box->granule_bits) + 1;
    uint64_t at = (key * 0x9e3779b97f4a7c15ULL >> 20) & (box->room - 1);
    while (box->keys[at] != 0 && box->keys[at] != key)
        at = (at + 1) & (box->room - 1);
    if (box->keys[at] == 0) {
        if (2 * (box->used + 1) > box->room) {
            box->full = 1;
            return 1;
        }
        box->keys[at] = key;
        box->used++;
    }
    box->votes[at] += box->weight;
    return 0;
}

static int by_votes(const void *a, const void *b) {
    const od_region *x = a, *y = b;
    if (x->votes != y->votes)
        return x->votes > y->votes ? -1 : 1;
    return x->start < y->start ? -1 : x->start > y->start;
}

int64_t od_vote(const od_base *base, const od_coarse *coarse, const uint8_t *target, uint64_t target_size, uint64_t from,
                uint64_t to, uint32_t granule_bits, od_region *regions, uint64_t capacity) {
    if (to > target_size || from > to)
        return 0;
    poll_box box = {.base = base, .granule_bits = granule_bits, .weight = 1ULL << (coarse->bits + coarse->thin)};
    if (!resize(&box, 256))
        return OD_NO_MEMORY;
    uint64_t gear[256], hash = 0, start = from >= OD_WINDOW ? from - OD_WINDOW : 0;
    uint32_t last = 0;
    int64_t result = 0;
    od_gear(gear);
    for (uint64_t i = start; i < to; i++) {
        hash = (hash << 2) + gear[target[i]];
        if (!od_is_sample(coarse, hash) || i + 1 < start + OD_WINDOW)
            continue;
        if (fold(hash) == last)
            continue;
        last = fold(hash);
        box.window = target + i - (OD_WINDOW - 1);
        od_coarse_find(coarse, hash, cast_vote, &box);
        if (box.full) {
            box.full = 0;
            if (!resize(&box, box.room * 2)) {
                result = OD_NO_MEMORY;
                goto out;
            }
        }
    }
    od_region *all = malloc((box.used + 1) * sizeof *all);
    if (all == NULL) {
        result = OD_NO_MEMORY;
        goto out;
    }
    uint64_t count = 0;
    for (uint64_t i = 0; i < box.room; i++)
        if (box.keys[i] != 0)
            all[count++] = (od_region){(box.keys[i] - 1) << granule_bits, box.votes[i]};
    qsort(all, count, sizeof *all, by_votes);
    if (count > capacity)
        count = capacity;
    if (count != 0)
        memcpy(regions, all, count * sizeof *all);
    free(all);
    result = (int64_t)count;
out:
    free(box.keys);
    free(box.votes);
    return result;
}
