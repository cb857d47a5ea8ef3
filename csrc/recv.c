/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The receiving pump: stream -> slots -> file (-> replies, in D2).
 *
 * The calling thread reads frames into slots; helpers write them.  What is for
 * the same block is written in order (a block may be sent twice: the later one
 * must win), and slots are answered in order, where the dialect has answers.
 * Buffered writes are one helper's; direct ones need several under way, each of
 * a full slot.  Small frames share a slot while the helpers are busy.  Every read asks for the rest of the current payload and at most
 * one header more, which is always there until END: so nothing behind END is
 * ever taken from the stream.
 *
 * On tmpfs the bytes of a new part of the file go by none of this: they are
 * read into its page cache at once (recv_place.c).
 */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include "clock.h"
#include "io.h"
#include "recv_internal.h"

#define MAX_WRITERS 64u

int pl_recv_payload(struct pl_recv *r, uint8_t *to, uint32_t len, bool last)
{
	uint8_t next[sizeof(r->raw)];
	struct iovec iov[2] = { { to, len }, { next, pl_recv_head_size(r) } };
	ssize_t n = pl_recv_read(r, iov, last ? 2 : 1, len);
	int err;

	if (n < 0)
		return (int)n;
	assert((size_t)n >= len && (size_t)n - len <= pl_recv_head_size(r));
	err = pl_recv_digest(r, to, len, last);
	if (!err && last) {
		r->raw_got = (uint32_t)n - len;
		memcpy(r->raw, next, r->raw_got);
	}
	return err;
}

/* `part` bytes of the data of the frame r->head. */
static int read_part(struct pl_recv *r, uint8_t *to, uint32_t part, bool last)
{
	return r->head.packed ? pl_recv_unpack(r, to, part, last) :
				pl_recv_payload(r, to, part, last);
}

static void add_part(struct recv_slot *s, uint64_t pos, uint32_t len, uint32_t off)
{
	uint64_t start = pos - pos % PL_BLOCK;
	uint64_t end = (pos + len + PL_BLOCK - 1) / PL_BLOCK * PL_BLOCK;

	s->start = s->nparts && s->start < start ? s->start : start;
	s->end = s->nparts && s->end > end ? s->end : end;
	s->part[s->nparts++] = (struct recv_part){ pos, len, off };
	s->used = (off + len + PL_BLOCK - 1) / PL_BLOCK * PL_BLOCK;
}

/* Data of the frame r->head into the file's own page, or into slots in
   parts of at most a slot. */
static int read_payload(struct pl_recv *r)
{
	uint64_t pos = r->head.pos;
	uint32_t left = r->head.size;

	if (r->head.packed) {
		int err = pl_recv_unpack_begin(r);

		if (err)
			return err;
	}
	for (uint32_t part, lead; left; pos += part, left -= part) {
		uint8_t *place = pl_recv_place(r, pos, left, &part);
		struct recv_slot *s;
		int err;

		if (place) {
			err = read_part(r, place, part, part == left);
			if (err)
				return err;
			pl_recv_placed(r, part);
			continue;
		}
		s = pl_recv_slot(r);
		if (!s)
			return r->err;
		/* Blocks lie in memory as in the file: O_DIRECT takes them from there. */
		lead = (uint32_t)(pos % PL_BLOCK);
		part = left < r->cfg.slot_size - s->used - lead ?
			       left : r->cfg.slot_size - s->used - lead;
		if (s->nparts == RECV_PARTS || (part < left && s->nparts)) {
			pl_recv_hand_over(r);
			part = 0;
			continue;
		}
		assert(part && s->used + lead + part <= r->cfg.slot_size);
		err = read_part(r, s->buf + s->used + lead, part, part == left);
		if (err)
			return err;
		add_part(s, pos, part, s->used + lead);
		pl_recv_saw(r, pos, part);
		if (part == left)
			s->replies += r->dialect == PL_DIALECT_D2 &&
				      r->head.type == PL_PACKET_DATA;
		/* An idle writer gets what there is, a busy one gets more later.
		   But a sender may wait for the answer before it goes on. */
		if (s->used >= r->cfg.slot_size ||
		    (s->replies && r->raw_got < pl_recv_head_size(r)) ||
		    __atomic_load_n(&r->writer_idle, __ATOMIC_RELAXED))
			pl_recv_hand_over(r);
	}
	return 0;
}

