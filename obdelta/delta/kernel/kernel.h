/* The native part of obdelta's delta builder: contract.
 *
 * Plain C11, no globals, no Python, no I/O, no output. Every function may be called from several
 * threads at once as long as no two of them change the same object. All input bytes are untrusted:
 * no function reads outside the ranges that it is given, and each ends after a time that is bounded
 * by its input's size (see the comments). What comes out depends on the arguments alone, never on
 * addresses, time or threads.
 *
 * Sizes and positions are in bytes. "Base" is the concatenation of the base image's uncompressed
 * layers, given as several ranges of memory; a base position counts from the first byte of the
 * first layer. Positions fit into 40 bits.
 *
 * Functions that allocate return NULL, or OD_NO_MEMORY, when there is no memory; what they return
 * is released by the od_free_... function of its type.
 *
 * The part between the two CDEF lines is also what cffi reads. */
#ifndef OBDELTA_KERNEL_H
#define OBDELTA_KERNEL_H

#include <stddef.h>
#include <stdint.h>

/* CDEF begins */

/* ---- the base ---- */

/* One base layer; `start` is its base position, the sum of the sizes before it. Layers are given
 * bottom to top. */
typedef struct {
    const uint8_t *at;
    uint64_t size;
    uint64_t start;
} od_layer;

typedef struct {
    const od_layer *layers;
    uint64_t count;
    uint64_t size; /* of all layers */
} od_base;

/* ---- tars (tar.c) ---- */

/* One entry: [start, content) are its header blocks (extended headers included), [content, content
 * + size) its bytes as they are stored, up to `end` padding. `name` lies in the names of its
 * od_tar. `hash` is of the content, of the header blocks where size is 0; 0 before od_hash_members.
 */
typedef struct {
    uint64_t start, content, size, end;
    uint64_t hash;
    uint64_t name;
    uint32_t name_size;
    uint32_t type; /* the header's typeflag, and OD_SPARSE */
} od_member;
#define OD_SPARSE 0x100

/* How the walk over a tar ended, at `stopped`. */
#define OD_TAR_END 0       /* a zero block, or the last byte: a whole tar */
#define OD_TAR_BAD 1       /* a block that is no header */
#define OD_TAR_TRUNCATED 2 /* in the middle of an entry */

typedef struct {
    od_member *members;
    uint64_t count;
    uint8_t *names;
    uint64_t names_size;
    uint64_t stopped;
    int32_t verdict;
} od_tar;

/* The entries of a tar (ustar, GNU, PAX; sparse entries as they are stored). Whatever the bytes
 * are, entries are in order, do not overlap and lie inside [0, size). Linear in size. */
od_tar *od_tar_walk(const uint8_t *at, uint64_t size);
void od_free_tar(od_tar *tar);

/* Whether a tar that was not walked here (but read from a file) could be one of a layer of `size`
 * bytes: entries in order and inside, names inside its names. */
int od_tar_fits(const od_tar *tar, uint64_t size);

/* Fill in the members' hashes; `at` is what was walked. */
void od_hash_members(const uint8_t *at, od_member *members, uint64_t count);

/* ---- the coarse index (sampled_index.c) ---- */

/* A sampled 32-byte window: its hash, and the position of its last byte in the layer. Windows are
 * chosen by content, one in 2^bits on average, so that equal bytes give equal samples wherever they
 * lie. */
typedef struct {
    uint32_t hash;
    uint32_t position;
} od_sample;

typedef struct {
    od_sample *samples;
    uint64_t count;
} od_samples;

/* The samples whose last byte lies in [from, to) of a layer of `size` bytes, in no certain order.
 * Where a layer is cut into ranges has a small influence on what is sampled at their borders. */
od_samples *od_sample_range(const uint8_t *at, uint64_t size, uint64_t from, uint64_t to, uint32_t bits);
void od_free_samples(od_samples *samples);

/* Samples of several layers, looked up by hash. `capacity`: how many samples will be added, taken
 * with `bits`; only one in 2^thin of them is kept. */
typedef struct od_coarse od_coarse;
od_coarse *od_coarse_new(uint64_t capacity, uint32_t bits, uint32_t thin);
void od_coarse_add(od_coarse *coarse, const od_sample *samples, uint64_t count, uint64_t start);
void od_free_coarse(od_coarse *coarse);

/* ---- the block index (block_matches.c) ---- */

/* Bytes of a block: what engines give librsync as a block's size. */
#define OD_BLOCK 512

/* Fills in the hashes of a layer's blocks [first, first + count), which must lie inside. */
void od_block_hashes(const uint8_t *at, uint64_t first, uint64_t count, uint32_t *hashes);

