/* Memory that ends at any allocation: everything that allocates says so, and nothing is read or
 * lost behind it. */

#include <stdlib.h>
#include <string.h>

#include "kernel.h"

/* tools/fuzz links with --wrap: the kernel's calls come here. */
void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *block, size_t size);

static int armed;
static unsigned seen, first, many;

static int fails(void)
{
    return armed && seen++ - first < many;
}

void *__wrap_malloc(size_t size)
{
    return fails() ? NULL : __real_malloc(size);
}

void *__wrap_calloc(size_t count, size_t size)
{
    return fails() ? NULL : __real_calloc(count, size);
}

void *__wrap_realloc(void *block, size_t size)
{
    return fails() ? NULL : __real_realloc(block, size);
}

static void check(const od_plan *plan, uint64_t size)
{
    uint64_t made = 0;
    for (uint64_t i = 0; i < plan->count; i++)
        made += plan->commands[i].size;
    if (made != size)
        abort();
}

static od_plan *planned(const od_base *base, od_tar *const *tars, const od_tar *members,
                        const od_sampled *sampled, const od_blocks *blocks, const uint8_t *target,
                        uint64_t size, const od_effort *effort, const od_pricing *pricing)
{
    od_plan *plan = NULL;
    uint64_t *found = __real_malloc((members->count + 1) * sizeof *found), count;
    od_exact *exact = od_exact_new(base, (const od_tar *const *)tars, target, size, members);
    int64_t done = 0;
    while (exact && done >= 0 && done < (int64_t)members->count)
        done = od_exact_next(exact, 1000, found);
    if (exact && done >= 0) {
        const od_span *spans = od_exact_spans(exact, &count);
        od_job job = {
            .base = base,
            .sampled = sampled,
            .blocks = blocks,
            .target = target,
            .target_size = size,
            .to = size,
            .spans = spans,
            .span_count = count,
            .effort = effort,
        };
        od_matches *matches = od_find_matches(&job);
        plan = matches ? od_plan_job(&job, matches, pricing) : NULL;
        od_free_matches(matches);
    }
    od_free_exact(exact);
    free(found);
    return plan;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 8)
        return 0;
    first = data[0] + data[1] / 128 * 256u;
    many = 1 + data[1] % 8 * 40u;
    od_effort effort = {
        .key = 4 + data[2] % 5,
        .step = 1 + data[3] % 8,
        .gap = 32,
        .trust_gap = 8,
        .trust_run = data[4] % 32,
        .shortest = 4 + data[5] % 16,
        .unit = 64u << data[6] % 12,
        .pad_floor = 64,
        .pad_ratio = 2,
        .pad_most = 1024,
        .window_ratio = 8,
    };
    od_pricing pricing = {data[7] % 2, 500};
    data += 8;
    size -= 8;
    uint64_t half = size / 2;
    od_layer layer = {data, half, 0};
    od_base base = {&layer, 1, half};
    const uint8_t *target = data + half;
    uint64_t target_size = size - half;

    seen = 0;
    armed = 1;
    od_tar *tars[1] = {od_tar_walk(data, half)}, *members = od_tar_walk(target, target_size);
    od_samples *samples = od_sample_range(data, half, 0, half, 2);
    od_sampled *sampled = samples ? od_sampled_new(samples->count, 2, 0) : NULL;
    if (sampled)
        od_sampled_add(sampled, samples->samples, samples->count, 0);
    uint32_t hashes[64];
    uint64_t number = half / OD_BLOCK < 64 ? half / OD_BLOCK : 64;
    od_blocks *blocks = od_blocks_new(number);
    od_block_hashes(data, 0, number, hashes);
    if (blocks)
        od_blocks_add(blocks, hashes, number, 0);
    if (tars[0] && members) {
        od_plan *part = planned(&base, tars, members, sampled, blocks, target, target_size,
                                &effort, &pricing),
                *whole = od_plan_of(NULL, 0);
        if (part)
            check(part, target_size);
        if (part && whole && od_append(whole, part) == 0)
            check(whole, target_size);
        od_free_plan(whole);
        od_free_plan(part);
    }
    od_free_tar(members);
    od_free_tar(tars[0]);
    od_free_samples(samples);
    od_free_sampled(sampled);
    od_free_blocks(blocks);
    armed = 0;
    return 0;
}
