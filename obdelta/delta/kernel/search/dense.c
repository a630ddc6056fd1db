/* Dense search (step 3): a hash index over windows of the base, and the search of bytes in it.
 *
 * The index is small and made anew for each unit. Its buckets have SLOTS entries; a full bucket
 * loses one of them, so that no look-up is long. */
#include "search.h"

#include <stdlib.h>
#include <string.h>

#define SLOTS 8
#define INDEX_BITS 27 /* entry = tag of 5 bits, number of the indexed position + 1 */
#define INDEX_MASK ((1u << INDEX_BITS) - 1)
#define AHEAD 16 /* positions that are prefetched ahead */
#define PER_PLACE 256 /* indexed positions for an entry of the table that leads to their window */

static inline uint64_t key_hash(const uint8_t *p, uint32_t key) {
    return (od_load64(p) << (64 - 8 * key)) * 0x9e3779b97f4a7c15ULL;
}

static inline uint32_t *bucket_of(const od_dense *d, uint64_t hash) {
    return d->entries + SLOTS * (((hash >> 32) * d->buckets) >> 32);
}

static inline uint32_t tag_of(uint64_t hash) {
    return (uint32_t)(hash >> 8) << INDEX_BITS;
}

static void insert(od_dense *d, uint64_t hash, uint64_t number) {
    uint32_t *bucket = bucket_of(d, hash), entry = tag_of(hash) | (uint32_t)(number + 1);
    for (int slot = 0; slot < SLOTS; slot++) {
        if (bucket[slot] == 0) {
            bucket[slot] = entry;
            return;
        }
    }
    bucket[(number * 0x9e3779b1u >> 13) % SLOTS] = entry;
}

/* Fills in the numbers of the windows that have each PER_PLACE-th of `total` indexed positions, and
 * of the last window behind them. */
static int place_windows(od_dense *d, uint64_t total) {
    uint64_t count = total / PER_PLACE + 2, window = 0;
    if (count > d->place_room) {
        free(d->places);
        d->place_room = 2 * count;
        d->places = malloc(d->place_room * sizeof *d->places);
        if (d->places == NULL)
            return OD_NO_MEMORY;
    }
    for (uint64_t place = 0; place < count; place++) {
        while (window + 1 < d->window_count && d->windows[window + 1].first <= place * PER_PLACE)
            window++;
        d->places[place] = (uint32_t)window;
    }
    return 0;
}

/* Indexes windows (sorted by position, disjoint, `at` unused; each inside one layer). */
int od_dense_fill(od_dense *d, const od_base *base, const od_span *windows, uint64_t count) {
    uint64_t total = 0;
    if (count + 1 > d->window_room) {
        free(d->windows);
        d->window_room = 2 * (count + 1);
        d->windows = malloc(d->window_room * sizeof *d->windows);
        if (d->windows == NULL)
            return OD_NO_MEMORY;
    }
    d->window_count = 0;
    for (uint64_t i = 0; i < count; i++) {
        const od_layer *layer = od_layer_of(base, windows[i].source);
        uint64_t positions = (windows[i].size - 8) / d->step + 1;
        if (total + positions >= INDEX_MASK)
            break;
        const uint8_t *at = layer->at + (windows[i].source - layer->start);
        d->windows[d->window_count++] = (od_window){total, windows[i].source, at, layer};
        total += positions;
    }
    d->windows[d->window_count].first = total;
    if (place_windows(d, total) != 0)
        return OD_NO_MEMORY;
    d->buckets = total / (SLOTS / 2) + 1;
    if (d->buckets > d->bucket_room) {
        free(d->entries);
        d->bucket_room = d->buckets + d->buckets / 2;
        d->entries = malloc(d->bucket_room * SLOTS * sizeof *d->entries);
        if (d->entries == NULL)
            return OD_NO_MEMORY;
    }
    memset(d->entries, 0, d->buckets * SLOTS * sizeof *d->entries);
    for (uint64_t w = 0; w < d->window_count; w++) {
        const uint8_t *at = d->windows[w].at;
        uint64_t first = d->windows[w].first, positions = d->windows[w + 1].first - first, last = 0,
                 hashes[AHEAD];
        for (uint64_t i = 0; i < AHEAD && i < positions; i++)
            hashes[i] = key_hash(at + i * d->step, d->key);
        for (uint64_t i = 0; i < positions; i++) {
            uint64_t hash = hashes[i % AHEAD];
            if (i + AHEAD < positions) {
                uint64_t coming = hashes[i % AHEAD] = key_hash(at + (i + AHEAD) * d->step, d->key);
                __builtin_prefetch(bucket_of(d, coming), 1);
            }
            if (hash != last) /* runs of one byte would fill their own bucket */
                insert(d, hash, first + i);
            last = hash;
        }
    }
    return 0;
}

/* Returns the window of an indexed position. */
static const od_window *window_of(const od_dense *d, uint64_t number) {
    uint64_t low = d->places[number / PER_PLACE], high = d->places[number / PER_PLACE + 1] + 1;
    while (high - low > 1) {
        uint64_t middle = low + (high - low) / 2;
        if (d->windows[middle].first <= number)
            low = middle;
        else
            high = middle;
    }
    return &d->windows[low];
}

/* Returns whether the last bytes are equal of a candidate that reaches as far as the longest. */
static inline int may_reach(const od_search *s, const od_layer *layer, uint64_t position,
                            uint64_t longest) {
    if (longest < 8)
        return 1;
    uint64_t inside = position - layer->start;
    return longest <= layer->size - inside &&
           od_load64(s->target + s->i + longest - 8) == od_load64(layer->at + inside + longest - 8);
}

void od_search_dense(od_search *s, uint64_t start, uint64_t stop) {
    const od_dense *d = &s->dense;
    uint64_t key = d->key, i = start, readable = s->readable;
    while (i < stop && i < readable && !s->failed) {
        if (s->wake < i + OD_NEAR) {
            s->i = i;
            od_follow_near(s);
            if (s->reach >= i + key) {
                i = s->reach - key + 1;
                continue;
            }
        }
        if (i + AHEAD < readable)
            __builtin_prefetch(bucket_of(d, key_hash(s->target + i + AHEAD, d->key)));
        uint64_t hash = key_hash(s->target + i, d->key);
        const uint32_t *bucket = bucket_of(d, hash);
        uint32_t tag = tag_of(hash);
        s->i = i;
        uint64_t longest = key - 1, best = 0;
        const od_layer *layer = NULL;
        for (int slot = 0; slot < SLOTS && bucket[slot] != 0; slot++) {
            if ((bucket[slot] & ~INDEX_MASK) != tag)
                continue;
            uint64_t number = (bucket[slot] & INDEX_MASK) - 1;
            const od_window *w = window_of(d, number);
            uint64_t position = w->base + (number - w->first) * d->step;
            if (longest >= key && !may_reach(s, w->layer, position, longest))
                continue;
            uint64_t after = od_weigh(s, w->layer, position);
            if (after > longest ||
                (layer != NULL && after == longest &&
                 od_distance(position - i, s->shift) < od_distance(best - i, s->shift))) {
                longest = after;
                best = position;
                layer = w->layer;
            }
        }
        /* Only a match that reaches further than all before it can make the path cheaper. */
        if (layer != NULL && i + longest > s->reach)
            od_accept(s, layer, best, longest);
        /* Any match that reaches further than `reach` has a key that begins here or later. */
        i = s->reach >= i + key + 1 ? s->reach - key + 1 : i + 1;
    }
}
