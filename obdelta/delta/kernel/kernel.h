/* The contract of the C kernel: types and functions, also read by cffi.
 *
 * Plain C11, no globals, no Python, no I/O, no output. Several threads may call any function at
 * once as long as no two of them change the same object. All input bytes are untrusted: no function
 * reads outside the ranges that it is given, and each ends after a time that is bounded by its
 * input's size (see the comments). The result depends on the arguments alone, never on addresses,
 * time or threads.
 *
 * Sizes and positions are in bytes. "Base" is the concatenation of the base image's uncompressed
 * layers, given as several ranges of memory. A base position counts from the first byte of the
 * first layer. Positions fit into 40 bits.
 *
 * Functions that allocate return NULL, or OD_NO_MEMORY, when there is no memory. The od_free_...
 * function of its type releases what they return.
 *
 * cffi reads the part between the two CDEF lines. */
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

/* One entry: its header blocks (extended headers included) are [start, content), its bytes as
 * stored are [content, content + size), and padding follows up to `end`. `name` lies in the names
 * of its od_tar. `hash` covers the content, or the header blocks where size is 0; it is 0 before
 * od_hash_members. */
typedef struct {
    uint64_t start, content, size, end;
    uint64_t hash;
    uint64_t name;
    uint32_t name_size;
    uint32_t type; /* the header's typeflag, and OD_SPARSE */
} od_member;
#define OD_SPARSE 0x100

/* How the walk over a tar ended, at position `stopped`. */
#define OD_TAR_END 0       /* a zero block, or the last byte: a complete tar */
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

/* Returns the entries of a tar (ustar, GNU, PAX; sparse entries as they are stored). For any bytes,
 * entries are in order, do not overlap and lie inside [0, size). Linear in size. */
od_tar *od_tar_walk(const uint8_t *at, uint64_t size);
void od_free_tar(od_tar *tar);

/* Returns whether a tar that was read from a file, not walked here, can belong to a layer of `size`
 * bytes: entries in order and inside, names inside its names. */
int od_tar_fits(const od_tar *tar, uint64_t size);

/* Fills in the members' hashes; `at` are the bytes that were walked. */
void od_hash_members(const uint8_t *at, od_member *members, uint64_t count);

/* ---- the sampled index (sampled_index.c) ---- */

/* A sampled 32-byte window: its hash, and the position of its last byte in the layer. The content
 * decides which windows are sampled, one in 2^bits on average, so equal bytes give equal samples at
 * any position. */
typedef struct {
    uint32_t hash;
    uint32_t position;
} od_sample;

typedef struct {
    od_sample *samples;
    uint64_t count;
} od_samples;

/* Returns the samples whose last byte lies in [from, to) of a layer of `size` bytes, in no
 * particular order. The cuts between ranges slightly influence what is sampled at their borders. */
od_samples *od_sample_range(const uint8_t *at, uint64_t size, uint64_t from, uint64_t to,
                            uint32_t bits);
void od_free_samples(od_samples *samples);

/* Samples of several layers, looked up by hash. `capacity` is the number of samples that will be
 * added, taken with `bits`; only one in 2^thin of them is kept. */
typedef struct od_sampled od_sampled;
od_sampled *od_sampled_new(uint64_t capacity, uint32_t bits, uint32_t thin);
void od_sampled_add(od_sampled *sampled, const od_sample *samples, uint64_t count, uint64_t start);
void od_free_sampled(od_sampled *sampled);

/* ---- the block index (block_matches.c) ---- */

/* Bytes of a block: engines give librsync this block size. */
#define OD_BLOCK 512

/* Fills in the hashes of a layer's blocks [first, first + count), which must lie inside. */
void od_block_hashes(const uint8_t *at, uint64_t first, uint64_t count, uint32_t *hashes);

/* Blocks of several layers, looked up by hash. `capacity` is the number of blocks that will be
 * added. Full buckets take no more, so that no look-up is long. */
typedef struct od_blocks od_blocks;
od_blocks *od_blocks_new(uint64_t capacity);
void od_blocks_add(od_blocks *blocks, const uint32_t *hashes, uint64_t count, uint64_t start);
void od_free_blocks(od_blocks *blocks);

/* ---- entries that are equal as a whole (exact_match.c) ---- */

/* target[at, at + size) == base[source, source + size). */
typedef struct {
    uint64_t at, size, source;
} od_span;

#define OD_NONE UINT64_MAX

/* Finds entries of a target whose content lies in the base. `tars` holds one walked and hashed tar
 * for each layer of the base. Its members are checked against the layer's size, and contents are
 * compared byte for byte. All arguments must outlive the object. */
typedef struct od_exact od_exact;
od_exact *od_exact_new(const od_base *base, const od_tar *const *tars, const uint8_t *target,
                     uint64_t target_size, const od_tar *members);
