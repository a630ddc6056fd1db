/* Helpers of the kernel's files: comparing bytes, the gear table, sorted lists of spans. */
#include "internal.h"

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

uint64_t od_equal_after(const uint8_t *a, const uint8_t *b, uint64_t limit) {
    uint64_t n = 0;
    while (n + 8 <= limit) {
        uint64_t difference = od_load64(a + n) ^ od_load64(b + n);
        if (difference != 0)
            return n + (uint64_t)(__builtin_ctzll(difference) >> 3);
        n += 8;
    }
    while (n < limit && a[n] == b[n])
        n++;
    return n;
}

uint64_t od_equal_before(const uint8_t *a, const uint8_t *b, uint64_t limit) {
    uint64_t n = 0;
    while (n + 8 <= limit && od_load64(a - n - 8) == od_load64(b - n - 8))
        n += 8;
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

static inline int is_before(const od_span *x, const od_span *y) {
    if (x->at != y->at)
        return x->at < y->at;
    if (x->size != y->size)
        return x->size > y->size;
    return x->source < y->source;
}

#define SORTED_BY_INSERTION 16

static void sort_few(od_span *spans, uint64_t count) {
    for (uint64_t i = 1; i < count; i++) {
        if (!is_before(&spans[i], &spans[i - 1]))
            continue;
        od_span moved = spans[i];
        uint64_t hole = i;
        do {
            spans[hole] = spans[hole - 1];
            hole--;
        } while (hole != 0 && is_before(&moved, &spans[hole - 1]));
        spans[hole] = moved;
    }
}

/* Moves the parent down a heap until its children sort before it. */
static void sink(od_span *spans, uint64_t parent, uint64_t count) {
    od_span moved = spans[parent];
    for (uint64_t child; (child = 2 * parent + 1) < count; parent = child) {
        if (child + 1 < count && is_before(&spans[child], &spans[child + 1]))
            child++;
        if (!is_before(&moved, &spans[child]))
            break;
        spans[parent] = spans[child];
    }
    spans[parent] = moved;
}

static void sort_in_place(od_span *spans, uint64_t count) {
    for (uint64_t i = count / 2; i-- != 0;)
        sink(spans, i, count);
    while (count > 1) {
        od_span last = spans[--count];
        spans[count] = spans[0];
        spans[0] = last;
        sink(spans, 0, count);
    }
}

/* A merge sort for lists that are nearly in order, as these are. The library's sort takes a tenth
 * of all planning time. */
void od_sort_spans(od_span *spans, uint64_t count) {
    int sorted = 1;
    for (uint64_t i = 0; i < count; i += SORTED_BY_INSERTION) {
        sort_few(spans + i, count - i < SORTED_BY_INSERTION ? count - i : SORTED_BY_INSERTION);
        sorted = sorted && (i == 0 || !is_before(&spans[i], &spans[i - 1]));
    }
    if (sorted)
        return;
    od_span *left = malloc(count * sizeof *left);
    if (left == NULL) {
        sort_in_place(spans, count);
        return;
    }
    for (uint64_t width = SORTED_BY_INSERTION; width < count; width *= 2) {
        for (uint64_t start = 0; start + width < count; start += 2 * width) {
            uint64_t middle = start + width, end = count - middle < width ? count : middle + width,
                     first = start;
            /* already in place */
            while (first < middle && !is_before(&spans[middle], &spans[first]))
                first++;
            uint64_t left_count = middle - first, l = 0, r = middle, to = first;
            memcpy(left, spans + first, left_count * sizeof *left);
            while (l < left_count && r < end)
                spans[to++] = is_before(&spans[r], &left[l]) ? spans[r++] : left[l++];
            memcpy(spans + to, left + l, (left_count - l) * sizeof *left);
        }
    }
    free(left);
}
