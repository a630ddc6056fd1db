/* Diagonals: follows matches over small gaps, and records what is equal there.
 *
 * match.c explains diagonals (step 4). A live diagonal is followed as the search comes near to the
 * end of its last equal run. Its credit decides when it is dropped. */
#include "search.h"

#include <string.h>

#define STRIDE 48 /* bytes that a live diagonal is followed beyond OD_NEAR */
#define CREDIBLE 12 /* the diagonal of a match of this size is followed */
#define SHORTEST_RUN 4
/* a run on a followed diagonal adds its size less this to the credit; a gap costs its size */
#define RUN_TOLL 6
#define MOST_CREDIT 96 /* upper bound of the credit; a diagonal without credit is dropped */

static inline uint64_t smaller(uint64_t a, uint64_t b) {
    return a < b ? a : b;
}

/* Returns the first position in [start, stop) from which on SHORTEST_RUN bytes are equal, or
 * `stop`. No byte from `end` on is read. */
static inline uint64_t next_run(const uint8_t *a, const uint8_t *b, uint64_t start, uint64_t stop,
                                uint64_t end) {
    const uint64_t low = 0x7f7f7f7f7f7f7f7fULL;
    for (; start < stop && end - start >= 8; start += 8 - SHORTEST_RUN + 1) {
        uint64_t unequal = od_load64(a + start) ^ od_load64(b + start);
        uint64_t equal = ~(((unequal & low) + low) | unequal | low); /* 0x80 in each equal byte */
        equal &= equal >> 8;
        equal &= equal >> 16; /* in each byte that begins four equal ones; zeros come in above */
        if (equal != 0)
            return smaller(start + (uint64_t)(__builtin_ctzll(equal) >> 3), stop);
    }
    for (; start < stop && end - start >= SHORTEST_RUN; start++)
        if (memcmp(a + start, b + start, SHORTEST_RUN) == 0)
            return start;
    return stop;
}

/* Follows a live diagonal over gaps, adding each equal run, until it is known up to `goal` or is
 * dropped. */
static void follow(od_search *s, od_diagonal *d, uint64_t goal) {
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
        uint64_t stop = x + effort->gap < most ? x + effort->gap : most, run = 0;
        uint64_t start = next_run(mine, other, x, stop, most);
        s->budget -= smaller(start - x, s->budget);
        if (start < stop)
            run = od_charged_after(s, mine + start, other + start, most - start);
        if (run < SHORTEST_RUN)
            run = 0; /* the budget is used up */
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
void od_follow_near(od_search *s) {
    uint64_t wake = UINT64_MAX;
    for (unsigned d = 0; d < OD_DIAGONALS; d++) {
        od_diagonal *diagonal = &s->diagonals[d];
        if (!diagonal->live)
            continue;
        if (diagonal->until < s->i + OD_NEAR)
            follow(s, diagonal, s->i + OD_NEAR + STRIDE);
        if (diagonal->live && diagonal->until < wake)
            wake = diagonal->until;
    }
    s->wake = wake;
}

/* Returns a slot for a new diagonal: a dead one's, or the least promising one's. */
static od_diagonal *place_for(od_search *s) {
    od_diagonal *worst = &s->diagonals[0];
    for (unsigned d = 0; d < OD_DIAGONALS; d++) {
        od_diagonal *here = &s->diagonals[d];
        if (here->layer == NULL)
            return here;
        if (here->live != worst->live ? !here->live
            : here->live ? here->credit < worst->credit
                         : here->until < worst->until)
            worst = here;
    }
    return worst;
}

void od_remember(od_search *s, const od_layer *layer, uint64_t since, uint64_t size,
                 uint64_t shift) {
    od_diagonal *d = place_for(s);
    *d = (od_diagonal){shift,
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
static od_diagonal *known_diagonal(od_search *s, uint64_t shift) {
    for (unsigned d = 0; d < OD_DIAGONALS; d++)
        if (s->diagonals[d].shift == shift && s->diagonals[d].layer != NULL &&
            s->diagonals[d].since <= s->i)
            return &s->diagonals[d];
    return NULL;
}

/* Returns how many bytes are equal from target position s->i and base `position` on; 0 where a
 * diagonal has already covered them. */
uint64_t od_weigh(od_search *s, const od_layer *layer, uint64_t position) {
    od_diagonal *known = known_diagonal(s, position - s->i);
    if (known != NULL && known->until > s->i)
        return 0;
    uint64_t inside = position - layer->start, limit = layer->size - inside;
    if (limit > s->to - s->i)
        limit = s->to - s->i;
    return od_charged_after(s, s->target + s->i, layer->at + inside, limit);
}

/* Records a match that od_weigh() has found, extended backwards. Returns where it begins. */
uint64_t od_accept(od_search *s, const od_layer *layer, uint64_t position, uint64_t after) {
    uint64_t shift = position - s->i, inside = position - layer->start, before = s->i - s->from;
    od_diagonal *known = known_diagonal(s, shift);
    if (before > inside)
        before = inside;
    if (before > OD_FURTHEST_BACK)
        before = OD_FURTHEST_BACK;
    if (known != NULL && before > s->i - known->until)
        before = s->i - known->until;
    before = od_charged_before(s, s->target + s->i, layer->at + inside, before);
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
    od_remember(s, layer, start, size, shift);
    s->shift = shift;
    return start;
}

/* Follows a diagonal backwards over gaps from the start of a match, not beyond `floor`. */
void od_follow_back(od_search *s, const od_layer *layer, uint64_t start, uint64_t shift,
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
            run = od_charged_before(s, s->target + end, layer->at + (end + shift - layer->start),
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