/* END, or a command with its data, of which the first four bytes matter. */
static int event(struct pl_recv *r, struct pl_recv_msg *msg, enum pl_stage *stage)
{
	struct iovec iov = { msg->data, sizeof(msg->data) };
	int err;

	msg->pos = r->head.pos;
	if (r->head.size) {
		err = (int)pl_recv_read(r, &iov, 1, sizeof(msg->data));
		if (err < 0)
			return err;
	}
	*stage = PL_STAGE_PROTOCOL;
	if (r->dialect == PL_DIALECT_D2 && r->head.size) {
		r->command = pl_get32(msg->data);
		if (r->command)
			return -EOPNOTSUPP;
		if (r->head.size != PL_SYNC_SIZE)
			return -EPROTO;
	}
	/* Asked again after END, it says so again: that header stays. */
	if (!r->ended) {
		err = pl_recv_digest(r, msg->data, r->head.size, true);
		if (err)
			return err;
	}
	msg->first_ns = r->first_ns;
	r->first_ns = 0;
	msg->arrived_ns = pl_now_ns();
	err = pl_recv_drain(r);
	if (err)
		return err;
	/* The writer is idle: what is its is ours. */
	msg->written_ns = pl_now_ns();
	msg->dirty_bytes = pl_recv_dirty(r);
	err = pl_recv_lanes_event(r, msg, !r->head.size);
	if (err < 0)
		return err;
	if (err == PL_RECV_LOST) {
		r->raw_got = 0;
		return err;
	}
	if (!r->head.size) {
		r->ended = true;
		return PL_RECV_END;
	}
	r->raw_got = 0;
	/* A peer that asks for an answer is alive, however little it sends. */
	r->peer_gives = (struct pl_patience){ 0 };
	return PL_RECV_SYNC;
}

/* What the sender says that the image is, which is compared when END follows; or a
   question about nodes. */
static int proof_frame(struct pl_recv *r, struct pl_recv_msg *msg)
{
	struct iovec iov = { r->proof_data, r->head.size };
	ssize_t n = pl_recv_read(r, &iov, 1, r->head.size);
	int err;

	if (n < 0)
		return (int)n;
	r->raw_got = 0;
	r->proof_len = r->head.size;
	r->claimed = !r->head.pos;
	msg->pos = r->head.pos;
	if (r->claimed)
		return 0;
	/* What the caller answers is of what is written; and it may read the file. */
	err = pl_recv_drain(r);
	return err ? err : PL_RECV_QUESTION;
}

/* The connection has failed, and another one may come. */
static bool is_broken(const struct pl_recv *r, int err, enum pl_stage stage)
{
	return r->features & PL_FEATURE_RESUME && !r->is_lane &&
	       stage == PL_STAGE_READ &&
	       (err == -ENODATA || err == -ECONNRESET || err == -ECONNABORTED ||
		err == -EPIPE || err == -EIO);
}

/* What has come whole is written: PL_RECV_BROKEN, or the failure of that. */
static int break_off(struct pl_recv *r, enum pl_stage *stage)
{
	uint64_t received = r->whole_bytes > r->base_bytes ?
				    r->whole_bytes - r->base_bytes : 0;
	int err = pl_recv_drain(r);

	*stage = PL_STAGE_WRITE;
	if (!err)
		err = pl_recv_lanes_broken(r, received);
	return err ? err : PL_RECV_BROKEN;
}

int pl_recv_run(struct pl_recv *r, struct pl_recv_msg *msg,
		struct pl_fault *fault)
{
	enum pl_stage stage;
	int ret;

