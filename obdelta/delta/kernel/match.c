/* Match search: finds ranges of the target that are equal to ranges of the base.
 *
 * The target range is searched from coarse to fine. Each step only searches the bytes that the
 * steps before left over, and adds its matches to one list. parse.c then takes the cheapest path
 * through the list. All matches are hints until bytes have been compared; `budget` bounds the bytes
 * compared.
 *
 *  target  |=======KNOWN=======|--------------------- gap ---------------------|==KNOWN==|
 *
 *   1                             ####sample####                ###sample###
 *   2                                              ##block##
 *   3                          ++                          +++               ++
 *   4                      ..>..>..             ..>                            <..
 *
 *  parse   |copy---------------|lit|copy---------|copy-----|lit|copy-----------|copy-----|
 *
 * 0. Known spans (exact_match.c): entries that are equal as a whole, with the headers between them.
 * They enter the list first, and nothing below can lose one. Only the gaps between them are
 * searched, one unit of `effort->unit` bytes at a time.
 *
 * 1. Sampled index (sampled_index.c): one 32-byte window in 2^bits of the base, chosen by content.
 * It finds long equal ranges anywhere in the base, and these anchor the unit.
 *
 * 2. Block index (block_matches.c): all aligned 512-byte blocks of the base. It finds what librsync
 * finds by its signature of the base.
 *
 * 3. Dense search: for bytes still left over, a hash index over every `step`-th position of small
 * windows of the base. The windows are the base bytes that face the bytes left over: beside the
 * matches to their left and right, and where a hint points (an older version of the same file).
 *
 * 4. Diagonals. A diagonal is a fixed distance (`shift`) between base and target positions:
 *
 *  base    ..a b c d e X f g h i Y j k l ..
 *            | | | | |   | | | |   | | |      equal runs on one diagonal
 *  target  ..a b c d e Q f g h i R j k l ..
 *
 * Where code or text was changed in place, equal runs follow one another on the same diagonal.
 * After each match the diagonal is followed over small gaps, forwards and backwards. That finds
 * runs which are too short for any index. A diagonal has credit: runs add to it and gaps use it up.
 *
 * The list may hold many overlapping matches for one byte. parse.c chooses among them by price: it
 * knows what a copy command costs and what gzip makes of literals. */
#include "kernel.h"

#include <stdlib.h>
#include <string.h>

#define SLOTS 8
#define INDEX_BITS 27 /* entry = tag of 5 bits, number of the indexed position + 1 */
#define INDEX_MASK ((1u << INDEX_BITS) - 1)
#define AHEAD 16      /* positions that are prefetched ahead */
#define DIAGONALS 8   /* remembered at a time */
#define NEAR 16       /* a live diagonal that ends this near is followed, */
#define STRIDE 48     /* this much further */
#define FURTHEST_BACK 4096
#define CREDIBLE 12   /* the diagonal of a match of this size is followed */
#define SHORTEST_RUN 4
/* a run on a followed diagonal adds its size less this to the credit; a gap costs its size */
#define RUN_TOLL 6
#define MOST_CREDIT 96 /* upper bound of the credit; a diagonal without credit is dropped */
#define SMALL_HINT (1u << 15) /* bytes of the base that are always searched */
#define BUDGET 256             /* most bytes that are compared for a target byte, */
#define LEAST_BUDGET (1u << 20) /* and least budget of a range */
#define WORTH_INDEXING 16 /* bytes left over in a unit from which on they are searched densely */

typedef struct {
    uint64_t first; /* number of its first indexed position */
    uint64_t base;  /* base position of the window */
    const uint8_t *at;
    const od_layer *layer;
} window;

