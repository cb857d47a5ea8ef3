/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pl.h - the native core of pyploop: bytes in, 0 / +n / -errno out.
 *
 * Rules that hold for everything declared here
 *   - No function knows Python.  None prints.  None exits.
 *   - Success is 0 or a count, failure is -errno.  Arguments are checked
 *     before any state is changed.
 *   - Positions and lengths are bytes (uint64_t); ranges are half-open
 *     [start, end).  A source is addressed relative to its own first byte,
 *     also when it is a partition or the middle of a backing file.
 *   - Whoever got an object from pl_X_new/pl_X_open gives it back with
 *     pl_X_free/pl_X_close, which accept NULL.
 *   - File descriptors are borrowed, never closed, unless a comment says so.
 *   - Calls on one object come from one thread at a time; the exceptions
 *     (cancel, progress) are marked "any thread".
 */
#ifndef PL_H
#define PL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The granule of hashes, the zero test, tracker bitmaps and O_DIRECT. */
#define PL_BLOCK 4096u

struct pl_extent {
	uint64_t start;
	uint64_t end;
};

/* Called just before [start, end) of the source is read; 0 or -errno. */
typedef int (*pl_hook)(void *ctx, uint64_t start, uint64_t end);

/* Stream dialects (docs/protocol.md); D3 is D2 with features agreed. */
enum pl_dialect { PL_DIALECT_NONE, PL_DIALECT_D1, PL_DIALECT_D2 };
#define PL_D1_MARK 0x4cc0ac3du
#define PL_D2_MARK 0x4cc0ac3eu
#define PL_D1_HEADER 16u
#define PL_D2_HEADER 24u	/* and PL_DIGEST bytes more with digests */
enum pl_packet {	/* D2's types; a SYNC of D1 is a command too */
	PL_PACKET_DATA = 0, PL_PACKET_CMD = 1, PL_PACKET_DATA_ASYNC = 2,
};

/*
 * A digest (MD5) of data that comes in pieces, computed by the caller's code:
 * none is built in.  With `out`, these were the last: write the digest there,
 * and begin anew.  0 or -errno.
 */
#define PL_DIGEST 16u
typedef int (*pl_digest)(void *ctx, const void *data, size_t len, uint8_t *out);

/* ------------------------------------------------------------ bitmap.c
 * One bit per granule of (1 << shift) bytes of a source of `size` bytes.
 * Words are 64 bits, little-endian bit order (bit i is word[i/64] >> i%64).
 */
struct pl_bitmap {
	uint64_t *word;		/* owned; mmapped, so untouched pages cost nothing */
	uint64_t nwords;
	uint64_t nbits;
	uint64_t size;		/* bytes covered; the last granule may be partial */
	uint32_t shift;
};

int pl_bitmap_init(struct pl_bitmap *b, uint64_t size, uint32_t shift);
void pl_bitmap_fini(struct pl_bitmap *b);
void pl_bitmap_zero(struct pl_bitmap *b);
/* Mark every granule that [start, end) touches; clipped to the size. */
void pl_bitmap_set(struct pl_bitmap *b, uint64_t start, uint64_t end);
/* Clear every granule that lies wholly in [start, end). */
void pl_bitmap_clear(struct pl_bitmap *b, uint64_t start, uint64_t end);
/* dst |= src; the same size and shift, else -EINVAL. */
int pl_bitmap_or(struct pl_bitmap *dst, const struct pl_bitmap *src);
/* dst &= src, or dst &= ~src; the same size and shift, else -EINVAL. */
int pl_bitmap_and(struct pl_bitmap *dst, const struct pl_bitmap *src, bool invert);
/* dst |= src where src may be coarser or finer; the same size, else -EINVAL. */
int pl_bitmap_or_scaled(struct pl_bitmap *dst, const struct pl_bitmap *src);
uint64_t pl_bitmap_count(const struct pl_bitmap *b);	/* set bits */
uint64_t pl_bitmap_bytes(const struct pl_bitmap *b);	/* bytes they cover */
/*
 * The first run of set bits at or after byte `from`.  Returns 1 and the
 * run, clipped to the size, or 0 when there is none.
 */
int pl_bitmap_next(const struct pl_bitmap *b, uint64_t from,
		   struct pl_extent *run);

/* ---------------------------------------------------------------- io.c
 * Whole transfers: EINTR, short counts and alignment are handled here.
 */