/* Blocks of several layers, looked up by hash. `capacity`: how many will be added. Full buckets
 * take no more, so that no look-up is long. */
typedef struct od_blocks od_blocks;
od_blocks *od_blocks_new(uint64_t capacity);
void od_blocks_add(od_blocks *blocks, const uint32_t *hashes, uint64_t count, uint64_t start);
void od_free_blocks(od_blocks *blocks);

/* ---- what is equal as a whole (exact_match.c) ---- */

/* target[at, at + size) == base[source, source + size). */
typedef struct {
    uint64_t at, size, source;
} od_span;

#define OD_NONE UINT64_MAX

/* Finds entries of a target whose content lies in the base. `tars` holds one walked and hashed tar
 * for each layer of the base; its members are checked against the layer's size, contents are
 * compared byte for byte. All arguments must outlive it. */
typedef struct od_same od_same;
od_same *od_same_new(const od_base *base, const od_tar *const *tars, const uint8_t *target, uint64_t target_size,
                     const od_tar *members);
void od_free_same(od_same *same);

/* Look at the next members, until `most` bytes have been compared or all have been seen. found[m]
 * becomes the base position of member m's content (of its headers where it has none), or OD_NONE.
 * Where there are several, the one that goes on from the previous member, else one of the same
 * name, else the topmost. Returns how many members have been seen by now, or OD_NO_MEMORY. */
int64_t od_same_next(od_same *same, uint64_t most, uint64_t *found);

/* Work done so far: entries looked at, and blocks compared. Linear in members and their bytes, also
 * where hashes are crafted. */
uint64_t od_same_steps(const od_same *same);

/* What was found, grown over the headers between as far as bytes are equal, and merged. In order of
 * `at`; spans may overlap. Sorts them: to be called once, at the end. They belong to `same`. */
const od_span *od_same_spans(od_same *same, uint64_t *count);

/* ---- planning (match.c, parse.c) ---- */

/* How hard to try. Prices are in 1/64 bit of the finished layer, sizes in bytes. */
typedef struct {
    uint32_t key;           /* bytes that must be equal for a candidate, 4 to 8 */
    uint32_t step;          /* every step-th base position is indexed where the search is dense */
    uint32_t gap;           /* after a match, so many unequal bytes may follow on its diagonal before it is given up */
    uint32_t trust_gap;     /* a gap this small ... */
    uint32_t trust_run;     /* ... before a run of at least so many bytes is not searched for anything better (0: always search) */
    uint32_t shortest;      /* copies shorter than this are not considered */
    uint32_t unit;          /* target bytes that are searched at a time */
    uint32_t pad_floor, pad_ratio, pad_most; /* what is left over between matches is searched for in the base bytes that face it,
                             * and on both sides in pad_floor + pad_ratio times its size more, at most pad_most */
    uint32_t window_ratio;  /* base bytes that are indexed for a unit: at most so many times its size */
    uint32_t copy_toll;     /* what a copy costs beside its bytes, for the time that it takes on the device */
    uint32_t densest;       /* at most one copy for so many bytes of a range (0: no bound); one more for its rest */
    uint32_t passes;        /* how often the cheapest way is sought; each but the first knows what the one before leaves to gzip */
} od_effort;

/* target[at, at + size) may resemble base[source, source + source_size). */
typedef struct {
    uint64_t at, size, source, source_size;
} od_hint;

/* A command: `size` bytes from base position `source`, or the next `size` bytes of the target where
 * `source` is OD_NONE. */
typedef struct {
    uint64_t size, source;
} od_command;

typedef struct {
    od_command *commands;
    uint64_t count, room;
    uint64_t work; /* bytes that the search found equal, also in vain; bounded by the size of the ranges */
} od_plan;

/* The commands that make target[from, to) from the base. `spans`: known matches (sorted by `at`),
 * what they cover is not searched. `hints`: sorted by `at`, not overlapping in the target; those
 * that do not lie in one layer are passed over. `coarse` and `blocks` may be NULL. Commands cover
 * the range exactly; every copy's bytes have been compared.
 *
 * Invariant: known bytes are copied. Every known span, clipped to the range, is a match that the
 * cheapest way may take, whatever the search does or skips. Another match takes its place only
 * where it reaches at least as far. Literals within a known span are shorter than OD_LONGEST_LOST,
 * a block of librsync's, and only there where a copy costs more than they do. od_lost checks it. */
