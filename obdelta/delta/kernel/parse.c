/* The planner: the cheapest sequence of copies and literals through the matches that match.c finds.
 *
 * od_plan_range runs a whole plan: search (match.c), first prices (price.c), then one or more
 * passes of dynamic programming here, each with better gzip prices than the one before.
 *
 * Between two events (a match begins or ends) nothing changes: copying costs nothing more, literals
 * cost their bytes. So states are compared at events only: one state for "in a literal", and one
 * for each match that covers the position.
 *
 *  matches     [====A====]
 *                   [=======B=======]
 *                                       [==C==]
 *  events      ^    ^    ^          ^   ^     ^
 *  cheapest    [====A====][===B====]lit [==C==] */
#include "kernel.h"

#include <stdlib.h>
#include <string.h>

#define ACTIVE 24             /* matches that are followed at once */
#define SLICE (1u << 18)      /* bytes after which the best path is settled */
#define LONGEST_LITERAL (1u << 20)
#define NOBODY UINT32_MAX
#define LITERAL (1ULL << 63)   /* in place of a shift (those lie within 41 bits of zero) */

/* Prices of commands after gzip, in 1/64 bit: measured over many streams. Copies from the same 64
 * KB share the high bytes of their position with the command before, and gzip finds them. */
#define LITERAL_PRICE (6 * 64)
#define COPY_PRICE (29 * 64)
#define FAR_PRICE (6 * 64)       /* extra, from another 64 KB */
#define FARTHER_PRICE (5 * 64)   /* extra, from another 16 MB */
#define LONG_PRICE (6 * 64)      /* extra, for a length of two bytes */
#define SHORT_POSITION (7 * 64)  /* less, for a position of two bytes */
#define ALIGNED_PRICE (7 * 64)   /* less, at a tar block: the low bits are always the same */
#define TAR_BLOCK 512

/* A step of a path: from target position `at` on, copy along `shift`, or LITERAL. */
typedef struct {
    uint64_t at, shift;
    uint32_t before;
} node;

typedef struct {
    uint64_t end, shift;
    uint64_t aligned; /* next position that the match copies from a block's first byte */
    int64_t cost;
    uint32_t node;
} state;

/* Returns the first target position after x that a copy along `shift` takes from a block's first
 * byte. */
static uint64_t aligned_after(uint64_t x, uint64_t shift) {
    return x + TAR_BLOCK - (x + shift) % TAR_BLOCK;
}

typedef struct {
    const uint8_t *target;
    const od_effort *effort;
    const od_prices *prices;
    uint64_t priced; /* first range of prices that does not end before the current position */
    node *nodes;
    uint32_t node_count, node_room;
    state active[ACTIVE];
    unsigned active_count;
    uint32_t floor;       /* least price of a literal byte */
    int64_t literal_cost; /* of being in a literal at the current position */
    uint32_t literal_node;
    od_command *commands;
    uint64_t count, room;
    int failed;
} parse;

static uint32_t new_node(parse *p, uint64_t at, uint64_t shift, uint32_t before) {
    if (p->node_count == p->node_room) {
        uint32_t room = p->node_room != 0 ? p->node_room * 2 : 4096;
        node *grown = room > p->node_room ? realloc(p->nodes, room * sizeof *grown) : NULL;
        if (grown == NULL) {
            p->failed = 1;
            return NOBODY;
        }
        p->nodes = grown;
        p->node_room = room;
    }
    p->nodes[p->node_count] = (node){at, shift, before};
    return p->node_count++;
}

/* Returns the base position behind the last copy on the path, or OD_NONE. */
static uint64_t last_source(const parse *p, uint32_t way, uint64_t at) {
    if (way == NOBODY)
        return OD_NONE;
    const node *n = &p->nodes[way];
    if (n->shift != LITERAL)
        return n->shift + at;
    if (n->before == NOBODY)
        return OD_NONE;
    const node *copy = &p->nodes[n->before];
    return copy->shift == LITERAL ? OD_NONE : copy->shift + n->at;
}

