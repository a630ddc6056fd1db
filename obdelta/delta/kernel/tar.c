/* The tar walk: finds where each entry of a layer's tar begins and ends, and hashes contents.
 *
 * Sources: POSIX pax (ustar, extended headers), GNU tar manual ("Basic Tar Format"), and what Go's
 * archive/tar accepts, because engines read layers with it. */
#define _GNU_SOURCE /* memmem */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

#define BLOCK 512u
#define LONGEST_NAME (1u << 20) /* a longer extended header or long name is skipped, not read */

/* Reads a number field: octal with leading spaces, or GNU's base-256. Returns 0 if it is neither or
 * does not fit. */
static int number(const uint8_t *field, unsigned width, uint64_t *value) {
    uint64_t n = 0;
    if (field[0] & 0x80) {
        if (field[0] & 0x40)
            return 0; /* negative */
        n = field[0] & 0x3f;
        for (unsigned i = 1; i < width; i++) {
            if (n >> 55)
                return 0;
            n = n << 8 | field[i];
        }
        *value = n;
        return 1;
    }
    unsigned i = 0;
    while (i < width && (field[i] == ' ' || field[i] == 0))
        i++;
    for (; i < width && field[i] >= '0' && field[i] <= '7'; i++) {
        if (n >> 60)
            return 0;
        n = n << 3 | (uint64_t)(field[i] - '0');
    }
    for (; i < width; i++)
        if (field[i] != ' ' && field[i] != 0)
            return 0;
    *value = n;
    return 1;
}

static int is_zero(const uint8_t *block, uint64_t size) {
    for (uint64_t i = 0; i < size; i++)
        if (block[i] != 0)
            return 0;
    return 1;
}

static int checksum_fits(const uint8_t *block) {
    uint64_t stored;
    if (!number(block + 148, 8, &stored))
        return 0;
    int64_t plain = 8 * ' ', with_sign = 8 * ' ';
    for (unsigned i = 0; i < BLOCK; i++) {
        if (i >= 148 && i < 156)
            continue;
        plain += block[i];
        with_sign += (int8_t)block[i];
    }
    return (int64_t)stored == plain || (int64_t)stored == with_sign;
}

/* Reads one record "LENGTH KEY=VALUE\n" of an extended header at *at; moves *at behind it. */
static int pax_record(const uint8_t *body, uint64_t size, uint64_t *at, const uint8_t **key,
                      uint64_t *key_size, const uint8_t **value, uint64_t *value_size) {
    uint64_t start = *at, i = start, length = 0;
    while (i < size && body[i] >= '0' && body[i] <= '9' && i - start < 9)
        length = length * 10 + (uint64_t)(body[i++] - '0');
    if (i == start || i >= size || body[i] != ' ' || length > size - start ||
        start + length < i + 3)
        return 0;
    const uint8_t *from = body + i + 1, *to = body + start + length - 1;
    const uint8_t *equals = memchr(from, '=', (size_t)(to - from));
    if (equals == NULL || *to != '\n')
        return 0;
    *key = from;
    *key_size = (uint64_t)(equals - from);
    *value = equals + 1;
    *value_size = (uint64_t)(to - equals - 1);
    *at = start + length;
    return 1;
}

static int is_key(const uint8_t *key, uint64_t size, const char *name) {
    return size == strlen(name) && memcmp(key, name, size) == 0;
}

/* Reads the attributes that an extended header gives to the next entry. */
static void read_pax(const uint8_t *body, uint64_t size, const uint8_t **name, uint64_t *name_size,
                     int *has_size, uint64_t *entry_size) {
    uint64_t at = 0, key_size, value_size;
    const uint8_t *key, *value;
    while (at < size && pax_record(body, size, &at, &key, &key_size, &value, &value_size)) {
        if (is_key(key, key_size, "path") || is_key(key, key_size, "GNU.sparse.name")) {
            *name = value;
            *name_size = value_size;
        } else if (is_key(key, key_size, "size")) {
            uint64_t n = 0, i = 0;
            for (; i < value_size && i < 18 && value[i] >= '0' && value[i] <= '9'; i++)
                n = n * 10 + (uint64_t)(value[i] - '0');
            if (i > 0 && i == value_size) {
                *has_size = 1;
                *entry_size = n;
            }
        }
    }
}

static int grow(void **list, uint64_t *room, uint64_t needed, size_t each) {
    if (needed <= *room)
        return 1;
    uint64_t more = *room * 2 > needed ? *room * 2 : needed + 64;
    void *grown = realloc(*list, more * each);
    if (grown == NULL)
        return 0;
    *list = grown;
    *room = more;
    return 1;
}

static uint64_t text_size(const uint8_t *field, unsigned width) {
    const uint8_t *end = memchr(field, 0, width);
    return end == NULL ? width : (uint64_t)(end - field);
}

typedef struct {
    od_tar *tar;
    uint64_t member_room, name_room;
} walk;

static int put_name(walk *w, const uint8_t *text, uint64_t size) {
    if (!grow((void **)&w->tar->names, &w->name_room, w->tar->names_size + size, 1))
        return 0;
    if (size != 0)
        memcpy(w->tar->names + w->tar->names_size, text, size);
    w->tar->names_size += size;
    return 1;
}