void od_free_exact(od_exact *exact);

/* Examines the next members, until `most` bytes have been compared or all members have been seen.
 * found[m] becomes the base position of member m's content (of its headers where it has none), or
 * OD_NONE. Among several positions, the one that continues the previous member wins, then one of
 * the same name, then the topmost. Returns the number of members seen so far, or OD_NO_MEMORY. */
int64_t od_exact_next(od_exact *exact, uint64_t most, uint64_t *found);

/* Returns the work done so far: entries examined, and blocks compared. Linear in members and their
 * bytes, also for crafted hashes. */
uint64_t od_exact_steps(const od_exact *exact);

/* Returns the spans that were found, extended over the headers between them as far as bytes are
 * equal, and merged. They are in order of `at` and may overlap. Sorts them: call it once, at the
 * end. They belong to `exact`. */
const od_span *od_exact_spans(od_exact *exact, uint64_t *count);

/* ---- matching (search/) ---- */

/* Search effort; sizes in bytes. */
typedef struct {
    uint32_t key;           /* bytes that must be equal for a candidate, 4 to 8 */
    uint32_t step;          /* the dense index holds every step-th base position */
    uint32_t gap;           /* unequal bytes that end a diagonal after a match */
    uint32_t trust_gap;     /* a gap of at most this size ... */
    uint32_t trust_run;     /* ... before a run of this size: taken without search (0: never) */
    uint32_t shortest;      /* copies shorter than this are not considered */
    uint32_t unit;          /* target bytes that are searched at a time */
    /* bytes without a match are searched for in the base bytes that face them, and in pad_floor
     * + pad_ratio times their size on both sides, at most pad_most */
    uint32_t pad_floor, pad_ratio, pad_most;
    uint32_t window_ratio;  /* most base bytes indexed for a unit, as a multiple of its size */
} od_effort;

/* target[at, at + size) may resemble base[source, source + source_size). */
typedef struct {
    uint64_t at, size, source, source_size;
} od_hint;

/* A range of the target to plan, target[from, to), and what is known of it. All of it must outlive
 * the calls below.
 *
 * `spans` are known matches, sorted by `at`; the bytes that they cover are not searched. `hints`
 * are sorted by `at` and do not overlap in the target; hints that do not lie in one layer are
 * ignored. `sampled`, `blocks`, `tars` and `tar` may be NULL. `tars` holds one walked tar for each
 * layer of the base, and `tar` is the target's. */
typedef struct {
    const od_base *base;
    const od_tar *const *tars;
    const od_sampled *sampled;
    const od_blocks *blocks;
    const uint8_t *target;
    uint64_t target_size;
    const od_tar *tar;
    uint64_t from, to;
    const od_span *spans;
    uint64_t span_count;
    const od_hint *hints;
    uint64_t hint_count;
    const od_effort *effort;
} od_job;

/* Candidates for copies in a job's range, in order of `at`; they may overlap. `work` are the bytes
 * that the search found equal, used or not; it is bounded by the range. */
typedef struct {
    od_span *spans;
    uint64_t count;
    uint64_t work;
} od_matches;

/* Returns the job's candidates: the known spans, and all that the search finds. Every candidate's
 * bytes have been compared. */
od_matches *od_find_matches(const od_job *job);
void od_free_matches(od_matches *matches);

/* ---- planning (plan/) ---- */

/* What compresses the stream: it decides what share of its entropy a literal byte costs. */
#define OD_GZIP 0
#define OD_ZSTD 1

/* `command` is what a command costs besides its bytes, for its time on the device, in 1/64 bit of
 * the compressed stream: at most OD_DEAREST_COMMAND, which is the price of 8 KB. The kernel does
 * not check that. Above it, plans hardly have copies, and sums of prices may overflow. */
#define OD_DEAREST_COMMAND 4194304
typedef struct {
    uint32_t form;
    uint32_t command;
} od_pricing;

/* A command: copies `size` bytes from base position `source`, or takes the next `size` bytes of the
 * target where `source` is OD_NONE. */
typedef struct {
    uint64_t size, source;
} od_command;

typedef struct {
    od_command *commands;
    uint64_t count, room;
} od_plan;

/* A plan has at most one copy for each so many bytes of its range, and one more: the longest ones.
 */
#define OD_BYTES_PER_COPY 24

/* Returns the commands that make target[from, to): those of the least price. They cover the range
 * exactly. One list of matches serves any number of plans.
 *
 * Below this bound, of two prices of a command in the same form the higher one never gives a plan
 * with more commands. (Copies out of tar headers count a part of a command: see
 * plan/cheapest_path.c.)
 *
 * Invariant: known bytes are copied. Every known span, clipped to the range, is a match that the
 * cheapest path may take, whatever the search does or skips. Another match takes its place only
 * where it reaches at least as far. Literals within a known span are shorter than od_longest_lost,
 * and occur only where a copy costs more. od_lost checks this. */
