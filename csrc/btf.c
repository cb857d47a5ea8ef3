/* SPDX-License-Identifier: Apache-2.0 */
/*
 * btf.c - a small reader of BTF, the kernel's description of its own types.
 *
 * The blob is treated as untrusted: parse() walks every type once and
 * accepts only what lies wholly inside; later lookups rely on that walk for
 * the extent of each record and check every id and name they meet.
 */
#include "bpf_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Nobody's vmlinux comes near; a bound keeps a bad file from eating memory. */
#define BTF_MAX_BLOB (256u << 20)
/* Modifiers in a row; the kernel allows as many. */
#define BTF_MAX_DEPTH 32
/* Members looked at in one search, also how deep it may recurse. */
#define BTF_MAX_MEMBERS 4096
/* Newer than some of the headers that we build with. */
#define KIND_ENUM64 19
/* The format's records, which are read where they stand in the blob. */
_Static_assert(sizeof(struct btf_type) == 12 && sizeof(struct btf_array) == 12 &&
	       sizeof(struct btf_member) == 12 && sizeof(struct btf_enum) == 8 &&
	       sizeof(struct btf_param) == 8 &&
	       sizeof(struct btf_var_secinfo) == 12 &&
	       _Alignof(struct btf_type) == 4, "BTF is made of 32-bit fields");

static const struct btf_type *type_at(const struct pl_btf *b, uint32_t id)
{
	/* Id 0 is void, which nothing here can use. */
	if (id == 0 || id >= b->ntypes)
		return NULL;
	return (const struct btf_type *)(b->blob + b->off[id]);
}

static const char *name_at(const struct pl_btf *b, uint32_t off)
{
	/* The section ends in NUL, so any start inside it is a string. */
	return off < b->str_len ? b->str + off : "";
}

/* Bytes that follow struct btf_type, or -1 for a kind we cannot step over. */
static int64_t tail_size(const struct btf_type *t)
{
	int64_t vlen = BTF_INFO_VLEN(t->info);

	switch (BTF_INFO_KIND(t->info)) {
	case BTF_KIND_INT:
	case BTF_KIND_VAR:
	case BTF_KIND_DECL_TAG:
		return 4;
	case BTF_KIND_ARRAY:
		return sizeof(struct btf_array);
	case BTF_KIND_STRUCT:
	case BTF_KIND_UNION:
		return vlen * (int64_t)sizeof(struct btf_member);
	case BTF_KIND_ENUM:
		return vlen * (int64_t)sizeof(struct btf_enum);
	case BTF_KIND_FUNC_PROTO:
		return vlen * (int64_t)sizeof(struct btf_param);
	case BTF_KIND_DATASEC:
		return vlen * (int64_t)sizeof(struct btf_var_secinfo);
	case KIND_ENUM64:
		return vlen * 12;
	case BTF_KIND_PTR:
	case BTF_KIND_FWD:
	case BTF_KIND_TYPEDEF:
	case BTF_KIND_VOLATILE:
	case BTF_KIND_CONST:
	case BTF_KIND_RESTRICT:
	case BTF_KIND_FUNC:
	case BTF_KIND_FLOAT:
	case BTF_KIND_TYPE_TAG:
		return 0;
	default:
		return -1;
	}
}

/* Note where each type begins; the records have no index of their own. */
static int index_types(struct pl_btf *b, uint64_t pos, uint64_t end)
{
	uint32_t room = 0, n = 1;
	int64_t tail;

	while (pos < end) {
		const struct btf_type *t;

		if (end - pos < sizeof(*t))
			return -EPROTO;
		t = (const struct btf_type *)(b->blob + pos);
		tail = tail_size(t);
		if (tail < 0 || (uint64_t)tail > end - pos - sizeof(*t))
			return -EPROTO;
		if (n >= room) {
			uint32_t *more;

			room = room ? room * 2 : 1u << 16;
			more = realloc(b->off, room * sizeof(*more));
			if (!more)
				return -ENOMEM;
			b->off = more;
		}
		b->off[n++] = (uint32_t)pos;
		pos += sizeof(*t) + (uint64_t)tail;
	}
	b->ntypes = n;
	return 0;
}

