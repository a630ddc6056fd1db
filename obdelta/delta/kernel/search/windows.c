/* Windows of the base for the dense search: the base bytes at the distance of the matches around a
 * gap, their diagonal. */
#include "search.h"

#define SMALL_HINT (1u << 15) /* bytes of the base that are always searched */

/* Adds the base bytes that face target[from, to) on a diagonal, and `pad` more on both sides,
 * inside [low, high). */
static void add_window(od_search *s, uint64_t shift, uint64_t from, uint64_t to, uint64_t pad,
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

static void add_facing(od_search *s, const od_span *match, uint64_t from, uint64_t to,
                       uint64_t pad) {
    const od_layer *layer = od_layer_of(s->base, match->source);
    add_window(s, match->source - match->at, from, to, pad, layer->start,
               layer->start + layer->size);
}

/* Adds the window of a hint for target[from, to), unless a match inside the hint's range already
 * points to the continuation in the base. */
static void add_hinted(od_search *s, const od_hint *hint, const od_span *right, uint64_t from,
                       uint64_t to, uint64_t pad) {
    uint64_t end = hint->at + hint->size;
    if (end <= from || hint->source >= s->base->size)
        return;
    const od_layer *layer = od_layer_of(s->base, hint->source);
    if (hint->source_size > layer->size - (hint->source - layer->start))
        return;
    if (hint->source_size > SMALL_HINT && ((s->left.size != 0 && s->left.at >= hint->at) ||
                                           (right != NULL && right->at + right->size <= end)))
        return;
    uint64_t more = od_distance(hint->source_size, hint->size);
    add_window(s, hint->source - hint->at, from, to, pad + more, hint->source,
               hint->source + hint->source_size);
}

/* Adds all of the base. */
static void add_all(od_search *s) {
    for (uint64_t n = 0; n < s->base->count; n++) {
        const od_layer *layer = &s->base->layers[n];
        if (layer->size != 0)
            add_window(s, 0, layer->start, layer->start + layer->size, 0, layer->start,
                       layer->start + layer->size);
    }
}

/* Sorts windows, joins them, and cuts them at layer borders and at `most` bytes in total. */
static void tidy_windows(od_search *s, uint64_t most) {
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

/* Adds the windows for target[from, to), which lies between s->left and `right` (NULL: none).
 * *first_hint is the first hint that may reach behind `from`. */
static void add_windows(od_search *s, const od_span *right, uint64_t from, uint64_t to,
                        uint64_t *first_hint) {
    const od_effort *effort = s->effort;
    uint64_t pad = effort->pad_floor + effort->pad_ratio * (to - from);
    if (pad > effort->pad_most)
        pad = effort->pad_most;
    if (s->left.size != 0)
        add_facing(s, &s->left, from, to, pad);
    if (right != NULL)
        add_facing(s, right, from, to, pad);
    while (*first_hint < s->hint_count &&
           s->hints[*first_hint].at + s->hints[*first_hint].size <= from)
        ++*first_hint;
    for (uint64_t h = *first_hint; h < s->hint_count && s->hints[h].at < to; h++)
        add_hinted(s, &s->hints[h], right, from, to, pad);
}

/* Lists the bytes of target[from, to) that no match covers, and the windows of the base that face
 * them. Returns the number of these bytes. */
uint64_t od_list_rest(od_search *s, uint64_t from, uint64_t to, const od_span *behind) {
    uint64_t covered = from, left_over = 0, found_count = s->list->count, first_hint = 0;
    s->windows.count = s->rest.count = 0;
    for (uint64_t f = s->first_found; f <= found_count && covered < to && !s->failed; f++) {
        const od_span *right = f < found_count ? &s->list->spans[f] : behind;
        uint64_t end = right != NULL && right->at < to ? right->at : to;
        if (end > covered + s->effort->trust_gap) {
            left_over += end - covered;
            if (od_span_push(&s->rest, covered, end - covered, 0) != 0)
                s->failed = 1;
            add_windows(s, right, covered, end, &first_hint);
        }
        if (right != NULL && right->at + right->size > covered) {
            covered = right->at + right->size;
            s->left = *right;
        }
    }
    return left_over;
}

void od_search_rest(od_search *s) {
    if (s->base->size <= SMALL_HINT) /* so small that it may hold no sample */
        add_all(s);
    tidy_windows(s, s->effort->window_ratio * s->effort->unit);
    if (s->windows.count == 0)
        return;
    if (od_dense_fill(&s->dense, s->base, s->windows.spans, s->windows.count) != 0)
        s->failed = 1;
    for (uint64_t r = 0; r < s->rest.count && !s->failed; r++) {
        uint64_t start = s->rest.spans[r].at, end = start + s->rest.spans[r].size;
        s->reach = start;
        od_search_dense(s, start - s->from >= s->dense.key ? start - s->dense.key + 1 : s->from,
                        end);
    }
}