/* Read exactly `len` bytes at `pos`; -EIO-free: end of file is -ENODATA. */
int pl_pread_full(int fd, void *buf, size_t len, uint64_t pos);
int pl_pwrite_full(int fd, const void *buf, size_t len, uint64_t pos);
int pl_fdatasync(int fd);
/* Buffers for O_DIRECT: PL_BLOCK aligned; the size is rounded up. */
void *pl_buf_new(size_t len);
void pl_buf_free(void *buf, size_t len);

/* ------------------------------------------------------- hash.c, known.c
 * Content hashes, and what the target is known to hold.
 */

/* 64-bit XXH3; PL_HASH_ZERO if and only if all bytes are zero. */
uint64_t pl_hash_block(const void *data, size_t len);
/* The same value by the portable code: the reference for tests. */
uint64_t pl_hash_block_ref(const void *data, size_t len);
bool pl_is_zero(const void *data, size_t len);
/* "avx2" or "portable": what pl_hash_block runs on this machine. */
const char *pl_hash_kernel(void);

#define PL_HASH_ZERO 0ull
#define PL_HASH_UNKNOWN (~0ull)

/*
 * The sender's knowledge of the target, which starts as zeroes:
 *   nonzero - one bit per PL_BLOCK: something else than zeroes was sent last;
 *   hash    - one per chunk of (1 << shift) bytes: the hash of what was sent
 *             last, PL_HASH_UNKNOWN when only a part of it was sent.
 * Both are mmapped: what stays zero costs no memory.
 */
struct pl_known {
	struct pl_bitmap nonzero;
	uint64_t *hash;		/* owned */
	uint64_t nchunks;
	uint64_t size;
	uint32_t shift;
};

int pl_known_init(struct pl_known *k, uint64_t size, uint32_t shift);
void pl_known_fini(struct pl_known *k);
/* The target may hold anything in [start, end): zeroes must be sent there. */
void pl_known_assume_data(struct pl_known *k, uint64_t start, uint64_t end);
/* The target holds exactly `data` at [start, start + len), which is whole chunks,
   the last one of the source among them perhaps; else -EINVAL. */
int pl_known_note(struct pl_known *k, uint64_t start, const uint8_t *data,
		  uint64_t len);

/* ---------------------------------------------------------- pump*.c
 * The sending pump: reads extents of a source with several reads in flight,
 * compares it with what the target is known to hold, and writes what must be sent -
 * in order as D1 frames or D2 packets into a stream, or in place into a file.
 *
 *      claim (ordered) -> hook -> read -> classify -> ring -> emit (ordered)
 *
 * The thread that calls pl_pump_pass emits; when it has nothing to emit it
 * reads too, so on a machine with few cores nobody waits for a wake-up.
 * Memory is slots * slot_size, whatever the size of the source.
 */
enum pl_sink {
	PL_SINK_FRAMES = 1,	/* D1 frames into out_fd, which is O_NONBLOCK or
				   a socket */
	PL_SINK_FILE = 2,	/* pwrite at the source's positions */
	PL_SINK_PACKETS = 3,	/* D2 packets into out_fd, a socket, where they
				   are answered */
};

enum pl_pass_flags {
	/* Do not send a block that is zero where the target is known to hold
	   zeroes (needs known). */
	PL_PASS_SKIP_ZERO = 1,
	/* Send only chunks that differ from what was sent last (needs `known`);
	   extents are widened to whole chunks. */
	PL_PASS_CHANGED = 2,
	/* The extents are holes of the source: do not read, they are zeroes.
	   They are narrowed to whole chunks, as the extents of the data between
	   them are widened (CHANGED, LAST). */
	PL_PASS_HOLES = 4,
	/* Send the source's last byte whatever it is: it carries the size.  The
	   first pass: with `known`, extents are widened to whole chunks. */
	PL_PASS_LAST = 8,
	/* Call the hook before each read. */
	PL_PASS_HOOK = 16,
	/* What is sent may be newer than what was looked at, as long as nothing
	   is written without the tracker's knowing; `known` then says only that
	   it may be anything but zeroes.  Lets page cache go into a pipe without
	   a copy, where that can be. */
	PL_PASS_LIVE = 32,
};

