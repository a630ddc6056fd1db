/* The planner: the cheapest sequence of copies and literals through the matches that match.c finds.
 *
 * od_plan_job prices literals (price.c) and runs dynamic programming here. The price of a plan is
 *
 *     bytes that its literals and commands take in the compressed stream
 *         + OD_WEIGHT * pricing->command * number of commands
 *
 * Between two events (a match begins or ends) nothing changes: copying costs nothing more, literals
 * cost their bytes. So states are compared at events only: one state for "in a literal", and one
 * for each match that covers the position.
 *
 *  matches     [====A====]
 *                   [=======B=======]
 *                                       [==C==]
 *  events      ^    ^    ^          ^   ^     ^
 *  cheapest    [====A====][===B====]lit [==C==]
 *
 * A dear command makes plans with fewer of them: a short copy between two literals becomes a part
 * of one literal, and a long match is kept where changing to another one would save little.
 *
 * Monotony: which paths exist, and what their bytes cost, depends on the matches alone, never on
 * the price of a command. The cheapest of all paths is found. So plans A and B for the prices p < q
 * satisfy bytes(A) + p * count(A) <= bytes(B) + p * count(B), and the reverse for q. The sum of the
 * two says that count(B) <= count(A). To keep this true, no decision but the choice of the cheapest
 * path may look at a cost: literals are priced by the matches, not by another plan, and a copy's
 * bytes by the matches before it, not by the commands before it. */
#include "plan.h"

#include <stdlib.h>

#define ACTIVE 24             /* matches that are followed at once */
#define MANY_NODES (1u << 18) /* nodes among which those of no path are looked for */
#define MOST_NODES (1u << 22) /* nodes of paths; with more, the best path of all is taken */
#define NO_NODE UINT32_MAX
#define LITERAL (1ULL << 63) /* in place of a shift (those lie within 41 bits of zero) */
#define MAIN_MATCH 64        /* matches of this size tell from where the target is copied here */

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
    int headers; /* reads tar headers only */
} state;

/* Returns the first target position after x that a copy along `shift` takes from a block's first
 * byte. */
static uint64_t aligned_after(uint64_t x, uint64_t shift) {
    return x + OD_TAR_BLOCK - (x + shift) % OD_TAR_BLOCK;
}

typedef struct {
    const od_job *job;
    const od_prices *prices;
    int64_t command;  /* price of a command */
    uint64_t member;  /* the target's first entry that does not end before the current position */
    uint64_t main;    /* shift of the last match of MAIN_MATCH bytes */
    node *nodes;
    uint32_t node_count, node_room;
    uint32_t many_nodes; /* nodes from which on those of no path are dropped */
    state active[ACTIVE];
    unsigned active_count;
    int64_t literal_cost; /* of being in a literal at the current position */
    uint32_t literal_node;
    od_plan *plan;
    int failed;
} parse;

static uint32_t new_node(parse *p, uint64_t at, uint64_t shift, uint32_t before) {
    if (p->node_count == p->node_room) {
        uint32_t room = p->node_room != 0 ? p->node_room * 2 : 4096;
        node *grown = room > p->node_room ? realloc(p->nodes, room * sizeof *grown) : NULL;
        if (grown == NULL) {
            p->failed = 1;
            return NO_NODE;
        }
        p->nodes = grown;
        p->node_room = room;
    }
    p->nodes[p->node_count] = (node){at, shift, before};
    return p->node_count++;
}

/* ---- prices ---- */

static int64_t literal_price(const parse *p) {
    return OD_LITERAL_COMMAND + p->command;
}

/* Returns the price of a copy to target position x. */
static int64_t copy_price(const parse *p, uint64_t x, const state *s) {
    const uint64_t source = x + s->shift, near = x + p->main;
    int64_t price = OD_COPY_COMMAND + (s->headers ? p->command / OD_HEADERS_SHARE : p->command);
    if (near >> 16 != source >> 16)
        price += near >> 24 != source >> 24 ? OD_FAR + OD_FARTHER : OD_FAR;
    if (s->end - x > 0xff)
        price += OD_LONG_SIZE;
    if (source <= 0xffff)
        price -= OD_SHORT_POSITION;
    if (source % OD_TAR_BLOCK == 0)
        price -= OD_ALIGNED;
    return price;
}

