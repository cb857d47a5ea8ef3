// SPDX-License-Identifier: Apache-2.0
/* What a test wants done within a container, which has no programs: statically linked.
 *
 *   tool pause                    waits for ever, as the others do afterwards
 *   tool mount FROM TO TYPE DATA  mount(2); TYPE bind: a bind mount; then ends
 *   tool pin CPU                  runs on this CPU only
 *   tool unread                   has an inotify event and a datagram that nobody reads
 *   tool unusual                  has a personality, sockets with options, a multicast group
 *   tool child                    starts a child, and that a child whose parent ends
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/socket.h>
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
	if (!strcmp(what, "unread")) {
		int events = inotify_init(), to = socket(AF_INET, SOCK_DGRAM, 0);
		struct sockaddr_in at = {
			.sin_family = AF_INET,
			.sin_port = htons(5555),
			.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
		};

		inotify_add_watch(events, "/tmp", IN_CREATE);
		if (mkdir("/tmp/seen", 0755) < 0 || bind(to, (void *)&at, sizeof(at)) < 0)
			return 1;
		sendto(to, "x", 1, 0, (void *)&at, sizeof(at));
	}
	if (!strcmp(what, "unusual")) {
		int udp = socket(AF_INET, SOCK_DGRAM, 0), tcp = socket(AF_INET, SOCK_STREAM, 0);
		int ttl = 5, timeout = 9999;
		struct ip_mreqn group = {
			.imr_multiaddr.s_addr = inet_addr("239.1.2.234"),
			.imr_ifindex = 1,
		};
		struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(5556) };

		personality(ADDR_NO_RANDOMIZE);
		if (bind(udp, (void *)&at, sizeof(at)) < 0 || bind(tcp, (void *)&at, sizeof(at)) < 0 ||
		    listen(tcp, 5) < 0 ||
		    setsockopt(udp, IPPROTO_IP, IP_MULTICAST_TTL, &ttl, sizeof(ttl)) < 0 ||
		    setsockopt(udp, IPPROTO_IP, IP_ADD_MEMBERSHIP, &group, sizeof(group)) < 0 ||
		    setsockopt(tcp, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout, sizeof(timeout)) < 0)
			return 1;
	}
	if (!strcmp(what, "zombies")) {
		for (int n = 0; n < 3; n++)
			if (fork() == 0)
				_exit(n);
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