typedef struct {
    window *windows;
    uint64_t window_count, window_room;
    uint32_t *entries;
    uint64_t buckets, bucket_room;
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

/* Indexes windows (sorted by position, disjoint, `at` unused; each inside one layer). */
static int build(dense *d, const od_base *base, const od_span *windows, uint64_t count) {
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
        d->windows[d->window_count++] = (window){total, windows[i].source, at, layer};
        total += positions;
    }
    d->windows[d->window_count].first = total;
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

/* The state of a diagonal: known from `since` to `until`, where its last equal run ends. A live one
 * is followed further as the search comes near. */
typedef struct {
    uint64_t shift; /* base position minus target position */
    uint64_t since, until;
    const od_layer *layer; /* NULL in an unused one */
    int64_t credit;
    int live;
} diagonal;

typedef struct {
    const od_base *base;
    const od_blocks *blocks;
    const uint8_t *target;
    uint64_t from, to;
    const od_effort *effort;
    od_span_list *list;
    diagonal diagonals[DIAGONALS];
    uint64_t i;     /* current target position */
    uint64_t reach; /* a match that begins before and ends here is of no use */
    uint64_t wake;  /* the first live diagonal's `until` */
    uint64_t shift; /* of the last match */
    dense dense;
    od_span_list windows;
    uint64_t budget; /* bytes that may still be compared; at 0, nothing more is found */
    int failed;
} search;

/* Return the number of bytes that are equal from two positions on, or before them; charge them to
 * the search. */
static uint64_t equal_after(search *s, const uint8_t *a, const uint8_t *b, uint64_t limit) {
    uint64_t equal = od_equal_after(a, b, limit < s->budget ? limit : s->budget);
    s->budget -= equal;
    return equal;
}

static uint64_t equal_before(search *s, const uint8_t *a, const uint8_t *b, uint64_t limit) {
    uint64_t equal = od_equal_before(a, b, limit < s->budget ? limit : s->budget);
    s->budget -= equal;
    return equal;
}

/* Follows a live diagonal over gaps, adding each equal run, until it is known up to `goal` or is
 * dropped. */
static void follow(search *s, diagonal *d, uint64_t goal) {
    const od_effort *effort = s->effort;
    /* target position of the layer's end */
    uint64_t limit = d->layer->start + d->layer->size - d->shift;
    if (limit > s->to)
        limit = s->to;
    const uint8_t *mine = s->target + d->until,
                  *other = d->layer->at + (d->until + d->shift - d->layer->start);
    /* x, start, stop: relative to `origin` */
    uint64_t most = limit - d->until, origin = d->until, x = 0;
    while (d->until < goal) {
        uint64_t stop = x + effort->gap < most ? x + effort->gap : most, run = 0, start = x;
        while (start < stop) {
            while (start < stop && mine[start] != other[start])
                start++;
            if (start >= stop)
                break;
            run = equal_after(s, mine + start, other + start, most - start);
            if (run >= SHORTEST_RUN)
                break;
            start += run;
            run = 0;
        }
        if (run == 0) {
            d->live = 0;
            return;
        }
        if (run >= effort->shortest &&
            od_span_push(s->list, origin + start, run, origin + start + d->shift) != 0) {
            s->failed = 1;
            return;
        }
        uint64_t end = origin + start + run;
        if (effort->trust_run != 0 && s->reach >= d->until && end > s->reach &&
            start - x <= effort->trust_gap && run >= effort->trust_run)
            s->reach = end;
        d->until = end;
        d->credit +=
            (int64_t)(run < MOST_CREDIT ? run : MOST_CREDIT) - RUN_TOLL - (int64_t)(start - x);
        if (d->credit < 0) {
            d->live = 0;
            return;
        }
        if (d->credit > MOST_CREDIT)
            d->credit = MOST_CREDIT;
        x = start + run;
    }
}

/* Follows all live diagonals that the search has come near to. */
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

/* Returns a slot for a new diagonal: a dead one's, or the least promising one's. */
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

static void remember(search *s, const od_layer *layer, uint64_t since, uint64_t size,
                     uint64_t shift) {
    diagonal *d = place_for(s);
    *d = (diagonal){shift,
                    since,
                    since + size,
                    layer,
                    (int64_t)(size < MOST_CREDIT ? size : MOST_CREDIT),
                    size >= CREDIBLE};
    if (d->live && d->until < s->wake)
        s->wake = d->until;
}

/* Returns the diagonal with this shift that was followed past s->i, or ended before it; NULL if
 * there is none. */
static diagonal *known_diagonal(search *s, uint64_t shift) {
    for (unsigned d = 0; d < DIAGONALS; d++)
        if (s->diagonals[d].shift == shift && s->diagonals[d].layer != NULL &&
            s->diagonals[d].since <= s->i)
            return &s->diagonals[d];
    return NULL;
}

/* Returns how many bytes are equal from target position s->i and base `position` on; 0 where a
 * diagonal has already covered them. */
static uint64_t weigh(search *s, const od_layer *layer, uint64_t position) {
    diagonal *known = known_diagonal(s, position - s->i);
    if (known != NULL && known->until > s->i)
        return 0;
    uint64_t inside = position - layer->start, limit = layer->size - inside;
    if (limit > s->to - s->i)
        limit = s->to - s->i;
    return equal_after(s, s->target + s->i, layer->at + inside, limit);
}

/* Records a match that weigh() has found, extended backwards. Returns where it begins. */
static uint64_t accept(search *s, const od_layer *layer, uint64_t position, uint64_t after) {
    uint64_t shift = position - s->i, inside = position - layer->start, before = s->i - s->from;
    diagonal *known = known_diagonal(s, shift);
    if (before > inside)
        before = inside;
    if (before > FURTHEST_BACK)
        before = FURTHEST_BACK;
    if (known != NULL && before > s->i - known->until)
        before = s->i - known->until;
    before = equal_before(s, s->target + s->i, layer->at + inside, before);
    uint64_t size = before + after, start = s->i - before;
    if (s->i + after > s->reach)
        s->reach = s->i + after;
    if (size < s->effort->shortest)
        return start;
    if (od_span_push(s->list, start, size, position - before) != 0) {
        s->failed = 1;
        return start;
    }
    if (known != NULL)
        known->layer = NULL, known->live = 0;
    remember(s, layer, start, size, shift);
    s->shift = shift;
    return start;
}

/* Follows a diagonal backwards over gaps from the start of a match, not beyond `floor`. */
static void follow_back(search *s, const od_layer *layer, uint64_t start, uint64_t shift,
                        uint64_t floor) {
    int64_t layer_start = (int64_t)(layer->start - shift); /* as a target position */
    uint64_t first = layer_start > (int64_t)floor ? (uint64_t)layer_start : floor;
    int64_t credit = MOST_CREDIT / 2;
    uint64_t x = start;
    while (x > first && credit >= 0) {
        uint64_t stop = x - first > s->effort->gap ? x - s->effort->gap : first, end = x, run = 0;
        while (end > stop) {
            while (end > stop && s->target[end - 1] != layer->at[end - 1 + shift - layer->start])
                end--;
            if (end == stop)
                break;
            run = equal_before(s, s->target + end, layer->at + (end + shift - layer->start),
                               end - first);
            if (run >= SHORTEST_RUN)
                break;
            end = run < end - stop ? end - run : stop;
            run = 0;
        }
        if (run == 0)
            return;
        if (run >= s->effort->shortest &&
            od_span_push(s->list, end - run, run, end - run + shift) != 0) {
            s->failed = 1;
            return;
        }
        credit += (int64_t)(run < MOST_CREDIT ? run : MOST_CREDIT) - RUN_TOLL - (int64_t)(x - end);
        if (credit > MOST_CREDIT)
            credit = MOST_CREDIT;
        x = end - run;
    }
}

/* ---- step 1: anchors from the sampled index ---- */

typedef struct {
    search *s;
    const od_layer *layer;
    uint64_t position, after;
} coarse_best;

static uint64_t distance(uint64_t a, uint64_t b) {
    return (int64_t)(a - b) < 0 ? b - a : a - b;
}

static int coarse_candidate(void *with, uint64_t position) {
    coarse_best *best = with;
    search *s = best->s;
    if (position >= s->base->size)
        return 0;
    const od_layer *layer = od_layer_of(s->base, position);
    /* s->i is the window's last byte; the whole window must be equal */
    uint64_t inside = position - layer->start;
    if (inside < OD_WINDOW - 1 || memcmp(s->target + s->i - (OD_WINDOW - 1),
                                         layer->at + inside - (OD_WINDOW - 1), OD_WINDOW) != 0)
        return 0;
    uint64_t after = weigh(s, layer, position);
    if (after > best->after ||
        (after == best->after && after != 0 &&
         distance(position - s->i, s->shift) < distance(best->position - s->i, s->shift))) {
        best->after = after;
        best->layer = layer;
        best->position = position;
    }
    return 0;
}

static void search_coarse(search *s, const od_coarse *coarse, const uint64_t *gear, uint64_t start,
                          uint64_t stop) {
    uint64_t begin = start - s->from >= OD_WINDOW ? start - OD_WINDOW + 1 : s->from, hash = 0,
             floor = start;
    for (uint64_t i = begin; i < stop && !s->failed; i++) {
        hash = (hash << 2) + gear[s->target[i]];
        if (!od_is_sample(coarse, hash) || i + 1 < begin + OD_WINDOW)
            continue;
        s->i = i;
        coarse_best best = {.s = s};
        od_coarse_find(coarse, hash, coarse_candidate, &best);
        if (best.after != 0 && i + best.after > s->reach) {
            uint64_t shift = best.position - i,
                     found = accept(s, best.layer, best.position, best.after);
            if (floor < found)
                follow_back(s, best.layer, found, shift,
                            found - floor < FURTHEST_BACK ? floor : found - FURTHEST_BACK);
        }
        s->i = s->reach > i ? s->reach : i;
        if (s->wake < s->i + NEAR)
            follow_near(s);
        if (s->reach > i + 2 * OD_WINDOW) { /* nothing new before the end of the matches found */
            floor = s->reach;
            begin = s->reach - OD_WINDOW + 1;
            i = begin - 1;
            hash = 0;
        }
    }
}

/* ---- step 2: whole blocks, anywhere in the base ---- */

static int block_candidate(void *with, uint64_t position) {
    coarse_best *best = with;
    search *s = best->s;
    if (position >= s->base->size)
        return 0;
    const od_layer *layer = od_layer_of(s->base, position);
    if (layer->size - (position - layer->start) < OD_BLOCK)
        return 0;
    uint64_t after = weigh(s, layer, position);
    if (after < OD_BLOCK)
        return 0;
    if (after > best->after ||
        (after == best->after &&
         distance(position - s->i, s->shift) < distance(best->position - s->i, s->shift))) {
        best->after = after;
        best->layer = layer;
        best->position = position;
    }
    return 0;
}

/* Finds blocks that begin or end in target[start, stop), where nothing is known yet. */
static void search_blocks(search *s, uint64_t start, uint64_t stop) {
    const od_blocks *blocks = s->blocks;
    uint64_t i = start - s->from > OD_BLOCK - 1 ? start - (OD_BLOCK - 1) : s->from;
    /* last position where one may begin */
    uint64_t last = s->to - stop > OD_BLOCK - 1 ? stop - 1 : s->to - OD_BLOCK;
    if (s->to - s->from < OD_BLOCK || i > last)
        return;
    s->reach = start;
    uint64_t hash = od_block_hash(s->target + i);
    while (!s->failed) {
        if (od_is_block(blocks, hash)) {
            s->i = i;
            coarse_best best = {.s = s};
            od_coarse_find(blocks->index, hash, block_candidate, &best);
            if (best.after != 0 && i + best.after > s->reach) {
                accept(s, best.layer, best.position, best.after);
                if (s->reach >= stop || i >= last)
                    return;
                i = s->reach < last ? s->reach : last;
                hash = od_block_hash(s->target + i);
                continue;
            }
        }
        if (i >= last)
            return;
        hash = od_block_roll(blocks, hash, s->target + i++);
    }
}

/* Searches the bytes of target[from, to) that no match covers. */
static void search_left_over(search *s, uint64_t from, uint64_t to, const od_span *behind,
                             uint64_t first_found) {
    uint64_t covered = from, found_count = s->list->count;
    for (uint64_t f = first_found; f <= found_count && covered < to && !s->failed; f++) {
        /* The list grows meanwhile, behind the entries that are read here. */
        const od_span *right = f < found_count ? &s->list->spans[f] : behind;
        uint64_t end = right != NULL && right->at < to ? right->at : to;
        uint64_t reach = right != NULL ? right->at + right->size : 0;
        if (end > covered + s->effort->trust_gap)
            search_blocks(s, covered, end);
        if (reach > covered)
            covered = reach;
    }
    if (s->list->count > found_count)
        od_sort_spans(s->list->spans + first_found, s->list->count - first_found);
}

/* ---- step 3: dense search of the bytes left over, in the windows that face them ---- */

static void search_dense(search *s, uint64_t start, uint64_t stop, uint64_t readable) {
    const dense *d = &s->dense;
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
            uint64_t position = w->base + (number - w->first) * d->step,
                     after = weigh(s, w->layer, position);
            if (after > longest ||
                (layer != NULL && after == longest &&
                 distance(position - i, s->shift) < distance(best - i, s->shift))) {
                longest = after;
                best = position;
                layer = w->layer;
            }
        }
        /* Only a match that reaches further than all before it can make the path cheaper. */
        if (layer != NULL && i + longest > s->reach)
            accept(s, layer, best, longest);
        /* Any match that reaches further than `reach` has a key that begins here or later. */
        i = s->reach >= i + key + 1 ? s->reach - key + 1 : i + 1;
    }
}

