/* What need not be searched: members of the target whose content lies in the base as a whole. */
#include "_kernel.h"

#include <stdlib.h>
#include <string.h>

#define DEEPEST 64            /* members of one hash and size that are looked at */
#define FURTHEST_BACK (1u << 14) /* bytes that a span grows backwards */

typedef struct {
    const od_tar *tar;
    const od_member *member;
    uint64_t position; /* of the content, in the base */
    uint64_t next;     /* the one before it in its chain, + 1 */
} known;

typedef struct {
    known *all;
    uint64_t count, mask;
    uint64_t *heads;
} knowledge;

static int learn(knowledge *k, const od_base *base, const od_tar *const *tars) {
    uint64_t count = 0, room = 256;
    for (uint64_t l = 0; l < base->count; l++)
        count += tars[l]->count;
    while (room < 2 * count)
        room *= 2;
    k->mask = room - 1;
    k->all = malloc((count + 1) * sizeof *k->all);
    k->heads = calloc(room, sizeof *k->heads);
    if (k->all == NULL || k->heads == NULL)
        return 0;
    for (uint64_t l = 0; l < base->count; l++) {
        const od_layer *layer = &base->layers[l];
        for (uint64_t m = 0; m < tars[l]->count; m++) {
            const od_member *member = &tars[l]->members[m];
            if (member->size == 0 || member->content > layer->size || member->size > layer->size - member->content)
                continue;
            uint64_t *head = &k->heads[member->hash & k->mask];
            k->all[k->count] = (known){tars[l], member, layer->start + member->content, *head};
            *head = ++k->count;
        }
    }
    return 1;
}

static int same_name(const od_tar *a, const od_member *x, const od_tar *b, const od_member *y) {
    return x->name_size == y->name_size && x->name <= a->names_size && x->name_size <= a->names_size - x->name &&
           y->name <= b->names_size && y->name_size <= b->names_size - y->name &&
           memcmp(a->names + x->name, b->names + y->name, x->name_size) == 0;
}

static const known *best_known(const knowledge *k, const od_base *base, const uint8_t *target, const od_tar *members,
                               const od_member *member, uint64_t expected) {
    const known *best = NULL;
    int best_rank = 0, seen = 0;
    for (uint64_t i = k->heads[member->hash & k->mask]; i != 0 && seen < DEEPEST; i = k->all[i - 1].next) {
        const known *here = &k->all[i - 1];
        if (here->member->hash != member->hash || here->member->size != member->size)
            continue;
        seen++;
        int rank = here->position == expected ? 3 : same_name(here->tar, here->member, members, member) ? 2 : 1;
        if (rank <= best_rank)
            continue;
        const od_layer *layer = od_layer_of(base, here->position);
        if (memcmp(layer->at + (here->position - layer->start), target + member->content, member->size) != 0)
            continue;
        best = here;
        best_rank = rank;
        if (rank == 3)
            break;
    }
    return best;
}

int od_same_members(const od_base *base, const od_tar *const *tars, const uint8_t *target, uint64_t target_size,
                    const od_tar *members, uint64_t *found) {
    knowledge k = {0};
    int result = OD_NO_MEMORY;
    if (learn(&k, base, tars)) {
        uint64_t shift = 0; /* base position minus target position of the last one found */
        for (uint64_t m = 0; m < members->count; m++) {
            const od_member *member = &members->members[m];
            found[m] = OD_NONE;
            if (member->size == 0 || member->content > target_size || member->size > target_size - member->content)
                continue;
            const known *best = best_known(&k, base, target, members, member, member->content + shift);
            if (best != NULL) {
                found[m] = best->position;
                shift = best->position - member->content;
            }
        }
        result = 0;
    }
    free(k.all);
    free(k.heads);
    return result;
}

od_spans *od_same_spans(const od_base *base, const uint8_t *target, uint64_t target_size, const od_tar *members,
                        const uint64_t *found) {
    od_span_list list = {0};
    for (uint64_t m = 0; m < members->count; m++) {
        const od_member *member = &members->members[m];
        if (found[m] == OD_NONE || member->size == 0)
            continue;
        uint64_t at = member->content, source = found[m], size = member->size;
        od_span *last = list.count != 0 ? &list.spans[list.count - 1] : NULL;
        if (last != NULL && source - at == last->source - last->at && at + size <= last->at + last->size)
            continue; /* the one before has grown over it */
        const od_layer *layer = od_layer_of(base, source);
        uint64_t inside = source - layer->start;
        uint64_t before = at;
        if (last != NULL && source - at == last->source - last->at)
            before = at - (last->at + last->size);
        if (before > inside)
            before = inside;
        if (before > FURTHEST_BACK)
            before = FURTHEST_BACK;
        before = od_equal_before(target + at, layer->at + inside, before);
        uint64_t after = target_size - (at + size), behind = layer->size - (inside + size);
        if (after > behind)
            after = behind;
        after = od_equal_after(target + at + size, layer->at + inside + size, after);
        if (od_span_push(&list, at - before, before + size + after, source - before) != 0) {
            free(list.spans);
            return NULL;
        }
    }
    od_spans *spans = malloc(sizeof *spans);
    if (spans == NULL) {
        free(list.spans);
        return NULL;
    }
    od_sort_spans(list.spans, list.count); /* growing backwards may put one before its predecessor */
    spans->spans = list.spans;
    spans->count = list.count;
    return spans;
}

void od_free_spans(od_spans *spans) {
    if (spans != NULL) {
        free(spans->spans);
        free(spans);
    }
}
