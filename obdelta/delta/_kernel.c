/* Small things that the kernel's files share. Contracts in _kernel.h. */
#include "_kernel.h"

#include <stdlib.h>
#include <string.h>

const od_layer *od_layer_of(const od_base *base, uint64_t position) {
    uint64_t low = 0, high = base->count;
    while (high - low > 1) {
        uint64_t middle = low + (high - low) / 2;
        if (base->layers[middle].start <= position)
            low = middle;
        else
            high = middle;
    }
    return &base->layers[low];
}

static inline uint64_t load64(const uint8_t *p) {
    uint64_t value;
    memcpy(&value, p, 8);
    return value;
}

uint64_t od_equal_after(const uint8_t *a, const uint8_t *b, uint64_t limit) {
    uint64_t n = 0;
    while (n + 8 <= limit) {
        uint64_t difference = load64(a + n) ^ load64(b + n);
        if (difference != 0) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
            return n + (uint64_t)(__builtin_ctzll(difference) >> 3);
#else
            return n + (uint64_t)(__builtin_clzll(difference) >> 3);
#endif
        }
        n += 8;
    }
    while (n < limit && a[n] == b[n])
        n++;
    return n;
}

uint64_t od_equal_before(const uint8_t *a, const uint8_t *b, uint64_t limit) {
    uint64_t n = 0;
    while (n < limit && *(a - n - 1) == *(b - n - 1))
        n++;
    return n;
}

void od_gear(uint64_t gear[256]) {
    uint64_t state = 0x6f6264656c7461ULL;
    for (int i = 0; i < 256; i++) { /* splitmix64 */
        uint64_t z = (state += 0x9e3779b97f4a7c15ULL);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
        gear[i] = z ^ (z >> 31);
    }
}

int od_span_push(od_span_list *list, uint64_t at, uint64_t size, uint64_t source) {
    if (list->count == list->room) {
        uint64_t room = list->room != 0 ? list->room * 2 : 256;
        od_span *grown = realloc(list->spans, room * sizeof *grown);
        if (grown == NULL)
            return OD_NO_MEMORY;
        list->spans = grown;
        list->room = room;
    }
    list->spans[list->count++] = (od_span){at, size, source};
    return 0;
}

static int by_place(const void *a, const void *b) {
    const od_span *x = a, *y = b;
    if (x->at != y->at)
        return x->at < y->at ? -1 : 1;
    if (x->size != y->size)
        return x->size > y->size ? -1 : 1;
    return x->source < y->source ? -1 : x->source > y->source;
}

void od_sort_spans(od_span *spans, uint64_t count) {
    if (count > 1)
        qsort(spans, count, sizeof *spans, by_place);
}