static int64_t copy_price(const parse *p, uint64_t last, uint64_t source, uint64_t size) {
    int64_t price = COPY_PRICE + (int64_t)p->effort->copy_toll;
    if (last == OD_NONE || last >> 16 != source >> 16)
        price +=
            last == OD_NONE || last >> 24 != source >> 24 ? FAR_PRICE + FARTHER_PRICE : FAR_PRICE;
    if (size > 0xff)
        price += LONG_PRICE;
    if (source <= 0xffff)
        price -= SHORT_POSITION;
    if (source % TAR_BLOCK == 0)
        price -= ALIGNED_PRICE;
    return price;
}

static void put(parse *p, uint64_t size, uint64_t source) {
    while (size != 0 && !p->failed) {
        od_command *last = p->count != 0 ? &p->commands[p->count - 1] : NULL;
        if (last != NULL && source != OD_NONE && last->source != OD_NONE &&
            last->source + last->size == source) {
            last->size += size;
            return;
        }
        uint64_t part = size;
        if (source == OD_NONE) {
            if (last != NULL && last->source == OD_NONE && last->size < LONGEST_LITERAL) {
                part = LONGEST_LITERAL - last->size < size ? LONGEST_LITERAL - last->size : size;
                last->size += part;
                size -= part;
                continue;
            }
            part = size < LONGEST_LITERAL ? size : LONGEST_LITERAL;
        }
        if (p->count == p->room) {
            uint64_t room = p->room != 0 ? p->room * 2 : 64;
            od_command *grown = realloc(p->commands, room * sizeof *grown);
            if (grown == NULL) {
                p->failed = 1;
                return;
            }
            p->commands = grown;
            p->room = room;
        }
        p->commands[p->count++] = (od_command){part, source};
        size -= part;
    }
}

/* Appends the commands of the path that ends in `way` at `end`. */
static void settle(parse *p, uint32_t way, uint64_t end) {
    uint32_t next = NOBODY;
    while (way != NOBODY) { /* reverses the list */
        uint32_t before = p->nodes[way].before;
        p->nodes[way].before = next;
        next = way;
        way = before;
    }
    while (next != NOBODY) {
        const node *n = &p->nodes[next];
        uint64_t until = n->before != NOBODY ? p->nodes[n->before].at : end;
        put(p, until - n->at, n->shift == LITERAL ? OD_NONE : n->at + n->shift);
        next = n->before;
    }
    p->node_count = 0;
}

typedef struct {
    int64_t cost;
    uint32_t node;
    int literal;
} leader;

static leader best_state(const parse *p) {
    leader best = {p->literal_cost, p->literal_node, 1};
    for (unsigned a = 0; a < p->active_count; a++)
        if (p->active[a].cost < best.cost)
            best = (leader){p->active[a].cost, p->active[a].node, 0};
    return best;
}

static inline uint32_t at_least(uint32_t floor, uint32_t price) {
    return price < floor ? floor : price;
}

/* Returns the least price of a literal byte: OD_LONGEST_LOST of them never cost less than leaving
 * the path for a copy and returning to it. */
static uint32_t floor_price(const od_effort *effort) {
    uint32_t dearest = COPY_PRICE + LONG_PRICE + 2 * (FAR_PRICE + FARTHER_PRICE) + LITERAL_PRICE;
    dearest += effort->copy_toll;
    return dearest / OD_LONGEST_LOST + 1;
}

