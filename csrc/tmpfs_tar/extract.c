/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Unpacks what create.c has packed, on another host.  The archive is hostile: a
 * name leads only into the tmpfs itself, through its own folders, and no file
 * is written to that was not made here.  Anything that create.c does not write
 * is refused.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "tar.h"

enum { ROOM = 256 << 10 };

static char buffer[ROOM];
static char name[LONGEST_PATH + 2]; /* of the member that is unpacked now */

static void take(void *to, size_t bytes)
{
	for (char *at = to; bytes;) {
		ssize_t n = read(STDIN_FILENO, at, bytes);
		if (n < 0)
			fail("cannot read", "the archive");
		if (!n)
			refuse("the archive ends in", name);
		at += n;
		bytes -= (size_t)n;
	}
}

static void skip_pad(int64_t bytes)
{
	char pad[BLOCK];
	if (bytes % BLOCK)
		take(pad, (size_t)(BLOCK - bytes % BLOCK));
}

static int64_t number(const char *field, size_t width)
{
	uint64_t value = 0;
	if (*field & 0x80) {
		for (size_t i = 0; i < width; i++) {
			if (value >> 55)
				refuse("a number is too large in", name);
			value = value << 8 |
				((unsigned char)field[i] & (i ? 255 : 127));
		}
	} else {
		for (size_t i = 0; i < width && field[i]; i++) {
			if (field[i] < '0' || field[i] > '7')
				refuse("a number is none in", name);
			value = value << 3 | (uint64_t)(field[i] - '0');
		}
	}
	return (int64_t)value;
}
#define NUMBER(field) number(field, sizeof(field))

/* ---- the pax header, which is kept until its member comes */

static struct {
	char *data;
	size_t bytes;
	struct timespec times[2]; /* utimensat's order */
} pax;

static void parse_time(const char *value, size_t n, struct timespec *to)
{
	char text[32];
	unsigned long long seconds;
	long part_of;
	int used = 0;
	bool before = n && *value == '-'; /* 1970 */
	value += before;
	n -= before;
	if (n >= sizeof text)
		refuse("a time is none in", name);
	memcpy(text, value, n);
	text[n] = '\0';
	if (sscanf(text, "%19llu.%9ld%n", &seconds, &part_of, &used) != 2 ||
	    used != (int)n || part_of < 0 || part_of > 999999999 ||
	    seconds > INT64_MAX + (unsigned long long)(before && !part_of))
		refuse("a time is none in", name);
	to->tv_sec = (time_t)(before ? 0 - seconds : seconds);
	to->tv_nsec = part_of;
	if (before && part_of) {
		to->tv_sec--;
		to->tv_nsec = 1000000000 - part_of;
	}
}

static void unescape(char *to, const char *from, size_t n)
{
	for (const char *end = from + n; from < end; from++) {
		if (*from == '%' && end - from > 2) {
			char hex[3] = { from[1], from[2], '\0' };
			*to++ = (char)strtoul(hex, NULL, 16);
			from += 2;
		} else {
			*to++ = *from;
		}
	}
	*to = '\0';
}

/* Takes the attributes of the pax header: the times, or with a file the
 * extended attributes. */