#define OD_LONGEST_LOST 512
od_plan *od_plan_range(const od_base *base, const od_coarse *coarse, const od_blocks *blocks,
                       const uint8_t *target, uint64_t target_size, uint64_t from, uint64_t to, const od_span *spans, uint64_t span_count, const od_hint *hints,
                       uint64_t hint_count, const od_effort *effort);
void od_free_plan(od_plan *plan);

/* Bytes of known spans that a plan for target[from, to) makes literals against the invariant: 0.
 * Linear. */
uint64_t od_lost(const od_plan *plan, uint64_t from, uint64_t to, const od_span *spans,
                 uint64_t span_count);

/* The commands that make target[from, to) from the known spans alone, without any search. Copies
 * are bounded as above. */
od_plan *od_plan_known(uint64_t from, uint64_t to, const od_span *spans, uint64_t span_count,
                       const od_effort *effort);

/* Put the commands of `part` behind those of `plan`; a copy that goes on over the border becomes
 * one. Returns 0 or OD_NO_MEMORY. */
int od_append(od_plan *plan, const od_plan *part);
od_plan *od_plan_of(const od_command *commands, uint64_t count);

/* ---- what a plan spends on each entry (report.c) ---- */

/* On the target bytes [start, end) of one entry, headers and padding with it. A copy is counted
 * where it begins, whatever it reaches over, so that the sums are those of od_count. `first` is the
 * command that makes the entry's first byte, `first_at` the target position where that command
 * begins. */
typedef struct {
    uint64_t literal_bytes, copied, copies, small_copies;
    uint64_t first, first_at;
} od_share;

/* Fills shares[0, member_count], one a member and the last for what lies outside of all. Members as
 * od_tar_walk gives them, of the target that the commands make. Linear. Returns how many members
 * have literal bytes. */
uint64_t od_share_out(const od_command *commands, uint64_t count, const od_member *members, uint64_t member_count,
                      uint64_t small, od_share *shares);

/* The members with the most literal bytes (none without any), most first, the earlier one first
 * where they are equal; at most `most`. Returns how many. */
uint64_t od_biggest(const od_share *shares, uint64_t member_count, uint64_t most, uint64_t *found);

/* A member's literals, joined: passes over `skip` bytes of them and writes at most `capacity`.
 * Returns how many were written. */
uint64_t od_literals(const od_command *commands, uint64_t count, const od_share *share, const od_member *member,
                     const uint8_t *target, uint64_t skip, uint8_t *out, uint64_t capacity);

/* ---- the command stream (stream.c) ---- */

/* What a list of commands comes to; small copies are those below `small`. */
typedef struct {
    uint64_t copies, small_copies, copied, literals, literal_bytes;
} od_tally;
void od_count(const od_command *commands, uint64_t count, uint64_t small, od_tally *tally);

/* Bytes that the commands take, without magic and END. */
uint64_t od_encoded_size(const od_command *commands, uint64_t count);

/* Writes whole commands from `*next` on while they fit into `capacity`, moving *next and the target
 * position *at. Returns the bytes written; 0 with *next < count means that the next command alone
 * does not fit, or leaves the target. */
uint64_t od_encode(const od_command *commands, uint64_t count, uint64_t *next, const uint8_t *target, uint64_t target_size,
                   uint64_t *at, uint8_t *out, uint64_t capacity);

#define OD_MORE 0      /* all input was read; give more */
#define OD_FULL 1      /* the output is full; call again with room */
#define OD_DONE 2      /* END was read */
#define OD_BAD_MAGIC (-1)
#define OD_BAD_COMMAND (-2)
#define OD_BAD_RANGE (-3)  /* a copy that leaves the base */
#define OD_BAD_NUMBER (-4) /* negative (8-byte numbers are signed), or an empty copy */
#define OD_NO_MEMORY (-5)

/* Where a reader of a stream stands; all zero at the start. */
typedef struct {
    uint64_t offset;     /* bytes of the stream read so far */
    uint64_t left;       /* bytes of the present command still to come */
    uint64_t source;     /* where a copy goes on */
    uint64_t numbers[2];
    uint64_t copies, copied, literals, literal_bytes;
    uint32_t state, command, need, have;
} od_reader;

/* Applies a part of a stream: reads in[0, in_size), writes out[0, capacity); *used and *made tell
 * how far it came. A stream may be cut anywhere. Nothing after END is read. On an error the
 * reader's offset is that of the byte after the bad number or command. */
int od_apply(od_reader *reader, const od_base *base, const uint8_t *in, uint64_t in_size, uint64_t *used, uint8_t *out,
             uint64_t capacity, uint64_t *made);

/* CDEF ends */

/* ---- shared between the kernel's own files ---- */