/* Adds the base bytes that face target[from, to) on a diagonal, and `pad` more on both sides,
 * inside [low, high). */
static void add_window(search *s, uint64_t shift, uint64_t from, uint64_t to, uint64_t pad,
                       uint64_t low, uint64_t high) {
    int64_t start = (int64_t)(from + shift) - (int64_t)pad,
            end = (int64_t)(to + shift) + (int64_t)pad;
    if (start < (int64_t)low)
        start = (int64_t)low;
    if (end > (int64_t)high)
        end = (int64_t)high;
    if (end - start >= 8 &&
        od_span_push(&s->windows, (uint64_t)start, (uint64_t)(end - start), (uint64_t)start) != 0)
        s->failed = 1;
}

static void add_facing(search *s, const od_span *match, uint64_t from, uint64_t to, uint64_t pad) {
    const od_layer *layer = od_layer_of(s->base, match->source);
    add_window(s, match->source - match->at, from, to, pad, layer->start,
               layer->start + layer->size);
}

/* Adds the window of a hint for target[from, to), unless a match inside the hint's range already
 * points to the continuation in the base. */
static void add_hinted(search *s, const od_hint *hint, const od_span *left, const od_span *right,
                       uint64_t from, uint64_t to, uint64_t pad) {
    uint64_t end = hint->at + hint->size;
    if (end <= from || hint->source >= s->base->size)
        return;
    const od_layer *layer = od_layer_of(s->base, hint->source);
    if (hint->source_size > layer->size - (hint->source - layer->start))
        return;
    if (hint->source_size > SMALL_HINT && ((left->size != 0 && left->at >= hint->at) ||
                                           (right != NULL && right->at + right->size <= end)))
        return;
    uint64_t more = distance(hint->source_size, hint->size);
    add_window(s, hint->source - hint->at, from, to, pad + more, hint->source,
               hint->source + hint->source_size);
}

