/* SPDX-License-Identifier: Apache-2.0 */
/* A tar for the tmpfs of a container: it packs and unpacks what CRIU asks tar
 * for, without gzip and without another process.
 *
 * The archive is one that GNU tar reads, too: GNU headers, and before each a
 * pax header with what GNU's has no place for (nanoseconds, extended
 * attributes).  For a host whose pyploop has no such tar, it is wrapped in
 * gzip's format without being compressed. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdnoreturn.h>

enum {
	BLOCK = 512,
	LONGEST_PATH = 4095, /* bytes, of a name below the tmpfs with its "./":
				what the kernel takes at once */
	LONGEST_PAX = 1 << 20, /* bytes of a pax header: extended attributes
				  have 64 KiB each */
	HEADER_EXTENTS = 4, /* of a sparse file, in its header */
	BLOCK_EXTENTS = 21, /* and in each block that follows it */
};

/* A GNU header. */
struct header {
	char name[100];
	char mode[8];
	char uid[8];
	char gid[8];
	char size[12];
	char mtime[12];
	char sum[8];
	char type;
	char link[100];
	char magic[8];
	char uname[32];
	char gname[32];
	char major[8];
	char minor[8];
	char atime[12];
	char ctime[12];
	char offset[12];
	char longnames[4];
	char unused;
	struct extent {
		char at[12];
		char length[12];
	} extents[HEADER_EXTENTS];
	char more;
	char realsize[12];
	char pad[17];
};
_Static_assert(sizeof(struct header) == BLOCK, "a header is one block");

struct more_extents {
	struct extent extents[BLOCK_EXTENTS];
	char more;
	char pad[7];
};
_Static_assert(sizeof(struct more_extents) == BLOCK,
	       "more extents are one block");

#define GNU_MAGIC "ustar  " /* with its NUL it fills the field */
#define XATTR "SCHILY.xattr."

/* Print "Error (pyploop tar): …: errno's text" and end with 2, GNU tar's code
 * for failures. */
noreturn void fail(const char *what, const char *name);
/* The same without errno. */
noreturn void refuse(const char *what, const char *name);

void *allocate(size_t bytes);

/* The checksum of a header, whose field counts as spaces. */
unsigned sum_of(const struct header *h);

/* Whether an extended attribute of this name moves.  Labels of security modules
 * are the host's own. */
bool moves(const char *xattr);

/* out.c: what is written to stdout. */
void out_begin(bool gzip);
void out_write(const void *data, size_t bytes);
/* Bytes of the file, from `at`. */
void out_file(int fd, int64_t at, int64_t bytes, const char *name);
void out_pad(int64_t bytes); /* zeroes up to a multiple of BLOCK */
void out_end(void);

/* below.c */
struct stat;
void begin_below(const char *folder);
bool is_same_device(const struct stat *st);
/* Opens the folder that the path is in, as `parent`.  Returns the path's last
 * part;
 * "." for the tmpfs itself. */
const char *enter(char *path);
extern int parent;

/* create.c, extract.c */
void create(const char *folder);
void extract(const char *folder);