/* The layer that holds a base position below base->size. */
const od_layer *od_layer_of(const od_base *base, uint64_t position);

/* How many bytes are equal, at most `limit`, from the two places on; or before them. */
uint64_t od_equal_after(const uint8_t *a, const uint8_t *b, uint64_t limit);
uint64_t od_equal_before(const uint8_t *a, const uint8_t *b, uint64_t limit);

/* Bytes shared by everything that hashes windows of 32 bytes: h = (h << 2) + gear[byte]. */
#define OD_WINDOW 32
void od_gear(uint64_t gear[256]);

/* What od_coarse knows of a window's hash: calls `found` for each candidate's last position until
 * it returns nonzero. */
typedef int (*od_found)(void *with, uint64_t position);
void od_coarse_find(const od_coarse *coarse, uint64_t hash, od_found found, void *with);

struct od_coarse {
    uint64_t *entries; /* buckets of eight: tag << 40 | position + 1; 0 is an empty one */
    uint64_t buckets;
    uint32_t bits, thin;
};

static inline uint32_t od_fold(uint64_t hash) {
    return (uint32_t)((hash * 0x9e3779b97f4a7c15ULL) >> 32);
}

/* Whether windows with this hash are in the index. */
static inline int od_is_sample(const od_coarse *coarse, uint64_t hash) {
    return (hash >> (64 - coarse->bits)) == 0 && (od_fold(hash) & ((1u << coarse->thin) - 1)) == 0;
}

struct od_blocks {
    od_coarse *index;  /* positions of blocks' first bytes */
    uint64_t *bits;    /* one for each block's hash, or several */
    uint64_t mask;     /* of the bits' numbers */
    uint64_t leaving;  /* what a byte's value is multiplied with as it leaves the window */
};

static inline uint64_t od_block_bit(const od_blocks *blocks, uint32_t folded) {
    return (folded * 0x9e3779b97f4a7c15ULL) >> 20 & blocks->mask;
}

/* A window's hash, and that of the window one byte on. */
uint64_t od_block_hash(const uint8_t *at);
static inline uint64_t od_block_roll(const od_blocks *blocks, uint64_t hash, const uint8_t *at) {
    return hash * 0x9e3779b97f4a7c15ULL + at[OD_BLOCK] - at[0] * blocks->leaving;
}

static inline int od_is_block(const od_blocks *blocks, uint64_t hash) {
    uint64_t bit = od_block_bit(blocks, od_fold(hash));
    return blocks->bits[bit / 64] >> (bit % 64) & 1;
}

/* A growing list of spans. */
typedef struct {
    od_span *spans;
    uint64_t count, room;
} od_span_list;
int od_span_push(od_span_list *list, uint64_t at, uint64_t size, uint64_t source);
void od_sort_spans(od_span *spans, uint64_t count); /* by at, then longest first, then source */

/* match.c: appends to `list` what it finds equal; sorted by `at`. `work`: see od_plan. Returns 0 or
 * OD_NO_MEMORY. */
int od_find_matches(const od_base *base, const od_coarse *coarse, const od_blocks *blocks,
                    const uint8_t *target, uint64_t target_size, uint64_t from, uint64_t to, const od_span *spans, uint64_t span_count, const od_hint *hints, uint64_t hint_count,
                    const od_effort *effort, od_span_list *list, uint64_t *work);

/* price.c: what gzip is expected to make of target bytes that are literals, in 1/64 bit. */
typedef struct {
    uint64_t at, size; /* of the target */
    uint64_t first;    /* index of its first byte's price */
} od_priced;

typedef struct {
    uint32_t any[256];   /* for bytes in no range */
    od_priced *ranges;   /* in order */
    uint64_t count, room;
    uint16_t *prices;
    uint64_t price_count, price_room;
} od_prices;

/* From the bytes that long matches leave over. */
void od_first_prices(od_prices *prices, const uint8_t *target, uint64_t from, uint64_t to, const od_span *matches,
                     uint64_t count);
/* From a plan for target[from, ...): its stream is compressed, after a fashion. Returns 0 or
 * OD_NO_MEMORY. */
int od_better_prices(od_prices *prices, const uint8_t *target, uint64_t target_size, uint64_t from, const od_plan *plan);
void od_drop_prices(od_prices *prices);

/* 64 * log2(n), n >= 1. */
uint32_t od_log2(uint64_t n);

/* parse.c: the cheapest way through the matches (sorted by `at`). */
od_plan *od_cheapest(const uint8_t *target, uint64_t from, uint64_t to, const od_span *matches, uint64_t count,
                     const od_prices *prices, const od_effort *effort);

#endif