static void each_record(const char *file)
{
	for (char *at = pax.data, *end = at + pax.bytes; at < end;) {
		char *digits;
		unsigned long all =
			strtoul(at, &digits, 10); /* pax.data ends with a NUL */
		if (digits == at || *digits != ' ' ||
		    all > (size_t)(end - at) ||
		    all < (size_t)(digits - at) + 3 || at[all - 1] != '\n')
			refuse("a pax record is damaged in", name);
		char *key = digits + 1, *last = at + all - 1,
		     *equals = memchr(key, '=', (size_t)(last - key));
		if (!equals)
			refuse("a pax record is damaged in", name);
		size_t n = (size_t)(equals - key), prefix = strlen(XATTR);
		const char *value = equals + 1;
		at += all;
		if (n > prefix && !memcmp(key, XATTR, prefix)) {
			char xattr[256 + 1];
			if (n - prefix >= sizeof xattr)
				refuse("an extended attribute's name is too "
				       "long in",
				       name);
			unescape(xattr, key + prefix, n - prefix);
			if (!moves(xattr))
				refuse("an extended attribute that does not "
				       "move is in",
				       name);
			if (file && lsetxattr(file, xattr, value,
					      (size_t)(last - value), 0) < 0)
				fail("cannot set an extended attribute of",
				     name);
		} else if (n == 5 && !memcmp(key, "mtime", n)) {
			parse_time(value, (size_t)(last - value),
				   &pax.times[1]);
		} else if (n == 5 && !memcmp(key, "atime", n)) {
			parse_time(value, (size_t)(last - value),
				   &pax.times[0]);
		} else {
			refuse("an unknown pax record is in", name);
		}
	}
}

static void take_pax(int64_t bytes)
{
	if (bytes > LONGEST_PAX)
		refuse("the pax header is too long before", name);
	free(pax.data);
	pax.data = allocate((size_t)bytes + 1);
	pax.bytes = (size_t)bytes;
	take(pax.data, pax.bytes);
	skip_pad(bytes);
	pax.data[pax.bytes] = '\0';
}

static void take_name(char *to, size_t room, int64_t bytes)
{
	if (bytes < 1 || bytes > (int64_t)room)
		refuse("a name is too long after", name);
	take(to, (size_t)bytes);
	skip_pad(bytes);
	to[bytes - 1] = '\0';
}

/* ---- one file */

static void copy(int fd, int64_t at, int64_t bytes)
{
	while (bytes) {
		size_t n = bytes < ROOM ? (size_t)bytes : ROOM;
		take(buffer, n);
		for (size_t done = 0; done < n;) {
			ssize_t written = pwrite(fd, buffer + done, n - done,
						 at + (int64_t)done);
			if (written < 0)
				fail("cannot write", name);
			done += (size_t)written;
		}
		at += (int64_t)n;
		bytes -= (int64_t)n;
	}
}

struct area {
	int64_t at, length;
};

/* The extents of a sparse file, each behind the one before and below `size`. */
static struct area *areas;
static size_t area_count, area_room;
static int64_t area_end;

static void add_areas(const struct extent *from, size_t places, int64_t size)
{
	for (size_t i = 0; i < places && from[i].length[0]; i++) {
		int64_t at = NUMBER(from[i].at),
			length = NUMBER(from[i].length);
		if (at < area_end || length < 0 || at > size ||
		    length > size - at)
			refuse("the extents are damaged of", name);
		if (area_count == area_room) {
			area_room = area_room * 2 + 64;
			areas = realloc(areas, area_room * sizeof *areas);
			if (!areas)
				fail("no memory for", name);
		}
		areas[area_count].at = at;
		areas[area_count++].length = length;
		area_end = at + length;
	}
}

static void fill(int fd, const struct header *h, int64_t size)
{
	if (h->type == '0') {
		copy(fd, 0, size);
		skip_pad(size);
		return;
	}
	int64_t whole = NUMBER(h->realsize);
	area_count = 0;
	area_end = 0;
	add_areas(h->extents, HEADER_EXTENTS, whole);
	for (char more = h->more; more;) {
		struct more_extents next;
		take(&next, sizeof next);
		add_areas(next.extents, BLOCK_EXTENTS, whole);
		more = next.more;
	}
	if (ftruncate(fd, whole) < 0)
		fail("cannot set the size of", name);
	for (size_t i = 0; i < area_count; i++) {
		copy(fd, areas[i].at, areas[i].length);
		skip_pad(areas[i].length);
	}
}