/* Adds all of the base. */
static void add_all(search *s) {
    for (uint64_t n = 0; n < s->base->count; n++) {
        const od_layer *layer = &s->base->layers[n];
        if (layer->size != 0)
            add_window(s, 0, layer->start, layer->start + layer->size, 0, layer->start,
                       layer->start + layer->size);
    }
}

/* Sorts windows, joins them, and cuts them at layer borders and at `most` bytes in total. */
static void tidy_windows(search *s, uint64_t most) {
    od_span *all = s->windows.spans;
    uint64_t count = 0;
    od_sort_spans(all, s->windows.count);
    for (uint64_t i = 0; i < s->windows.count; i++) {
        od_span *last = count != 0 ? &all[count - 1] : NULL;
        if (last != NULL && all[i].source <= last->source + last->size &&
            od_layer_of(s->base, last->source) == od_layer_of(s->base, all[i].source)) {
            uint64_t end = all[i].source + all[i].size;
            if (end > last->source + last->size)
                last->size = end - last->source;
        } else {
            all[count++] = all[i];
        }
    }
    uint64_t total = 0;
    for (uint64_t i = 0; i < count; i++) {
        if (all[i].size > most - total)
            all[i].size = most - total;
        total += all[i].size;
        if (all[i].size < 8) {
            count = i;
            break;
        }
    }
    s->windows.count = count;
}

