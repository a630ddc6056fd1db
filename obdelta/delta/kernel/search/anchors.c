/* Anchors: finds the matches that the sampled index and the block index know (steps 1 and 2). */
#include "search.h"

#include <string.h>

/* The longest match among the candidates for one target position. */
typedef struct {
    od_search *s;
    const od_layer *layer;
    uint64_t position, after;
} best_match;

/* Takes a candidate that is longer than the best one, or as long and nearer to the last match's
 * diagonal. */
static void take_better(best_match *best, const od_layer *layer, uint64_t position,
                        uint64_t after) {
    const od_search *s = best->s;
    if (after > best->after ||
        (after == best->after && after != 0 &&
         od_distance(position - s->i, s->shift) < od_distance(best->position - s->i, s->shift))) {
        best->after = after;
        best->layer = layer;
        best->position = position;
    }
}

static int sample_candidate(void *with, uint64_t position) {
    best_match *best = with;
    od_search *s = best->s;
    if (position >= s->base->size)
        return 0;
    const od_layer *layer = od_layer_of(s->base, position);
    /* s->i is the window's last byte; the whole window must be equal */
    uint64_t inside = position - layer->start;
    if (inside < OD_WINDOW - 1 || memcmp(s->target + s->i - (OD_WINDOW - 1),
                                         layer->at + inside - (OD_WINDOW - 1), OD_WINDOW) != 0)
        return 0;
    take_better(best, layer, position, od_weigh(s, layer, position));
    return 0;
}

void od_search_samples(od_search *s, const od_sampled *sampled, uint64_t start, uint64_t stop) {
    uint64_t begin = start - s->from >= OD_WINDOW ? start - OD_WINDOW + 1 : s->from, hash = 0,
             floor = start;
    for (uint64_t i = begin; i < stop && !s->failed; i++) {
        hash = (hash << 2) + s->gear[s->target[i]];
        if (!od_is_sample(sampled, hash) || i + 1 < begin + OD_WINDOW)
            continue;
        s->i = i;
        best_match best = {.s = s};
        od_sampled_find(sampled, hash, sample_candidate, &best);
        if (best.after != 0 && i + best.after > s->reach) {
            uint64_t shift = best.position - i,
                     found = od_accept(s, best.layer, best.position, best.after);
            if (floor < found)
                od_follow_back(s, best.layer, found, shift,
                            found - floor < OD_FURTHEST_BACK ? floor : found - OD_FURTHEST_BACK);
        }
        s->i = s->reach > i ? s->reach : i;
        if (s->wake < s->i + OD_NEAR)
            od_follow_near(s);
        if (s->reach > i + 2 * OD_WINDOW) { /* nothing new before the end of the matches found */
            floor = s->reach;
            begin = s->reach - OD_WINDOW + 1;
            i = begin - 1;
            hash = 0;
        }
    }
}

static int block_candidate(void *with, uint64_t position) {
    best_match *best = with;
    od_search *s = best->s;
    if (position >= s->base->size)
        return 0;
    const od_layer *layer = od_layer_of(s->base, position);
    if (layer->size - (position - layer->start) < OD_BLOCK)
        return 0;
    uint64_t after = od_weigh(s, layer, position);
    if (after >= OD_BLOCK)
        take_better(best, layer, position, after);
    return 0;
}

/* Returns the hash of the block at `i`, which is behind the last one that was looked up. */
static uint64_t block_hash_at(const od_search *s, uint64_t i) {
    if (s->last_block == OD_NONE || i - s->last_block >= OD_BLOCK)
        return od_block_hash(s->target + i);
    uint64_t hash = s->last_block_hash;
    for (uint64_t at = s->last_block; at < i; at++)
        hash = od_block_roll(s->blocks, hash, s->target + at);
    return hash;
}

/* Finds blocks that begin or end in target[start, stop), where nothing is known yet. Gaps may be
 * much shorter than blocks: a block is looked up once for all of them. */
void od_search_blocks(od_search *s, uint64_t start, uint64_t stop) {
    const od_blocks *blocks = s->blocks;
    uint64_t i = start - s->from > OD_BLOCK - 1 ? start - (OD_BLOCK - 1) : s->from;
    /* last position where one may begin */
    uint64_t last = s->to - stop > OD_BLOCK - 1 ? stop - 1 : s->to - OD_BLOCK;
    if (s->last_block != OD_NONE && i <= s->last_block)
        i = s->last_block + 1;
    if (s->to - s->from < OD_BLOCK || i > last)
        return;
    s->reach = start;
    uint64_t hash = block_hash_at(s, i);
    while (!s->failed) {
        s->last_block = i;
        s->last_block_hash = hash;
        if (od_is_block(blocks, hash)) {
            s->i = i;
            best_match best = {.s = s};
            od_sampled_find(blocks->index, hash, block_candidate, &best);
            if (best.after != 0 && i + best.after > s->reach) {
                od_accept(s, best.layer, best.position, best.after);
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