static int parse(struct pl_btf *b, void *blob, size_t len, size_t mapped)
{
	const struct btf_header *h = blob;
	uint64_t type, type_end, str, str_end;
	int ret = -EPROTO;

	memset(b, 0, sizeof(*b));
	b->blob = blob;
	b->mapped = mapped;
	/* Another byte order shows as a wrong magic, and is refused with it. */
	if (len < sizeof(*h) || len > BTF_MAX_BLOB || h->magic != BTF_MAGIC ||
	    h->version != BTF_VERSION || h->hdr_len < sizeof(*h))
		goto bad;

	type = (uint64_t)h->hdr_len + h->type_off;
	type_end = type + h->type_len;
	str = (uint64_t)h->hdr_len + h->str_off;
	str_end = str + h->str_len;
	/* All records are made of 32-bit fields and must be read as such. */
	if (type_end > len || str_end > len || h->str_len == 0 || type % 4 ||
	    b->blob[str_end - 1] != '\0')
		goto bad;

	b->str = (const char *)b->blob + str;
	b->str_len = h->str_len;
	ret = index_types(b, type, type_end);
	if (ret < 0)
		goto bad;
	return 0;
bad:
	pl_btf_free(b);
	return ret;
}

int pl_btf_parse(struct pl_btf *b, void *blob, size_t len)
{
	return parse(b, blob, len, 0);
}

/*
 * Linux 6.16 can map its BTF; before, sysfs hands it out a page a read, which
 * takes several times as long as all the rest of opening a tracker.
 */
static int map_blob(struct pl_btf *b, int fd)
{
	struct stat st;
	void *blob;

	if (fstat(fd, &st) < 0 || st.st_size <= 0 || st.st_size > BTF_MAX_BLOB)
		return -ENODEV;
	blob = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (blob == MAP_FAILED)
		return -ENODEV;
	return parse(b, blob, (size_t)st.st_size, (size_t)st.st_size);
}

int pl_btf_load(struct pl_btf *b, const char *path)
{
	size_t len = 0, room = 8u << 20;
	unsigned char *blob;
	ssize_t n;
	int fd, ret;

	memset(b, 0, sizeof(*b));
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	ret = map_blob(b, fd);
	if (ret != -ENODEV) {
		close(fd);
		return ret;
	}
	blob = malloc(room);
	ret = blob ? 0 : -ENOMEM;
	while (!ret) {
		/* sysfs need not tell the size, so read to the end. */
		if (len == room) {
			unsigned char *more = NULL;

			room *= 2;
			if (room <= 2 * (size_t)BTF_MAX_BLOB)
				more = realloc(blob, room);
			if (!more) {
				ret = -ENOMEM;
				break;
			}
			blob = more;
		}
		n = read(fd, blob + len, room - len);
		if (n == 0)
			break;
		if (n > 0)
			len += (size_t)n;
		else if (errno != EINTR)
			ret = -errno;
	}
	close(fd);
	if (ret) {
		free(blob);
		return ret;
	}
	return pl_btf_parse(b, blob, len);
}

void pl_btf_free(struct pl_btf *b)
{
	if (b->mapped)
		munmap(b->blob, b->mapped);
	else
		free(b->blob);
	free(b->off);
	memset(b, 0, sizeof(*b));
}

const char *pl_btf_name(const struct pl_btf *b, uint32_t id)
{
	const struct btf_type *t = type_at(b, id);

	return t ? name_at(b, t->name_off) : "";
}

int pl_btf_find(const struct pl_btf *b, const char *name, unsigned kind)
{
	for (uint32_t id = 1; id < b->ntypes; id++) {
		const struct btf_type *t = type_at(b, id);

		if (BTF_INFO_KIND(t->info) == kind &&
		    !strcmp(name_at(b, t->name_off), name))
			return (int)id;
	}
	return -ENOENT;
}