/* Adds the price of literal bytes from x to next; stops when the sum can no longer win. */
static void pass_literals(parse *p, uint64_t x, uint64_t next) {
    int64_t enough = INT64_MAX;
    for (unsigned a = 0; a < p->active_count; a++)
        if (p->active[a].cost + literal_price(p) < enough)
            enough = p->active[a].cost + literal_price(p);
    const uint8_t *target = p->job->target;
    while (x < next && p->literal_cost < enough) {
        uint64_t end;
        const uint32_t *prices = od_prices_at(p->prices, p->job->tar, &p->member, x, &end);
        for (end = end < next ? end : next; x < end && p->literal_cost < enough; x++)
            p->literal_cost += prices[target[x]];
    }
    if (x < next)
        p->literal_cost = enough + 1; /* so that the next event drops it */
}

/* ---- the cheapest path ---- */

/* Appends the commands of the path that ends in `path` at `end`. */
static void emit_path(parse *p, uint32_t path, uint64_t end) {
    uint32_t next = NO_NODE;
    while (path != NO_NODE) { /* reverses the list */
        uint32_t before = p->nodes[path].before;
        p->nodes[path].before = next;
        next = path;
        path = before;
    }
    while (next != NO_NODE && !p->failed) {
        const node *n = &p->nodes[next];
        uint64_t until = n->before != NO_NODE ? p->nodes[n->before].at : end;
        uint64_t source = n->shift == LITERAL ? OD_NONE : n->at + n->shift;
        p->failed = od_append_command(p->plan, until - n->at, source) != 0;
        next = n->before;
    }
    p->node_count = 0;
}

typedef struct {
    int64_t cost;
    uint32_t node;
    int literal;
} best_path;

static best_path best_state(const parse *p) {
    best_path best = {p->literal_cost, p->literal_node, 1};
    for (unsigned a = 0; a < p->active_count; a++)
        if (p->active[a].cost < best.cost)
            best = (best_path){p->active[a].cost, p->active[a].node, 0};
    return best;
}

static void add_active(parse *p, const state *entering) {
    if (p->active_count < ACTIVE) {
        p->active[p->active_count++] = *entering;
        return;
    }
    unsigned worst = 0;
    for (unsigned a = 1; a < ACTIVE; a++)
        if (p->active[a].end < p->active[worst].end)
            worst = a;
    if (p->active[worst].end < entering->end)
        p->active[worst] = *entering;
}

/* Joins a match to one under way on the same diagonal. Returns whether there is one. */
static int join(parse *p, uint64_t x, uint64_t shift, uint64_t end) {
    for (unsigned a = 0; a < p->active_count; a++) {
        state *s = &p->active[a];
        if (s->shift != shift || s->end < x)
            continue;
        if (s->end < end) {
            s->headers =
                s->headers && od_reads_headers_only(p->job, s->end + shift, end - s->end);
            s->end = end;
        }
        return 1;
    }
    return 0;
}

/* Changes states at x: enters matches that begin there, and those under way, from the cheapest
 * state where that is cheaper. */
static void event(parse *p, uint64_t x, const od_matches *matches, uint64_t *next) {
    const uint64_t to = p->job->to;
    uint64_t first = *next;
    for (; *next < matches->count && matches->spans[*next].at <= x; ++*next) {
        const od_span *m = &matches->spans[*next];
        if (m->size >= MAIN_MATCH)
            p->main = m->source - m->at;
        join(p, x, m->source - m->at, m->at + m->size < to ? m->at + m->size : to);
    }
    best_path best = best_state(p);
    if (!best.literal && best.cost + literal_price(p) < p->literal_cost) {
        p->literal_cost = best.cost + literal_price(p);
        p->literal_node = new_node(p, x, LITERAL, best.node);
    }
    unsigned kept = 0;
    for (unsigned a = 0; a < p->active_count; a++) {
        state s = p->active[a];
        if (s.end <= x)
            continue;
        int64_t cost = best.cost + copy_price(p, x, &s);
        if (cost < s.cost) {
            s.cost = cost;
            s.node = new_node(p, x, s.shift, best.node);
        }
        if (s.aligned <= x)
            s.aligned = aligned_after(x, s.shift);
        p->active[kept++] = s;
    }
    p->active_count = kept;
    for (; first < *next; first++) {
        const od_span *m = &matches->spans[first];
        uint64_t end = m->at + m->size < to ? m->at + m->size : to, shift = m->source - m->at;
        if (end <= x || end - x < p->job->effort->shortest || join(p, x, shift, end))
            continue;
        state s = {.end = end, .shift = shift, .aligned = aligned_after(x, shift)};
        s.headers = od_reads_headers_only(p->job, x + shift, end - x);
        s.cost = best.cost + copy_price(p, x, &s);
        s.node = new_node(p, x, shift, best.node);
        add_active(p, &s);
    }
}

