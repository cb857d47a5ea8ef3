// SPDX-License-Identifier: Apache-2.0
/* A process of a container that has what CRIU may not dump; it needs no libraries.
 *
 *   odd WHAT[:PATH]…   gets all of it, writes "ready" or the errno's text to /state, and waits
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/netlink.h>
#include <linux/perf_event.h>
#include <linux/rtnetlink.h>
#include <linux/vm_sockets.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static void over(const char *what, long result)
{
	int fd = open("/state", O_WRONLY | O_CREAT | O_TRUNC, 0644);
	const char *text = result < 0 ? strerror(errno) : "ready";

	if (result < 0)
		dprintf(fd, "%s: %s\n", what, text);
	else
		dprintf(fd, "ready\n");
	close(fd);
}

static int unix_to(const char *path, int type, int listening)
{
	struct sockaddr_un at = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, type, 0);

	strncpy(at.sun_path, path, sizeof(at.sun_path) - 1);
	if (listening)
		return bind(fd, (void *)&at, sizeof(at)) < 0 || listen(fd, 5) < 0 ? -1 : fd;
	return connect(fd, (void *)&at, sizeof(at)) < 0 ? -1 : fd;
}

/* A child that is in namespaces of its own; within them a child of that. */
static int nested(int flags)
{
	int pair[2];
	char c = 1;
	pid_t child;

	if (pipe(pair) < 0 || (child = fork()) < 0)
		return -1;
	if (child == 0) {
		c = unshare(flags) == 0 && (flags & CLONE_NEWUSER || fork() >= 0);
		write(pair[1], &c, 1);
		for (;;)
			pause();
	}
	read(pair[0], &c, 1);
	close(pair[0]);
	close(pair[1]);
	return c ? 0 : -1;
}

