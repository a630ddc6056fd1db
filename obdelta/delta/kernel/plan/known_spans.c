/* Known spans: makes a plan of known spans alone, and checks that a plan has kept all of them. */
#include "plan.h"

uint64_t od_longest_lost(const od_pricing *pricing) {
    uint64_t dearest = OD_COPY_COMMAND + OD_LONG_SIZE + 2 * (OD_FAR + OD_FARTHER) +
                       OD_LITERAL_COMMAND + 2ULL * OD_WEIGHT * pricing->command;
    uint64_t longest = dearest / OD_LEAST_LITERAL + 1;
    return longest < OD_BLOCK ? OD_BLOCK : longest;
}

/* Appends the known spans, and literals between them. Returns 0 or OD_NO_MEMORY. */
static int append_known(od_plan *plan, const od_job *job) {
    uint64_t at = job->from;
    for (uint64_t n = 0; n < job->span_count && job->spans[n].at < job->to && at < job->to; n++) {
        const od_span *span = &job->spans[n];
        uint64_t start = span->at > at ? span->at : at, end = span->at + span->size;
        if (end > job->to)
            end = job->to;
        if (end <= start || end - start < job->effort->shortest)
            continue;
        if (od_append_command(plan, start - at, OD_NONE) != 0 ||
            od_append_command(plan, end - start, span->source + (start - span->at)) != 0)
            return OD_NO_MEMORY;
        at = end;
    }
    return at < job->to ? od_append_command(plan, job->to - at, OD_NONE) : 0;
}

od_plan *od_plan_known(const od_job *job) {
    od_plan *plan = od_plan_of(NULL, 0);
    if (plan != NULL && append_known(plan, job) != 0) {
        od_free_plan(plan);
        return NULL;
    }
    return plan;
}

uint64_t od_lost(const od_job *job, const od_plan *plan, const od_pricing *pricing) {
    const uint64_t from = job->from, to = job->to, longest = od_longest_lost(pricing);
    const od_span *spans = job->spans;
    uint64_t at = from, first = 0, lost = 0;
    for (uint64_t n = 0; n < job->span_count && spans[n].at < to; n++) {
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
                lost += run >= longest ? run : 0;
                run = 0;
            }
            if (stop >= end)
                break;
            here = stop;
        }
    }
    return lost;
}
