/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bpf_marks.c - reading the marks and sums of the tracker's programs, in the
 * memory shared with them.
 *
 * Words are taken by exchange: a mark set at the same time is either in
 * what was taken or still there for the next.  The plain load before it is
 * for speed, as nearly all words are zero: an exchange would dirty every
 * cache line of the map.  A mark that this load misses belongs to a write
 * that nobody here can know to be complete; it is there for the next take.
 */
#include "bpf_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static uint64_t get(const uint64_t *p)
{
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static uint64_t peek(const uint64_t *p)
{
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static uint64_t tracked(const struct pl_bpf *t)
{
	return t->cfg.end - t->cfg.start;
}

void pl_bpf_counters(const struct pl_bpf *t, struct pl_bpf_counters *out)
{
	const struct pl_bpf_page *p = t->page;

	/* Sums only grow: two equal readings mean that none grew in between. */
	*out = (struct pl_bpf_counters){ 0 };
	for (unsigned i = 0; i < PL_BPF_LANES; i++) {
		out->done_write += get(&p->done[i].write);
		out->done_discard += get(&p->done[i].discard);
		out->queued_write += get(&p->queued[i].write);
		out->queued_discard += get(&p->queued[i].discard);
	}
	out->everything = get(&p->everything);
}

static int take(struct pl_bpf *t, struct pl_bpf_bits *from, uint32_t shift,
		struct pl_bitmap *into)
{
	uint64_t everything;

	if (into->size != tracked(t) || into->shift != shift)
		return -EINVAL;
	/* A source without done marks has a bitmap of no words there. */
	for (uint64_t i = 0; i < from->in_map.nwords; i++)
		if (peek(&from->word[i]))
			into->word[i] |= __atomic_exchange_n(&from->word[i], 0,
							     __ATOMIC_SEQ_CST);
	if (from->in_map.nwords == 0)
		return 0;

	/* What is declared from here on differs from `seen` the next time. */
	everything = get(&t->page->everything);
	if (everything != from->seen) {
		from->seen = everything;
		pl_bitmap_set(into, 0, into->size);
	}
	return 0;
}

int pl_bpf_take_done(struct pl_bpf *t, struct pl_bitmap *into)
{
	return take(t, &t->done, t->cfg.done_shift, into);
}

int pl_bpf_take_runs(struct pl_bpf *t,
		     int (*run)(void *ctx, uint64_t start, uint64_t end),
		     void *ctx)
{
	struct pl_bpf_bits *from = &t->done;
	uint32_t shift = t->cfg.done_shift;
	uint64_t size = tracked(t), start = 0, end = 0;
	uint64_t everything = get(&t->page->everything);
	bool all = from->in_map.nwords && everything != from->seen;
	int err = 0;

	/* What is declared from here on differs from `seen` the next time. */
	from->seen = everything;
	for (uint64_t i = 0; i < from->in_map.nwords && !err; i++) {
		uint64_t x = peek(&from->word[i]);

		if (x)
			x = __atomic_exchange_n(&from->word[i], 0, __ATOMIC_SEQ_CST);
		while (x && !all && !err) {
			unsigned bit = (unsigned)__builtin_ctzll(x);
			uint64_t rest = ~(x >> bit);
			unsigned len = rest ? (unsigned)__builtin_ctzll(rest) : 64;
			uint64_t at = (i * 64 + bit) << shift;

			if (at != end && end)
				err = run(ctx, start, end);
			if (at != end || !end)
				start = at;
			end = at + ((uint64_t)len << shift);
			x = bit + len < 64 ? x & (~0ull << (bit + len)) : 0;
		}
	}
	if (all)
		end = size;
	if (err || !end)
		return err;
	return run(ctx, start, end < size ? end : size);
}

int pl_bpf_take_queued(struct pl_bpf *t, struct pl_bitmap *into)
{
	return take(t, &t->queued, t->cfg.queued_shift, into);
}

uint64_t pl_bpf_peek_done(const struct pl_bpf *t)
{
	const struct pl_bpf_marks *m = &t->done.in_map;
	uint64_t n = 0;

	if (m->nwords && get(&t->page->everything) != t->done.seen)
		return ((tracked(t) - 1) >> m->shift) + 1;
	for (uint64_t i = 0; i < m->nwords; i++)
		n += (uint64_t)__builtin_popcountll(peek(&t->done.word[i]));
	return n;
}

/*
 * Unlike the rest, safe to call from several threads at once: all it
 * changes are words, atomically.
 */
int pl_bpf_forget(void *tracker, uint64_t start, uint64_t end)
{
	struct pl_bpf *t = tracker;
	uint32_t shift = t->cfg.done_shift;
	uint64_t size = tracked(t), first, last, w;

	if (start > end)
		return -EINVAL;
	if (t->done.in_map.nwords == 0 || start >= size)
		return 0;
	/* Granules [first, last); a partial one at the very end is whole. */
	first = (start >> shift) + !!(start & ((1ull << shift) - 1));
	if (end >= size)
		last = ((size - 1) >> shift) + 1;
	else
		last = end >> shift;

	while (first < last) {
		uint64_t mask = ~0ull << (first % 64);
		uint64_t next = (first / 64 + 1) * 64;

		if (next > last)
			mask &= ~0ull >> (next - last);
		w = first / 64;
		if (peek(&t->done.word[w]) & mask)
			__atomic_fetch_and(&t->done.word[w], ~mask,
					   __ATOMIC_SEQ_CST);
		first = next;
	}
	return 0;
}

/* Field numbers of /sys/block/X/stat, from 1. */
enum { STAT_WRITE = 7, STAT_INFLIGHT = 9, STAT_DISCARD = 14, STAT_MAX = 32 };

static int read_stat(int fd, uint64_t *wr, uint64_t *discard,
		     uint64_t *inflight)
{
	uint64_t field[STAT_MAX + 1] = { 0 };
	char buf[1024], *p = buf, *end;
	unsigned n = 0;
	ssize_t len;

	do {
		len = pread(fd, buf, sizeof(buf) - 1, 0);
	} while (len < 0 && errno == EINTR);
	if (len < 0)
		return -errno;
	buf[len] = '\0';
	while (n < STAT_MAX) {
		uint64_t v = strtoull(p, &end, 10);

		if (end == p)
			break;
		field[++n] = v;
		p = end;
	}
	if (n < STAT_INFLIGHT)
		return -EPROTO;
	*wr = field[STAT_WRITE];
	*inflight = field[STAT_INFLIGHT];
	*discard = field[STAT_DISCARD];	/* 0 where the kernel has none */
	return 0;
}

int pl_bpf_snapshot(const struct pl_bpf *t, int stat_fd, unsigned tries,
		    struct pl_bpf_snapshot *out)
{
	uint64_t wr, discard, inflight;
	int ret;

	do {
		pl_bpf_counters(t, &out->before);
		ret = read_stat(stat_fd, &out->stat_write, &out->stat_discard,
				&out->inflight);
		if (ret < 0)
			return ret;
		pl_bpf_counters(t, &out->after);
		/*
		 * The kernel counts a request here after, or (zram) before,
		 * our program sees it: standing counters alone do not show
		 * that nothing was between the two.
		 */
		ret = read_stat(stat_fd, &wr, &discard, &inflight);
		if (ret < 0)
			return ret;
		out->stable = !memcmp(&out->before, &out->after,
				      sizeof(out->before)) &&
			      wr == out->stat_write &&
			      discard == out->stat_discard;
	} while (!out->stable && tries-- > 1);
	return 0;
}
