/* Any bytes as a delta stream: od_apply stays inside its buffers, ends, and says the same however
 * the stream is cut. */

#include <stdlib.h>
#include <string.h>

#include "kernel.h"

#define MOST (1u << 16) /* bytes of output that are looked at */

static uint8_t pattern[3][512];

/* Applies `in` in pieces of `cut` bytes into pieces of `room`; every piece is a block of its own,
 * so that a byte too far is seen. Returns the last verdict; `out` gets what was made. */
static int apply(const od_base *base, const uint8_t *in, size_t size, size_t cut, size_t room,
                 uint8_t *out, size_t *made, od_reader *reader)
{
    size_t at = 0;
    int verdict = OD_MORE;
    memset(reader, 0, sizeof *reader);
    *made = 0;
    while (*made < MOST) {
        size_t piece = size - at < cut ? size - at : cut;
        size_t space = MOST - *made < room ? MOST - *made : room;
        uint8_t *from = malloc(piece ? piece : 1), *to = malloc(space);
        uint64_t used = 0, done = 0;
        if (!from || !to)
            abort();
        memcpy(from, in + at, piece);
        verdict = od_apply(reader, base, from, piece, &used, to, space, &done);
        if (used > piece || done > space)
            abort();
        memcpy(out + *made, to, done);
        free(from);
        free(to);
        at += used;
        *made += done;
        if (verdict != OD_MORE && verdict != OD_FULL)
            break;
        if (verdict == OD_MORE && (used != piece || at == size))
            break;
        if (verdict == OD_FULL && done == 0 && space != 0)
            abort(); /* it would go on for ever */
    }
    return verdict;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t whole[MOST], cut[MOST];
    od_layer layers[3];
    od_base base = {layers, 3, 0};
    size_t whole_made, cut_made;
    od_reader whole_reader, cut_reader;
    uint8_t *blocks[3];
    if (size < 2)
        return 0;
    for (int i = 0; i < 3; i++) {
        size_t bytes = i == 1 ? 0 : 300 + 100 * (size_t)i; /* an empty layer in between */
        for (size_t j = 0; j < sizeof pattern[i]; j++)
            pattern[i][j] = (uint8_t)(j * 7 + 31 * (size_t)i);
        blocks[i] = malloc(bytes ? bytes : 1);
        if (!blocks[i])
            abort();
        memcpy(blocks[i], pattern[i], bytes);
        layers[i] = (od_layer){blocks[i], bytes, base.size};
        base.size += bytes;
    }
    int one = apply(&base, data + 2, size - 2, size, MOST, whole, &whole_made, &whole_reader);
    int two = apply(&base, data + 2, size - 2, 1 + data[0] % 16, 1 + data[1] % 64, cut, &cut_made,
                    &cut_reader);
    if (whole_made != cut_made || memcmp(whole, cut, whole_made) != 0)
        abort();
    if (whole_made < MOST && (one != two || whole_reader.offset != cut_reader.offset))
        abort();
    for (int i = 0; i < 3; i++)
        free(blocks[i]);
    return 0;
}