	for (;;) {
		uint64_t end;

		ret = pl_recv_head(r, &stage);
		if (ret)
			break;
		stage = PL_STAGE_READ;
		if (r->head.mark == PL_PROOF_MARK) {
			ret = proof_frame(r, msg);
			if (ret)
				break;
			continue;
		}
		if (r->head.size)
			r->claimed = false;
		if (!r->head.size || r->head.type == PL_PACKET_CMD) {
			ret = event(r, msg, &stage);
			break;
		}
		if (r->head.type == RECV_FRAME_BARRIER) {
			ret = pl_recv_barrier(r, &stage);
			if (ret)
				break;
			continue;
		}
		if (r->is_lane && !r->whole_bytes) {
			/* It must say first which lane it is, and since when. */
			stage = PL_STAGE_PROTOCOL;
			ret = -EBADMSG;
			break;
		}
		r->at_barrier = false;
		end = r->head.pos + r->head.size;
		if (!r->first_ns)
			r->first_ns = pl_now_ns();
		ret = read_payload(r);
		if (ret) {
			if (ret == -EBADE || ret == -EILSEQ)
				stage = PL_STAGE_PROTOCOL;
			break;
		}
		if (r->head.packed) {
			RECV_ADD(r, packed_bytes, r->head.size);
			RECV_ADD(r, packed_frames, 1);
		}
		RECV_ADD(r, data_bytes, r->head.size);
		RECV_ADD(r, frames, 1);
		r->whole_bytes = r->stats.stream_bytes - r->raw_got;
		if (end > r->stats.image_size)
			__atomic_store_n(&r->stats.image_size, end, __ATOMIC_RELAXED);
	}
	if (ret < 0 && is_broken(r, ret, stage))
		ret = break_off(r, &stage);
	if (ret < 0) {
		/* A lane may end, and the copy go on: what has come whole counts. */
		if (r->is_lane)
			(void)!pl_recv_drain(r);
		pl_recv_fail(r, ret, stage, r->head.pos);
		/* The caller tells the peer of the failure: not in between the
		   writer's answers. */
		ret = pl_recv_drain(r);
		*fault = r->fault;
		/* The caller may close the file. */
		pl_recv_lanes_stop(r);
	}
	pl_direct_end(&r->direct);
	return ret;
}

enum pl_dialect pl_recv_dialect(const struct pl_recv *r)
{
	return r->dialect;
}

int pl_recv_expect_digests(struct pl_recv *r)
{
	if (r->dialect != PL_DIALECT_D2 || !r->cfg.digest)
		return -EINVAL;
	r->digests = true;
	return 0;
}

int pl_recv_expect(struct pl_recv *r, uint64_t features)
{
	if (r->dialect != PL_DIALECT_D1 || features & ~pl_recv_features() ||
	    (features & PL_FEATURE_PROOF && !r->cfg.proof) ||
	    (features & PL_FEATURE_LANES && r->cfg.fill))
		return -EINVAL;
	r->features = features;
	r->base_bytes = r->stats.stream_bytes;
	if (features & PL_FEATURE_LANES)
		pl_recv_lanes_open(r);
	return 0;
}

int pl_recv_expect_proof(struct pl_recv *r, struct pl_proof *proof)
{
	if (r->dialect != PL_DIALECT_D1 || r->stats.frames)
		return -EINVAL;
	r->cfg.proof = proof;
	return 0;
}

const uint8_t *pl_recv_proof_data(const struct pl_recv *r, uint32_t *len)
{
	bool there = r->ended ? r->claimed :
				r->proof_len && r->head.mark == PL_PROOF_MARK;

	*len = there ? r->proof_len : 0;
	return there ? r->proof_data : NULL;
}

void pl_recv_reopen(struct pl_recv *r)
{
	r->ended = r->claimed = false;
	r->raw_got = 0;
	r->peer_gives = (struct pl_patience){ 0 };
}

void pl_recv_relink(struct pl_recv *r, int fd)
{
	uint64_t woken;

	pthread_mutex_lock(&r->lanes.lock);	/* a new lane copies the configuration */
	r->cfg.in_fd = fd;
	pthread_mutex_unlock(&r->lanes.lock);
	pthread_mutex_lock(&r->lock);
	__atomic_store_n(&r->broken, false, __ATOMIC_RELAXED);
	/* But not what a cancel has written. */
	if (!r->err && read(r->cancel_fd, &woken, sizeof(woken)) < 0)
		woken = 0;	/* nobody had woken us */
	pthread_mutex_unlock(&r->lock);
	r->raw_got = 0;
	r->proof_len = 0;
	r->ended = r->claimed = r->at_barrier = false;
	r->base_bytes = r->whole_bytes = r->stats.stream_bytes;
	r->peer_gives = (struct pl_patience){ 0 };
	r->relinked = true;
	if (r->features & PL_FEATURE_LANES)
		pl_recv_lanes_open(r);
}

void pl_recv_disconnect(struct pl_recv *r)
{
	__atomic_store_n(&r->broken, true, __ATOMIC_RELAXED);
	pl_recv_wake(r);
	pl_recv_lanes_wake(r);
}