struct pl_pump_cfg {
	int src_fd;
	uint64_t src_base;	/* where the source starts in src_fd */
	uint64_t size;		/* bytes of the source */
	uint32_t align;		/* of position and length for src_fd: 1 for buffered
				   reads, a power of two <= 65536 for O_DIRECT */
	uint32_t tail;		/* bytes at the source's end that O_DIRECT cannot
				   read, since they are no whole sector; < align */
	int tail_fd;		/* what they are read from, buffered, */
	uint64_t tail_pos;	/* and where they begin in it */
	int out_fd;
	enum pl_sink sink;
	uint32_t cluster;	/* largest frame, cut from an extent's start; a
				   multiple of PL_BLOCK, at most 64 MiB */
	uint32_t slots;		/* >= 2 */
	uint32_t readers;	/* helper threads, 0..64 */
	uint32_t stall_ms;	/* give up (-ETIMEDOUT) when the stream took less
				   than 64 KiB in so long (patience.h); 0: never */
	uint64_t rate;		/* bytes per second to the target, 0: no limit */
	struct pl_known *known;	/* borrowed; NULL: send all, remember nothing */
	pl_hook hook;
	void *hook_ctx;
	/* PL_SINK_PACKETS only: */
	bool async;		/* DATA_ASYNC, which is not answered */
	uint32_t window;	/* answers outstanding at most, >= 256 */
	pl_digest digest;	/* each packet carries one; NULL: none does */
	void *digest_ctx;
};

/* Monotonic counters, readable from any thread while a pass runs. */
struct pl_pump_stats {
	uint64_t read_bytes;	/* read from the source */
	uint64_t data_bytes;	/* sent as payload */
	uint64_t wire_bytes;	/* payload + headers */
	uint64_t zero_bytes;	/* not sent: zero at both ends */
	uint64_t same_bytes;	/* not sent: unchanged */
	uint64_t frames;
	uint64_t done_bytes;	/* of the extents of this pass, finished */
	uint64_t huge_bytes;	/* of the file, made as huge pages (tmpfs) */
};

/* Where a pass failed. */
enum pl_stage { PL_STAGE_NONE, PL_STAGE_READ, PL_STAGE_WRITE, PL_STAGE_HOOK,
		PL_STAGE_PROTOCOL, PL_STAGE_REPLY };
struct pl_fault {
	enum pl_stage stage;
	uint64_t pos;		/* in the source (READ) or image (WRITE) */
	uint64_t stream;	/* bytes of the stream before the fault */
	uint64_t frame;		/* frames before the fault */
	uint32_t mark, size;	/* the offending header (PROTOCOL) */
	uint32_t type, command;	/* of D2's, the same */
	int32_t reply;		/* the peer's failure (REPLY with -EREMOTEIO) */
};

struct pl_pump;
int pl_pump_new(struct pl_pump **out, const struct pl_pump_cfg *cfg);
void pl_pump_free(struct pl_pump *p);
/*
 * Send `n` extents (ascending, disjoint, within the size).  0, or -errno with
 * *fault set; -ECANCELED after pl_pump_cancel.  -ENODATA: the source is
 * shorter than it was.  A frame never has 4 data bytes (that is SYNC).
 */
int pl_pump_pass(struct pl_pump *p, const struct pl_extent *ext, size_t n,
		 unsigned flags, struct pl_fault *fault);
/*
 * Write raw bytes (a control frame) into the stream; same rules.
 */
int pl_pump_write(struct pl_pump *p, const void *buf, size_t len,
		  struct pl_fault *fault);
/*
 * PL_SINK_PACKETS: write a control packet and wait for its answer, and all that
 * are due before it, for timeout_ms at most (0: for ever).  -EREMOTEIO: an answer was a
 * failure, fault->reply; -EPROTO: there was one too many.  Passes can fail with
 * these too.
 */
int pl_pump_ask(struct pl_pump *p, const void *buf, size_t len,
		uint32_t timeout_ms, struct pl_fault *fault);
/* Between two passes; bytes per second, 0: no limit. */
void pl_pump_limit(struct pl_pump *p, uint64_t rate);
void pl_pump_cancel(struct pl_pump *p);			/* any thread */
void pl_pump_stats(const struct pl_pump *p, struct pl_pump_stats *out); /* any */

