/* The state of a match search, and the functions that the files of this directory share. */
#ifndef OBDELTA_SEARCH_H
#define OBDELTA_SEARCH_H

#include "internal.h"

#define OD_DIAGONALS 8 /* remembered at a time */
#define OD_NEAR 16     /* a live diagonal that ends this near is followed */
/* bytes before an anchor that may extend its match, and in which its diagonal is followed */
#define OD_FURTHEST_BACK 4096

/* A window of the base in the dense index. */
typedef struct {
    uint64_t first; /* number of its first indexed position */
    uint64_t base;  /* base position of the window */
    const uint8_t *at;
    const od_layer *layer;
} od_window;

/* The dense index (dense.c): every step-th position of some windows, by a hash of `key` bytes. */
typedef struct {
    od_window *windows;
    uint64_t window_count, window_room;
    uint32_t *entries;
    uint64_t buckets, bucket_room;
    uint32_t *places; /* numbers of windows, by the numbers of indexed positions */
    uint64_t place_room;
    uint32_t step, key;
} od_dense;

/* The state of a diagonal: known from `since` to `until`, where its last equal run ends. A live one
 * is followed further as the search comes near. */
typedef struct {
    uint64_t shift; /* base position minus target position */
    uint64_t since, until;
    const od_layer *layer; /* NULL in an unused one */
    int64_t credit;
    int live;
} od_diagonal;

/* The search of one job, unit by unit. */
typedef struct {
    const od_base *base;
    const od_blocks *blocks;
    const uint8_t *target;
    uint64_t from, to;
    const od_effort *effort;
    od_span_list *list;
    od_diagonal diagonals[OD_DIAGONALS];
    uint64_t i;     /* current target position */
    uint64_t reach; /* a match that begins before and ends here is of no use */
    uint64_t wake;  /* the first live diagonal's `until` */
    uint64_t shift; /* of the last match */
    od_dense dense;
    od_span_list windows; /* of the base, for the current unit */
    od_span_list rest;    /* of the target: bytes that the dense search gets in this unit */
    od_span left;         /* last match before the current position */
    const od_hint *hints; /* those that end behind the current position */
    uint64_t hint_count;
    uint64_t first_found; /* first match of the current unit in the list */
    uint64_t readable;    /* end of the positions from which 8 bytes can be read */
    uint64_t gear[256];
    /* the last position of this unit that was looked up in the block index (OD_NONE), its hash */
    uint64_t last_block, last_block_hash;
    uint64_t budget; /* bytes that may still be compared; at 0, nothing more is found */
    int failed;
} od_search;

/* Return the number of bytes that are equal from two positions on, or before them; charge them to
 * the search. */
static inline uint64_t od_charged_after(od_search *s, const uint8_t *a, const uint8_t *b,
                                        uint64_t limit) {
    uint64_t equal = od_equal_after(a, b, limit < s->budget ? limit : s->budget);
    s->budget -= equal;
    return equal;
}

static inline uint64_t od_charged_before(od_search *s, const uint8_t *a, const uint8_t *b,
                                         uint64_t limit) {
    uint64_t equal = od_equal_before(a, b, limit < s->budget ? limit : s->budget);
    s->budget -= equal;
    return equal;
}

static inline uint64_t od_distance(uint64_t a, uint64_t b) {
    return (int64_t)(a - b) < 0 ? b - a : a - b;
}

/* ---- diagonals.c ---- */

/* Follows all live diagonals that the search has come near to. */
void od_follow_near(od_search *s);

/* Follows a diagonal backwards over gaps from the start of a match, not beyond `floor`. */
void od_follow_back(od_search *s, const od_layer *layer, uint64_t start, uint64_t shift,
                    uint64_t floor);

/* Remembers the diagonal of a match. */
void od_remember(od_search *s, const od_layer *layer, uint64_t since, uint64_t size,
                 uint64_t shift);

/* Returns how many bytes are equal from target position s->i and base `position` on; 0 where a
 * diagonal has already covered them. */
uint64_t od_weigh(od_search *s, const od_layer *layer, uint64_t position);

/* Records a match that od_weigh has found, extended backwards. Returns where it begins. */
uint64_t od_accept(od_search *s, const od_layer *layer, uint64_t position, uint64_t after);

/* ---- anchors.c ---- */

/* Finds samples in target[start, stop). */
void od_search_samples(od_search *s, const od_sampled *sampled, uint64_t start, uint64_t stop);

/* Finds blocks that begin or end in target[start, stop), where nothing is known yet. */
void od_search_blocks(od_search *s, uint64_t start, uint64_t stop);

/* ---- dense.c ---- */

/* Indexes windows (sorted by position, disjoint, `at` unused; each inside one layer). Returns 0 or
 * OD_NO_MEMORY. */
int od_dense_fill(od_dense *d, const od_base *base, const od_span *windows, uint64_t count);

/* Finds the longest match of each position in target[start, stop). */
void od_search_dense(od_search *s, uint64_t start, uint64_t stop);

/* ---- windows.c ---- */

/* Lists the bytes of target[from, to) that no match covers, and the windows of the base that face
 * them. Returns the number of these bytes. `behind` is the match that begins at `to`, or NULL. */
uint64_t od_list_rest(od_search *s, uint64_t from, uint64_t to, const od_span *behind);

/* Searches the listed bytes in the listed windows. */
void od_search_rest(od_search *s);

#endif
