/* Match search: finds ranges of the target that are equal to ranges of the base.
 *
 * The target range is searched from coarse to fine. Each step only searches the bytes that the
 * steps before left over, and adds its matches to one list. cheapest_path.c then takes the cheapest
 * path through the list. All matches are hints until bytes have been compared; `budget` bounds the
 * bytes compared.
 *
 *  target  |=======KNOWN=======|--------------------- gap ---------------------|==KNOWN==|
 *
 *   1                             ####sample####                ###sample###
 *   2                                              ##block##
 *   3                          ++                          +++               ++
 *   4                      ..>..>..             ..>                            <..
 *
 *  plan    |copy---------------|lit|copy---------|copy-----|lit|copy-----------|copy-----|
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
 * The list may hold many overlapping matches for one byte. cheapest_path.c chooses among them by
 * price: it knows what a command costs the device and what the compressor makes of literals. */
#include "search.h"

#include <stdlib.h>

#define BUDGET 256              /* most bytes that are compared for a target byte, */
#define LEAST_BUDGET (1u << 20) /* and least budget of a range */
#define WORTH_INDEXING 16 /* bytes left over in a unit from which on they are searched densely */

static void sort_found(od_search *s) {
    od_sort_spans(s->list->spans + s->first_found, s->list->count - s->first_found);
}

/* Searches the bytes of target[from, to) that no match covers. */
static void search_left_over(od_search *s, uint64_t from, uint64_t to, const od_span *behind) {
    uint64_t covered = from, found_count = s->list->count;
    for (uint64_t f = s->first_found; f <= found_count && covered < to && !s->failed; f++) {
        /* The list grows meanwhile, behind the entries that are read here. */
        const od_span *right = f < found_count ? &s->list->spans[f] : behind;
        uint64_t end = right != NULL && right->at < to ? right->at : to;
        uint64_t reach = right != NULL ? right->at + right->size : 0;
        if (end > covered + s->effort->trust_gap)
            od_search_blocks(s, covered, end);
        if (reach > covered)
            covered = reach;
    }
    if (s->list->count > found_count)
        sort_found(s);
}

/* Searches one unit; `behind` is the known span that begins at its end, or NULL. */
static void search_unit(od_search *s, const od_sampled *sampled, uint64_t from, uint64_t to,
                        const od_span *behind) {
    s->reach = s->i = from;
    od_follow_near(s);
    if (behind != NULL)
        od_follow_back(s, od_layer_of(s->base, behind->source), behind->at,
                    behind->source - behind->at, from);
    if (sampled != NULL && to - from >= OD_WINDOW)
        od_search_samples(s, sampled, from, to);
    if (s->failed)
        return;
    if (s->list->count > s->first_found)
        sort_found(s);
    s->last_block = OD_NONE;
    if (s->blocks != NULL)
        search_left_over(s, from, to, behind);
    uint64_t left_over = od_list_rest(s, from, to, behind);
    if (left_over >= WORTH_INDEXING && !s->failed)
        od_search_rest(s);
}

/* Searches the next unit of a gap. Returns the position up to which the target is searched. */
static uint64_t search_part(od_search *s, const od_sampled *sampled, uint64_t covered,
                            uint64_t gap_end, const od_span *right) {
    const uint64_t unit = s->effort->unit;
    uint64_t end = gap_end - covered > unit + unit / 2 ? covered + unit : gap_end;
    while (s->hint_count != 0 && s->hints->at + s->hints->size <= covered)
        s->hints++, s->hint_count--;
    search_unit(s, sampled, covered, end,
                right != NULL && end == gap_end && right->at == end ? right : NULL);
    s->first_found = s->list->count;
    /* a long match: nothing to search before its end */
    if (s->left.size != 0 && s->left.at + s->left.size > end)
        end = s->left.at + s->left.size;
    return end;
}

/* Appends the known spans, clipped to the job's range. */
static int push_known(const od_job *job, od_span_list *list) {
    for (uint64_t n = 0; n < job->span_count && job->spans[n].at < job->to; n++) {
        const od_span *span = &job->spans[n];
        uint64_t at = span->at > job->from ? span->at : job->from;
        uint64_t end = span->at + span->size < job->to ? span->at + span->size : job->to;
        if (at < end && od_span_push(list, at, end - at, span->source + (at - span->at)) != 0)
            return OD_NO_MEMORY;
    }
    return 0;
}

/* Passes the known spans that begin at `covered` or before; *next becomes the first one behind.
 * Their diagonals continue behind them. Returns where the gap behind them begins. */
static uint64_t pass_known(od_search *s, const od_job *job, uint64_t covered, uint64_t *next) {
    for (; *next < job->span_count && job->spans[*next].at <= covered; ++*next) {
        const od_span *span = &job->spans[*next];
        uint64_t at = span->at > s->from ? span->at : s->from;
        uint64_t end = span->at + span->size < s->to ? span->at + span->size : s->to;
        if (at >= end)
            continue;
        uint64_t source = span->source + (at - span->at);
        if (end < s->to)
            od_remember(s, od_layer_of(s->base, source), at, end - at, source - at);
        if (end > covered) {
            covered = end;
            s->left = (od_span){at, end - at, source};
            s->shift = source - at;
        }
    }
    return covered;
}

static int find(const od_job *job, od_span_list *list, uint64_t *work) {
    const od_effort *effort = job->effort;
    const uint64_t from = job->from, to = job->to;
    const uint64_t budget = LEAST_BUDGET + BUDGET * (to - from);
    od_search s = {.budget = budget,
                .base = job->base,
                .blocks = job->blocks,
                .target = job->target,
                .from = from,
                .to = to,
                .effort = effort,
                .list = list,
                .wake = UINT64_MAX,
                .hints = job->hints,
                .hint_count = job->hint_count};
    s.dense.key = effort->key;
    s.dense.step = effort->step;
    od_gear(s.gear);
    s.readable = job->target_size >= 8 ? job->target_size - 8 + 1 : 0;
    if (s.readable > to)
        s.readable = to;
    /* Known spans enter the list first: the search cannot lose any. */
    if (push_known(job, list) != 0)
        return OD_NO_MEMORY;
    s.first_found = list->count;
    uint64_t covered = from, next = 0;
    while (covered < to && !s.failed) {
        covered = pass_known(&s, job, covered, &next);
        const od_span *right = next < job->span_count ? &job->spans[next] : NULL;
        uint64_t gap_end = right != NULL && right->at < to ? right->at : to;
        while (covered < gap_end && !s.failed)
            covered = search_part(&s, job->sampled, covered, gap_end, right);
    }
    free(s.dense.windows);
    free(s.dense.entries);
    free(s.dense.places);
    free(s.windows.spans);
    free(s.rest.spans);
    *work = budget - s.budget;
    if (s.failed)
        return OD_NO_MEMORY;
    od_sort_spans(list->spans, list->count);
    return 0;
}

od_matches *od_find_matches(const od_job *job) {
    od_matches *matches = calloc(1, sizeof *matches);
    od_span_list list = {0};
    uint64_t work = 0;
    int inside = job->from <= job->to && job->to <= job->target_size;
    if (matches == NULL || (inside && find(job, &list, &work) != 0)) {
        free(matches);
        free(list.spans);
        return NULL;
    }
    *matches = (od_matches){list.spans, list.count, work};
    return matches;
}

void od_free_matches(od_matches *matches) {
    if (matches != NULL) {
        free(matches->spans);
        free(matches);
    }
}
