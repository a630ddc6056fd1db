/* Prices of literals: the bytes that they will probably take after compression.
 *
 * A literal byte costs a share of its entropy among the bytes that long matches leave over: the
 * share stands for the repetitions that the compressor finds. Entropy in context, and an imitation
 * of the compressor's search on the stream of an earlier plan, predict no better: neither knows how
 * the stream changes with the plan. */
#include "plan.h"

#define LEAST 64
#define MOST (10 * 64)
#define HEADER_PART 4 /* a byte of a header costs this part: it repeats one of the headers before */
#define LONG_MATCH 16 /* bytes that matches of this size cover are not counted */

/* Of 256: the share of its entropy that a literal byte costs. Measured over many streams. */
static const uint32_t entropy_share[] = {[OD_GZIP] = 165, [OD_ZSTD] = 150};

/* Returns 64 * log2(n), n >= 1. */
static uint32_t log2_of(uint64_t n) {
    unsigned whole = 63 - (unsigned)__builtin_clzll(n);
    uint64_t x = whole > 31 ? n >> (whole - 31) : n << (31 - whole); /* in [2^31, 2^32) */
    uint32_t result = whole;
    for (int i = 0; i < 6; i++) {
        x = (x * x) >> 31;
        result <<= 1;
        if (x >> 32) {
            x >>= 1;
            result |= 1;
        }
    }
    return result;
}

void od_price_literals(od_prices *prices, const od_job *job, const od_matches *matches,
                       uint32_t form) {
    uint64_t seen[256], total = 0, covered = job->from;
    for (int byte = 0; byte < 256; byte++)
        seen[byte] = 1;
    for (uint64_t m = 0; m <= matches->count; m++) {
        const od_span *match = m < matches->count ? &matches->spans[m] : NULL;
        uint64_t at = match != NULL ? match->at : job->to;
        for (; covered < at; covered++)
            seen[job->target[covered]] += 4;
        if (match != NULL && match->size >= LONG_MATCH && match->at + match->size > covered)
            covered = match->at + match->size;
    }
    for (int byte = 0; byte < 256; byte++)
        total += seen[byte];
    for (int byte = 0; byte < 256; byte++) {
        uint32_t price = (log2_of(total) - log2_of(seen[byte])) * entropy_share[form] >> 8;
        prices->content[byte] = price < LEAST ? LEAST : price > MOST ? MOST : price;
        price /= HEADER_PART;
        prices->header[byte] = price < OD_LEAST_LITERAL ? OD_LEAST_LITERAL : price;
    }
}

/* Returns the prices of the literal bytes at target position x. They are the same up to *end.
 * *member is the tar's first entry that does not end before x; it is moved there, never back. */
const uint32_t *od_prices_at(const od_prices *prices, const od_tar *tar, uint64_t *member,
                             uint64_t x, uint64_t *end) {
    *end = UINT64_MAX;
    if (tar == NULL)
        return prices->content;
    while (*member < tar->count && tar->members[*member].end <= x)
        ++*member;
    if (*member == tar->count)
        return prices->content;
    const od_member *here = &tar->members[*member];
    if (x < here->content) {
        *end = here->content;
        return prices->header;
    }
    if (x < here->content + here->size) {
        *end = here->content + here->size;
        return prices->content;
    }
    *end = here->end;
    return prices->header;
}

/* Returns whether base[source, source + size) has only bytes outside the contents of files: engines
 * have these in memory. */
int od_reads_headers_only(const od_job *job, uint64_t source, uint64_t size) {
    if (job->tars == NULL)
        return 0;
    const od_layer *layer = od_layer_of(job->base, source);
    const od_tar *tar = job->tars[layer - job->base->layers];
    uint64_t at = source - layer->start, low = 0, high = tar->count;
    while (low < high) { /* the first entry that ends behind `at` */
        uint64_t middle = low + (high - low) / 2;
        if (tar->members[middle].end <= at)
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < tar->count && tar->members[low].start < at + size; low++) {
        const od_member *member = &tar->members[low];
        if (member->size != 0 && member->content < at + size && at < member->content + member->size)
            return 0;
    }
    return tar->count != 0 && at + size <= tar->members[tar->count - 1].end;
}
