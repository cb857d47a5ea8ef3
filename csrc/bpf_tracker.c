/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bpf_tracker.c - which blocks of a device are written, marked by BPF
 * programs: loading them.  bpf_marks.c reads the marks.
 *
 * Invariants
 *   - Only the kernel side sets marks; only take and forget clear them.
 *   - Once pl_bpf_open has returned, every write that completes is marked
 *     before its writer learns of it.  A reader that clears first and reads
 *     afterwards (never through the page cache) loses nothing, as long as
 *     the kernel delivers every event; the sums show whether it has.
 *   - Marks are visible before the sums that count them.
 *   - All state in the kernel hangs on descriptors (closed on exec) and on
 *     the mapping: a crash detaches everything.
 *
 * The map is one value: pages of counters, the done bitmap, the queued
 * bitmap, and the area of ones that bpf_prog.c copies from; each on a page
 * of its own.  User space works in the same memory, without system calls.
 */
#include "bpf_internal.h"

#include <assert.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The verifier's bound on an offset into a map value, BPF_MAX_VAR_OFF. */
#define MAX_VALUE (1ull << 29)
#define LOG_SIZE (256u << 10)

__attribute__((format(printf, 4, 5)))
static int fail(char *why, size_t why_len, int err, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(why, why_len, fmt, ap);
	va_end(ap);
	return err;
}

static int sys_bpf(int cmd, union bpf_attr *attr)
{
	long ret = syscall(SYS_bpf, cmd, attr, sizeof(*attr));

	return ret < 0 ? -errno : (int)ret;
}

static int fail_bpf(char *why, size_t why_len, int err, const char *what)
{
	const char *hint = "";

	if (err == -EPERM || err == -EACCES)
		hint = "; needs root, or CAP_BPF and CAP_PERFMON";
	else if (err == -ENOSYS)
		hint = "; this kernel is built without bpf(2)";
	return fail(why, why_len, err, "BPF tracker: cannot %s: %s%s", what,
		    strerror(-err), hint);
}

static int check_cfg(const struct pl_bpf_cfg *c, char *why, size_t why_len)
{
	if (c->source != PL_BPF_RQ && c->source != PL_BPF_BIO &&
	    c->source != PL_BPF_QUEUE)
		return fail(why, why_len, -EINVAL, "BPF tracker: no such source");
	if (c->start >= c->end || c->start % 512 || c->end % 512)
		return fail(why, why_len, -EINVAL,
			    "BPF tracker: the range must be whole sectors");
	if (c->done_shift < 12 || c->done_shift > 40 ||
	    c->queued_shift < 12 || c->queued_shift > 40)
		return fail(why, why_len, -EINVAL,
			    "BPF tracker: granules are 2^12 to 2^40 bytes");
	if (c->major == 0 || c->major >= 1u << 12 || c->minor >= 1u << 20)
		return fail(why, why_len, -EINVAL,
			    "BPF tracker: no such device number %u:%u",
			    c->major, c->minor);
	return 0;
}

/* Give one bitmap its place at *off, a page boundary before and after. */
static void place(struct pl_bpf_bits *m, uint64_t size, uint32_t shift, size_t lanes,
		  uint64_t page, uint64_t *off)
{
	uint64_t nwords;

	nwords = (size >> shift) + !!(size & ((1ull << shift) - 1));
	nwords = nwords / 64 + !!(nwords % 64);
	assert(*off % page == 0 && *off + nwords * 8 <= UINT32_MAX);
	m->in_map = (struct pl_bpf_marks){
		.off = (uint32_t)*off, .nwords = (uint32_t)nwords,
		.shift = shift, .lanes = (uint32_t)lanes,
	};
	*off = (*off + nwords * 8 + page - 1) / page * page;
}

