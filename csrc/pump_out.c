/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pump's end: frames into a stream (D1's, or D2's packets), or bytes into
 * a file.
 *
 * The stream must not block the emitter in write(2), or a signal could not
 * stop the copy while the peer is stuck; so it is non-blocking (or a socket,
 * MSG_DONTWAIT) and the emitter waits in poll(2) together with the cancel
 * descriptor.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "clock.h"
#include "io.h"
#include "pump_internal.h"

/* Until the stream takes more: 0, -ECANCELED, -ETIMEDOUT; D2's answers are
   taken meanwhile, with their errors. */
int pl_stream_wait(struct pl_pump *p)
{
	bool answers = p->cfg.sink == PL_SINK_PACKETS;
	struct pollfd pfd[2] = {
		{ .fd = p->cancel_fd, .events = POLLIN },
		{ .fd = p->cfg.out_fd, .events = answers ? POLLOUT | POLLIN : POLLOUT },
	};
	int n = pl_patient_poll(&p->peer_takes, pfd, 2, p->cfg.stall_ms);

	if (n < 0)
		return n;
	if (pfd[0].revents)
		return -ECANCELED;
	if (answers && (pfd[1].revents & POLLIN))
		return pl_reply_take(p);
	/* POLLERR (reader gone) is left to write(2), which names it. */
	return 0;
}

/* 0, or -ECANCELED. */
static int sleep_ms(struct pl_pump *p, int ms)
{
	struct pollfd pfd = { .fd = p->cancel_fd, .events = POLLIN };
	int n = poll(&pfd, 1, ms);

	if (n < 0)
		return errno == EINTR ? 0 : -errno;
	return n ? -ECANCELED : 0;
}

/* Wait until the bytes sent so far are due; rate_lock held. */
static int wait_due(struct pl_pump *p, size_t bytes)
{
	uint64_t now = pl_now_ns(), due;

	due = p->rate_t0_ns +
	      (uint64_t)((double)p->rate_bytes * 1e9 / (double)p->cfg.rate);
	if (!p->rate_t0_ns || now > due + 1000000000u) {
		p->rate_t0_ns = now;
		p->rate_bytes = 0;
		due = now;
	}
	p->rate_bytes += bytes;
	while (now < due) {
		int err = sleep_ms(p, (int)((due - now + 999999) / 1000000));

		if (err)
			return err;
		now = pl_now_ns();
	}
	return 0;
}

/* A token bucket of one second's burst at most, shared by all writers. */
static int obey_rate(struct pl_pump *p, size_t bytes)
{
	int err;

	if (!p->cfg.rate)
		return 0;
	pthread_mutex_lock(&p->rate_lock);
	err = wait_due(p, bytes);
	pthread_mutex_unlock(&p->rate_lock);
	return err;
}

/* A peer that has hung up may have said why. */
static int why_closed(struct pl_pump *p, int err)
{
	int said = p->cfg.sink == PL_SINK_PACKETS ? pl_reply_take(p) : 0;

	return said == -EREMOTEIO ? said : err;
}

void pl_stream_moved(struct pl_pump *p, size_t n)
{
	STAT_ADD(p, wire_bytes, n);
	pl_patience_moved(&p->peer_takes, n);
}

int pl_stream_fault(struct pl_pump *p, int err, struct pl_fault *fault)
{
	if (err == -EREMOTEIO || err == -EPROTO) {
		pl_reply_explain(p, err, fault);
		return err;
	}
	fault->stage = PL_STAGE_WRITE;
	fault->stream = __atomic_load_n(&p->stats.wire_bytes, __ATOMIC_RELAXED);
	fault->frame = __atomic_load_n(&p->stats.frames, __ATOMIC_RELAXED);
	return err;
}

int pl_stream_write(struct pl_pump *p, struct iovec *iov, unsigned n,
		    struct pl_fault *fault)
{
	int fd = p->cfg.out_fd, err = 0;
	size_t total = 0;

	for (unsigned i = 0; i < n; i++)
		total += iov[i].iov_len;
	err = obey_rate(p, total);
	while (!err && n) {
		struct msghdr msg = { .msg_iov = iov, .msg_iovlen = n };
		ssize_t done;

		if (__atomic_load_n(&p->cancelled, __ATOMIC_RELAXED)) {
			err = -ECANCELED;
			break;
		}
		done = sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (done < 0 && errno == ENOTSOCK)
			done = writev(fd, iov, (int)n);
		if (done < 0) {
			if (errno == EAGAIN || errno == EWOULDBLOCK)
				err = pl_stream_wait(p);
			else if (errno != EINTR)
				err = why_closed(p, -errno);
			continue;
		}
		pl_stream_moved(p, (size_t)done);
		while (n && (size_t)done >= iov->iov_len) {
			done -= (ssize_t)iov->iov_len;
			iov++;
			n--;
		}
		if (n) {
			iov->iov_base = (char *)iov->iov_base + done;
			iov->iov_len -= (size_t)done;
		}
	}
	return err ? pl_stream_fault(p, err, fault) : 0;
}

