/* Any bytes as base and target: walk, hash, compare, sample, plan, encode, explain; and the stream
 * makes exactly the target. */

#include <stdlib.h>
#include <string.h>

#include "internal.h"

static uint8_t *copied(const uint8_t *from, size_t size)
{
    uint8_t *block = malloc(size ? size : 1);
    if (!block)
        abort();
    memcpy(block, from, size);
    return block;
}

static void check_tar(const od_tar *tar, uint64_t size)
{
    uint64_t at = 0;
    for (uint64_t i = 0; i < tar->count; i++) {
        const od_member *member = &tar->members[i];
        if (member->start < at || member->content < member->start || member->size > size ||
            member->content > size - member->size || member->end < member->content + member->size ||
            member->end > size || member->name > tar->names_size ||
            member->name_size > tar->names_size - member->name)
            abort();
        at = member->end;
    }
}

static void check_span(const od_base *base, const od_span *span, const uint8_t *target,
                       uint64_t size)
{
    if (span->at > size || span->size > size - span->at || span->source >= base->size)
        abort();
    const od_layer *layer = od_layer_of(base, span->source);
    uint64_t inside = span->source - layer->start;
    if (span->size > layer->size - inside ||
        memcmp(layer->at + inside, target + span->at, span->size) != 0)
        abort();
}

/* Encodes in pieces of `room`, applies each at once, and compares with the target. */
static void prove(const od_base *base, const od_plan *plan, const uint8_t *target, uint64_t size,
                  size_t room)
{
    uint8_t *made = malloc(size ? size : 1), *piece = malloc(room);
    od_reader reader;
    uint64_t next = 0, at = 0, done = 0, used, fresh, written, total = 0;
    if (!made || !piece)
        abort();
    memset(&reader, 0, sizeof reader);
    static const uint8_t magic[4] = {0x72, 0x73, 0x02, 0x36}, end[1] = {0};
    if (od_apply(&reader, base, magic, 4, &used, made, size, &fresh) != OD_MORE || used != 4)
        abort();
    while (next < plan->count) {
        uint64_t before = next;
        written = od_encode(plan->commands, plan->count, &next, target, size, &at, piece, room);
        if (written > room)
            abort();
        if (next == before) {
            room = room * 2;
            piece = realloc(piece, room);
            if (!piece || room > (size + 64) * 4)
                abort();
            continue;
        }
        total += written;
        int verdict =
            od_apply(&reader, base, piece, written, &used, made + done, size - done, &fresh);
        done += fresh;
        if ((verdict != OD_MORE && verdict != OD_FULL) || used != written)
            abort();
    }
    if (od_apply(&reader, base, end, 1, &used, made + done, size - done, &fresh) != OD_DONE)
        abort();
    if (done != size || at != size || memcmp(made, target, size) != 0 ||
        total != od_encoded_size(plan->commands, plan->count))
        abort();
    free(made);
    free(piece);
}

/* Shares the plan out over the entries: sums are those of a plain count, and an entry's literals
 * are the target's bytes. */
static void explain(const od_plan *plan, const od_tar *tar, const uint8_t *target, uint64_t size)
{
    enum { MOST = 3, ROOM = 64 };
    od_share *shares = malloc((tar->count + 1) * sizeof *shares);
    if (!shares)
        abort();
    uint64_t changed =
                 od_share_out(plan->commands, plan->count, tar->members, tar->count, 64, shares),
             found[MOST], some = 0;
    od_tally sum = {0}, whole;
    od_count(plan->commands, plan->count, 64, &whole);
    for (uint64_t i = 0; i <= tar->count; i++) {
        sum.literal_bytes += shares[i].literal_bytes;
        sum.copied += shares[i].copied;
        sum.copies += shares[i].copies;
        sum.small_copies += shares[i].small_copies;
        if (i == tar->count)
            break;
        const od_member *member = &tar->members[i];
        if (shares[i].literal_bytes + shares[i].copied != member->end - member->start)
            abort();
        some += shares[i].literal_bytes != 0;
        uint8_t out[ROOM];
        uint64_t skip = shares[i].literal_bytes / 2, left = shares[i].literal_bytes - skip;
        uint64_t made =
            od_literals(plan->commands, plan->count, &shares[i], member, target, skip, out, ROOM);
        if (made != (left < ROOM ? left : ROOM))
            abort();
    }
    if (sum.literal_bytes != whole.literal_bytes || sum.copied != whole.copied ||
        sum.copies != whole.copies || sum.small_copies != whole.small_copies || changed != some ||
        whole.literal_bytes + whole.copied != size)
        abort();
    uint64_t number = od_biggest(shares, tar->count, MOST, found);
    if (number != (some < MOST ? some : MOST))
        abort();
    for (uint64_t i = 1; i < number; i++)
        if (shares[found[i - 1]].literal_bytes < shares[found[i]].literal_bytes)
            abort();
    free(shares);
}

