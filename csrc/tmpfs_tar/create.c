/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Packs a tmpfs.  The container is suspended, so nothing changes meanwhile.  As
 * GNU tar does, it leaves out sockets (CRIU makes them anew) and what is
 * mounted in the tmpfs.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <search.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "tar.h"

static int root;
static dev_t device;
static char path[LONGEST_PATH + 1] = "."; /* of what is packed now */
static size_t length = 1;

static void put_number(char *field, size_t width, uint64_t value)
{
	if (value >> 3 * (width - 1)) { /* GNU: binary, the first bit set */
		for (size_t i = width; i-- > 0; value >>= 8)
			field[i] = (char)(value & 255);
		field[0] = (char)(field[0] | 0x80);
		return;
	}
	field[width - 1] = '\0';
	for (size_t i = width - 1; i-- > 0; value >>= 3)
		field[i] = (char)('0' + (value & 7));
}

static void put_header(struct header *h)
{
	memcpy(h->magic, GNU_MAGIC, sizeof h->magic);
	snprintf(h->sum, sizeof h->sum, "%06o", sum_of(h));
	h->sum[7] = ' ';
	out_write(h, sizeof *h);
}

/* A member without a file: a long name, or a pax header. */
static void put_member(char type, const void *data, size_t bytes)
{
	struct header h = { .type = type };
	strcpy(h.name, "././@LongLink");
	put_number(h.size, sizeof h.size, bytes);
	put_number(h.mode, sizeof h.mode, 0644);
	put_number(h.mtime, sizeof h.mtime, 0);
	put_header(&h);
	out_write(data, bytes);
	out_pad((int64_t)bytes);
}

static void put_name(char *field, size_t width, char type, const char *name)
{
	size_t n = strlen(name);
	if (n > width)
		put_member(type, name, n + 1);
	/* One that is as long as the field has no NUL. */
	memcpy(field, name, n < width ? n : width);
}

/* ---- the pax header */

static struct {
	char *data;
	size_t bytes, room;
} pax;

static void pax_add(const char *key, const void *value, size_t bytes)
{
	size_t rest = strlen(key) + bytes + 3, digits = 1;
	/* Its own length counts, too. */
	for (size_t limit = 10; rest + digits >= limit; limit *= 10)
		digits++;
	size_t all = rest + digits;
	if (pax.bytes + all > LONGEST_PAX)
		refuse("its extended attributes are too large", path);
	if (pax.bytes + all + 1 > pax.room) {
		pax.room = (pax.bytes + all + 1) * 2;
		pax.data = realloc(pax.data, pax.room);
		if (!pax.data)
			fail("no memory for", path);
	}
	int n = snprintf(pax.data + pax.bytes, pax.room - pax.bytes,
			 "%zu %s=", all, key);
	memcpy(pax.data + pax.bytes + n, value, bytes);
	pax.data[pax.bytes + all - 1] = '\n';
	pax.bytes += all;
}

static void pax_time(const char *key, struct timespec t)
{
	char text[32];
	bool before = t.tv_sec < 0; /* 1970; a timespec counts its nanoseconds
				       upwards even then */
	if (before && t.tv_nsec) {
		t.tv_sec++;
		t.tv_nsec = 1000000000 - t.tv_nsec;
	}
	unsigned long long seconds = (unsigned long long)t.tv_sec;
	int n = snprintf(text, sizeof text, "%s%llu.%09ld", before ? "-" : "",
			 before ? 0 - seconds : seconds, t.tv_nsec);
	pax_add(key, text, (size_t)n);
}

/* '=' ends a key of a pax header, so GNU tar escapes it in a name. */
static void escape(char *out, const char *name)
{
	for (; *name; name++)
		if (*name == '=' || *name == '%')
			out += sprintf(out, "%%%02X", (unsigned char)*name);
		else
			*out++ = *name;
	*out = '\0';
}

/* There is no call that takes a folder's descriptor, so the tmpfs is the working
 * folder: a longer name would exceed the kernel's limit. */
