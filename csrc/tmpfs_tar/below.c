/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Places below the tmpfs.  A name is followed step by step, by descriptors, so
 * that no link leads out of it.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tar.h"

static int root;
static dev_t device;

/*
 * The folder that is open, with its name: the next member is mostly in it, too.
 */
int parent = -1;
static char parent_name[LONGEST_PATH + 1];

/* The next part of the path at *at, which is cut off.  "" when there is none.
 */
static char *part(char **at)
{
	while (**at == '/')
		++*at;
	char *start = *at;
	*at += strcspn(start, "/");
	if (**at)
		*(*at)++ = '\0';
	return start;
}

/* Opens the folder that the path is in.  Returns its last part; "." for the
 * tmpfs itself. */
const char *enter(char *path)
{
	static char above[LONGEST_PATH + 1];
	size_t n = strlen(path);
	while (n && path[n - 1] == '/')
		path[--n] = '\0';
	char *last = strrchr(path, '/');
	if (*path == '/' || !*path)
		refuse("an absolute or empty name:", path);
	last = last ? last + 1 : path;
	if (!strcmp(last, "..") || (!strcmp(last, ".") && last != path))
		refuse("a name that leads elsewhere:", path);
	memcpy(above, path, (size_t)(last - path));
	above[last - path] = '\0';
	if (parent >= 0 && !strcmp(above, parent_name))
		return last;
	if (parent >= 0)
		close(parent);
	strcpy(parent_name, above);
	parent = dup(root);
	for (char *at = above, *step; parent >= 0 && *(step = part(&at));) {
		if (!strcmp(step, ".."))
			refuse("a name that leads elsewhere:", path);
		int next =
			openat(parent, step,
			       O_PATH | O_NOFOLLOW | O_DIRECTORY | O_CLOEXEC);
		struct stat st;
		if (next >= 0 && (fstat(next, &st) < 0 || !is_same_device(&st)))
			refuse("another file system is in the way of", path);
		close(parent);
		parent = next;
	}
	if (parent < 0)
		fail("cannot enter the folder of", path);
	return last;
}

bool is_same_device(const struct stat *st)
{
	return st->st_dev == device;
}

void begin_below(const char *folder)
{
	struct stat st;
	root = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (root < 0 || fstat(root, &st) < 0)
		fail("cannot open", folder);
	device = st.st_dev;
}
