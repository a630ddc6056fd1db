/* Costs of a plan for each entry of the target's tar: copies, and literal bytes. Contract:
 * kernel.h. */
#include "internal.h"

#include <string.h>

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

uint64_t od_share_out(const od_command *commands, uint64_t count, const od_member *members,
                      uint64_t member_count, uint64_t small, od_share *shares) {
    od_share *outside = &shares[member_count];
    memset(shares, 0, (member_count + 1) * sizeof *shares);
    uint64_t at = 0, member = 0;
    for (uint64_t i = 0; i < count; i++) {
        const od_command *command = &commands[i];
        uint64_t end = at + command->size;
        int is_copy = command->source != OD_NONE, counted = !is_copy;
        for (uint64_t from = at; from < end;) {
            while (member < member_count && members[member].end <= from)
                member++;
            int inside = member < member_count && members[member].start <= from;
            uint64_t to = member == member_count
                              ? end
                              : smaller(end, inside ? members[member].end : members[member].start);
            od_share *share = inside ? &shares[member] : outside;
            if (inside && share->literal_bytes + share->copied == 0) {
                share->first = i;
                share->first_at = at;
            }
            if (is_copy)
                share->copied += to - from;
            else
                share->literal_bytes += to - from;
            if (!counted) {
                share->copies++;
                share->small_copies += command->size < small;
                counted = 1;
            }
            from = to;
        }
        at = end;
    }
    uint64_t changed = 0;
    for (uint64_t i = 0; i < member_count; i++)
        changed += shares[i].literal_bytes != 0;
    return changed;
}

uint64_t od_biggest(const od_share *shares, uint64_t member_count, uint64_t most, uint64_t *found) {
    uint64_t number = 0;
    for (uint64_t i = 0; i < member_count; i++) {
        uint64_t bytes = shares[i].literal_bytes;
        if (bytes == 0 ||
            (number == most && (most == 0 || shares[found[number - 1]].literal_bytes >= bytes)))
            continue;
        uint64_t place = number < most ? number++ : number - 1;
        for (; place > 0 && shares[found[place - 1]].literal_bytes < bytes; place--)
            found[place] = found[place - 1];
        found[place] = i;
    }
    return number;
}

uint64_t od_literals(const od_command *commands, uint64_t count, const od_share *share,
                     const od_member *member, const uint8_t *target, uint64_t skip, uint8_t *out,
                     uint64_t capacity) {
    uint64_t at = share->first_at, made = 0;
    for (uint64_t i = share->first; i < count && at < member->end && made < capacity; i++) {
        uint64_t from = at < member->start ? member->start : at;
        uint64_t to = smaller(at + commands[i].size, member->end);
        at += commands[i].size;
        if (commands[i].source != OD_NONE || to <= from)
            continue;
        uint64_t passed = smaller(skip, to - from);
        skip -= passed;
        uint64_t part = smaller(to - from - passed, capacity - made);
        memcpy(out + made, target + from + passed, part);
        made += part;
    }
    return made;
}