/* Adds the price of literal bytes from x to next; stops when the sum can no longer win. */
static void pass_literals(parse *p, uint64_t x, uint64_t next) {
    int64_t enough = INT64_MAX;
    for (unsigned a = 0; a < p->active_count; a++)
        if (p->active[a].cost + LITERAL_PRICE < enough)
            enough = p->active[a].cost + LITERAL_PRICE;
    const od_prices *prices = p->prices;
    while (x < next && p->literal_cost < enough) {
        while (p->priced < prices->count &&
               prices->ranges[p->priced].at + prices->ranges[p->priced].size <= x)
            p->priced++;
        const od_priced *range = p->priced < prices->count ? &prices->ranges[p->priced] : NULL;
        uint64_t stop = next;
        if (range == NULL || range->at > x) {
            if (range != NULL && range->at < stop)
                stop = range->at;
            for (; x < stop && p->literal_cost < enough; x++)
                p->literal_cost += at_least(p->floor, prices->any[p->target[x]]);
        } else {
            const uint16_t *price = prices->prices + range->first;
            if (range->at + range->size < stop)
                stop = range->at + range->size;
            for (; x < stop && p->literal_cost < enough; x++)
                p->literal_cost += at_least(p->floor, price[x - range->at]);
        }
    }
    if (x < next)
        p->literal_cost = enough + 1; /* so that the next event drops it */
}

static void add_active(parse *p, state entering) {
    if (p->active_count < ACTIVE) {
        p->active[p->active_count++] = entering;
        return;
    }
    unsigned worst = 0;
    for (unsigned a = 1; a < ACTIVE; a++)
        if (p->active[a].end < p->active[worst].end)
            worst = a;
    if (p->active[worst].end < entering.end)
        p->active[worst] = entering;
}

/* Changes states at x: enters matches that begin there, and those under way, from the cheapest
 * state where that is cheaper. */
static void event(parse *p, uint64_t x, uint64_t to, const od_span *matches, uint64_t count,
                  uint64_t *next) {
    leader best = best_state(p);
    uint64_t last = last_source(p, best.node, x);
    if (!best.literal && best.cost + LITERAL_PRICE < p->literal_cost) {
        p->literal_cost = best.cost + LITERAL_PRICE;
        p->literal_node = new_node(p, x, LITERAL, best.node);
    }
    unsigned kept = 0;
    for (unsigned a = 0; a < p->active_count; a++) {
        state s = p->active[a];
        if (s.end <= x)
            continue;
        int64_t cost = best.cost + copy_price(p, last, x + s.shift, s.end - x);
        if (cost < s.cost) {
            s.cost = cost;
            s.node = new_node(p, x, s.shift, best.node);
        }
        p->active[kept++] = s;
    }
    p->active_count = kept;
    for (; *next < count && matches[*next].at <= x; ++*next) {
        const od_span *m = &matches[*next];
        uint64_t end = m->at + m->size < to ? m->at + m->size : to, shift = m->source - m->at;
        if (end <= x || end - x < p->effort->shortest)
            continue;
        int known = 0;
        for (unsigned a = 0; a < p->active_count && !known; a++) {
            if (p->active[a].shift == shift) {
                known = 1;
                if (p->active[a].end < end)
                    p->active[a].end = end;
            }
        }
        if (known)
            continue;
        int64_t cost = best.cost + copy_price(p, last, x + shift, end - x);
        add_active(p, (state){end, shift, aligned_after(x, shift), cost,
                              new_node(p, x, shift, best.node)});
    }
}

/* Drops all paths but the best. Matches under way stay, either continued or to be entered anew. */
static void collapse(parse *p, uint64_t x) {
    leader best = best_state(p);
    uint64_t going_on = best.node == NOBODY ? LITERAL : p->nodes[best.node].shift;
    settle(p, best.node, x);
    p->literal_cost = LITERAL_PRICE;
    p->literal_node = new_node(p, x, LITERAL, NOBODY);
    for (unsigned a = 0; a < p->active_count; a++) {
        state *s = &p->active[a];
        s->node = new_node(p, x, s->shift, NOBODY);
        s->cost = s->shift == going_on ? 0 : copy_price(p, OD_NONE, x + s->shift, s->end - x);
    }
    if (best.literal)
        p->literal_cost = 0;
}