/* Drops the nodes that belong to no path. Returns 0 or OD_NO_MEMORY. */
static int drop_nodes(parse *p) {
    uint32_t *places = calloc(p->node_count, sizeof *places); /* new number + 1 */
    if (places == NULL)
        return OD_NO_MEMORY;
    for (unsigned a = 0; a <= p->active_count; a++) {
        uint32_t n = a < p->active_count ? p->active[a].node : p->literal_node;
        for (; n != NO_NODE && places[n] == 0; n = p->nodes[n].before)
            places[n] = 1;
    }
    uint32_t kept = 0;
    for (uint32_t n = 0; n < p->node_count; n++) { /* a node's predecessor has a lower number */
        if (places[n] == 0)
            continue;
        node moved = p->nodes[n];
        if (moved.before != NO_NODE)
            moved.before = places[moved.before] - 1;
        p->nodes[kept] = moved;
        places[n] = ++kept;
    }
    for (unsigned a = 0; a < p->active_count; a++)
        p->active[a].node = places[p->active[a].node] - 1;
    p->literal_node = places[p->literal_node] - 1;
    p->node_count = kept;
    p->many_nodes = kept > MANY_NODES / 2 ? 2 * kept : MANY_NODES;
    free(places);
    return 0;
}

/* Drops all paths but the best, which ends at x: for crafted matches, whose paths never meet. */
static void collapse(parse *p, uint64_t x) {
    best_path best = best_state(p);
    uint64_t shift = p->nodes[best.node].shift;
    emit_path(p, best.node, x);
    p->literal_cost = best.literal ? 0 : literal_price(p);
    p->literal_node = new_node(p, x, LITERAL, NO_NODE);
    for (unsigned a = 0; a < p->active_count; a++) {
        state *s = &p->active[a];
        s->cost = s->shift == shift ? 0 : copy_price(p, x, s);
        s->node = new_node(p, x, s->shift, NO_NODE);
    }
}

/* Returns the cheapest path through the matches. */
static od_plan *cheapest(const od_job *job, const od_matches *matches, const od_prices *prices,
                         const od_pricing *pricing) {
    parse p = {.job = job,
               .prices = prices,
               .command = (int64_t)OD_WEIGHT * pricing->command,
               .many_nodes = MANY_NODES,
               .plan = od_plan_of(NULL, 0)};
    p.failed = p.plan == NULL;
    uint64_t x = job->from, next = 0;
    p.literal_cost = literal_price(&p);
    p.literal_node = new_node(&p, x, LITERAL, NO_NODE);
    while (!p.failed && x < job->to) {
        event(&p, x, matches, &next);
        if (p.node_count > p.many_nodes && !p.failed)
            p.failed = drop_nodes(&p) != 0;
        if (p.node_count > MOST_NODES && !p.failed)
            collapse(&p, x);
        uint64_t stop = job->to;
        if (next < matches->count && matches->spans[next].at < stop)
            stop = matches->spans[next].at;
        for (unsigned a = 0; a < p.active_count; a++) {
            if (p.active[a].end < stop)
                stop = p.active[a].end;
            if (p.active_count > 1 && p.active[a].aligned < stop)
                stop = p.active[a].aligned;
        }
        pass_literals(&p, x, stop);
        x = stop;
    }
    if (!p.failed)
        emit_path(&p, best_state(&p).node, job->to);
    free(p.nodes);
    if (p.failed) {
        od_free_plan(p.plan);
        return NULL;
    }
    return p.plan;
}

od_plan *od_plan_job(const od_job *job, const od_matches *matches, const od_pricing *pricing) {
    if (job->from > job->to || job->to > job->target_size)
        return od_plan_of(NULL, 0);
    od_prices prices;
    od_price_literals(&prices, job, matches, pricing->form);
    od_plan *plan = cheapest(job, matches, &prices, pricing);
    if (plan != NULL && od_bound_copies(plan, job) != 0) {
        od_free_plan(plan);
        return NULL;
    }
    return plan;
}
