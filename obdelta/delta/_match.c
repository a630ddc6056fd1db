/* Finding equal bytes: a dense hash index over windows of the base, the coarse index, and diagonals.
 *
 * A diagonal is a fixed distance between target and base positions. Where code or text was changed in place, equal runs follow one
 * another on the same diagonal, so after each match the diagonal is probed onward over small gaps; that finds runs which are too
 * short for any index. */
#include "_kernel.h"

#include <stdlib.h>
#include <string.h>

#define SLOTS 8
#define INDEX_BITS 27 /* entry = tag of 5 bits, number of the indexed position + 1 */
#define INDEX_MASK ((1u << INDEX_BITS) - 1)
#define AHEAD 12        /* positions that are prefetched ahead */
#define DIAGONALS 8     /* that are remembered */
#define NEAR 16         /* a live diagonal that ends so near is followed, */
#define STRIDE 48       /* so far further */
#define FURTHEST_BACK 512
#define CREDIBLE 12     /* a match of this size has its diagonal probed */
#define SHORTEST_PROBED 4
#define RUN_TOLL 6      /* a run on a probed diagonal is worth its size less this, a gap costs its size; */
#define MOST_CREDIT 96  /* the sum is kept below this, and the diagonal given up when it is used up */

typedef struct {
    uint64_t first; /* number of its first indexed position */
    uint64_t base;  /* base position of the window */
    const uint8_t *at;
    const od_layer *layer;
} window;

typedef struct {
    window *windows;
    uint64_t window_count;
    uint32_t *entries;
    uint64_t buckets;
    uint32_t step, key;
} dense;

