/* librsync's delta command stream: writes it, and applies it to a base. Format:
 * docs/delta-format.md. */
#include "internal.h"

#include <string.h>

#define COMMAND_END 0x00
#define COMMAND_LITERAL_LAST 0x40 /* 0x01 to 0x40: that many bytes */
#define COMMAND_LITERAL_N 0x41    /* 0x41 to 0x44: length in 1, 2, 4, 8 bytes */
#define COMMAND_COPY 0x45         /* + 4 * width code of the position + width code of the length */
#define COMMAND_COPY_LAST 0x54

static const uint8_t MAGIC[4] = {0x72, 0x73, 0x02, 0x36};

/* Returns 0, 1, 2, 3 for a number that needs 1, 2, 4, 8 bytes. */
static unsigned width_code(uint64_t value) {
    return value <= 0xff ? 0 : value <= 0xffff ? 1 : value <= 0xffffffff ? 2 : 3;
}

static uint64_t head_size(const od_command *command) {
    if (command->source != OD_NONE)
        return 1 + (1u << width_code(command->source)) + (1u << width_code(command->size));
    return command->size <= COMMAND_LITERAL_LAST ? 1 : 1 + (1u << width_code(command->size));
}

void od_count(const od_command *commands, uint64_t count, uint64_t small, od_tally *tally) {
    od_tally sum = {0};
    for (uint64_t i = 0; i < count; i++) {
        if (commands[i].source == OD_NONE) {
            sum.literals++;
            sum.literal_bytes += commands[i].size;
        } else {
            sum.copies++;
            sum.small_copies += commands[i].size < small;
            sum.copied += commands[i].size;
        }
    }
    *tally = sum;
}

uint64_t od_encoded_size(const od_command *commands, uint64_t count) {
    uint64_t size = 0;
    for (uint64_t i = 0; i < count; i++)
        size += head_size(&commands[i]) + (commands[i].source == OD_NONE ? commands[i].size : 0);
    return size;
}

static uint8_t *put_number(uint8_t *out, uint64_t value, unsigned code) {
    unsigned width = 1u << code;
    for (unsigned i = 0; i < width; i++)
        out[i] = (uint8_t)(value >> (8 * (width - 1 - i)));
    return out + width;
}

uint64_t od_encode(const od_command *commands, uint64_t count, uint64_t *next,
                   const uint8_t *target, uint64_t target_size, uint64_t *at, uint8_t *out,
                   uint64_t capacity) {
    uint8_t *to = out;
    while (*next < count) {
        const od_command *command = &commands[*next];
        int literal = command->source == OD_NONE;
        uint64_t left = capacity - (uint64_t)(to - out), head = head_size(command);
        if (*at > target_size || command->size > target_size - *at || head > left ||
            (literal && command->size > left - head))
            break;
        unsigned size_code = width_code(command->size);
        if (!literal) {
            unsigned source_code = width_code(command->source);
            *to++ = (uint8_t)(COMMAND_COPY + 4 * source_code + size_code);
            to = put_number(to, command->source, source_code);
            to = put_number(to, command->size, size_code);
        } else {
            if (command->size <= COMMAND_LITERAL_LAST) {
                *to++ = (uint8_t)command->size;
            } else {
                *to++ = (uint8_t)(COMMAND_LITERAL_N + size_code);
                to = put_number(to, command->size, size_code);
            }
            memcpy(to, target + *at, command->size);
            to += command->size;
        }
        *at += command->size;
        ++*next;
    }
    return (uint64_t)(to - out);
}

enum { AT_MAGIC, AT_COMMAND, AT_NUMBERS, AT_LITERAL, AT_COPY, AT_END };

/* Begins a command once all of its numbers are read. */
static int begin(od_reader *r, const od_base *base) {
    if (r->command < COMMAND_COPY) {
        if (r->numbers[0] >> 63)
            return OD_BAD_NUMBER;
        r->left = r->numbers[0];
        r->literals++;
        r->literal_bytes += r->left;
        r->state = AT_LITERAL;
        return OD_MORE;
    }
    uint64_t source = r->numbers[0], size = r->numbers[1];
    if (source >> 63 || size >> 63 || size == 0)
        return OD_BAD_NUMBER;
    if (source > base->size || size > base->size - source)
        return OD_BAD_RANGE;
    r->source = source;
    r->left = size;
    r->copies++;
    r->copied += size;
    r->state = AT_COPY;
    return OD_MORE;
}

static unsigned first_width(unsigned command) {
    return 1u << (command < COMMAND_COPY ? command - COMMAND_LITERAL_N
                                         : (command - COMMAND_COPY) >> 2);
}

static int read_byte(od_reader *r, const od_base *base, uint8_t byte) {
    r->offset++;
    if (r->state == AT_MAGIC) {
        if (byte != MAGIC[r->have])
            return OD_BAD_MAGIC;
        if (++r->have == sizeof MAGIC)
            r->state = AT_COMMAND;
        return OD_MORE;
    }
    if (r->state == AT_COMMAND) {
        if (byte > COMMAND_COPY_LAST)
            return OD_BAD_COMMAND;
        r->command = byte;
        r->have = 0;
        r->numbers[0] = r->numbers[1] = 0;
        if (byte == COMMAND_END) {
            r->state = AT_END;
            return OD_DONE;
        }
        if (byte <= COMMAND_LITERAL_LAST) {
            r->numbers[0] = byte;
            return begin(r, base);
        }
        r->need = first_width(byte) + (byte < COMMAND_COPY ? 0 : 1u << ((byte - COMMAND_COPY) & 3));
        r->state = AT_NUMBERS;
        return OD_MORE;
    }
    unsigned which = r->have >= first_width(r->command);
    r->numbers[which] = r->numbers[which] << 8 | byte;
    return ++r->have == r->need ? begin(r, base) : OD_MORE;
}

static void copy_from_base(const od_base *base, uint64_t source, uint8_t *out, uint64_t size) {
    while (size != 0) {
        const od_layer *layer = od_layer_of(base, source);
        uint64_t inside = source - layer->start, part = layer->size - inside;
        if (part > size)
            part = size;
        memcpy(out, layer->at + inside, part);
        out += part;
        source += part;
        size -= part;
    }
}

int od_apply(od_reader *r, const od_base *base, const uint8_t *in, uint64_t in_size, uint64_t *used,
             uint8_t *out, uint64_t capacity, uint64_t *made) {
    uint64_t taken = 0, given = 0;
    int status = OD_MORE;
    for (;;) {
        if (r->state == AT_END) {
            status = OD_DONE;
            break;
        }
        if (r->state == AT_LITERAL || r->state == AT_COPY) {
            if (r->left == 0) {
                r->state = AT_COMMAND;
                continue;
            }
            uint64_t part = r->left;
            if (part > capacity - given)
                part = capacity - given;
            if (r->state == AT_LITERAL && part > in_size - taken)
                part = in_size - taken;
            if (part == 0) {
                status = given == capacity ? OD_FULL : OD_MORE;
                break;
            }
            if (r->state == AT_LITERAL) {
                memcpy(out + given, in + taken, part);
                taken += part;
                r->offset += part;
            } else {
                copy_from_base(base, r->source, out + given, part);
                r->source += part;
            }
            given += part;
            r->left -= part;
            continue;
        }
        if (taken == in_size)
            break;
        status = read_byte(r, base, in[taken++]);
        if (status != OD_MORE)
            break;
    }
    *used = taken;
    *made = given;
    return status;
}
