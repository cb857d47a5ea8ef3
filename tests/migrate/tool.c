// SPDX-License-Identifier: Apache-2.0
/* What a test wants done within a container, which has no programs: statically linked.
 *
 *   tool pause                    waits for ever, as the others do afterwards
 *   tool mount FROM TO TYPE DATA  mount(2); TYPE bind: a bind mount; then ends
 *   tool pin CPU                  runs on this CPU only
 *   tool child                    starts a child, and that a child whose parent ends
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	if (!strcmp(what, "mount") && argc == 6) {
		unsigned long flags = strcmp(argv[4], "bind") ? 0 : MS_BIND;

		mkdir(argv[3], 0755);
		if (mount(argv[2], argv[3], argv[4], flags, argv[5]) == 0)
			return 0;
		perror(argv[3]);
		return 1;
	}
	if (!strcmp(what, "pin") && argc == 3) {
		cpu_set_t set;

		CPU_ZERO(&set);
		CPU_SET(atoi(argv[2]), &set);
		if (sched_setaffinity(0, sizeof(set), &set) < 0)
			return 1;
	}
	if (!strcmp(what, "child")) {
		pid_t middle = fork();

		if (middle == 0) {
			middle = getpid();
			if (fork() > 0)
				_exit(0);
			while (getppid() == middle)
				usleep(1000);
			execl("/proc/self/exe", "tool", "pause", NULL);
			_exit(1);
		}
		waitpid(middle, NULL, 0);
	}
	for (;;)
		pause();
}
