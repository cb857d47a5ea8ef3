/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bpf_layout.c - where the running kernel keeps what the program reads.
 *
 * Nothing is assumed of the tracepoints but the kind of object that they
 * pass: its position among the arguments, and every offset from there on,
 * comes from BTF.  Types are followed from the prototype, not looked up by
 * name, so a second "struct request" somewhere cannot be taken for ours.
 */
#include "bpf_internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#define MAX_ARGS 8

static const struct {
	const char *typedef_name, *object;
	bool has_bytes;		/* the last argument is nr_bytes */
} events[] = {
	[PL_EV_RQ_COMPLETE] = { "btf_trace_block_rq_complete", "request", true },
	[PL_EV_BIO_COMPLETE] = { "btf_trace_block_bio_complete", "bio", false },
	[PL_EV_BIO_QUEUE] = { "btf_trace_block_bio_queue", "bio", false },
};

struct finder {
	const struct pl_btf *b;
	char *why;
	size_t why_len;
};

/* Add the offset of `name` in struct `id`; the type of the member, or -errno. */
static int member(const struct finder *f, int id, const char *name,
		  uint32_t *off)
{
	uint32_t type = 0;
	int ret;

	ret = pl_btf_member(f->b, (uint32_t)id, name, off, &type);
	if (ret == 0)
		return (int)type;
	snprintf(f->why, f->why_len,
		 "BPF tracker: this kernel's struct %s has no usable member '%s' (BTF)",
		 pl_btf_name(f->b, (uint32_t)id), name);
	return ret;
}

/* The same, for a member that is, or points to, a struct. */
static int step(const struct finder *f, int id, const char *name, uint32_t *off)
{
	int ret = member(f, id, name, off);

	if (ret < 0)
		return ret;
	ret = pl_btf_struct(f->b, (uint32_t)ret);
	if (ret < 0)
		snprintf(f->why, f->why_len,
			 "BPF tracker: '%s' of this kernel's struct %s is no struct (BTF)",
			 name, pl_btf_name(f->b, (uint32_t)id));
	return ret;
}

static int find_request(const struct finder *f, int id, struct pl_bpf_object *o)
{
	int q, disk;

	if (member(f, id, "cmd_flags", &o->off_op) < 0 ||
	    member(f, id, "__sector", &o->off_sector) < 0)
		return -ENOENT;
	q = step(f, id, "q", &o->path[0]);
	if (q < 0)
		return q;
	o->npath = 2;
	disk = step(f, q, "disk", &o->path[1]);
	if (disk < 0) {
		/* Before 5.15 the request itself knew. */
		o->path[0] = 0;
		o->npath = 1;
		disk = step(f, id, "rq_disk", &o->path[0]);
	}
	return disk;
}

static int find_bio(const struct finder *f, int id, struct pl_bpf_object *o)
{
	int iter, bdev;

	if (member(f, id, "bi_opf", &o->off_op) < 0)
		return -ENOENT;
	iter = step(f, id, "bi_iter", &o->off_sector);
	if (iter < 0)
		return iter;
	o->off_bytes = o->off_sector;
	if (member(f, iter, "bi_sector", &o->off_sector) < 0 ||
	    member(f, iter, "bi_size", &o->off_bytes) < 0)
		return -ENOENT;
	bdev = step(f, id, "bi_bdev", &o->path[0]);
	if (bdev < 0)
		return bdev;
	o->npath = 2;
	return step(f, bdev, "bd_disk", &o->path[1]);
}

/* The argument that points to struct `object`; it and the id of the struct. */
static int find_arg(const struct pl_btf *b, const uint32_t *arg, int nargs,
		    const char *object, int *id)
{
	for (int i = 1; i < nargs; i++) {
		*id = pl_btf_struct(b, arg[i]);
		if (*id > 0 && !strcmp(pl_btf_name(b, (uint32_t)*id), object))
			return i - 1;	/* the first is the probe's own data */
	}
	return -ENOENT;
}

int pl_bpf_object_find(const struct pl_btf *b, enum pl_bpf_event ev,
		       struct pl_bpf_object *o, char *why, size_t why_len)
{
	const struct finder f = { b, why, why_len };
	const char *name = events[ev].typedef_name;
	uint32_t arg[MAX_ARGS];
	int ret, id, nargs, at;

	memset(o, 0, sizeof(*o));
	ret = pl_btf_find(b, name, BTF_KIND_TYPEDEF);
	if (ret < 0) {
		snprintf(why, why_len, "BPF tracker: this kernel has no %s in its BTF", name);
		return ret;
	}
	o->btf_id = (uint32_t)ret;

	nargs = pl_btf_params(b, o->btf_id, arg, MAX_ARGS);
	if (nargs < 0 || nargs > MAX_ARGS)
		nargs = 0;
	at = find_arg(b, arg, nargs, events[ev].object, &id);
	/* nr_bytes is an int of 4 bytes; a pointer there is something else. */
	if (at < 0 || (events[ev].has_bytes &&
		       (at + 2 >= nargs ||
			!pl_btf_is_int(b, arg[nargs - 1], 4)))) {
		snprintf(why, why_len,
			 "BPF tracker: this kernel's %s has other arguments than expected",
			 name);
		return -EPROTO;
	}
	o->arg = (uint32_t)at;
	o->bytes_arg = events[ev].has_bytes ? nargs - 2 : -1;

	ret = events[ev].has_bytes ? find_request(&f, id, o) :
				     find_bio(&f, id, o);
	if (ret < 0)
		return ret;
	if (member(&f, ret, "major", &o->off_major) < 0 ||
	    member(&f, ret, "first_minor", &o->off_minor) < 0)
		return -ENOENT;
	return 0;
}