static void search_unit(search *s, const od_coarse *coarse, const uint64_t *gear, uint64_t from,
                        uint64_t to, uint64_t readable, od_span *left, const od_span *behind,
                        const od_hint *hints, uint64_t hint_count, uint64_t first_found) {
    const od_effort *effort = s->effort;
    s->reach = s->i = from;
    follow_near(s);
    if (behind != NULL)
        follow_back(s, od_layer_of(s->base, behind->source), behind->at,
                    behind->source - behind->at, from);
    if (coarse != NULL && to - from >= OD_WINDOW)
        search_coarse(s, coarse, gear, from, to);
    if (s->failed)
        return;
    /* The bytes left over, and the base bytes that face them. */
    if (s->list->count > first_found)
        od_sort_spans(s->list->spans + first_found, s->list->count - first_found);
    if (s->blocks != NULL)
        search_left_over(s, from, to, behind, first_found);
    od_span_list rest = {0};
    uint64_t covered = from, left_over = 0, found_count = s->list->count, first_hint = 0;
    s->windows.count = 0;
    for (uint64_t f = first_found; f <= found_count && covered < to && !s->failed; f++) {
        const od_span *right = f < found_count ? &s->list->spans[f] : behind;
        uint64_t end = right != NULL && right->at < to ? right->at : to;
        if (end > covered + effort->trust_gap) {
            uint64_t size = end - covered, pad = effort->pad_floor + effort->pad_ratio * size;
            if (pad > effort->pad_most)
                pad = effort->pad_most;
            left_over += size;
            if (od_span_push(&rest, covered, size, 0) != 0)
                s->failed = 1;
            if (left->size != 0)
                add_facing(s, left, covered, end, pad);
            if (right != NULL)
                add_facing(s, right, covered, end, pad);
            while (first_hint < hint_count &&
                   hints[first_hint].at + hints[first_hint].size <= covered)
                first_hint++;
            for (uint64_t h = first_hint; h < hint_count && hints[h].at < end; h++)
                add_hinted(s, &hints[h], left, right, covered, end, pad);
        }
        if (right != NULL && right->at + right->size > covered) {
            covered = right->at + right->size;
            *left = *right;
        }
    }
    if (left_over >= WORTH_INDEXING && !s->failed) {
        if (s->base->size <= SMALL_HINT) /* so small that it may hold no sample */
            add_all(s);
        tidy_windows(s, effort->window_ratio * effort->unit);
        if (s->windows.count != 0) {
            if (build(&s->dense, s->base, s->windows.spans, s->windows.count) != 0)
                s->failed = 1;
            for (uint64_t r = 0; r < rest.count && !s->failed; r++) {
                uint64_t start = rest.spans[r].at, end = start + rest.spans[r].size;
                s->reach = start;
                search_dense(s,
                             start - s->from >= s->dense.key ? start - s->dense.key + 1 : s->from,
                             end, readable);
            }
        }
    }
    free(rest.spans);
}