static int plan(struct pl_bpf *t, char *why, size_t why_len)
{
	uint64_t size = t->cfg.end - t->cfg.start, off, page, need;
	uint32_t shift = t->cfg.queued_shift;

	/* Bounds first: place() stores offsets in 32 bits. */
	need = size >> t->cfg.queued_shift;
	if (t->cfg.source != PL_BPF_QUEUE) {
		need += size >> t->cfg.done_shift;
		if (t->cfg.done_shift < shift)
			shift = t->cfg.done_shift;
	}
	if (need / 8 > MAX_VALUE)
		goto too_large;

	page = (uint64_t)sysconf(_SC_PAGESIZE);
	off = (sizeof(struct pl_bpf_page) + page - 1) / page * page;
	if (t->cfg.source != PL_BPF_QUEUE)
		place(&t->done, size, t->cfg.done_shift,
		      offsetof(struct pl_bpf_page, done), page, &off);
	place(&t->queued, size, t->cfg.queued_shift,
	      offsetof(struct pl_bpf_page, queued), page, &off);
	t->queued.in_map.look_first = true;
	/*
	 * The ones come last.  To the verifier a bitmap's last word and the
	 * most words to set are independent of each other; their sum must
	 * fit into the value, and does.
	 */
	t->ones_off = (uint32_t)off;
	t->ones_words = pl_bpf_ones_words(shift);
	off += (t->ones_words * 8ull + page - 1) / page * page;
	if (off > MAX_VALUE)
		goto too_large;
	t->len = off;
	return 0;
too_large:
	return fail(why, why_len, -E2BIG,
		    "BPF tracker: the bitmaps of %llu GiB do not fit one map; use a coarser granule",
		    (unsigned long long)(size >> 30));
}

static int make_map(struct pl_bpf *t, char *why, size_t why_len)
{
	union bpf_attr attr;
	char *mem;

	/* Not "= { 0 }", which need not clear all of a union. */
	memset(&attr, 0, sizeof(attr));
	attr.map_type = BPF_MAP_TYPE_ARRAY;
	attr.key_size = 4;
	attr.value_size = (uint32_t)t->len;
	attr.max_entries = 1;
	attr.map_flags = BPF_F_MMAPABLE;
	strcpy(attr.map_name, "pl_dirty");
	t->map_fd = sys_bpf(BPF_MAP_CREATE, &attr);
	if (t->map_fd == -ENOMEM || t->map_fd == -E2BIG)
		return fail(why, why_len, t->map_fd,
			    "BPF tracker: no %zu MiB of kernel memory for the map (%s); use a coarser granule",
			    t->len >> 20, strerror(-t->map_fd));
	if (t->map_fd < 0)
		return fail_bpf(why, why_len, t->map_fd, "create its map");
	mem = mmap(NULL, t->len, PROT_READ | PROT_WRITE, MAP_SHARED,
		   t->map_fd, 0);
	if (mem == MAP_FAILED)
		return fail_bpf(why, why_len, -errno, "map its memory");
	t->page = (struct pl_bpf_page *)mem;
	t->done.word = (uint64_t *)(mem + t->done.in_map.off);
	t->queued.word = (uint64_t *)(mem + t->queued.in_map.off);
	memset(mem + t->ones_off, 0xff, t->ones_words * 8ull);
	return 0;
}

/* The last line of the verifier's log, without its statistics. */
static const char *last_line(char *log)
{
	char *line = log, *next, *last = log;

	for (; line; line = next) {
		next = strchr(line, '\n');
		if (next)
			*next++ = '\0';
		if (*line && strncmp(line, "processed ", 10))
			last = line;
	}
	return last;
}

static int load(const struct pl_bpf_code *code, uint32_t btf_id,
		char *why, size_t why_len)
{
	union bpf_attr attr;
	char *log;
	int fd;

	memset(&attr, 0, sizeof(attr));
	attr.prog_type = BPF_PROG_TYPE_TRACING;
	attr.expected_attach_type = BPF_TRACE_RAW_TP;
	attr.attach_btf_id = btf_id;
	attr.insns = (uintptr_t)code->insn;
	attr.insn_cnt = code->n;
	attr.license = (uintptr_t)pl_bpf_licence;
	strcpy(attr.prog_name, "pl_dirty");
	fd = sys_bpf(BPF_PROG_LOAD, &attr);
	if (fd >= 0)
		return fd;
	if (fd == -EPERM)
		return fail_bpf(why, why_len, fd, "load its program");
	/* Again, for the reason: writing the log makes every load slower. */
	log = calloc(1, LOG_SIZE);
	if (!log)
		return fail_bpf(why, why_len, fd, "load its program");
	attr.log_level = 1;
	attr.log_size = LOG_SIZE;
	attr.log_buf = (uintptr_t)log;
	fd = sys_bpf(BPF_PROG_LOAD, &attr);
	if (fd < 0) {
		log[LOG_SIZE - 1] = '\0';
		fail(why, why_len, fd,
		     "BPF tracker: the kernel refused its program: %s: %s",
		     strerror(-fd), last_line(log));
	}
	free(log);
	return fd;
}