/* Spans made of any bytes, sorted: in order, and the same ones. */
static void sort(const uint8_t *data, size_t size)
{
    uint64_t count = size / 2, sum = 0, sorted = 0;
    od_span *spans = malloc((count ? count : 1) * sizeof *spans);
    if (!spans)
        abort();
    for (uint64_t i = 0; i < count; i++) {
        spans[i] = (od_span){i / 8 + data[2 * i] / 16, data[2 * i + 1] % 4, data[2 * i] % 16};
        sum += spans[i].at * spans[i].at + 31 * spans[i].size + spans[i].source * spans[i].size;
    }
    od_sort_spans(spans, count);
    for (uint64_t i = 0; i < count; i++) {
        sorted += spans[i].at * spans[i].at + 31 * spans[i].size + spans[i].source * spans[i].size;
        const od_span *x = &spans[i], *y = x + 1;
        if (i + 1 < count &&
            (x->at > y->at || (x->at == y->at && (x->size < y->size ||
                                                  (x->size == y->size && x->source > y->source)))))
            abort();
    }
    if (sum != sorted)
        abort();
    free(spans);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 16)
        return 0;
    sort(data, size);
    const uint8_t *set = data;
    data += 16;
    size -= 16;
    od_effort effort = {
        .key = 4 + set[0] % 5,
        .step = 1 + set[1] % 8,
        .gap = set[2],
        .trust_gap = set[3] % 32,
        .trust_run = set[4],
        .shortest = 4 + set[5] % 60,
        .unit = 64u << set[6] % 12,
        .pad_floor = 16u << set[7] % 8,
        .pad_ratio = set[7] >> 5,
        .pad_most = 1024,
        .window_ratio = 1 + set[8] % 32,
    };
    od_pricing pricing = {.form = set[11] % 2, .command = set[9] * set[9] * 64u << set[10] % 4};
    size_t first = size * (set[13] % 8) / 16, second = size * (set[14] % 8) / 16,
           rest = size - first - second;
    uint8_t *copies[3] = {copied(data, first), copied(data + first, second),
                          copied(data + first + second, rest)};
    const uint8_t *target = copies[2];
    od_layer layers[2] = {{copies[0], first, 0}, {copies[1], second, first}};
    od_base base = {layers, 2, first + second};
    uint32_t bits = 1 + set[15] % 6, thin = set[15] / 64;

    uint32_t *hashes = malloc((size / OD_BLOCK + 1) * sizeof *hashes);
    od_blocks *blocks = od_blocks_new(size / OD_BLOCK);
    if (!hashes || !blocks)
        abort();
    for (int i = 0; i < 2; i++) {
        uint64_t number = layers[i].size / OD_BLOCK;
        od_block_hashes(layers[i].at, 0, number, hashes);
        for (uint64_t n = 0; n < number; n++)
            if (hashes[n] != od_fold(od_block_hash(layers[i].at + n * OD_BLOCK)))
                abort();
        od_blocks_add(blocks, hashes, number, layers[i].start);
    }
    free(hashes);
    od_tar *tars[2], *members = od_tar_walk(target, rest);
    od_samples *samples[2];
    for (int i = 0; i < 2; i++) {
        tars[i] = od_tar_walk(layers[i].at, layers[i].size);
        samples[i] = od_sample_range(layers[i].at, layers[i].size, 0, layers[i].size, bits);
        if (!tars[i] || !samples[i])
            abort();
        check_tar(tars[i], layers[i].size);
        od_hash_members(layers[i].at, tars[i]->members, tars[i]->count);
    }
    od_sampled *sampled = od_sampled_new(samples[0]->count + samples[1]->count, bits, thin);
    if (!members || !sampled)
        abort();
    for (int i = 0; i < 2; i++)
        od_sampled_add(sampled, samples[i]->samples, samples[i]->count, layers[i].start);
    check_tar(members, rest);
    od_hash_members(target, members->members, members->count);
    uint64_t *found = malloc((members->count ? members->count : 1) * sizeof *found), count;
    od_exact *exact = od_exact_new(&base, (const od_tar *const *)tars, target, rest, members);
    if (!found || !exact)
        abort();
    while (od_exact_next(exact, 1 + set[15] * 64u, found) < (int64_t)members->count)
        continue;
    /* Bounded for each member: chains, and bodies that are compared. */
    if (od_exact_steps(exact) > 64 * members->count + 5 * (rest / OD_BLOCK))
        abort();
    const od_span *spans = od_exact_spans(exact, &count);
    for (uint64_t i = 0; i < count; i++)
        check_span(&base, &spans[i], target, rest);
    od_hint hint = {0, rest / 2, 0, first};
    uint64_t cut = rest * set[12] / 256; /* two ranges, as two tasks would plan them */
    od_plan *plan = od_plan_of(NULL, 0), *fallback = od_plan_of(NULL, 0);
    for (int part = 0; part < 2; part++) {
        od_job job = {
            .base = &base,
            .tars = set[10] & 8 ? (const od_tar *const *)tars : NULL,
            .sampled = set[13] & 128 ? sampled : NULL,
            .blocks = set[14] & 64 ? NULL : blocks,
            .target = target,
            .target_size = rest,
            .tar = set[10] & 16 ? members : NULL,
            .from = part ? cut : 0,
            .to = part ? rest : cut,
            .spans = spans,
            .span_count = count,
            .hints = &hint,
            .hint_count = set[14] & 128 && first ? 1 : 0,
            .effort = &effort,
        };
        od_matches *matches = od_find_matches(&job);
        if (!plan || !fallback || !matches)
            abort();
        od_plan *half = od_plan_job(&job, matches, &pricing);
        if (!half || od_append(plan, half) != 0)
            abort();
        if (matches->work > (1u << 20) + 256 * (job.to - job.from))
            abort();
        od_tally tally, dearer;
        od_count(half->commands, half->count, 0, &tally);
        if (tally.copies > (job.to - job.from) / OD_BYTES_PER_COPY + 1)
            abort();
        if (od_lost(&job, half, &pricing) != 0)
            abort();
        /* Where commands cost more, there are not more of them. */
        od_pricing higher = {pricing.form, pricing.command + 64u * set[12]};
        od_plan *other = od_plan_job(&job, matches, &higher);
        if (!other || od_lost(&job, other, &higher) != 0)
            abort();
        od_count(other->commands, other->count, 0, &dearer);
        if (!job.tars && tally.copies < (job.to - job.from) / OD_BYTES_PER_COPY &&
            dearer.copies + dearer.literals > tally.copies + tally.literals)
            abort();
        od_free_plan(other);
        od_free_matches(matches);
        od_free_plan(half);
        od_plan *known = od_plan_known(&job);
        if (!known || od_append(fallback, known) != 0)
            abort();
        od_free_plan(known);
    }
    prove(&base, fallback, target, rest, 16);
    od_free_plan(fallback);
    prove(&base, plan, target, rest, 16);
    explain(plan, members, target, rest);

    od_free_plan(plan);
    od_free_exact(exact);
    free(found);
    od_free_sampled(sampled);
    od_free_blocks(blocks);
    od_free_tar(members);
    for (int i = 0; i < 2; i++) {
        od_free_tar(tars[i]);
        od_free_samples(samples[i]);
    }
    for (int i = 0; i < 3; i++)
        free(copies[i]);
    return 0;
}