static int make_header(const struct pl_pump *p, uint8_t *h, uint64_t pos,
		       const uint8_t *data, uint32_t len)
{
	if (p->cfg.sink == PL_SINK_FRAMES) {
		pl_d1_put(h, len, pos);
		return 0;
	}
	pl_d2_put(h, p->cfg.async ? PL_PACKET_DATA_ASYNC : PL_PACKET_DATA, len,
		  pos);
	return p->cfg.digest ? p->cfg.digest(p->cfg.digest_ctx, data, len,
					     h + PL_D2_HEADER) : 0;
}

/* Room in the window for so many packets, all of which will be answered. */
static int ask(struct pl_pump *p, unsigned packets, struct pl_fault *fault)
{
	int err;

	if (p->cfg.sink != PL_SINK_PACKETS)
		return 0;
	if (p->cfg.async)
		packets = 0;
	err = pl_reply_take(p);		/* a failure is seen early */
	if (!err)
		err = pl_reply_room(p, packets);
	if (err)
		pl_reply_explain(p, err, fault);
	return err;
}

static int emit_spliced(struct pl_pump *p, struct slot *s, const struct frag *r,
			struct pl_fault *fault)
{
	struct iovec iov = { s->hdr, p->hdr_size };
	int err = obey_rate(p, r->len);

	if (err)
		return pl_stream_fault(p, err, fault);
	make_header(p, s->hdr, r->pos, NULL, r->len);
	err = pl_stream_write(p, &iov, 1, fault);
	if (!err)
		err = pl_splice_run(p, s, r, fault);
	if (!err) {
		STAT_ADD(p, data_bytes, r->len);
		STAT_ADD(p, frames, 1);
	}
	return err;
}

static int emit_frames(struct pl_pump *p, struct slot *s, struct pl_fault *fault)
{
	struct iovec iov[2 * PL_BATCH];
	uint8_t *hdr = s->hdr;
	unsigned i = 0;
	int err = 0;

	while (i < s->nruns && !err) {
		unsigned n = 0, frames = 0;
		uint64_t bytes = 0;

		fault->pos = s->run[i].pos;
		if (pl_run_is_spliced(p, &s->run[i])) {
			err = emit_spliced(p, s, &s->run[i++], fault);
			continue;
		}
		/* Room for the two frames that one run may need. */
		for (; i < s->nruns && n + 4 <= 2 * PL_BATCH && !err &&
		       !pl_run_is_spliced(p, &s->run[i]); i++) {
			struct frag r = s->run[i];
			/* A frame of 4 bytes means SYNC in D1: send such a tail in
			   two halves, which every receiver takes as data. */
			bool halves = r.len == 4 && p->cfg.sink == PL_SINK_FRAMES;
			uint32_t step = halves ? 2 : r.len;

			for (uint32_t at = 0; at < r.len && !err; at += step) {
				uint8_t *data = s->data + r.off + at;

				err = make_header(p, hdr, r.pos + at, data, step);
				iov[n++] = (struct iovec){ hdr, p->hdr_size };
				iov[n++] = (struct iovec){ data, step };
				hdr += p->hdr_size;
				frames++;
			}
			bytes += r.len;
		}
		if (!err)
			err = ask(p, frames, fault);
		if (!err)
			err = pl_stream_write(p, iov, n, fault);
		if (!err) {
			STAT_ADD(p, data_bytes, bytes);
			STAT_ADD(p, frames, frames);
		}
	}
	return err;
}

static int emit_file(struct pl_pump *p, struct slot *s, struct pl_fault *fault)
{
	for (unsigned i = 0; i < s->nruns; i++) {
		struct frag *r = &s->run[i];
		int err = obey_rate(p, r->len);

		pl_huge_ahead(p, r->pos, r->pos + r->len);
		if (!err && !s->place)
			err = pl_pwrite_full(p->cfg.out_fd, s->data + r->off,
					     r->len, r->pos);
		if (err) {
			fault->stage = PL_STAGE_WRITE;
			fault->pos = r->pos;
			return err;
		}
		/* Writeback starts at once, so that dirty pages do not pile up
		   and the last fdatasync is short; its errors are kept for that. */
		sync_file_range(p->cfg.out_fd, (off_t)r->pos, (off_t)r->len,
				SYNC_FILE_RANGE_WRITE);
		STAT_ADD(p, data_bytes, r->len);
		STAT_ADD(p, wire_bytes, r->len);
	}
	STAT_ADD(p, frames, s->nruns);
	return 0;
}

int pl_slot_emit(struct pl_pump *p, struct slot *s, struct pl_fault *fault)
{
	return p->cfg.sink == PL_SINK_FILE ? emit_file(p, s, fault) :
					     emit_frames(p, s, fault);
}