/* Load and attach one program; the descriptor of the attachment or -errno. */
static int attach(const struct pl_bpf *t, const struct pl_btf *btf,
		  enum pl_bpf_event ev, const struct pl_bpf_bits *m,
		  char *why, size_t why_len)
{
	const struct pl_bpf_target target = {
		.map_fd = t->map_fd,
		.ones_off = t->ones_off, .ones_words = t->ones_words,
		.major = t->cfg.major, .minor = t->cfg.minor,
		.first = t->cfg.start / 512, .end = t->cfg.end / 512,
		.zeroes_with_discards = t->cfg.source == PL_BPF_BIO,
	};
	union bpf_attr attr;
	struct pl_bpf_object obj;
	struct pl_bpf_code code;
	int ret, prog;

	ret = pl_bpf_object_find(btf, ev, &obj, why, why_len);
	if (ret < 0)
		return ret;
	ret = pl_bpf_assemble(&code, &target, &obj, &m->in_map);
	if (ret < 0)
		return fail_bpf(why, why_len, ret, "assemble its program");
	prog = load(&code, obj.btf_id, why, why_len);
	if (prog < 0)
		return prog;
	memset(&attr, 0, sizeof(attr));
	attr.raw_tracepoint.prog_fd = (uint32_t)prog;
	ret = sys_bpf(BPF_RAW_TRACEPOINT_OPEN, &attr);
	if (ret < 0)
		fail_bpf(why, why_len, ret, "attach to its tracepoint");
	/* The attachment keeps the program. */
	close(prog);
	return ret;
}

int pl_bpf_open(struct pl_bpf **out, const struct pl_bpf_cfg *cfg,
		char *why, size_t why_len)
{
	struct pl_btf btf = { 0 };
	struct pl_bpf *t;
	int ret;

	*out = NULL;
	ret = check_cfg(cfg, why, why_len);
	if (ret < 0)
		return ret;
	t = calloc(1, sizeof(*t));
	if (!t)
		return fail_bpf(why, why_len, -ENOMEM, "begin");
	t->cfg = *cfg;
	t->map_fd = t->link_fd[0] = t->link_fd[1] = -1;

	ret = plan(t, why, why_len);
	if (ret < 0)
		goto out;
	ret = pl_btf_load(&btf, PL_BTF_VMLINUX);
	if (ret < 0) {
		fail(why, why_len, ret, "BPF tracker: %s: %s%s", PL_BTF_VMLINUX,
		     strerror(-ret), ret == -ENOENT ?
		     "; this kernel is built without BTF" : "");
		goto out;
	}
	ret = make_map(t, why, why_len);
	if (ret < 0)
		goto out;

	/*
	 * Queued first: then what is submitted and completes from now on has
	 * both marks, and the queued marks can stand in for a lost done mark.
	 * The other order would leave some requests with the done mark only.
	 */
	ret = attach(t, &btf, PL_EV_BIO_QUEUE, &t->queued, why, why_len);
	if (ret < 0)
		goto out;
	t->link_fd[0] = ret;
	if (cfg->source != PL_BPF_QUEUE) {
		ret = attach(t, &btf, cfg->source == PL_BPF_RQ ?
			     PL_EV_RQ_COMPLETE : PL_EV_BIO_COMPLETE,
			     &t->done, why, why_len);
		if (ret < 0)
			goto out;
		t->link_fd[1] = ret;
	}
	ret = 0;
	if (why_len)
		why[0] = '\0';
	*out = t;
	t = NULL;
out:
	pl_btf_free(&btf);
	pl_bpf_close(t);
	return ret;
}

void pl_bpf_close(struct pl_bpf *t)
{
	if (!t)
		return;
	for (int i = 0; i < 2; i++)
		if (t->link_fd[i] >= 0)
			close(t->link_fd[i]);
	if (t->page)
		munmap(t->page, t->len);
	if (t->map_fd >= 0)
		close(t->map_fd);
	free(t);
}