/* ---------------------------------------------------------- recv*.c
 * The receiving pump: stream -> ring -> file.  The calling thread reads, one
 * helper writes, so that the two overlap.  Never reads past END.  The first
 * marker decides the dialect; another one later is -EBADMSG.  In D2 the helper
 * answers DATA once it is written; SYNC, END and failures are the caller's to
 * answer, and nobody else writes to reply_fd while a run returns.
 */
enum pl_recv_event {
	PL_RECV_SYNC = 1,	/* everything before it is written (not durable) */
	PL_RECV_END = 2,
};

struct pl_recv_cfg {
	int in_fd;
	int out_fd;
	uint32_t slots, slot_size;	/* memory is the product */
	uint32_t max_frame;	/* larger sizes are refused (-EMSGSIZE) */
	uint32_t stall_ms;	/* less than 64 KiB, or no END, in so long a wait:
				   -ETIMEDOUT (patience.h); 0: never */
	uint64_t window;	/* dirty bytes of the target kept unwritten at
				   most, roughly; 0: no rolling writeback */
	uint32_t sparse;	/* 1: zero blocks become holes */
	uint64_t held;		/* the file may hold data below this position; 0: it
				   is new */
	uint64_t largest;	/* data past this position are refused (-EFBIG); 0:
				   no limit */
	int reply_fd;		/* socket that D2 is answered on; -1: D2 is refused */
	pl_digest digest;	/* or NULL */
	void *digest_ctx;
};

struct pl_recv_stats {
	uint64_t stream_bytes, data_bytes, frames, written_bytes, hole_bytes;
	uint64_t image_size;	/* highest position + size seen */
	uint64_t huge_bytes;	/* of the file, made as huge pages (tmpfs) */
};

struct pl_recv_msg {
	uint64_t pos;
	uint8_t data[4];	/* SYNC's payload (in D2 a command of zero) */
	/* CLOCK_MONOTONIC, ns: when the first data since the last event began to
	   be there (0: there were none), when this event was read, and when all
	   before it was written. */
	uint64_t first_ns, arrived_ns, written_ns;
	/* Written since pl_recv_synced, and not known to be on the disk, bytes. */
	uint64_t dirty_bytes;
};

struct pl_recv;
int pl_recv_new(struct pl_recv **out, const struct pl_recv_cfg *cfg);
void pl_recv_free(struct pl_recv *r);
/*
 * Run until a SYNC or END frame: returns the event, or -errno with *fault.
 * -ENODATA: the stream ended before END.  -EBADMSG: bad marker.  -EMSGSIZE:
 * frame too large.  -ERANGE: position past 2^63 - size.  -EFBIG: past `largest`.
 * D2: -EOPNOTSUPP: a type
 * or command that is not taken.  -EPROTO: a command of the wrong size.  -EBADE:
 * wrong digest.  -ENOTSOCK: no reply_fd.
 */
int pl_recv_run(struct pl_recv *r, struct pl_recv_msg *msg,
		struct pl_fault *fault);
/* Between two runs: the caller has had the file synced. */
void pl_recv_synced(struct pl_recv *r);
/* Of what was received so far. */
enum pl_dialect pl_recv_dialect(const struct pl_recv *r);
/* Between two runs: every packet from now on carries a digest.  -EINVAL unless
   this is D2 and the configuration has one. */
int pl_recv_expect_digests(struct pl_recv *r);
void pl_recv_cancel(struct pl_recv *r);			/* any thread */
void pl_recv_stats(const struct pl_recv *r, struct pl_recv_stats *out);	/* any */

/* -------------------------------------------------------------- ploop.c
 * The ploop driver's own tracking (`ploop` type 'P' ioctls; numbers from the
 * driver's documented interface).  Positions are bytes of the image.
 */
struct pl_ploop {
	int fd;			/* borrowed: the open /dev/ploopN */
};

/* A tracker left by a killed sender (EBUSY) is aborted, once. */
int pl_ploop_start(struct pl_ploop *t, uint64_t size);
/* Pump hook: extents at or past `end` will still be reached by the pass. */
int pl_ploop_setpos(void *tracker, uint64_t start, uint64_t end);
/* 1 and the next dirty extent, which is cleared; 0: none is left. */
int pl_ploop_next(struct pl_ploop *t, struct pl_extent *dirty);
int pl_ploop_sync(struct pl_ploop *t);		/* flush the top delta */
int pl_ploop_stop(struct pl_ploop *t);		/* fails while bits are unread */
int pl_ploop_abort(struct pl_ploop *t);

