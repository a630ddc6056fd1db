/* Exact matches: finds tar entries of the target whose whole content is in the base.
 *
 * Their bytes need no search. The spans found here are the planner's known spans. */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

#define DEEPEST 64            /* entries of a chain that are examined at most */
#define MOST_UNEQUAL 2        /* of them, bodies with the same hash and size but other bytes */
#define FURTHEST_BACK (1u << 14) /* bytes that a span is extended backwards */

typedef struct {
    const od_tar *tar;
    const od_member *member;
    uint64_t position; /* of the body, in the base */
    uint64_t next;     /* the previous one in its chain, + 1 */
} known;

struct od_exact {
    const od_base *base;
    const uint8_t *target;
    uint64_t target_size;
    const od_tar *members;
    known *all;
    uint64_t count, mask;
    uint64_t *heads;
    uint64_t next;  /* next member */
    uint64_t shift; /* base position minus target position of the last one found */
    uint64_t steps; /* entries examined, and blocks compared */
    od_span_list list;
};

/* Returns the position in its tar of the bytes compared for an entry: its content, or its headers
 * if it has none. */
static inline uint64_t body_of(const od_member *member) {
    return member->size != 0 ? member->content : member->start;
}

static inline uint64_t body_size(const od_member *member) {
    return member->size != 0 ? member->size : member->content - member->start;
}

/* Crafted entries may share a hash, but not also every size. The end of a chain decides which bytes
 * are found, so the order must be the same in every process. */
static uint64_t *head_of(const od_exact *k, const od_member *member) {
    uint64_t key =
        (member->hash ^ body_size(member) * 0x9e3779b97f4a7c15ULL) * 0xe7037ed1a0b428dbULL;
    return &k->heads[(key ^ key >> 32) & k->mask];
}

static int learn(od_exact *k, const od_tar *const *tars) {
    const od_base *base = k->base;
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
            uint64_t body = body_of(member), size = body_size(member);
            if (size == 0 || body > layer->size || size > layer->size - body)
                continue;
            uint64_t *head = head_of(k, member);
            k->all[k->count] = (known){tars[l], member, layer->start + body, *head};
            *head = ++k->count;
        }
    }
    return 1;
}

od_exact *od_exact_new(const od_base *base, const od_tar *const *tars, const uint8_t *target,
                     uint64_t target_size, const od_tar *members) {
    od_exact *exact = calloc(1, sizeof *exact);
    if (exact == NULL)
        return NULL;
    exact->base = base;
    exact->target = target;
    exact->target_size = target_size;
    exact->members = members;
    if (!learn(exact, tars)) {
        od_free_exact(exact);
        return NULL;
    }
    return exact;
}

void od_free_exact(od_exact *exact) {
    if (exact != NULL) {
        free(exact->all);
        free(exact->heads);
        free(exact->list.spans);
        free(exact);
    }
}

static int same_name(const od_tar *a, const od_member *x, const od_tar *b, const od_member *y) {
    return x->name_size == y->name_size && x->name <= a->names_size &&
           x->name_size <= a->names_size - x->name && y->name <= b->names_size &&
           y->name_size <= b->names_size - y->name &&
           memcmp(a->names + x->name, b->names + y->name, x->name_size) == 0;
}

static const known *best_known(od_exact *k, const od_member *member) {
    const known *best = NULL;
    uint64_t body = body_of(member), size = body_size(member);
    int best_rank = 0, seen = 0, unequal = 0;
    for (uint64_t i = *head_of(k, member); i != 0 && seen < DEEPEST; i = k->all[i - 1].next) {
        const known *here = &k->all[i - 1];
        seen++;
        k->steps++;
        if (here->member->hash != member->hash || body_size(here->member) != size ||
            (here->member->size == 0) != (member->size == 0))
            continue;
        int rank = here->position == body + k->shift                        ? 3
                   : same_name(here->tar, here->member, k->members, member) ? 2
                                                                            : 1;
        if (rank <= best_rank)
            continue;
        const od_layer *layer = od_layer_of(k->base, here->position);
        k->steps += size / OD_BLOCK;
        if (memcmp(layer->at + (here->position - layer->start), k->target + body, size) != 0) {
            if (++unequal == MOST_UNEQUAL)
                break;
            continue;
        }
        best = here;
        best_rank = rank;
        if (rank == 3)
            break;
    }
    return best;
}

/* Records the span of a member, joined with the previous one where all bytes between are equal. */
static int put_span(od_exact *k, const od_member *member, uint64_t source) {
    uint64_t at = body_of(member), size = body_size(member);
    const od_layer *layer = od_layer_of(k->base, source);
    uint64_t inside = source - layer->start, before = at < inside ? at : inside;
    od_span *last = k->list.count != 0 ? &k->list.spans[k->list.count - 1] : NULL;
    uint64_t behind = last != NULL && source - at == last->source - last->at
                          ? at - (last->at + last->size)
                          : OD_NONE;
    uint64_t most = behind < FURTHEST_BACK ? behind : FURTHEST_BACK;
    before = od_equal_before(k->target + at, layer->at + inside, before < most ? before : most);
    /* in the same layer: one copy is enough */
    if (before == behind && last->source >= layer->start) {
        last->size += before + size;
        return 0;
    }
    return od_span_push(&k->list, at - before, before + size, source - before);
}

/* Extends the last span over the padding and headers behind it. */
static void grow_last(od_exact *k, uint64_t until) {
    if (k->list.count == 0)
        return;
    od_span *last = &k->list.spans[k->list.count - 1];
    uint64_t end = last->at + last->size;
    if (end >= until)
        return;
    const od_layer *layer = od_layer_of(k->base, last->source);
    uint64_t inside = last->source + last->size - layer->start, most = layer->size - inside;
    if (most > until - end)
        most = until - end;
    last->size += od_equal_after(k->target + end, layer->at + inside, most);
}

int64_t od_exact_next(od_exact *exact, uint64_t most, uint64_t *found) {
    const od_tar *members = exact->members;
    uint64_t compared = 0;
    for (; exact->next < members->count && compared < most; exact->next++) {
        const od_member *member = &members->members[exact->next];
        found[exact->next] = OD_NONE;
        uint64_t body = body_of(member), size = body_size(member);
        if (size == 0 || body > exact->target_size || size > exact->target_size - body)
            continue;
        grow_last(exact, body);
        compared += member->end - member->start;
        const known *best = best_known(exact, member);
        if (best == NULL)
            continue;
        found[exact->next] = best->position;
        exact->shift = best->position - body;
        if (put_span(exact, member, best->position) != 0)
            return OD_NO_MEMORY;
    }
    if (exact->next == members->count)
        grow_last(exact, exact->target_size);
    return (int64_t)exact->next;
}

uint64_t od_exact_steps(const od_exact *exact) {
    return exact->steps;
}

const od_span *od_exact_spans(od_exact *exact, uint64_t *count) {
    /* extending backwards may put one before its predecessor */
    od_sort_spans(exact->list.spans, exact->list.count);
    *count = exact->list.count;
    return exact->list.spans;
}
