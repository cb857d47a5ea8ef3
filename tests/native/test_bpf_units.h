/* SPDX-License-Identifier: Apache-2.0 */
/* The parts of test_bpf.c that need no writing to devices; included by it. */

/* Look up whatever the tracker looks up; the answers do not matter. */
static void use_btf(struct pl_btf *b)
{
	struct pl_bpf_object o;
	char why[256];
	uint32_t off = 0, type;

	for (int ev = PL_EV_RQ_COMPLETE; ev <= PL_EV_BIO_QUEUE; ev++)
		(void)!pl_bpf_object_find(b, (enum pl_bpf_event)ev, &o, why, sizeof(why));
	for (uint32_t id = 0; id < b->ntypes + 2; id += 97)
		(void)!pl_btf_member(b, id, "no such member", &off, &type);
}

/* A struct whose anonymous members are, twice each, the struct itself. */
static void test_btf_cycle(void)
{
	const uint32_t rec[] = {
		0, BTF_KIND_STRUCT << 24 | 2, 8,  0, 1, 0,  0, 1, 0,
		0, BTF_KIND_TYPEDEF << 24, 2,		/* typedef of itself */
		0, BTF_KIND_PTR << 24, 999,
	};
	const struct btf_header h = {
		.magic = BTF_MAGIC, .version = BTF_VERSION, .hdr_len = sizeof(h),
		.type_len = sizeof(rec), .str_off = sizeof(rec), .str_len = 4,
	};
	uint32_t off = 0, type;
	unsigned char *blob = malloc(sizeof(h) + sizeof(rec) + 4);
	struct pl_btf b;

	OK(blob != NULL);
	memcpy(blob, &h, sizeof(h));
	memcpy(blob + sizeof(h), rec, sizeof(rec));
	memset(blob + sizeof(h) + sizeof(rec), 0, 4);
	OK(pl_btf_parse(&b, blob, sizeof(h) + sizeof(rec) + 4) == 0);
	OK(pl_btf_member(&b, 1, "x", &off, &type) == -EPROTO);
	OK(pl_btf_member(&b, 2, "x", &off, &type) == -ENOENT);
	OK(pl_btf_struct(&b, 3) == -ENOENT && pl_btf_struct(&b, 2) == -ENOENT);
	OK(pl_btf_find(&b, "x", BTF_KIND_STRUCT) == -ENOENT);
	pl_btf_free(&b);
}

static void test_btf(void)
{
	struct pl_btf b, bad;
	struct pl_bpf_object o;
	char why[256] = "";
	size_t len, cut;
	unsigned char *copy;
	const struct btf_header *h;

	OK(pl_btf_load(&b, "/nonexistent") == -ENOENT);
	OK(pl_btf_load(&b, "/dev/null") == -EPROTO);
	OK(pl_btf_load(&b, PL_BTF_VMLINUX) == 0);
	for (int ev = PL_EV_RQ_COMPLETE; ev <= PL_EV_BIO_QUEUE; ev++)
		if (pl_bpf_object_find(&b, (enum pl_bpf_event)ev, &o, why,
				       sizeof(why)) != 0)
			DIE("%s", why);
	h = (const struct btf_header *)b.blob;
	len = (size_t)h->hdr_len + h->str_off + h->str_len;
	for (int i = 0; i < 60; i++) {
		/* Cut anywhere, or with bytes changed anywhere. */
		cut = i % 2 ? (size_t)random() % len : len;
		copy = malloc(cut + 1);
		OK(copy != NULL);
		memcpy(copy, b.blob, cut);
		for (int k = 0; cut && i % 2 == 0 && k < 1 << (i / 4); k++)
			copy[24 + (size_t)random() % (cut - 24)] ^=
				(unsigned char)(1 + random() % 255);
		if (pl_btf_parse(&bad, copy, cut) == 0) {
			use_btf(&bad);
			pl_btf_free(&bad);
		}
	}
	pl_btf_free(&b);
	test_btf_cycle();
}

static void refuse(struct pl_bpf_cfg c, int err)
{
	char why[256] = "";
	struct pl_bpf *t;
	int ret = pl_bpf_open(&t, &c, why, sizeof(why));

	printf("  %d: %s\n", ret, why);
	OK(ret == err && t == NULL && *why);
}

static void test_refusals(void)
{
	const struct pl_bpf_cfg good = { 7, 0, 0, GiB, 12, 16, PL_BPF_RQ };
	struct pl_bpf_cfg c;
	pid_t pid;
	int st;

	c = good, c.end = 0;
	refuse(c, -EINVAL);
	c = good, c.start = 100;
	refuse(c, -EINVAL);
	c = good, c.done_shift = 11;
	refuse(c, -EINVAL);
	c = good, c.source = (enum pl_bpf_source)9;
	refuse(c, -EINVAL);
	c = good, c.major = 0;
	refuse(c, -EINVAL);
	c = good, c.end = 64 * 1024 * GiB;
	refuse(c, -E2BIG);
	c = good, c.end = 1ull << 62;
	refuse(c, -E2BIG);
	fflush(stdout);
	pid = fork();
	OK(pid >= 0);
	if (pid == 0) {
		OK(setgid(65534) == 0 && setuid(65534) == 0);
		refuse(good, -EPERM);
		fflush(stdout);
		_exit(0);
	}
	OK(waitpid(pid, &st, 0) == pid && st == 0);
	pl_bpf_close(NULL);
}

