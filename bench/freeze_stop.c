/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The stop command of bench_freeze: freeze_stop FIFO [PID...]
 *
 * Writes the time (CLOCK_MONOTONIC, u64 ns) to FIFO as its first act, stops the
 * processes, waits until every thread of theirs has stopped, and writes the
 * time again.  Exit 0, or 1 with a message.  Linked statically, so that the
 * window that is measured does not begin with a dynamic linker.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PATIENCE_NS 10000000000ull

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* The letter of the thread's state; 'T' also for one that has gone. */
static char state(const char *pid, const char *tid)
{
	char path[96], text[512], *end;
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/%.20s/task/%.20s/stat", pid, tid);
	fd = open(path, O_RDONLY);
	if (fd < 0)
		return 'T';
	n = read(fd, text, sizeof(text) - 1);
	close(fd);
	text[n > 0 ? n : 0] = 0;
	end = strrchr(text, ')');	/* the name before it may hold anything */
	return end && end[1] ? end[2] : 'T';
}

static int all_stopped(const char *pid)
{
	char path[64];
	struct dirent *e;
	int stopped = 1;
	DIR *d;

	snprintf(path, sizeof(path), "/proc/%.20s/task", pid);
	d = opendir(path);
	while (d && stopped && (e = readdir(d)))
		if (e->d_name[0] != '.')
			stopped = state(pid, e->d_name) == 'T';
	if (d)
		closedir(d);
	return stopped;
}

int main(int argc, char **argv)
{
	const struct timespec pause = { .tv_nsec = 50000 };
	uint64_t stamp[2] = { now(), 0 };
	int fifo;

	if (argc < 2) {
		fprintf(stderr, "usage: %s FIFO [PID...]\n", argv[0]);
		return 1;
	}
	fifo = open(argv[1], O_WRONLY);
	if (fifo < 0 || write(fifo, &stamp[0], sizeof(stamp[0])) < 0)
		die(argv[1]);
	for (int i = 2; i < argc; i++)
		if (kill(atoi(argv[i]), SIGSTOP) < 0)
			die(argv[i]);
	for (int i = 2; i < argc; i++)
		while (!all_stopped(argv[i])) {
			if (now() - stamp[0] > PATIENCE_NS) {
				fprintf(stderr, "%s does not stop\n", argv[i]);
				return 1;
			}
			nanosleep(&pause, NULL);
		}
	stamp[1] = now();
	return write(fifo, &stamp[1], sizeof(stamp[1])) < 0;
}