static void set_rights(const struct header *h, const char *last)
{
	char file[64 + 256];
	mode_t mode = (mode_t)NUMBER(h->mode) & 07777;
	snprintf(file, sizeof file, "/proc/self/fd/%d/%s", parent, last);
	if (fchownat(parent, last, (uid_t)NUMBER(h->uid), (gid_t)NUMBER(h->gid),
		     AT_SYMLINK_NOFOLLOW) < 0)
		fail("cannot set the owner of", name);
	/*
	 * Nobody else is here yet: what was made with this name is still there.
	 */
	if (h->type != '2' && fchmodat(parent, last, mode, 0) < 0)
		fail("cannot set the mode of", name);
	each_record(file);
	if (utimensat(parent, last, pax.times, AT_SYMLINK_NOFOLLOW) < 0)
		fail("cannot set the times of", name);
}

static void make(const struct header *h, char *target)
{
	static char path[LONGEST_PATH + 2];
	int64_t size = NUMBER(h->size);
	dev_t number_of =
		makedev((unsigned)NUMBER(h->major), (unsigned)NUMBER(h->minor));
	strcpy(path, name);
	if (h->type == '1') {
		const char *first = strcpy(path, target);
		first = enter(path);
		int from = dup(parent);
		static char to[LONGEST_PATH + 2], kept[LONGEST_PATH + 2];
		strcpy(kept, first);
		strcpy(to, name);
		const char *last = enter(to);
		if (from < 0 || linkat(from, kept, parent, last, 0) < 0)
			fail("cannot link", name);
		close(from);
		return;
	}
	const char *last = enter(path);
	int fd, failed = 0;
	switch (h->type) {
	case '0':
	case 'S':
		fd = openat(parent, last,
			    O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW |
				    O_CLOEXEC,
			    0600);
		if (fd < 0)
			fail("cannot make", name);
		fill(fd, h, size);
		close(fd);
		break;
	case '2':
		failed = symlinkat(target, parent, last);
		break;
	case '3':
		failed = mknodat(parent, last, S_IFCHR | 0600, number_of);
		break;
	case '4':
		failed = mknodat(parent, last, S_IFBLK | 0600, number_of);
		break;
	case '6':
		failed = mknodat(parent, last, S_IFIFO | 0600, 0);
		break;
	case '5':
		/* A folder comes again after its files. */
		failed = mkdirat(parent, last, 0700);
		if (failed && errno == EEXIST) {
			struct stat st;
			failed =
				fstatat(parent, last, &st, AT_SYMLINK_NOFOLLOW);
			if (!failed &&
			    (!S_ISDIR(st.st_mode) || !is_same_device(&st)))
				refuse("there is something else already at",
				       name);
		}
		break;
	default:
		refuse("an unknown kind of file:", name);
	}
	if (failed)
		fail("cannot make", name);
	set_rights(h, last);
}

static void copy_field(char *to, const char *field, size_t width)
{
	size_t n = strnlen(field, width);
	memcpy(to, field, n);
	to[n] = '\0';
}

void extract(const char *folder)
{
	static char target[LONGEST_PATH + 2];
	static const struct header none;
	bool named = false, linked = false;
	begin_below(folder);
	umask(0);
	strcpy(name, "its first header");
	for (struct header h;;) {
		take(&h, sizeof h);
		if (!memcmp(&h, &none, sizeof h))
			return;
		char sum[sizeof h.sum] = { 0 };
		memcpy(sum, h.sum, 6);
		if (memcmp(h.magic, GNU_MAGIC, sizeof h.magic) ||
		    number(sum, 6) != (int64_t)sum_of(&h))
			refuse("the archive is damaged after", name);
		int64_t size = NUMBER(h.size);
		switch (h.type) {
		case 'x':
			take_pax(size);
			continue;
		case 'L':
			take_name(name, sizeof name, size);
			named = true;
			continue;
		case 'K':
			take_name(target, sizeof target, size);
			linked = true;
			continue;
		}
		if (!named)
			copy_field(name, h.name, sizeof h.name);
		if (!linked)
			copy_field(target, h.link, sizeof h.link);
		memset(pax.times, 0, sizeof pax.times);
		make(&h, target);
		named = linked = false;
		pax.bytes = 0;
	}
}
