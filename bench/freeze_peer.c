/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Preloaded into the C receiver by bench_freeze.
 *
 * Appends the time (CLOCK_MONOTONIC, u64 ns) at which each fdatasync returns to
 * the file in FREEZE_PEER_LOG.  With FREEZE_PEER_OLD the first one, which is
 * the one for the SYNC frame, is left out: then the receiver does what 1.10
 * did, which synced at the end only.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

__attribute__((visibility("default"))) int fdatasync(int fd)
{
	static int calls;
	const char *log = getenv("FREEZE_PEER_LOG");
	struct timespec t;
	uint64_t stamp;
	int rc = 0, to;

	if (calls++ || !getenv("FREEZE_PEER_OLD"))
		rc = (int)syscall(SYS_fdatasync, fd);
	clock_gettime(CLOCK_MONOTONIC, &t);
	stamp = (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
	to = log ? open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
	if (to >= 0) {
		/* A stamp that cannot be written is missed by the reader. */
		rc = write(to, &stamp, sizeof(stamp)) == sizeof(stamp) ? rc : -1;
		close(to);
	}
	return rc;
}