struct runs {
	struct pl_bitmap *into;
	uint64_t last;		/* end of the one before */
	unsigned n;
};

static int add_run(void *ctx, uint64_t start, uint64_t end)
{
	struct runs *u = ctx;

	OK(start < end && end <= u->into->size && (!u->n || start > u->last));
	pl_bitmap_set(u->into, start, end);
	u->last = end;
	u->n++;
	return 0;
}

static int refuse_run(void *ctx, uint64_t start, uint64_t end)
{
	(void)ctx, (void)start, (void)end;
	return -ENOMEM;
}

/* The marks as runs: all of them, joined, ascending, once. */
static void as_runs(struct run *r, struct pl_bitmap *got)
{
	struct pl_bitmap want;
	uint64_t size = got->size;

	OK(pl_bitmap_init(&want, size, got->shift) == 0);
	for (int i = 0; i < 2000; i++) {
		struct runs u = { .into = got };

		for (int k = i % 40; k >= 0; k--) {
			uint64_t a = (uint64_t)random() % size;

			pl_bitmap_set(&want, a, a + (uint64_t)random() % 2000000);
		}
		for (uint64_t w = 0; w < want.nwords; w++)
			r->t->done.word[w] = want.word[w];
		OK(pl_bpf_take_runs(r->t, add_run, &u) == 0);
		OK(!memcmp(want.word, got->word, want.nwords * 8));
		OK(pl_bpf_peek_done(r->t) == 0);
		pl_bitmap_zero(&want);
		pl_bitmap_zero(got);
	}
	r->t->done.word[0] = 1;
	OK(pl_bpf_take_runs(r->t, refuse_run, NULL) == -ENOMEM);
	{
		struct runs u = { .into = got };

		r->t->done.word[0] = 5;
		__atomic_fetch_add(&r->t->page->everything, 1, __ATOMIC_SEQ_CST);
		OK(pl_bpf_take_runs(r->t, add_run, &u) == 0);
		OK(u.n == 1 && pl_bitmap_bytes(got) == size);
		OK(pl_bpf_peek_done(r->t) == 0);
		OK(pl_bpf_take_runs(r->t, add_run, &u) == 0 && u.n == 1);
	}
	pl_bitmap_zero(got);
	pl_bitmap_fini(&want);
}

/* forget() against pl_bitmap_clear(), and the "everything" declaration. */
static void test_forget(struct dev *d)
{
	struct pl_bitmap want, got, wrong;
	struct run r;
	uint64_t size = d->size - 512, a, b;

	run_open(&r, d, PL_BPF_RQ, 0, size, 13, 16);
	OK(pl_bitmap_init(&want, size, 13) == 0);
	OK(pl_bitmap_init(&got, size, 13) == 0);
	OK(pl_bitmap_init(&wrong, size, 14) == 0);
	for (int i = 0; i < 3000; i++) {
		for (uint64_t w = 0; w < want.nwords; w++)
			want.word[w] = r.t->done.word[w] = i % 3 ? ~0ull :
				(uint64_t)random() << 32 ^ (uint64_t)random();
		a = (uint64_t)random() % (size + 1);
		b = i % 2 ? (uint64_t)random() % (size + 1) :
			    a + (uint64_t)random() % 3000000;
		if (i % 5 == 0)
			b = size;
		if (a > b) {
			OK(pl_bpf_forget(r.t, a, b) == -EINVAL);
			continue;
		}
		OK(pl_bpf_forget(r.t, a, b) == 0);
		pl_bitmap_clear(&want, a, b < size ? b : size);
		OK(pl_bpf_take_done(r.t, &got) == 0);
		OK(!memcmp(want.word, got.word, want.nwords * 8));
		pl_bitmap_zero(&got);
	}
	OK(pl_bpf_take_done(r.t, &wrong) == -EINVAL);
	as_runs(&r, &got);

	/* Each side is told once, also if the other has been told before. */
	__atomic_fetch_add(&r.t->page->everything, 1, __ATOMIC_SEQ_CST);
	OK(pl_bpf_forget(r.t, 0, size) == 0);
	OK(pl_bpf_peek_done(r.t) == want.nbits);
	OK(pl_bpf_take_done(r.t, &got) == 0 && pl_bitmap_bytes(&got) == size);
	OK(pl_bpf_peek_done(r.t) == 0);
	pl_bitmap_zero(&got);
	OK(pl_bpf_take_done(r.t, &got) == 0 && pl_bitmap_count(&got) == 0);
	pl_bitmap_zero(&r.want_q);
	OK(pl_bpf_take_queued(r.t, &r.want_q) == 0);
	OK(pl_bitmap_bytes(&r.want_q) == size);
	pl_bitmap_fini(&want), pl_bitmap_fini(&got), pl_bitmap_fini(&wrong);
	run_close(&r);
}