od_plan *od_cheapest(const uint8_t *target, uint64_t from, uint64_t to, const od_span *matches,
                     uint64_t count, const od_prices *prices, const od_effort *effort) {
    parse p = {.target = target, .effort = effort, .prices = prices, .floor = floor_price(effort)};
    uint64_t x = from, next = 0, settled = from;
    p.literal_cost = LITERAL_PRICE;
    p.literal_node = new_node(&p, from, LITERAL, NOBODY);
    while (!p.failed) {
        if (x >= to) {
            settle(&p, best_state(&p).node, to);
            break;
        }
        event(&p, x, to, matches, count, &next);
        if (x - settled >= SLICE || p.node_count > SLICE) {
            collapse(&p, x);
            settled = x;
        }
        uint64_t stop = next < count && matches[next].at < to ? matches[next].at : to;
        for (unsigned a = 0; a < p.active_count; a++) {
            if (p.active[a].end < stop)
                stop = p.active[a].end;
            if (p.active_count > 1 && p.active[a].aligned > x && p.active[a].aligned < stop)
                stop = p.active[a].aligned;
        }
        pass_literals(&p, x, stop);
        x = stop;
    }
    free(p.nodes);
    od_plan *plan = p.failed ? NULL : malloc(sizeof *plan);
    if (plan == NULL) {
        free(p.commands);
        return NULL;
    }
    *plan = (od_plan){p.commands, p.count, p.room, 0};
    return plan;
}

#define SIZES 4096 /* longer copies are one class */

static uint32_t size_class(const od_command *command) {
    return command->size < SIZES ? (uint32_t)command->size : SIZES - 1;
}

/* Keeps the `most` longest copies of a plan (among equal ones the first); the others become
 * literals. Returns 0 or OD_NO_MEMORY. */
static int thin_out(od_plan *plan, uint64_t most) {
    uint64_t copies[SIZES] = {0}, longer = 0;
    for (uint64_t i = 0; i < plan->count; i++)
        if (plan->commands[i].source != OD_NONE)
            copies[size_class(&plan->commands[i])]++;
    uint32_t least = SIZES - 1;
    while (least != 0 && longer + copies[least] <= most)
        longer += copies[least--];
    uint64_t equal = most - longer;
    parse p = {0};
    for (uint64_t i = 0; i < plan->count; i++) {
        const od_command *command = &plan->commands[i];
        int kept = command->source != OD_NONE && size_class(command) >= least;
        if (kept && size_class(command) == least)
            kept = equal != 0 && equal-- != 0;
        put(&p, command->size, kept ? command->source : OD_NONE);
    }
    if (p.failed) {
        free(p.commands);
        return OD_NO_MEMORY;
    }
    free(plan->commands);
    *plan = (od_plan){p.commands, p.count, p.room, plan->work};
    return 0;
}

/* Bounds the copies of a plan for target[from, to). Returns 0 or OD_NO_MEMORY. */
static int bound_copies(od_plan *plan, uint64_t from, uint64_t to, const od_effort *effort) {
    od_tally tally;
    if (effort->densest == 0)
        return 0;
    uint64_t most = (to - from) / effort->densest + 1;
    od_count(plan->commands, plan->count, 0, &tally);
    return tally.copies > most ? thin_out(plan, most) : 0;
}

uint64_t od_lost(const od_plan *plan, uint64_t from, uint64_t to, const od_span *spans,
                 uint64_t span_count) {
    uint64_t at = from, first = 0, lost = 0;
    for (uint64_t n = 0; n < span_count && spans[n].at < to; n++) {
        uint64_t start = spans[n].at > from ? spans[n].at : from;
        uint64_t end = spans[n].at + spans[n].size, run = 0;
        if (end > to)
            end = to;
        while (first < plan->count && at + plan->commands[first].size <= start)
            at += plan->commands[first++].size;
        uint64_t here = at; /* a long literal is several commands */
        for (uint64_t c = first; c <= plan->count && start < end; c++) {
            uint64_t stop = c < plan->count ? here + plan->commands[c].size : end;
            int literal = c < plan->count && plan->commands[c].source == OD_NONE;
            if (literal)
                run += (stop < end ? stop : end) - (here > start ? here : start);
            if (!literal || stop >= end) {
                lost += run >= OD_LONGEST_LOST ? run : 0;
                run = 0;
            }
            if (stop >= end)
                break;
            here = stop;
        }
    }
    return lost;
}