/* Appends the known spans, clipped to target[from, to). */
static int push_known(const od_span *spans, uint64_t count, uint64_t from, uint64_t to,
                      od_span_list *list) {
    for (uint64_t n = 0; n < count && spans[n].at < to; n++) {
        uint64_t at = spans[n].at > from ? spans[n].at : from;
        uint64_t end = spans[n].at + spans[n].size < to ? spans[n].at + spans[n].size : to;
        if (at < end && od_span_push(list, at, end - at, spans[n].source + (at - spans[n].at)) != 0)
            return OD_NO_MEMORY;
    }
    return 0;
}

int od_find_matches(const od_base *base, const od_coarse *coarse, const od_blocks *blocks,
                    const uint8_t *target, uint64_t target_size, uint64_t from, uint64_t to,
                    const od_span *spans, uint64_t span_count, const od_hint *hints,
                    uint64_t hint_count, const od_effort *effort, od_span_list *list,
                    uint64_t *work) {
    const uint64_t budget = LEAST_BUDGET + BUDGET * (to - from);
    search s = {.budget = budget,
                .base = base,
                .blocks = blocks,
                .target = target,
                .from = from,
                .to = to,
                .effort = effort,
                .list = list,
                .wake = UINT64_MAX};
    s.dense.key = effort->key;
    s.dense.step = effort->step;
    uint64_t gear[256];
    od_gear(gear);
    uint64_t readable = target_size >= 8 ? target_size - 8 + 1 : 0;
    if (readable > to)
        readable = to;
    /* Known spans enter the list first: the search cannot lose any. */
    if (push_known(spans, span_count, from, to, list) != 0)
        return OD_NO_MEMORY;
    uint64_t covered = from, next = 0, first_found = list->count;
    od_span left = {0};
    while (covered < to && !s.failed) {
        uint64_t gap_end = to;
        for (; next < span_count; next++) { /* diagonals of known spans continue behind them */
            const od_span *span = &spans[next];
            uint64_t at = span->at > from ? span->at : from;
            uint64_t end = span->at + span->size < to ? span->at + span->size : to;
            if (span->at > covered) {
                gap_end = span->at < to ? span->at : to;
                break;
            }
            if (at >= end)
                continue;
            uint64_t source = span->source + (at - span->at);
            if (end < to)
                remember(&s, od_layer_of(base, source), at, end - at, source - at);
            if (end > covered) {
                covered = end;
                left = (od_span){at, end - at, source};
                s.shift = source - at;
            }
        }
        while (covered < gap_end && !s.failed) {
            uint64_t end = gap_end - covered > effort->unit + effort->unit / 2
                               ? covered + effort->unit
                               : gap_end;
            while (hint_count != 0 && hints->at + hints->size <= covered)
                hints++, hint_count--;
            const od_span *behind =
                end == gap_end && next < span_count && spans[next].at == end ? &spans[next] : NULL;
            search_unit(&s, coarse, gear, covered, end, readable, &left, behind, hints, hint_count,
                        first_found);
            first_found = list->count;
            covered = end;
            /* a long match: nothing to search before its end */
            if (left.size != 0 && left.at + left.size > covered)
                covered = left.at + left.size;
        }
    }
    free(s.dense.windows);
    free(s.dense.entries);
    free(s.windows.spans);
    *work = budget - s.budget;
    if (s.failed)
        return OD_NO_MEMORY;
    od_sort_spans(list->spans, list->count);
    return 0;
}
