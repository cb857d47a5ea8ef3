/* SPDX-License-Identifier: Apache-2.0 */
/* The sink of D1's frames: a stream that nobody answers. */
#include "pump_internal.h"

static int put_header(const struct pl_pump *p, uint8_t *to, uint64_t pos,
		      const uint8_t *data, uint32_t len)
{
	(void)p;
	(void)data;
	pl_d1_put(to, PL_D1_MARK, len, pos);
	return 0;
}

const struct pl_sink_ops pl_sink_frames = {
	.in_order = true,
	.splices = true,
	.header_size = PL_D1_HEADER,
	.reserved_size = PL_SYNC_SIZE,
	.emit = pl_emit_frames,
	.put_header = put_header,
};