static void pax_xattrs(void)
{
	static char names[65536], value[65536]; /* the kernel's own limits */
	ssize_t listed = llistxattr(path, names, sizeof names);
	if (listed < 0 && errno != ENOTSUP)
		fail("cannot list the extended attributes of", path);
	for (char *name = names; name < names + listed;
	     name += strlen(name) + 1) {
		if (!moves(name))
			continue;
		ssize_t n = lgetxattr(path, name, value, sizeof value);
		if (n < 0)
			fail("cannot read an extended attribute of", path);
		char key[sizeof XATTR + 3 * 256];
		strcpy(key, XATTR);
		escape(key + strlen(XATTR), name);
		pax_add(key, value, (size_t)n);
	}
}

/* ---- regular files */

static struct {
	struct {
		int64_t at, length;
	} *list;
	size_t count, room;
} data;

static void add_extent(int64_t at, int64_t bytes)
{
	if (data.count == data.room) {
		data.room = data.room * 2 + 64;
		data.list = realloc(data.list, data.room * sizeof *data.list);
		if (!data.list)
			fail("no memory for", path);
	}
	data.list[data.count].at = at;
	data.list[data.count++].length = bytes;
}

/* Where the file has data.  Returns how much. */
static int64_t find_data(int fd, int64_t size)
{
	int64_t at = 0, sum = 0;
	data.count = 0;
	while (at < size) {
		int64_t from = lseek(fd, at, SEEK_DATA);
		if (from < 0 && errno == ENXIO) /* a hole up to the end */
			break;
		int64_t to = from < 0 ? -1 : lseek(fd, from, SEEK_HOLE);
		if (to < 0)
			fail("cannot find the holes of", path);
		if (from >= size)
			break;
		to = to < size ? to : size;
		add_extent(from, to - from);
		sum += to - from;
		at = to;
	}
	return sum;
}

static void put_extents(struct extent *to, size_t places, size_t *next)
{
	for (size_t i = 0; i < places && *next < data.count; i++, ++*next) {
		put_number(to[i].at, sizeof to[i].at,
			   (uint64_t)data.list[*next].at);
		put_number(to[i].length, sizeof to[i].length,
			   (uint64_t)data.list[*next].length);
	}
}