od_plan *od_plan_known(uint64_t from, uint64_t to, const od_span *spans, uint64_t span_count,
                       const od_effort *effort) {
    od_plan *plan = calloc(1, sizeof *plan);
    parse p = {0};
    uint64_t at = from;
    for (uint64_t n = 0; n < span_count && spans[n].at < to && at < to; n++) {
        uint64_t start = spans[n].at > at ? spans[n].at : at, end = spans[n].at + spans[n].size;
        if (end > to)
            end = to;
        if (end <= start || end - start < effort->shortest)
            continue;
        put(&p, start - at, OD_NONE);
        put(&p, end - start, spans[n].source + (start - spans[n].at));
        at = end;
    }
    if (at < to)
        put(&p, to - at, OD_NONE);
    if (plan == NULL || p.failed) {
        free(p.commands);
        free(plan);
        return NULL;
    }
    *plan = (od_plan){p.commands, p.count, p.room, 0};
    if (bound_copies(plan, from, to, effort) != 0) {
        od_free_plan(plan);
        return NULL;
    }
    return plan;
}

od_plan *od_plan_range(const od_base *base, const od_coarse *coarse, const od_blocks *blocks,
                       const uint8_t *target, uint64_t target_size, uint64_t from, uint64_t to,
                       const od_span *spans, uint64_t span_count, const od_hint *hints,
                       uint64_t hint_count, const od_effort *effort) {
    if (from > to || to > target_size)
        return calloc(1, sizeof(od_plan));
    od_span_list list = {0};
    od_prices prices = {0};
    od_plan *plan = NULL;
    uint64_t work = 0;
    if (od_find_matches(base, coarse, blocks, target, target_size, from, to, spans, span_count,
                        hints, hint_count, effort, &list, &work) != 0)
        goto out;
    od_first_prices(&prices, target, from, to, list.spans, list.count);
    plan = od_cheapest(target, from, to, list.spans, list.count, &prices, effort);
    for (uint32_t pass = 1; pass < effort->passes && plan != NULL; pass++) {
        int priced = od_better_prices(&prices, target, target_size, from, plan);
        od_free_plan(plan);
        plan = priced == 0 ? od_cheapest(target, from, to, list.spans, list.count, &prices, effort)
                           : NULL;
    }
    if (plan != NULL && bound_copies(plan, from, to, effort) != 0) {
        od_free_plan(plan);
        plan = NULL;
    }
    if (plan != NULL)
        plan->work = work;
out:
    od_drop_prices(&prices);
    free(list.spans);
    return plan;
}

void od_free_plan(od_plan *plan) {
    if (plan != NULL) {
        free(plan->commands);
        free(plan);
    }
}

od_plan *od_plan_of(const od_command *commands, uint64_t count) {
    od_plan *plan = calloc(1, sizeof *plan);
    od_plan part = {(od_command *)commands, count, count, 0};
    if (plan != NULL && od_append(plan, &part) != 0) {
        od_free_plan(plan);
        return NULL;
    }
    return plan;
}

int od_append(od_plan *plan, const od_plan *part) {
    uint64_t needed = plan->count + part->count;
    if (needed > plan->room) {
        uint64_t room = needed > plan->room + plan->room / 2 ? needed : plan->room + plan->room / 2;
        od_command *grown = realloc(plan->commands, room * sizeof *grown);
        if (grown == NULL)
            return OD_NO_MEMORY;
        plan->commands = grown;
        plan->room = room;
    }
    uint64_t first = 0;
    if (plan->count != 0 && part->count != 0) {
        od_command *last = &plan->commands[plan->count - 1];
        const od_command *next = &part->commands[0];
        if (last->source != OD_NONE && next->source != OD_NONE &&
            last->source + last->size == next->source) {
            last->size += next->size;
            first = 1;
        }
    }
    if (part->count > first)
        memcpy(plan->commands + plan->count, part->commands + first,
               (part->count - first) * sizeof *part->commands);
    plan->count += part->count - first;
    plan->work += part->work;
    return 0;
}