static inline uint64_t load64(const uint8_t *p) {
    uint64_t value;
    memcpy(&value, p, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

static inline uint64_t key_hash(const uint8_t *p, uint32_t key) {
    return (load64(p) << (64 - 8 * key)) * 0x9e3779b97f4a7c15ULL;
}

static inline uint32_t *bucket_of(const dense *d, uint64_t hash) {
    return d->entries + SLOTS * (((hash >> 32) * d->buckets) >> 32);
}

static inline uint32_t tag_of(uint64_t hash) {
    return (uint32_t)(hash >> 8) << INDEX_BITS;
}

static void insert(dense *d, uint64_t hash, uint64_t number) {
    uint32_t *bucket = bucket_of(d, hash), entry = tag_of(hash) | (uint32_t)(number + 1);
    for (int slot = 0; slot < SLOTS; slot++) {
        if (bucket[slot] == 0) {
            bucket[slot] = entry;
            return;
        }
    }
    bucket[(number * 0x9e3779b1u >> 13) % SLOTS] = entry;
}

static int build(dense *d, const od_base *base, const od_span *windows, uint64_t count, const od_effort *effort) {
    uint64_t total = 0;
    d->step = effort->step;
    d->key = effort->key;
    d->windows = malloc((count + 1) * sizeof *d->windows);
    if (d->windows == NULL)
        return OD_NO_MEMORY;
    for (uint64_t i = 0; i < count; i++) {
        if (windows[i].source >= base->size || windows[i].size < 8)
            continue;
        const od_layer *layer = od_layer_of(base, windows[i].source);
        uint64_t inside = windows[i].source - layer->start;
        if (windows[i].size > layer->size - inside)
            continue;
        uint64_t positions = (windows[i].size - 8) / d->step + 1;
        if (total + positions >= INDEX_MASK)
            break;
        d->windows[d->window_count++] = (window){total, windows[i].source, layer->at + inside, layer};
        total += positions;
    }
    d->windows[d->window_count].first = total;
    if (total == 0)
        return 0;
    d->buckets = total / (SLOTS / 2) + 1;
    d->entries = calloc(d->buckets * SLOTS, sizeof *d->entries);
    if (d->entries == NULL)
        return OD_NO_MEMORY;
    for (uint64_t w = 0; w < d->window_count; w++) {
        const uint8_t *at = d->windows[w].at;
        uint64_t first = d->windows[w].first, positions = d->windows[w + 1].first - first, last = 0;
        for (uint64_t i = 0; i < positions; i++) {
            if (i + AHEAD < positions)
                __builtin_prefetch(bucket_of(d, key_hash(at + (i + AHEAD) * d->step, d->key)), 1);
            uint64_t hash = key_hash(at + i * d->step, d->key);
            if (hash != last) /* runs of one byte would fill their bucket with themselves */
                insert(d, hash, first + i);
            last = hash;
        }
    }
    return 0;
}

static const window *window_of(const dense *d, uint64_t number) {
    uint64_t low = 0, high = d->window_count;
    while (high - low > 1) {
        uint64_t middle = low + (high - low) / 2;
        if (d->windows[middle].first <= number)
            low = middle;
        else
            high = middle;
    }
    return &d->windows[low];
}

/* Where a diagonal stands: known from `since` to `until`, where its last equal run ends. A live one is followed further as the
 * search comes near. */
typedef struct {
    uint64_t shift; /* base position minus target position */
    uint64_t since, until;
    const od_layer *layer; /* NULL in an unused one */
    int64_t credit;
    int live;
} diagonal;

typedef struct {
    const od_base *base;
    const uint8_t *target;
    uint64_t from, to;
    const od_effort *effort;
    od_span_list *list;
    diagonal diagonals[DIAGONALS];
    uint64_t i;     /* where in the target */
    uint64_t reach; /* nothing that begins before and ends here can be of use */
    uint64_t wake;  /* the first live diagonal's `until` */
    int failed;
} search;

/* Follow a live diagonal over gaps, adding each equal run, until it is known up to `goal` or given up. */
static void follow(search *s, diagonal *d, uint64_t goal) {
    const od_effort *effort = s->effort;
    uint64_t limit = d->layer->start + d->layer->size - d->shift; /* target position of the layer's end */
    if (limit > s->to)
        limit = s->to;
    const uint8_t *mine = s->target + d->until, *other = d->layer->at + (d->until + d->shift - d->layer->start);
    uint64_t most = limit - d->until, origin = d->until, x = 0; /* x, start, stop: relative to `origin` */
    while (d->until < goal) {
        uint64_t stop = x + effort->gap < most ? x + effort->gap : most, run = 0, start = x;
        while (start < stop) {
            while (start < stop && mine[start] != other[start])
                start++;
            if (start >= stop)
                break;
            run = od_equal_after(mine + start, other + start, most - start);
            if (run >= SHORTEST_PROBED)
                break;
            start += run;
            run = 0;
        }
        if (run == 0) {
            d->live = 0;
            return;
        }
        if (run >= effort->shortest && od_span_push(s->list, origin + start, run, origin + start + d->shift) != 0) {
            s->failed = 1;
            return;
        }
        uint64_t end = origin + start + run;
        if (effort->trust_run != 0 && s->reach >= d->until && end > s->reach && start - x <= effort->trust_gap &&
            run >= effort->trust_run)
            s->reach = end;
        d->until = end;
        d->credit += (int64_t)(run < MOST_CREDIT ? run : MOST_CREDIT) - RUN_TOLL - (int64_t)(start - x);
        if (d->credit < 0) {
            d->live = 0;
            return;
        }
        if (d->credit > MOST_CREDIT)
            d->credit = MOST_CREDIT;
        x = start + run;
    }
}

/* Follow all live diagonals that the search has come near to. */
static void follow_near(search *s) {
    uint64_t wake = UINT64_MAX;
    for (unsigned d = 0; d < DIAGONALS; d++) {
        diagonal *diagonal = &s->diagonals[d];
        if (!diagonal->live)
            continue;
        if (diagonal->until < s->i + NEAR)
            follow(s, diagonal, s->i + NEAR + STRIDE);
        if (diagonal->live && diagonal->until < wake)
            wake = diagonal->until;
    }
    s->wake = wake;
}

/* A diagonal's place among those that are remembered: a dead one's, or the least promising's. */
static diagonal *place_for(search *s) {
    diagonal *worst = &s->diagonals[0];
    for (unsigned d = 0; d < DIAGONALS; d++) {
        diagonal *here = &s->diagonals[d];
        if (here->layer == NULL)
            return here;
        if (here->live != worst->live ? !here->live
            : here->live ? here->credit < worst->credit
                         : here->until < worst->until)
            worst = here;
    }
    return worst;
}

static void remember(search *s, const od_layer *layer, uint64_t since, uint64_t size, uint64_t shift) {
    diagonal *d = place_for(s);
    *d = (diagonal){shift, since, since + size, layer, (int64_t)(size < MOST_CREDIT ? size : MOST_CREDIT), size >= CREDIBLE};
    if (d->live && d->until < s->wake)
        s->wake = d->until;
}

/* The diagonal that has been followed past s->i already, or has ended before it; NULL where there is none. */
static diagonal *known_diagonal(search *s, uint64_t shift) {
    for (unsigned d = 0; d < DIAGONALS; d++)
        if (s->diagonals[d].shift == shift && s->diagonals[d].layer != NULL && s->diagonals[d].since <= s->i)
            return &s->diagonals[d];
    return NULL;
}

/* How many bytes are equal from target position s->i and `position` of the base on; 0 on a diagonal that is known there. */
static uint64_t weigh(search *s, const od_layer *layer, uint64_t position) {
    diagonal *known = known_diagonal(s, position - s->i);
    if (known != NULL && known->until > s->i)
        return 0;
    uint64_t inside = position - layer->start, limit = layer->size - inside;
    if (limit > s->to - s->i)
        limit = s->to - s->i;
    return od_equal_after(s->target + s->i, layer->at + inside, limit);
}

/* Take a match that weigh() has found, growing it backwards. */
static void accept(search *s, const od_layer *layer, uint64_t position, uint64_t after) {
    uint64_t shift = position - s->i, inside = position - layer->start, before = s->i - s->from;
    diagonal *known = known_diagonal(s, shift);
    if (before > inside)
        before = inside;
    if (before > FURTHEST_BACK)
        before = FURTHEST_BACK;
    if (known != NULL && before > s->i - known->until)
        before = s->i - known->until;
    before = od_equal_before(s->target + s->i, layer->at + inside, before);
    uint64_t size = before + after;
    if (s->i + after > s->reach)
        s->reach = s->i + after;
    if (size < s->effort->shortest)
        return;
    if (od_span_push(s->list, s->i - before, size, position - before) != 0) {
        s->failed = 1;
        return;
    }
    if (known != NULL)
        known->layer = NULL, known->live = 0;
    remember(s, layer, s->i - before, size, shift);
}

static int coarse_candidate(void *with, uint64_t position) {
    search *s = with;
    if (position >= s->base->size)
        return 0;
    const od_layer *layer = od_layer_of(s->base, position);
    /* s->i is the window's last byte; at least the whole window must be equal. */
    uint64_t inside = position - layer->start;
    if (inside < OD_WINDOW - 1 || s->i < s->from + OD_WINDOW - 1 ||
        memcmp(s->target + s->i - (OD_WINDOW - 1), layer->at + inside - (OD_WINDOW - 1), OD_WINDOW) != 0)
        return 0;
    uint64_t after = weigh(s, layer, position);
    if (after != 0 && s->i + after > s->reach)
        accept(s, layer, position, after);
    return 0;
}

static void search_coarse(search *s, const od_coarse *coarse, const uint64_t *gear, uint64_t start, uint64_t stop) {
    uint64_t begin = start - s->from >= OD_WINDOW ? start - OD_WINDOW : s->from, hash = 0;
    for (uint64_t i = begin; i < stop && !s->failed; i++) {
        hash = (hash << 2) + gear[s->target[i]];
        if (!od_is_sample(coarse, hash) || i + 1 < begin + OD_WINDOW)
            continue;
        s->i = i;
        od_coarse_find(coarse, hash, coarse_candidate, s);
    }
}

static void search_dense(search *s, const dense *d, uint64_t start, uint64_t stop, uint64_t readable) {
    uint64_t key = d->key, i = start;
    while (i < stop && i < readable && !s->failed) {
        if (s->wake < i + NEAR) {
            s->i = i;
            follow_near(s);
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
            const window *w = window_of(d, number);
            uint64_t position = w->base + (number - w->first) * d->step, after = weigh(s, w->layer, position);
            if (after > longest) {
                longest = after;
                best = position;
                layer = w->layer;
            }
        }
        /* Only what goes further than all before it can make the way cheaper. */
        if (layer != NULL && i + longest > s->reach)
            accept(s, layer, best, longest);
        /* Whatever goes further than `reach` has a key that begins here or later. */
        i = s->reach >= i + key + 1 ? s->reach - key + 1 : i + 1;
    }
}

int od_find_matches(const od_base *base, const od_coarse *coarse, const uint8_t *target, uint64_t target_size, uint64_t from,
                    uint64_t to, const od_span *spans, uint64_t span_count, const od_span *windows, uint64_t window_count,
                    const od_effort *effort, od_span_list *list) {
    search s = {.base = base, .target = target, .from = from, .to = to, .effort = effort, .list = list, .wake = UINT64_MAX};
    dense d = {0};
    uint64_t gear[256];
    od_gear(gear);
    if (build(&d, base, windows, window_count, effort) != 0) {
        free(d.windows);
        return OD_NO_MEMORY;
    }
    uint64_t readable = target_size >= 8 ? target_size - 8 + 1 : 0;
    if (readable > to)
        readable = to;
    uint64_t covered = from, next = 0;
    while (covered < to && !s.failed) {
        uint64_t gap_end = to;
        /* Known spans are matches too; their diagonals go on behind them. */
        uint64_t gap = covered;
        for (; next < span_count; next++) {
            const od_span *span = &spans[next];
            if (span->at + span->size <= from)
                continue;
            if (span->at > covered) {
                gap_end = span->at < to ? span->at : to;
                break;
            }
            if (span->at + span->size > covered)
                covered = span->at + span->size;
            gap = covered;
            uint64_t at = span->at > from ? span->at : from;
            uint64_t end = span->at + span->size < to ? span->at + span->size : to;
            if (at >= end)
                continue;
            uint64_t source = span->source + (at - span->at);
            if (od_span_push(list, at, end - at, source) != 0)
                s.failed = 1;
            else if (end < to)
                remember(&s, od_layer_of(base, source), at, end - at, source - at);
        }
        if (gap >= to || s.failed)
            break;
        uint64_t start = gap - from >= d.key ? gap - d.key + 1 : from;
        s.reach = s.i = gap;
        follow_near(&s);
        if (coarse != NULL && gap_end - gap >= OD_WINDOW)
            search_coarse(&s, coarse, gear, start, gap_end);
        if (d.entries != NULL) {
            s.reach = gap;
            search_dense(&s, &d, start, gap_end, readable);
        }
        covered = gap_end;
    }
    free(d.windows);
    free(d.entries);
    if (s.failed)
        return OD_NO_MEMORY;
    od_sort_spans(list->spans, list->count);
    return 0;
}
