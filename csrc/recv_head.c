/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The receiver's headers: which dialect, what kind of packet, within bounds.
 * No byte is asked for before the bytes ahead of it say that it will come.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "recv_internal.h"

uint32_t pl_recv_head_size(const struct pl_recv *r)
{
	if (r->dialect != PL_DIALECT_D2)
		return PL_D1_HEADER;
	return r->digests ? PL_D2_HEADER + PL_DIGEST : PL_D2_HEADER;
}

/* Until `size` bytes of the header are here. */
static int fill(struct pl_recv *r, uint32_t size)
{
	struct iovec iov;
	ssize_t n;

	if (r->raw_got >= size)
		return 0;
	iov.iov_base = r->raw + r->raw_got;
	iov.iov_len = size - r->raw_got;
	n = pl_recv_read(r, &iov, 1, iov.iov_len);
	if (n < 0)
		return (int)n;
	r->raw_got = size;
	return 0;
}

static int check_data(const struct pl_recv *r)
{
	if (r->head.size > r->cfg.max_frame)
		return -EMSGSIZE;
	if (r->head.pos > (uint64_t)INT64_MAX - r->head.size)
		return -ERANGE;
	if (r->cfg.largest && r->head.pos + r->head.size > r->cfg.largest)
		return -EFBIG;
	if (r->cfg.proof && r->head.pos + r->head.size > r->cfg.proof->size)
		return -EFBIG;
	return 0;
}

static int parse_d1(struct pl_recv *r, enum pl_stage *stage)
{
	struct pl_d1_header wire = pl_d1_get(r->raw);
	struct recv_header *h = &r->head;

	(void)stage;
	h->size = wire.size;
	h->pos = wire.pos;
	h->type = h->size == PL_SYNC_SIZE ? PL_PACKET_CMD : PL_PACKET_DATA;
	if (h->size && h->type != PL_PACKET_CMD)
		return check_data(r);
	return r->is_lane ? -EBADMSG : 0;
}

static int parse_barrier(struct pl_recv *r, enum pl_stage *stage)
{
	uint32_t size = pl_d1_get(r->raw).size;

	(void)stage;
	r->head.size = size;
	r->head.pos = pl_d1_get(r->raw).pos;
	r->head.type = RECV_FRAME_BARRIER;
	if (r->is_lane ? size != PL_BARRIER_HEAD :
			 size < PL_BARRIER_HEAD || size % 2 ||
			 size > PL_BARRIER_HEAD + 2 * PL_BARRIER_NAMES)
		return -EPROTO;
	return 0;
}

static int parse_proof(struct pl_recv *r, enum pl_stage *stage)
{
	struct pl_d1_header wire = pl_d1_get(r->raw);

	(void)stage;
	r->head.size = wire.size;
	r->head.pos = wire.pos;
	if (!wire.pos)
		return wire.size == PL_CLAIM_SIZE ? 0 : -EPROTO;
	return wire.size && wire.size % 8 == 0 && wire.size <= PL_NODES_MAX * 8 ?
		       0 : -EPROTO;
}

static int parse_d2(struct pl_recv *r, enum pl_stage *stage)
{
	struct recv_header *h = &r->head;
	struct pl_d2_header wire;
	int err;

	if (r->cfg.reply_fd < 0)
		return -ENOTSOCK;
	err = fill(r, pl_recv_head_size(r));
	if (err) {
		*stage = PL_STAGE_READ;
		return err;
	}
	wire = pl_d2_get(r->raw);
	h->type = wire.type;
	h->size = wire.size;
	h->pos = wire.pos;
	if (h->size == 0)
		return 0;
	switch (h->type) {
	case PL_PACKET_DATA:
	case PL_PACKET_DATA_ASYNC:
		return check_data(r);
	case PL_PACKET_CMD:
		/* What it is stands in its data. */
		return h->size < PL_SYNC_SIZE ? -EPROTO : 0;
	}
	return -EOPNOTSUPP;
}

static int parse_compressed(struct pl_recv *r, enum pl_stage *stage)
{
	struct pl_d1_header wire = pl_d1_get(r->raw);
	struct recv_header *h = &r->head;
	struct pl_packed_header packed;
	int err;

	h->pos = wire.pos;
	if (wire.size <= PL_PACKED_HEADER)
		return -EILSEQ;
	err = fill(r, PL_D1_HEADER + PL_PACKED_HEADER);
	if (err) {
		*stage = PL_STAGE_READ;
		return err;
	}
	packed = pl_packed_get(r->raw + PL_D1_HEADER);
	h->type = PL_PACKET_DATA;
	h->size = packed.size;
	h->packed = wire.size - PL_PACKED_HEADER;
	/* Larger than the data: so no sender makes it. */
	if (!h->size || h->packed > h->size || packed.codec != PL_CODEC_ZSTD ||
	    packed.zero[0] || packed.zero[1] || packed.zero[2])
		return -EILSEQ;
	return check_data(r);
}

/* What may follow, by its marker. */
static const struct kind {
	uint32_t mark;
	enum pl_dialect dialect;
	uint64_t feature;	/* both ends must have agreed on it; 0: none */
	/* The rest of the header -> r->head; on failure *stage, which is PROTOCOL,
	   may become READ. */
	int (*parse)(struct pl_recv *r, enum pl_stage *stage);
} kinds[] = {
	{ PL_D1_MARK, PL_DIALECT_D1, 0, parse_d1 },
	{ PL_D2_MARK, PL_DIALECT_D2, 0, parse_d2 },
	{ PL_D1_COMPRESSED_MARK, PL_DIALECT_D1, PL_FEATURE_COMPRESSED, parse_compressed },
	{ PL_PROOF_MARK, PL_DIALECT_D1, PL_FEATURE_PROOF, parse_proof },
	{ PL_BARRIER_MARK, PL_DIALECT_D1, PL_FEATURE_LANES, parse_barrier },
};
#define KINDS (sizeof(kinds) / sizeof(*kinds))

uint64_t pl_recv_features(void)
{
	uint64_t all = PL_FEATURE_RESUME;	/* it has no frames */

	for (size_t i = 0; i < KINDS; i++)
		all |= kinds[i].feature;
	return all;
}

/* NULL: such a marker may not come here. */
static const struct kind *kind_of(const struct pl_recv *r, uint32_t mark)
{
	for (size_t i = 0; i < KINDS; i++) {
		const struct kind *k = &kinds[i];

		if (k->mark == mark && !(k->feature & ~r->features) &&
		    (r->dialect == PL_DIALECT_NONE || r->dialect == k->dialect))
			return k;
	}
	return NULL;
}

int pl_recv_head(struct pl_recv *r, enum pl_stage *stage)
{
	int err = fill(r, PL_D1_HEADER);
	const struct kind *kind;

	*stage = PL_STAGE_READ;
	if (err)
		return err;
	*stage = PL_STAGE_PROTOCOL;
	r->head = (struct recv_header){ .mark = pl_get32(r->raw) };
	kind = kind_of(r, r->head.mark);
	if (!kind)
		return -EBADMSG;
	r->dialect = kind->dialect;
	return kind->parse(r, stage);
}

int pl_recv_digest(struct pl_recv *r, const void *data, uint32_t len, bool last)
{
	uint8_t got[PL_DIGEST];
	int err;

	if (!r->digests)
		return 0;
	err = r->cfg.digest(r->cfg.digest_ctx, data, len, last ? got : NULL);
	if (err || !last)
		return err;
	return memcmp(got, r->raw + PL_D2_HEADER, PL_DIGEST) ? -EBADE : 0;
}