od_plan *od_plan_job(const od_job *job, const od_matches *matches, const od_pricing *pricing);
void od_free_plan(od_plan *plan);

/* Returns the bytes from which on literals within a known span always cost more than a copy. */
uint64_t od_longest_lost(const od_pricing *pricing);

/* Returns the bytes of known spans that a plan makes literals against the invariant: 0 unless there
 * is a fault. Linear. */
uint64_t od_lost(const od_job *job, const od_plan *plan, const od_pricing *pricing);

/* Returns the commands that make target[from, to) from the known spans alone, without any search.
 */
od_plan *od_plan_known(const od_job *job);

/* Appends the commands of `part` to those of `plan`; a copy that continues over the border becomes
 * one. Returns 0 or OD_NO_MEMORY. */
int od_append(od_plan *plan, const od_plan *part);
od_plan *od_plan_of(const od_command *commands, uint64_t count);

/* ---- what a plan spends on each entry (report.c) ---- */

/* Costs on the target bytes [start, end) of one entry, with headers and padding. A copy counts
 * where it begins, however far it reaches, so that the sums equal those of od_count. `first` is the
 * command that makes the entry's first byte; `first_at` is the target position where that command
 * begins. */
typedef struct {
    uint64_t literal_bytes, copied, copies, small_copies;
    uint64_t first, first_at;
} od_share;

/* Fills shares[0, member_count]: one a member, and the last for bytes outside all members. Members
 * are those of od_tar_walk, of the target that the commands make. Linear. Returns the number of
 * members with literal bytes. */
uint64_t od_share_out(const od_command *commands, uint64_t count, const od_member *members,
                      uint64_t member_count, uint64_t small, od_share *shares);

/* Finds at most `most` members with the most literal bytes, largest first, the earlier one first
 * where they are equal. Members without literals are left out. Returns how many were found. */
uint64_t od_biggest(const od_share *shares, uint64_t member_count, uint64_t most, uint64_t *found);

/* Writes a member's literals, joined: skips `skip` bytes of them and writes at most `capacity`.
 * Returns the number of bytes written. */
uint64_t od_literals(const od_command *commands, uint64_t count, const od_share *share,
                     const od_member *member, const uint8_t *target, uint64_t skip, uint8_t *out,
                     uint64_t capacity);

/* ---- the command stream (stream.c) ---- */

/* Totals of a list of commands; small copies are those below `small` bytes. */
typedef struct {
    uint64_t copies, small_copies, copied, literals, literal_bytes;
} od_tally;
void od_count(const od_command *commands, uint64_t count, uint64_t small, od_tally *tally);

/* Returns the bytes that the commands take, without magic and END. */
uint64_t od_encoded_size(const od_command *commands, uint64_t count);

/* Writes whole commands from `*next` on while they fit into `capacity`; moves *next and the target
 * position *at. Returns the bytes written; 0 with *next < count means that the next command alone
 * does not fit, or leaves the target. */
uint64_t od_encode(const od_command *commands, uint64_t count, uint64_t *next,
                   const uint8_t *target, uint64_t target_size, uint64_t *at, uint8_t *out,
                   uint64_t capacity);

#define OD_MORE 0      /* all input was read; more is needed */
#define OD_FULL 1      /* the output is full; call again with room */
#define OD_DONE 2      /* END was read */
#define OD_BAD_MAGIC (-1)
#define OD_BAD_COMMAND (-2)
#define OD_BAD_RANGE (-3)  /* a copy that leaves the base */
#define OD_BAD_NUMBER (-4) /* negative (8-byte numbers are signed), or an empty copy */
#define OD_NO_MEMORY (-5)

/* The position of a stream's reader; all zero at the start. */
typedef struct {
    uint64_t offset;     /* bytes of the stream read so far */
    uint64_t left;       /* bytes of the current command still to come */
    uint64_t source;     /* base position where a copy continues */
    uint64_t numbers[2];
    uint64_t copies, copied, literals, literal_bytes;
    uint32_t state, command, need, have;
} od_reader;

/* Applies a part of a stream: reads in[0, in_size) and writes out[0, capacity); *used and *made are
 * the bytes read and written. A stream may be cut anywhere. Nothing after END is read. On an error
 * the reader's offset is that of the byte after the bad number or command. */
int od_apply(od_reader *reader, const od_base *base, const uint8_t *in, uint64_t in_size,
             uint64_t *used, uint8_t *out, uint64_t capacity, uint64_t *made);

/* CDEF ends */

#endif