static int put_member(walk *w, od_member member, const uint8_t *block, const uint8_t *name,
                      uint64_t name_size) {
    member.name = w->tar->names_size;
    if (name != NULL) {
        if (!put_name(w, name, name_size))
            return 0;
    } else {
        uint64_t prefix = memcmp(block + 257, "ustar\0", 6) == 0 ? text_size(block + 345, 155) : 0;
        if (prefix != 0 &&
            (!put_name(w, block + 345, prefix) || !put_name(w, (const uint8_t *)"/", 1)))
            return 0;
        if (!put_name(w, block, text_size(block, 100)))
            return 0;
    }
    member.name_size = (uint32_t)(w->tar->names_size - member.name);
    if (!grow((void **)&w->tar->members, &w->member_room, w->tar->count + 1, sizeof member))
        return 0;
    w->tar->members[w->tar->count++] = member;
    return 1;
}

static int walk_all(walk *w, const uint8_t *at, uint64_t size) {
    od_tar *tar = w->tar;
    uint64_t position = 0, start = 0;
    const uint8_t *name = NULL;
    uint64_t name_size = 0, told_size = 0;
    int has_size = 0, sparse = 0;
    for (;;) {
        tar->stopped = position;
        uint64_t left = size - position;
        const uint8_t *block = at + position;
        if (is_zero(block, left < BLOCK ? left : BLOCK)) {
            tar->verdict = start == position ? OD_TAR_END : OD_TAR_TRUNCATED;
            return 1;
        }
        uint64_t content_size;
        if (left < BLOCK || !checksum_fits(block) || !number(block + 124, 12, &content_size)) {
            tar->verdict = OD_TAR_BAD;
            return 1;
        }
        uint32_t type = block[156];
        position += BLOCK;
        /* GNU's old sparse entries: more of the map follows the header */
        if (type == 'S' && block[482]) {
            int more = 1;
            while (more && size - position >= BLOCK) {
                more = at[position + 504] != 0;
                position += BLOCK;
            }
            if (more) {
                tar->verdict = OD_TAR_TRUNCATED;
                return 1;
            }
        }
        int extends = type == 'x' || type == 'L' || type == 'K' || type == 'g' || type == 'X';
        if (!extends && has_size)
            content_size = told_size;
        if (type >= '1' && type <= '6')
            /* links, devices, directories and FIFOs have no content, whatever their size field
             * holds */
            content_size = 0;
        if (content_size > size - position) {
            tar->verdict = OD_TAR_TRUNCATED;
            return 1;
        }
        const uint8_t *body = at + position;
        uint64_t padding = (BLOCK - content_size % BLOCK) % BLOCK;
        uint64_t content = position;
        position += content_size;
        position += padding < size - position ? padding : size - position;
        if (extends) {
            sparse |= memmem(body, content_size, "GNU.sparse.", 11) != NULL;
            if (content_size <= LONGEST_NAME) {
                if (type == 'x' || type == 'X') {
                    read_pax(body, content_size, &name, &name_size, &has_size, &told_size);
                } else if (type == 'L') {
                    name = body;
                    name_size = text_size(body, (unsigned)content_size);
                }
            }
            continue;
        }
        od_member member = {.start = start,
                            .content = content,
                            .size = content_size,
                            .end = position,
                            .type = type};
        if (sparse || type == 'S')
            member.type |= OD_SPARSE;
        if (!put_member(w, member, block, name, name_size))
            return 0;
        start = position;
        name = NULL;
        has_size = sparse = 0;
    }
}

od_tar *od_tar_walk(const uint8_t *at, uint64_t size) {
    walk w = {.tar = calloc(1, sizeof(od_tar))};
    if (w.tar != NULL && !walk_all(&w, at, size)) {
        od_free_tar(w.tar);
        return NULL;
    }
    return w.tar;
}

void od_free_tar(od_tar *tar) {
    if (tar != NULL) {
        free(tar->members);
        free(tar->names);
        free(tar);
    }
}

int od_tar_fits(const od_tar *tar, uint64_t size) {
    uint64_t at = 0;
    for (uint64_t i = 0; i < tar->count; i++) {
        const od_member *m = &tar->members[i];
        if (m->start < at || m->content < m->start || m->end < m->content || m->end > size ||
            m->size > m->end - m->content || m->name > tar->names_size ||
            m->name_size > tar->names_size - m->name)
            return 0;
        at = m->end;
    }
    return 1;
}

static inline uint64_t mixed(uint64_t a, uint64_t b) {
    __uint128_t product = (__uint128_t)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* Returns a hash that is the same for equal contents; bytes always decide on equality. Never 0. */
static uint64_t content_hash(const uint8_t *p, uint64_t size) {
    const uint64_t k0 = 0xa0761d6478bd642fULL, k1 = 0xe7037ed1a0b428dbULL;
    uint64_t lanes[4] = {size ^ k0, size ^ k1, k0, k1}, words[8];
    uint64_t n = size;
    for (; n >= 64; n -= 64, p += 64) {
        memcpy(words, p, 64);
        for (int i = 0; i < 4; i++)
            lanes[i] = mixed(words[2 * i] ^ lanes[i] ^ k1, words[2 * i + 1] ^ k0);
    }
    memset(words, 0, sizeof words);
    if (n != 0)
        memcpy(words, p, n);
    for (int i = 0; i < 4; i++)
        lanes[i] = mixed(words[2 * i] ^ lanes[i] ^ k1, words[2 * i + 1] ^ k0);
    uint64_t hash = mixed(lanes[0] ^ k0, lanes[1] ^ k1) ^ mixed(lanes[2] ^ k1, lanes[3] ^ size);
    return hash != 0 ? hash : 1;
}

void od_hash_members(const uint8_t *at, od_member *members, uint64_t count) {
    for (uint64_t i = 0; i < count; i++) {
        od_member *m = &members[i];
        m->hash = m->size != 0 ? content_hash(at + m->content, m->size)
                               : content_hash(at + m->start, m->content - m->start);
    }
}