static long get(const char *what, const char *path)
{
	if (!strcmp(what, "nothing"))
		return 0;
	if (!strcmp(what, "uring")) {
		char params[512] = { 0 };

		return syscall(SYS_io_uring_setup, 8, params);
	}
	if (!strncmp(what, "netlink", 7)) {
		int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
		struct sockaddr_nl at = { .nl_family = AF_NETLINK, .nl_groups = strtoul(path, NULL, 0) };
		struct {
			struct nlmsghdr h;
			struct rtgenmsg g;
		} ask = { .h = { .nlmsg_len = sizeof(ask), .nlmsg_type = RTM_GETLINK,
				 .nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP } };

		if (bind(fd, (void *)&at, sizeof(at)) < 0)
			return -1;
		return !strcmp(what, "netlink-data") ? send(fd, &ask, sizeof(ask), 0) : 0;
	}
	if (!strcmp(what, "pidns"))
		return nested(CLONE_NEWPID);
	if (!strcmp(what, "utsns"))
		return nested(CLONE_NEWUTS);
	if (!strcmp(what, "ipcns"))
		return nested(CLONE_NEWIPC);
	if (!strcmp(what, "mntns"))
		return nested(CLONE_NEWNS);
	if (!strcmp(what, "mntns-exec") || !strcmp(what, "timens-exec")) {
		if (fork() == 0) {
			if (unshare(what[0] == 'm' ? CLONE_NEWNS : 0x80) < 0)
				_exit(1);
			if (what[0] == 'm')
				mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL);
			execl("/tool", "/tool", "nothing", NULL);
		}
		return usleep(100000);
	}
	if (!strcmp(what, "netns"))
		return nested(CLONE_NEWNET);
	if (!strcmp(what, "userns"))
		return nested(CLONE_NEWUSER);
	if (!strcmp(what, "cgroupns"))
		return nested(CLONE_NEWCGROUP);
	if (!strcmp(what, "timens"))
		return nested(0x80);
	if (!strcmp(what, "xdp"))
		return socket(AF_XDP, SOCK_RAW, 0);
	if (!strcmp(what, "vsock"))
		return socket(AF_VSOCK, SOCK_STREAM, 0);
	if (!strcmp(what, "packet"))
		return socket(AF_PACKET, SOCK_RAW, htons(3));
	if (!strcmp(what, "raw"))
		return socket(AF_INET, SOCK_RAW, IPPROTO_ICMP);
	if (!strcmp(what, "udplite"))
		return socket(AF_INET, SOCK_DGRAM, IPPROTO_UDPLITE);
	if (!strcmp(what, "mptcp") || !strcmp(what, "mptcp-listen")) {
		int fd = socket(AF_INET, SOCK_STREAM, 262);
		struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(7000) };

		if (fd < 0 || !strcmp(what, "mptcp"))
			return fd;
		return bind(fd, (void *)&at, sizeof(at)) < 0 ? -1 : listen(fd, 3);
	}
	if (!strcmp(what, "bpf-map")) {
		union bpf_attr attr = { .map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4,
					.value_size = 8, .max_entries = 4 };

		return syscall(SYS_bpf, BPF_MAP_CREATE, &attr, sizeof(attr));
	}
	if (!strcmp(what, "bpf-prog")) {
		struct bpf_insn code[] = {
			{ .code = BPF_ALU64 | BPF_MOV | BPF_K },
			{ .code = BPF_JMP | BPF_EXIT },
		};
		union bpf_attr attr = { .prog_type = BPF_PROG_TYPE_SOCKET_FILTER,
					.insns = (unsigned long)code, .insn_cnt = 2,
					.license = (unsigned long)"GPL" };

		return syscall(SYS_bpf, BPF_PROG_LOAD, &attr, sizeof(attr));
	}
	if (!strcmp(what, "userfault"))
		return syscall(SYS_userfaultfd, 1);
	if (!strcmp(what, "secret") || !strcmp(what, "secret-map")) {
		int fd = syscall(447, 0);

		if (fd < 0 || ftruncate(fd, 4096) < 0)
			return -1;
		if (!strcmp(what, "secret"))
			return fd;
		char *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

		close(fd);
		return p == MAP_FAILED ? -1 : (*p = 1);
	}
	if (!strcmp(what, "packets")) {
		int pair[2];

		return pipe2(pair, O_DIRECT);
	}
	if (!strcmp(what, "memfd"))
		return memfd_create("x", 0);
	if (!strcmp(what, "perf")) {
		struct perf_event_attr attr = { .type = PERF_TYPE_SOFTWARE, .size = sizeof(attr),
						.config = PERF_COUNT_SW_CPU_CLOCK,
						.exclude_kernel = 1 };

		return syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0);
	}
	if (!strcmp(what, "pidfd"))
		return syscall(SYS_pidfd_open, getpid(), 0);
	if (!strcmp(what, "landlock")) {
		unsigned long attr = 1;

		return syscall(444, &attr, 8, 0);
	}
	if (!strcmp(what, "mqueue"))
		return mq_open("/q", O_CREAT | O_RDWR, 0600, NULL);
	if (!strcmp(what, "unix-out"))
		return unix_to(path, SOCK_STREAM, 0);
	if (!strcmp(what, "unix-in")) {
		unix_to("/data/in", SOCK_STREAM, 1);
		return unix_to("/data/in", SOCK_STREAM, 0);
	}
	if (!strcmp(what, "unix-listen"))
		return unix_to(path, SOCK_STREAM, 1);
	if (!strcmp(what, "deleted") || !strcmp(what, "deleted-linked") ||
	    !strcmp(what, "deleted-large") || !strcmp(what, "deleted-sparse")) {
		const char *name = *path ? path : "/data/one";
		int fd = open(name, O_RDWR | O_CREAT, 0600);
		static char block[1 << 16];

		if (!strcmp(what, "deleted-linked") && link(name, "/data/two") < 0)
			return -1;
		if (!strcmp(what, "deleted-sparse"))
			ftruncate(fd, 1 << 26);
		for (int n = 0; n < (strcmp(what, "deleted-large") ? 1 : 32); n++)
			write(fd, block, sizeof(block));
		return unlink(name);
	}
	if (!strcmp(what, "deleted-cwd"))
		return mkdir("/data/cwd", 0700) < 0 || chdir("/data/cwd") < 0 ? -1 : rmdir("/data/cwd");
	if (!strcmp(what, "nsfd"))
		return open("/proc/self/ns/net", O_RDONLY);
	if (!strcmp(what, "open"))
		return open(path, O_RDWR);
	if (!strcmp(what, "aio")) {
		unsigned long context = 0;

		return syscall(SYS_io_setup, 4, &context);
	}
	errno = EINVAL;
	return -1;
}

int main(int argc, char **argv)
{
	for (int n = 1; n < argc; n++) {
		char *path = strchr(argv[n], ':');

		if (path)
			*path++ = 0;
		if (get(argv[n], path ? path : "") < 0) {
			over(argv[n], -1);
			return 1;
		}
	}
	over("", 0);
	if (argc == 2 && !strcmp(argv[1], "netlink-reader")) {
		char buffer[65536];

		while (recv(3, buffer, sizeof(buffer), 0) >= 0 || errno == ENOBUFS)
			;
	}
	for (;;)
		pause();
}
