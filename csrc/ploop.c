/* SPDX-License-Identifier: Apache-2.0 */
/* The ploop driver's tracking ioctls. */
#include <errno.h>
#include <stddef.h>
#include <sys/ioctl.h>

#include "ploop.h"

struct track_extent {
	uint64_t start, end;
};
_Static_assert(sizeof(struct track_extent) == 16 &&
	       offsetof(struct track_extent, end) == 8, "the driver's, in its ioctls");

#define TRACK_INIT _IOR('P', 6, struct track_extent)
#define TRACK_STOP _IO('P', 7)
#define TRACK_ABORT _IO('P', 8)
#define TRACK_SETPOS _IOW('P', 9, uint64_t)
#define TRACK_READ _IOR('P', 10, struct track_extent)
#define DEVICE_SYNC _IO('P', 11)

int pl_ploop_start(struct pl_ploop *t, uint64_t size)
{
	struct track_extent e = { 0, size };

	if (ioctl(t->fd, TRACK_INIT, &e) == 0)
		return 0;
	if (errno != EBUSY)
		return -errno;
	if (ioctl(t->fd, TRACK_ABORT) < 0)
		return -errno;
	e = (struct track_extent){ 0, size };
	return ioctl(t->fd, TRACK_INIT, &e) < 0 ? -errno : 0;
}

int pl_ploop_setpos(void *tracker, uint64_t start, uint64_t end)
{
	struct pl_ploop *t = tracker;

	(void)start;
	return ioctl(t->fd, TRACK_SETPOS, &end) < 0 ? -errno : 0;
}

int pl_ploop_next(struct pl_ploop *t, struct pl_extent *dirty)
{
	struct track_extent e = { 0, 0 };

	if (ioctl(t->fd, TRACK_READ, &e) < 0)
		return errno == EAGAIN ? 0 : -errno;
	if (e.end <= e.start)
		return -ERANGE;
	*dirty = (struct pl_extent){ e.start, e.end };
	return 1;
}

int pl_ploop_sync(struct pl_ploop *t)
{
	return ioctl(t->fd, DEVICE_SYNC) < 0 ? -errno : 0;
}

int pl_ploop_stop(struct pl_ploop *t)
{
	return ioctl(t->fd, TRACK_STOP) < 0 ? -errno : 0;
}

int pl_ploop_abort(struct pl_ploop *t)
{
	return ioctl(t->fd, TRACK_ABORT) < 0 ? -errno : 0;
}
