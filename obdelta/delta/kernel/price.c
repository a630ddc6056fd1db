/* Prices of literal bytes: estimates what gzip makes of them, by an imitation of its search on the
 * plan's stream. */
#include "kernel.h"

#include <stdlib.h>
#include <string.h>

#define WINDOW 32768u
#define TABLE_BITS 14
#define WAYS 4           /* positions of one hash that are remembered */
#define SHORTEST 4       /* gzip also takes near matches of 3 bytes; that hardly pays */
#define LONGEST 258
#define SHORT_COPY 512   /* bytes: a longer copy stays a copy, at any price of its literals */
/* a length and a distance, without the bits for their order of magnitude */
#define MATCH_PRICE (7 * 64)
#define LEAST (2 * 64)
#define MOST (10 * 64)
/* of 256: share of the order-0 entropy that literals cost, as gzip finds repetitions too */
#define FIRST_SCALE 150
#define LONG_MATCH 16    /* bytes that matches of this size cover are not counted */

uint32_t od_log2(uint64_t n) {
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

static uint32_t clipped(uint32_t price) {
    return price < LEAST ? LEAST : price > MOST ? MOST : price;
}

void od_first_prices(od_prices *prices, const uint8_t *target, uint64_t from, uint64_t to,
                     const od_span *matches, uint64_t count) {
    uint64_t seen[256], total = 0, covered = from;
    for (int b = 0; b < 256; b++)
        seen[b] = 1;
    for (uint64_t m = 0; m <= count; m++) {
        uint64_t at = m < count ? matches[m].at : to;
        for (; covered < at; covered++)
            seen[target[covered]] += 4;
        if (m < count && matches[m].size >= LONG_MATCH && matches[m].at + matches[m].size > covered)
            covered = matches[m].at + matches[m].size;
    }
    for (int b = 0; b < 256; b++)
        total += seen[b];
    for (int b = 0; b < 256; b++)
        prices->any[b] = clipped((od_log2(total) - od_log2(seen[b])) * FIRST_SCALE >> 8);
}

/* The last positions where each hash of four bytes was seen in the stream. */
typedef struct {
    const uint8_t *stream;
    uint32_t places[1u << TABLE_BITS][WAYS]; /* position + 1 */
} history;

static uint32_t hash_of(const uint8_t *p) {
    uint32_t word;
    memcpy(&word, p, 4);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap32(word);
#endif
    return word * 0x9e3779b1u >> (32 - TABLE_BITS);
}

static void note(history *h, uint64_t position) {
    uint32_t *places = h->places[hash_of(h->stream + position)];
    memmove(places + 1, places, (WAYS - 1) * sizeof *places);
    places[0] = (uint32_t)position + 1;
}

/* Returns the longest match for p[0, limit) that a compressor at stream position `now` could use;
 * its price in *price. */
static uint64_t recall(const history *h, const uint8_t *p, uint64_t limit, uint64_t now,
                       uint32_t *price) {
    uint64_t longest = 0, nearest = 0;
    if (limit < SHORTEST)
        return 0;
    if (limit > LONGEST)
        limit = LONGEST;
    const uint32_t *places = h->places[hash_of(p)];
    for (int way = 0; way < WAYS && places[way] != 0; way++) {
        uint64_t position = places[way] - 1, distance = now - position;
        if (distance > WINDOW)
            break;
        uint64_t size =
            od_equal_after(p, h->stream + position, limit < distance ? limit : distance);
        if (size > longest) {
            longest = size;
            nearest = distance;
        }
    }
    if (longest < SHORTEST)
        return 0;
    *price = MATCH_PRICE + od_log2(nearest) + (longest > 10 ? od_log2(longest) / 2 : 0);
    return longest;
}

static int add_prices(od_prices *prices, uint64_t at, uint64_t size) {
    od_priced *last = prices->count != 0 ? &prices->ranges[prices->count - 1] : NULL;
    if (prices->price_count + size > prices->price_room) {
        uint64_t room = 2 * (prices->price_count + size);
        uint16_t *grown = realloc(prices->prices, room * sizeof *grown);
        if (grown == NULL)
            return OD_NO_MEMORY;
        prices->prices = grown;
        prices->price_room = room;
    }
    prices->price_count += size;
    if (last != NULL && last->at + last->size == at) {
        last->size += size;
        return 0;
    }
    if (prices->count == prices->room) {
        uint64_t room = prices->room != 0 ? 2 * prices->room : 64;
        od_priced *grown = realloc(prices->ranges, room * sizeof *grown);
        if (grown == NULL)
            return OD_NO_MEMORY;
        prices->ranges = grown;
        prices->room = room;
    }
    prices->ranges[prices->count++] = (od_priced){at, size, prices->price_count - size};
    return 0;
}

/* Prices one command's target bytes. Bytes without any match are left 0, and are counted where they
 * are in the stream. */
static void price_bytes(history *h, const uint8_t *bytes, uint64_t size, uint64_t readable,
                        uint64_t now, int literal, uint16_t *prices, uint64_t seen[256],
                        uint64_t *symbols) {
    for (uint64_t i = 0; i < size;) {
        uint32_t price = 0;
        uint64_t match =
            recall(h, bytes + i, readable - i < size - i ? readable - i : size - i, now, &price);
        uint64_t step = match != 0 ? match : 1;
        for (uint64_t k = 0; k < step; k++)
            prices[i + k] = (uint16_t)(price / step);
        if (literal) {
            ++*symbols;
            if (match == 0)
                seen[bytes[i]]++;
            for (uint64_t k = 0; k < step && i + k + 4 <= readable; k++)
                note(h, now + k);
            now += step;
        }
        i += step;
    }
}

int od_better_prices(od_prices *prices, const uint8_t *target, uint64_t target_size, uint64_t from,
                     const od_plan *plan) {
    uint64_t size = od_encoded_size(plan->commands, plan->count), next = 0, at = from,
             symbols = 256;
    uint64_t seen[256] = {0};
    uint8_t *stream = malloc(size + 1);
    history *h = calloc(1, sizeof *h);
    int result = OD_NO_MEMORY;
    if (stream == NULL || h == NULL || size >= UINT32_MAX)
        goto out;
    od_encode(plan->commands, plan->count, &next, target, target_size, &at, stream, size);
    h->stream = stream;
    prices->count = prices->price_count = 0;
    uint64_t now = 0;
    at = from;
    for (uint64_t c = 0; c < plan->count; c++) {
        const od_command *command = &plan->commands[c];
        int literal = command->source == OD_NONE;
        uint64_t whole = od_encoded_size(command, 1), head = whole - (literal ? command->size : 0);
        symbols += head;
        for (uint64_t k = 0; k < head && now + k + 4 <= size; k++)
            note(h, now + k);
        if (literal || command->size <= SHORT_COPY) {
            if (add_prices(prices, at, command->size) != 0)
                goto out;
            price_bytes(h, target + at, command->size, literal ? size - now - head : command->size,
                        now + head, literal, prices->prices + prices->price_count - command->size,
                        seen, &symbols);
        }
        now += whole;
        at += command->size;
    }
    for (int b = 0; b < 256; b++)
        prices->any[b] = clipped(od_log2(symbols) - od_log2(seen[b] + 1));
    for (uint64_t r = 0; r < prices->count; r++) {
        const od_priced *range = &prices->ranges[r];
        for (uint64_t i = 0; i < range->size; i++)
            if (prices->prices[range->first + i] == 0)
                prices->prices[range->first + i] = (uint16_t)prices->any[target[range->at + i]];
    }
    result = 0;
out:
    free(stream);
    free(h);
    return result;
}

void od_drop_prices(od_prices *prices) {
    free(prices->ranges);
    free(prices->prices);
}