/* ------------------------------------------------- bpf_tracker.c (+ btf.c, bpf_prog.c)
 * Dirty tracking of one block device by BPF programs at the block layer's
 * tracepoints.  Needs bpf(2) with BTF (/sys/kernel/btf/vmlinux), nothing
 * else: no clang, no libbpf, no tracefs.
 *
 * Two kinds of marks, because completion events can be lost on some
 * machines while the sum of what completed is known to the kernel:
 *   done   - set when a write (or discard, write-zeroes ...) has completed,
 *            before its writer is woken;
 *   queued - set when a bio is submitted, in the submitter's own context.
 * Counters are 512-byte sectors of the WHOLE disk, not clipped to
 * [start, end), so that they can be compared with /sys/block/X/stat.  With
 * PL_BPF_BIO write-zeroes count as discards: zram accounts neither.
 */
enum pl_bpf_source {
	PL_BPF_RQ = 1,	   /* done marks from block_rq_complete (has blk-mq) */
	PL_BPF_BIO = 2,	   /* done marks from block_bio_complete (zram, brd) */
	PL_BPF_QUEUE = 3,  /* no done marks; queued marks only (dm, md) */
};

struct pl_bpf_cfg {
	uint32_t major, minor;	/* of the whole disk (gendisk major, first_minor) */
	uint64_t start, end;	/* bytes of the disk that are tracked; the whole
				   disk or a partition; multiples of 512 */
	uint32_t done_shift;	/* granule of the done bitmap, >= 12 */
	uint32_t queued_shift;	/* granule of the queued bitmap, >= 12 */
	enum pl_bpf_source source;
};

struct pl_bpf_counters {
	uint64_t done_write, done_discard;	/* sectors completed */
	uint64_t queued_write, queued_discard;	/* sectors submitted */
	uint64_t everything;			/* times "all is dirty" was declared */
};

struct pl_bpf;

/* On failure *why (>= 256 bytes) gets one line a person can act on. */
int pl_bpf_open(struct pl_bpf **out, const struct pl_bpf_cfg *cfg,
		char *why, size_t why_len);
void pl_bpf_close(struct pl_bpf *t);
void pl_bpf_counters(const struct pl_bpf *t, struct pl_bpf_counters *out);
/*
 * Move the marks into `into` (atomic exchange word by word, OR into the
 * destination); the bitmap must have been made for end - start bytes and
 * the matching shift, else -EINVAL.  An "everything is dirty" declaration
 * since the last take sets the whole destination.  Returns 0.
 */
int pl_bpf_take_done(struct pl_bpf *t, struct pl_bitmap *into);
int pl_bpf_take_queued(struct pl_bpf *t, struct pl_bitmap *into);
/*
 * pl_bpf_take_done as runs, ascending: each is given to `run`, whose failure
 * ends it (and loses marks).  A bitmap in between would cost page faults over
 * the whole of a large source.
 */
int pl_bpf_take_runs(struct pl_bpf *t,
		     int (*run)(void *ctx, uint64_t start, uint64_t end),
		     void *ctx);
/*
 * Bits now set in the done bitmap, without touching them; all bits when
 * everything is dirty.
 */
uint64_t pl_bpf_peek_done(const struct pl_bpf *t);
/*
 * Pump hook (any thread): drop the done marks of granules that lie wholly in
 * [start, end), source-relative; called just BEFORE that range is read
 * (clear, then read).  Never drops an "everything" declaration.
 */
int pl_bpf_forget(void *tracker, uint64_t start, uint64_t end);

/*
 * One look at the counters and at the kernel's own accounting
 * (/sys/block/X/stat, fields 7 and 14), as consistent as a running system
 * allows.  Loops up to `tries` times until nothing moved between two
 * readings of the counters around one of the file.
 */
struct pl_bpf_snapshot {
	struct pl_bpf_counters before, after;	/* around the reading of stat */
	uint64_t stat_write, stat_discard;	/* sectors, since boot */
	uint64_t inflight;	/* stat field 9 (requests in flight, reads too) */
	int stable;		/* 1: before == after, and stat read twice alike */
};
int pl_bpf_snapshot(const struct pl_bpf *t, int stat_fd, unsigned tries,
		    struct pl_bpf_snapshot *out);

#endif /* PL_H */
