/* Plans as lists of commands: appended to, joined, and bounded in their number of copies. */
#include "plan.h"

#include <stdlib.h>
#include <string.h>

#define LONGEST_LITERAL (1u << 20)
#define SIZES 4096 /* longer copies are one class */

/* Makes room for `needed` commands. Returns 0 or OD_NO_MEMORY. */
static int make_room(od_plan *plan, uint64_t needed) {
    if (needed <= plan->room)
        return 0;
    uint64_t room = plan->room < 64 ? 64 : plan->room + plan->room / 2;
    if (room < needed)
        room = needed;
    od_command *grown = realloc(plan->commands, room * sizeof *grown);
    if (grown == NULL)
        return OD_NO_MEMORY;
    plan->commands = grown;
    plan->room = room;
    return 0;
}

/* Appends a command, or makes the last one longer. Returns 0 or OD_NO_MEMORY. */
int od_append_command(od_plan *plan, uint64_t size, uint64_t source) {
    while (size != 0) {
        od_command *last = plan->count != 0 ? &plan->commands[plan->count - 1] : NULL;
        if (last != NULL && source != OD_NONE && last->source != OD_NONE &&
            last->source + last->size == source) {
            last->size += size;
            return 0;
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
        if (make_room(plan, plan->count + 1) != 0)
            return OD_NO_MEMORY;
        plan->commands[plan->count++] = (od_command){part, source};
        size -= part;
    }
    return 0;
}

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
    od_plan thinned = {0};
    for (uint64_t i = 0; i < plan->count; i++) {
        const od_command *command = &plan->commands[i];
        int kept = command->source != OD_NONE && size_class(command) >= least;
        if (kept && size_class(command) == least)
            kept = equal != 0 && equal-- != 0;
        if (od_append_command(&thinned, command->size, kept ? command->source : OD_NONE) != 0) {
            free(thinned.commands);
            return OD_NO_MEMORY;
        }
    }
    free(plan->commands);
    *plan = thinned;
    return 0;
}

/* Bounds the copies of a job's plan. Returns 0 or OD_NO_MEMORY. */
int od_bound_copies(od_plan *plan, const od_job *job) {
    od_tally tally;
    uint64_t most = (job->to - job->from) / OD_BYTES_PER_COPY + 1;
    od_count(plan->commands, plan->count, 0, &tally);
    return tally.copies > most ? thin_out(plan, most) : 0;
}

void od_free_plan(od_plan *plan) {
    if (plan != NULL) {
        free(plan->commands);
        free(plan);
    }
}

od_plan *od_plan_of(const od_command *commands, uint64_t count) {
    od_plan *plan = calloc(1, sizeof *plan);
    od_plan part = {(od_command *)commands, count, count};
    if (plan != NULL && od_append(plan, &part) != 0) {
        od_free_plan(plan);
        return NULL;
    }
    return plan;
}

int od_append(od_plan *plan, const od_plan *part) {
    if (make_room(plan, plan->count + part->count) != 0)
        return OD_NO_MEMORY;
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
    return 0;
}
