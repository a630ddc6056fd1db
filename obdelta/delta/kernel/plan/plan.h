/* Prices of commands and literals, and plans under construction: shared by the planner's files. */
#ifndef OBDELTA_PLAN_H
#define OBDELTA_PLAN_H

#include "internal.h"

/* The longer literals are, the more the compressor finds in them, and the less of its entropy a
 * byte costs. So commands count more than they cost. Measured: bytes + price * commands is least
 * so. */
#define OD_WEIGHT 2
#define OD_HEADERS_SHARE 4 /* a copy that opens no file costs this part of a command's price */
#define OD_TAR_BLOCK 512

/* What commands take in the compressed stream, of either form, in 1/64 bit: measured over many
 * streams. */
#define OD_LITERAL_COMMAND (10 * 64)
#define OD_COPY_COMMAND (29 * 64)
#define OD_FAR (6 * 64)            /* more, from other 64 KB than the matches before */
#define OD_FARTHER (5 * 64)        /* still more, from other 16 MB */
#define OD_LONG_SIZE (6 * 64)      /* more, for a length of two bytes */
#define OD_SHORT_POSITION (7 * 64) /* less, for a position of two bytes */
#define OD_ALIGNED (7 * 64)        /* less, at a tar block: the low bits are always the same */

/* ---- price.c ---- */

#define OD_LEAST_LITERAL 16 /* least price of a literal byte */

/* Prices of literal bytes, in the contents of files and outside. */
typedef struct {
    uint32_t content[256], header[256];
} od_prices;

/* Computes the prices in a form from the bytes that long matches leave over. Linear. */
void od_price_literals(od_prices *prices, const od_job *job, const od_matches *matches,
                       uint32_t form);

/* Returns the prices of the literal bytes at target position x. They are the same up to *end.
 * *member is the tar's first entry that does not end before x; it is moved there, never back. */
const uint32_t *od_prices_at(const od_prices *prices, const od_tar *tar, uint64_t *member,
                             uint64_t x, uint64_t *end);

/* Returns whether base[source, source + size) has only bytes outside the contents of files: engines
 * have these in memory. */
int od_reads_headers_only(const od_job *job, uint64_t source, uint64_t size);

/* ---- commands.c ---- */

/* Appends a command, or makes the last one longer. Returns 0 or OD_NO_MEMORY. */
int od_append_command(od_plan *plan, uint64_t size, uint64_t source);

/* Bounds the copies of a job's plan by OD_BYTES_PER_COPY. Returns 0 or OD_NO_MEMORY. */
int od_bound_copies(od_plan *plan, const od_job *job);

#endif