/* Past typedef, const, volatile, restrict and type tags. */
static uint32_t strip(const struct pl_btf *b, uint32_t id)
{
	for (int i = 0; i < BTF_MAX_DEPTH; i++) {
		const struct btf_type *t = type_at(b, id);

		if (!t)
			return 0;
		switch (BTF_INFO_KIND(t->info)) {
		case BTF_KIND_TYPEDEF:
		case BTF_KIND_CONST:
		case BTF_KIND_VOLATILE:
		case BTF_KIND_RESTRICT:
		case BTF_KIND_TYPE_TAG:
			id = t->type;
			break;
		default:
			return id;
		}
	}
	return 0;
}

int pl_btf_pointee(const struct pl_btf *b, uint32_t id)
{
	const struct btf_type *t = type_at(b, strip(b, id));

	if (!t || BTF_INFO_KIND(t->info) != BTF_KIND_PTR)
		return -ENOENT;
	id = strip(b, t->type);
	return id ? (int)id : -ENOENT;
}

bool pl_btf_is_int(const struct pl_btf *b, uint32_t id, uint32_t size)
{
	const struct btf_type *t = type_at(b, strip(b, id));

	return t && BTF_INFO_KIND(t->info) == BTF_KIND_INT && t->size == size;
}

int pl_btf_struct(const struct pl_btf *b, uint32_t id)
{
	const struct btf_type *t;
	int p = pl_btf_pointee(b, id);

	id = p > 0 ? (uint32_t)p : strip(b, id);
	t = type_at(b, id);
	if (!t)
		return -ENOENT;
	switch (BTF_INFO_KIND(t->info)) {
	case BTF_KIND_STRUCT:
		return (int)id;
	case BTF_KIND_FWD:
		/* Deduplication may leave only the declaration here. */
		return pl_btf_find(b, name_at(b, t->name_off),
				   BTF_KIND_STRUCT);
	default:
		return -ENOENT;
	}
}

/* `budget` ends the search in structs that contain themselves. */
static int member(const struct pl_btf *b, uint32_t id, const char *name,
		  uint32_t *off, uint32_t *type, unsigned *budget)
{
	const struct btf_type *t = type_at(b, strip(b, id));
	const struct btf_member *m;
	uint32_t bits, width, inner;
	int ret;

	if (!t || (BTF_INFO_KIND(t->info) != BTF_KIND_STRUCT &&
		   BTF_INFO_KIND(t->info) != BTF_KIND_UNION))
		return -ENOENT;

	m = (const struct btf_member *)(t + 1);
	for (unsigned i = 0; i < BTF_INFO_VLEN(t->info); i++, m++) {
		const char *this = name_at(b, m->name_off);

		if ((*budget)-- == 0)
			return -EPROTO;
		bits = m->offset;
		width = 0;
		if (BTF_INFO_KFLAG(t->info)) {
			width = BTF_MEMBER_BITFIELD_SIZE(bits);
			bits = BTF_MEMBER_BIT_OFFSET(bits);
		}
		if (!strcmp(this, name)) {
			if (width || bits % 8)
				return -EPROTO;
			*off += bits / 8;
			*type = m->type;
			return 0;
		}
		if (*this || bits % 8)
			continue;
		inner = *off + bits / 8;
		ret = member(b, m->type, name, &inner, type, budget);
		if (ret != -ENOENT) {
			*off = inner;
			return ret;
		}
	}
	return -ENOENT;
}

int pl_btf_member(const struct pl_btf *b, uint32_t id, const char *name,
		  uint32_t *off, uint32_t *type)
{
	unsigned budget = BTF_MAX_MEMBERS;

	return member(b, id, name, off, type, &budget);
}

int pl_btf_params(const struct pl_btf *b, uint32_t id, uint32_t *type,
		  unsigned max)
{
	const struct btf_param *p;
	const struct btf_type *t;
	unsigned n;
	int proto = pl_btf_pointee(b, id);

	if (proto < 0)
		return proto;
	t = type_at(b, (uint32_t)proto);
	if (BTF_INFO_KIND(t->info) != BTF_KIND_FUNC_PROTO)
		return -ENOENT;
	n = BTF_INFO_VLEN(t->info);
	p = (const struct btf_param *)(t + 1);
	for (unsigned i = 0; i < n && i < max; i++)
		type[i] = p[i].type;
	return (int)n;
}