static void put_file(struct header *h, int64_t size)
{
	int fd = openat(root, path,
			O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		fail("cannot open", path);
	int64_t sum = size ? find_data(fd, size) : 0;
	size_t next = 0;
	if (sum < size) {
		h->type = 'S';
		add_extent(size, 0); /* says where the last hole ends */
		put_extents(h->extents, HEADER_EXTENTS, &next);
		h->more = next < data.count;
		put_number(h->realsize, sizeof h->realsize, (uint64_t)size);
	} else {
		next = data.count;
	}
	put_number(h->size, sizeof h->size, (uint64_t)sum);
	put_header(h);
	while (next < data.count) {
		struct more_extents more = { 0 };
		put_extents(more.extents, BLOCK_EXTENTS, &next);
		more.more = next < data.count;
		out_write(&more, sizeof more);
	}
	for (size_t i = 0; size && i < data.count; i++) {
		out_file(fd, data.list[i].at, data.list[i].length, path);
		out_pad(data.list[i].length);
	}
	close(fd);
}

/* ---- other names of the same file */

struct seen {
	ino_t inode;
	char *name;
};
static void *seen;

static int by_inode(const void *a, const void *b)
{
	ino_t x = ((const struct seen *)a)->inode,
	      y = ((const struct seen *)b)->inode;
	return x < y ? -1 : x > y;
}

/* The first name of a file that has several; NULL: this one is the first. */
static const char *first_name(const struct stat *st)
{
	if (st->st_nlink < 2 || S_ISDIR(st->st_mode))
		return NULL;
	struct seen *one = allocate(sizeof *one);
	one->inode = st->st_ino;
	struct seen **found = tsearch(one, &seen, by_inode);
	if (!found)
		fail("no memory for", path);
	if (*found != one) {
		free(one);
		return (*found)->name;
	}
	one->name = strdup(path);
	if (!one->name)
		fail("no memory for", path);
	return NULL;
}

/* ---- one file */

/* xattrs: with its extended attributes. */
static void put_entry(const struct stat *st, bool xattrs)
{
	static char name[LONGEST_PATH + 2], target[LONGEST_PATH + 1];
	bool folder = S_ISDIR(st->st_mode);
	struct header h = { 0 };
	const char *first = first_name(st);
	snprintf(name, sizeof name, folder ? "%s/" : "%s", path);
	put_number(h.mode, sizeof h.mode, st->st_mode & 07777);
	put_number(h.uid, sizeof h.uid, st->st_uid);
	put_number(h.gid, sizeof h.gid, st->st_gid);
	put_number(h.size, sizeof h.size, 0);
	put_number(h.mtime, sizeof h.mtime,
		   st->st_mtim.tv_sec < 0 ? 0 : (uint64_t)st->st_mtim.tv_sec);
	if (!first) {
		pax.bytes = 0;
		pax_time("mtime", st->st_mtim);
		pax_time("atime", st->st_atim);
		if (xattrs)
			pax_xattrs();
		put_member('x', pax.data, pax.bytes);
	}
	put_name(h.name, sizeof h.name, 'L', name);
	if (first) {
		h.type = '1';
		put_name(h.link, sizeof h.link, 'K', first);
	} else if (S_ISREG(st->st_mode)) {
		h.type = '0';
		put_file(&h, st->st_size);
		return;
	} else if (S_ISLNK(st->st_mode)) {
		ssize_t n = readlinkat(root, path, target, sizeof target);
		if (n < 0 || n >= (ssize_t)sizeof target)
			fail("cannot read the symbolic link", path);
		target[n] = '\0';
		h.type = '2';
		put_name(h.link, sizeof h.link, 'K', target);
	} else if (S_ISCHR(st->st_mode) || S_ISBLK(st->st_mode)) {
		h.type = S_ISCHR(st->st_mode) ? '3' : '4';
		put_number(h.major, sizeof h.major, major(st->st_rdev));
		put_number(h.minor, sizeof h.minor, minor(st->st_rdev));
	} else {
		h.type = folder ? '5' : '6';
	}
	put_header(&h);
}

static void put_folder(void);

static void put_any(bool top)
{
	struct stat st;
	if (fstatat(root, path, &st, AT_SYMLINK_NOFOLLOW) < 0)
		fail("cannot look at", path);
	if (S_ISSOCK(st.st_mode))
		return;
	bool here = top || st.st_dev == device, folder = S_ISDIR(st.st_mode);
	if (!here && !folder)
		return;
	put_entry(&st, !folder);
	if (folder && here)
		put_folder();
	/* Again: its files have changed its time.  And an attribute may give
	 * them rights. */
	if (folder)
		put_entry(&st, here);
}

/* All names are read first, so that no descriptor is open for each level. */
static void put_folder(void)
{
	int fd = openat(root, path,
			O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	DIR *folder = fd < 0 ? NULL : fdopendir(fd);
	if (!folder)
		fail("cannot open", path);
	char **names = NULL;
	size_t count = 0, room = 0;
	struct dirent *entry;
	while (errno = 0, (entry = readdir(folder))) {
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		if (count == room) {
			room = room * 2 + 16;
			names = realloc(names, room * sizeof *names);
		}
		if (!names || !(names[count++] = strdup(entry->d_name)))
			fail("no memory for", path);
	}
	if (errno)
		fail("cannot list", path);
	closedir(folder);
	for (size_t i = 0, before = length; i < count; i++) {
		size_t n = strlen(names[i]);
		if (before + 1 + n > LONGEST_PATH)
			refuse("a name in it is too long: its folders are "
			       "nested too deeply",
			       path);
		path[before] = '/';
		memcpy(path + before + 1, names[i], n + 1);
		length = before + 1 + n;
		put_any(false);
		path[length = before] = '\0';
		free(names[i]);
	}
	free(names);
}

void create(const char *folder)
{
	struct stat st;
	root = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (root < 0 || fstat(root, &st) < 0 || fchdir(root) < 0)
		fail("cannot open", folder);
	device = st.st_dev;
	put_any(true);
	out_end();
}
