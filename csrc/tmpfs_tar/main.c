/* SPDX-License-Identifier: Apache-2.0 */
/*
 * CRIU starts `tar` for each tmpfs of a container.  pyploop puts this program's
 * folder first into the PATH of CRIU.  Any other call, and an archive of
 * another tar, goes to the next tar in PATH.  PYPLOOP_TMPFS says how a tmpfs is
 * packed: "plain", or "wrapped" in gzip.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tar.h"

static const char *const CREATE[] = {
	"--create",
	"--gzip",
	"--no-unquote",
	"--no-wildcards",
	"--one-file-system",
	"--check-links",
	"--preserve-permissions",
	"--sparse",
	"--numeric-owner",
	"--directory",
};
static const char *const EXTRACT[] = {
	"--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory",
};
#define COUNT(list) (sizeof(list) / sizeof *(list))

noreturn void fail(const char *what, const char *name)
{
	/* CRIU's log: a line with "Error" is shown by pyploop. */
	fprintf(stderr, "Error (pyploop tar): %s %s: %s\n", what, name,
		strerror(errno));
	exit(2);
}

noreturn void refuse(const char *what, const char *name)
{
	fprintf(stderr, "Error (pyploop tar): %s %s\n", what, name);
	exit(2);
}

void *allocate(size_t bytes)
{
	void *made = calloc(1, bytes);
	if (!made)
		refuse("no memory for", "the archive");
	return made;
}

unsigned sum_of(const struct header *h)
{
	const unsigned char *bytes = (const unsigned char *)h;
	unsigned sum = 0;
	for (size_t i = 0; i < sizeof *h; i++)
		sum += bytes[i];
	for (size_t i = 0; i < sizeof h->sum; i++)
		sum += ' ' - (unsigned)(unsigned char)h->sum[i];
	return sum;
}

bool moves(const char *xattr)
{
	return !strncmp(xattr, "user.", 5) || !strncmp(xattr, "trusted.", 8) ||
	       !strcmp(xattr, "security.capability") ||
	       !strcmp(xattr, "system.posix_acl_access") ||
	       !strcmp(xattr, "system.posix_acl_default");
}

static bool begins(int argc, char **argv, const char *const *words,
		   size_t count, int more)
{
	if (argc != 1 + (int)count + more)
		return false;
	for (size_t i = 0; i < count; i++)
		if (strcmp(argv[1 + i], words[i]) != 0)
			return false;
	return true;
}

static bool is_ours(void)
{
	struct header h;
	return pread(STDIN_FILENO, &h, sizeof h, 0) == (ssize_t)sizeof h &&
	       !memcmp(h.magic, GNU_MAGIC, sizeof h.magic);
}

/* Runs the tar that would be found without this one. */
static noreturn void next(char **argv)
{
	struct stat self, st;
	char file[4096];
	const char *path = getenv("PATH");
	if (!path || stat("/proc/self/exe", &self) < 0)
		path = "/usr/sbin:/usr/bin:/sbin:/bin";
	for (const char *at = path; *at;) {
		size_t n = strcspn(at, ":");
		snprintf(file, sizeof file, "%.*s/tar", (int)n, at);
		at += n + (at[n] == ':');
		if (stat(file, &st) < 0 ||
		    (st.st_dev == self.st_dev && st.st_ino == self.st_ino))
			continue;
		execv(file, argv);
	}
	fail("cannot run", "another tar in PATH");
}

int main(int argc, char **argv)
{
	const char *how = getenv("PYPLOOP_TMPFS");
	bool wrapped = how && !strcmp(how, "wrapped");
	if (begins(argc, argv, CREATE, COUNT(CREATE), 2) &&
	    !strcmp(argv[argc - 1], ".") && how &&
	    (wrapped || !strcmp(how, "plain"))) {
		out_begin(wrapped);
		create(argv[argc - 2]);
	} else if (begins(argc, argv, EXTRACT, COUNT(EXTRACT), 1) &&
		   is_ours()) {
		extract(argv[argc - 1]);
	} else {
		next(argv);
	}
	return 0;
}