void pl_recv_cancel(struct pl_recv *r)
{
	pl_recv_fail(r, -ECANCELED, PL_STAGE_NONE, 0);
	pl_recv_wake(r);
	pthread_mutex_lock(&r->lock);
	pthread_cond_broadcast(&r->done);
	pthread_mutex_unlock(&r->lock);
	pl_recv_lanes_wake(r);
}

void pl_recv_stats(struct pl_recv *r, struct pl_recv_stats *out)
{
	pl_read_counters(out, &r->stats, sizeof(*out));
	out->direct_bytes = __atomic_load_n(&r->direct.bytes, __ATOMIC_RELAXED);
	pl_recv_lanes_stats(r, out);
}

static int new_slots(struct pl_recv *r)
{
	const struct pl_recv_cfg *c = &r->cfg;
	/* Between two runs of one part there is a block of zeroes at least. */
	size_t runs = RECV_PARTS + c->slot_size / PL_BLOCK / 2 + 1;

	r->slot = calloc(c->slots, sizeof(*r->slot));
	r->thread = calloc(r->cfg.writers, sizeof(*r->thread));
	r->memory = pl_buf_new((size_t)c->slots * c->slot_size);
	if (!r->slot || !r->thread || !r->memory)
		return -ENOMEM;
	for (unsigned i = 0; i < c->slots; i++) {
		struct recv_slot *s = &r->slot[i];

		s->buf = r->memory + (size_t)i * c->slot_size;
		s->run = calloc(runs, sizeof(*s->run));
		if (!s->run)
			return -ENOMEM;
	}
	return 0;
}

int pl_recv_new(struct pl_recv **out, const struct pl_recv_cfg *c)
{
	struct pl_recv *r;
	int err;

	if (c->in_fd < 0 || c->out_fd < 0 || c->reply_fd < -1 || c->slots < 2 || c->slots > 1024 ||
	    !c->slot_size || c->slot_size % PL_BLOCK || !c->max_frame ||
	    c->stall_ms > INT32_MAX || c->lane_stall_ms > INT32_MAX ||
	    c->writers > MAX_WRITERS)
		return -EINVAL;
	r = calloc(1, sizeof(*r));
	if (!r)
		return -ENOMEM;
	r->cfg = *c;
	r->cancel_fd = -1;
	r->written_end = c->old_end;
	r->ahead.fd = c->ahead && c->direct.block ? c->out_fd : -1;
	/* Only direct writes are for several; buffered ones are in order then. */
	if (!c->writers || !c->direct.block)
		r->cfg.writers = 1;
	/* Only of a new file it is known that it has holes where nothing was
	   written. */
	if (c->sparse && !c->old_end)
		pl_huge_init(&r->huge, c->out_fd, 1);
	pthread_mutex_init(&r->lock, NULL);
	pthread_cond_init(&r->work, NULL);
	pthread_cond_init(&r->done, NULL);
	pthread_cond_init(&r->planned, NULL);
	err = pl_recv_lanes_init(r);
	if (err) {
		free(r);
		return err;
	}
	err = pl_direct_init(&r->direct, c->out_fd, &c->direct);
	if (!err)
		err = new_slots(r);
	if (!err) {
		r->cancel_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		err = r->cancel_fd < 0 ? -errno : pl_recv_start(r);
	}
	if (err) {
		pl_recv_free(r);
		return err;
	}
	*out = r;
	return 0;
}

void pl_recv_free(struct pl_recv *r)
{
	if (!r)
		return;
	pl_recv_lanes_fini(r);
	pl_recv_stop(r);
	for (unsigned i = 0; r->slot && i < r->cfg.slots; i++)
		free(r->slot[i].run);
	free(r->slot);
	pl_recv_unpack_fini(r);
	free(r->thread);
	pl_buf_free(r->memory, (size_t)r->cfg.slots * r->cfg.slot_size);
	pl_direct_fini(&r->direct);
	pl_huge_fini(&r->huge);
	if (r->cancel_fd >= 0)
		close(r->cancel_fd);
	pthread_cond_destroy(&r->planned);
	pthread_cond_destroy(&r->done);
	pthread_cond_destroy(&r->work);
	pthread_mutex_destroy(&r->lock);
	free(r);
}
