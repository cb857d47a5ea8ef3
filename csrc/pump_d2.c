/* SPDX-License-Identifier: Apache-2.0 */
/* The sink of D2's packets: a socket on which the peer answers (pump_reply.c). */
#include "pump_internal.h"

static int put_header(const struct pl_pump *p, uint8_t *to, uint64_t pos,
		      const uint8_t *data, uint32_t len)
{
	pl_d2_put(to, p->cfg.async ? PL_PACKET_DATA_ASYNC : PL_PACKET_DATA, len,
		  pos);
	return p->cfg.digest ? p->cfg.digest(p->cfg.digest_ctx, data, len,
					     to + PL_D2_HEADER) : 0;
}

/* Until the window has room for so many packets. */
static int admit(struct pl_pump *p, unsigned packets, struct pl_fault *fault)
{
	int err = pl_reply_take(p);	/* a failure is seen early */

	if (!err)
		err = pl_reply_room(p, p->cfg.async ? 0 : packets);
	if (err)
		pl_reply_explain(p, err, fault);
	return err;
}

const struct pl_sink_ops pl_sink_packets = {
	.in_order = true,
	.digests = true,
	.header_size = PL_D2_HEADER,
	.min_window = PL_BATCH,
	.emit = pl_emit_frames,
	.put_header = put_header,
	.admit = admit,
	.take_answers = pl_reply_take,
};
