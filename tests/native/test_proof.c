/* SPDX-License-Identifier: Apache-2.0 */
/* The tree of hashes: against a plain model, however the image came about. */
#define _GNU_SOURCE
#include "stream.h"

/* The root of an image, level by level, without a tree that is kept. */
static void model(const uint8_t *image, uint64_t size, uint8_t root[16])
{
	uint64_t n = (size + 4095) / 4096, unit = 8;
	uint8_t *level = must_alloc(n * 8), sealed[32];
	uint32_t block = 4096, algorithm = 1;

	for (uint64_t i = 0; i < n; i++) {
		uint64_t len = size - i * 4096 < 4096 ? size - i * 4096 : 4096;
		uint64_t h = pl_hash_block_ref(image + i * 4096, len);

		memcpy(level + i * 8, &h, 8);
	}
	do {
		uint64_t above = n ? (n + 255) / 256 : 1;
		uint8_t *next = must_alloc(above * 16);

		for (uint64_t i = 0; i < above; i++) {
			uint64_t k = n - i * 256 < 256 ? n - i * 256 : 256;

			if (n && !pl_is_zero(level + i * 256 * unit, k * unit))
				pl_hash128_ref(level + i * 256 * unit, k * unit,
					       next + i * 16);
		}
		free(level);
		level = next;
		n = above;
		unit = 16;
	} while (n > 1);
	memcpy(sealed, level, 16);
	memcpy(sealed + 16, &size, 8);
	memcpy(sealed + 24, &block, 4);
	memcpy(sealed + 28, &algorithm, 4);
	pl_hash128_ref(sealed, 32, root);
	free(level);
}

static void same_root(struct pl_proof *p, int fd, const uint8_t *image)
{
	uint8_t got[16], want[16];

	EQ(pl_proof_root(p, fd, got), 0);
	model(image, p->size, want);
	OK(!memcmp(got, want, 16));
}

/* Writes of every size, in any order, over each other; zeroes and parts of blocks. */
static void random_writes(uint64_t size, int rounds)
{
	uint8_t *image = must_alloc(size), *data = must_alloc(size);
	int fd = temp_file(NULL, size);
	struct pl_proof p, fresh;
	struct pl_extent run;

	fill_random(data, size);
	memset(data, 0, size / 3);
	EQ(pl_proof_init(&p, size), 0);
	same_root(&p, -1, image);
	for (int i = 0; i < rounds && size; i++) {
		for (int k = 0; k < 5; k++) {
			uint64_t pos = rnd(size), len = rnd(rnd(4) ? 9000 : 300000) + 1;
			uint64_t from;

			if (rnd(2))
				pos -= pos % 4096;
			if (len > size - pos)
				len = size - pos;
			from = rnd(size - len + 1);
			memcpy(image + pos, data + from, len);
			OK(pwrite(fd, image + pos, len, (off_t)pos) == (ssize_t)len);
			pl_proof_note(&p, image + pos, len, pos);
		}
		same_root(&p, fd, image);
	}
	/* It is what a tree of the whole image is; of the file, too, if that is shorter. */
	EQ(pl_proof_init(&fresh, size), 0);
	pl_proof_note(&fresh, image, size, 0);
	same_root(&fresh, -1, image);
	EQ(pl_proof_differ(&p, &fresh, 0, &run), 0);
	pl_proof_fini(&p);
	pl_proof_fini(&fresh);
	close(fd);
	free(image);
	free(data);
}

/* One bit anywhere is another root, and its block is found. */
static void each_bit_counts(void)
{
	uint64_t size = 3 * MiB + 77;
	uint8_t *image = must_alloc(size), before[16], after_it[16];
	struct pl_proof p, q;
	struct pl_extent run;

	fill_random(image, size);
	memset(image + MiB, 0, MiB);
	EQ(pl_proof_init(&p, size), 0);
	EQ(pl_proof_init(&q, size), 0);
	pl_proof_note(&p, image, size, 0);
	pl_proof_note(&q, image, size, 0);
	EQ(pl_proof_root(&p, -1, before), 0);
	for (int i = 0; i < 1000; i++) {
		uint64_t at = i ? rnd(size) : size - 1, first = at - at % 4096;
		uint64_t end = first + 4096 < size ? first + 4096 : size;
		uint8_t bit = (uint8_t)(1u << rnd(8));

		image[at] ^= bit;
		pl_proof_note(&q, image + first, end - first, first);
		EQ(pl_proof_root(&q, -1, after_it), 0);
		OK(memcmp(before, after_it, 16));
		EQ(pl_proof_differ(&p, &q, 0, &run), 1);
		EQ(run.start, first);
		EQ(run.end, end);
		EQ(pl_proof_differ(&p, &q, run.end, &run), 0);
		image[at] ^= bit;
		pl_proof_note(&q, image + first, end - first, first);
		EQ(pl_proof_root(&q, -1, after_it), 0);
		OK(!memcmp(before, after_it, 16));
	}
	pl_proof_fini(&p);
	pl_proof_fini(&q);
	free(image);
}

/* What was written in part is read back; where nothing can be read, it is an error. */
static void unknown_blocks(void)
{
	uint8_t image[10000] = { 0 }, root[16];
	struct pl_proof p;
	int fd = temp_file(NULL, 0);

	fill_random(image, 5000);
	EQ(pl_proof_init(&p, sizeof(image)), 0);
	pl_proof_note(&p, image, 5000, 0);
	EQ(pl_proof_root(&p, -1, root), -ENODATA);
	OK(pwrite(fd, image, 5000, 0) == 5000);
	/* Behind the file's end the image is zero. */
	same_root(&p, fd, image);
	same_root(&p, -1, image);
	EQ(pl_proof_init(&p, (uint64_t)INT64_MAX + 1), -EINVAL);
	close(fd);
}

/* Other sizes are other roots, also of nothing but zeroes. */
static void sizes_count(void)
{
	uint8_t a[16], b[16];
	struct pl_proof p, q;
	struct pl_extent run;

	EQ(pl_proof_init(&p, 64 * GiB), 0);
	EQ(pl_proof_init(&q, 64 * GiB + 1), 0);
	EQ(p.levels, 3);
	EQ(q.levels, 4);
	EQ(pl_proof_root(&p, -1, a), 0);
	EQ(pl_proof_root(&q, -1, b), 0);
	OK(memcmp(a, b, 16));
	EQ(pl_proof_differ(&p, &q, 0, &run), -EINVAL);
	pl_proof_fini(&p);
	pl_proof_fini(&q);
}

struct noter {
	pthread_t thread;
	struct pl_proof *proof;
	const uint8_t *image;
	uint64_t size, first;
};

static void *noter_main(void *arg)
{
	struct noter *n = arg;

	for (uint64_t at = n->first * 4096; at < n->size; at += 4 * 4096)
		pl_proof_note(n->proof, n->image + at,
			      n->size - at < 4096 ? n->size - at : 4096, at);
	return NULL;
}

/* Threads that have blocks of their own disturb each other in nothing. */
static void threads(void)
{
	uint64_t size = 5 * MiB + 1;
	uint8_t *image = must_alloc(size);
	struct noter n[4];
	struct pl_proof p;

	fill_random(image, size);
	EQ(pl_proof_init(&p, size), 0);
	for (unsigned i = 0; i < 4; i++) {
		n[i] = (struct noter){ .proof = &p, .image = image, .size = size,
				       .first = i };
		OK(pthread_create(&n[i].thread, NULL, noter_main, &n[i]) == 0);
	}
	for (unsigned i = 0; i < 4; i++)
		pthread_join(n[i].thread, NULL);
	same_root(&p, -1, image);
	pl_proof_fini(&p);
	free(image);
}

/* A receiver that keeps a proof, until END. */
struct receiver {
	pthread_t thread;
	struct pl_recv *r;
	struct pl_proof proof;
	int in, out, event;
	uint32_t syncs;
	struct pl_recv_msg msg;
	struct pl_fault fault;
};

static void *receiver_main(void *arg)
{
	struct receiver *v = arg;

	while ((v->event = pl_recv_run(v->r, &v->msg, &v->fault)) == PL_RECV_SYNC)
		if (!v->syncs++) {
			EQ(pl_recv_expect(v->r, PL_FEATURE_PROOF), -EINVAL);
			EQ(pl_recv_expect_proof(v->r, &v->proof), 0);
			EQ(pl_recv_expect(v->r, PL_FEATURE_PROOF), 0);
		}
	return NULL;
}

static void receiver_start(struct receiver *v, int in, uint64_t size, uint32_t slot)
{
	struct pl_recv_cfg cfg = {
		.in_fd = in, .out_fd = temp_file(NULL, 0), .slots = 3,
		.slot_size = slot, .max_frame = 64u << 20, .sparse = 1, .reply_fd = -1,
	};

	*v = (struct receiver){ .in = in, .out = cfg.out_fd };
	EQ(pl_proof_init(&v->proof, size), 0);
	EQ(pl_recv_new(&v->r, &cfg), 0);
	OK(pthread_create(&v->thread, NULL, receiver_main, v) == 0);
}

static void receiver_free(struct receiver *v)
{
	pl_recv_free(v->r);
	pl_proof_fini(&v->proof);
	close(v->in);
	close(v->out);
}

static void put_frame(struct pl_pump *p, uint32_t mark, uint64_t pos, const void *data,
		      uint32_t len)
{
	struct header h = { mark, len, pos };
	struct pl_fault fault;

	EQ(pl_pump_write(p, &h, sizeof(h), &fault), 0);
	if (len)
		EQ(pl_pump_write(p, data, len, &fault), 0);
}

/* Both ends of a copy in rounds come to the root of the image: with hashes of blocks and
   of larger chunks, spliced or not, with blocks that become zero, and a last one that is
   no block. */
static void both_ends(uint32_t shift, unsigned flags, uint64_t size)
{
	uint8_t *image = must_alloc(size), claim[48] = { 0 }, root[16];
	const struct pl_extent all = { 0, size };
	const uint8_t *got;
	struct pl_pump_cfg cfg;
	struct pl_fault fault;
	struct pl_proof proof;
	struct pl_known known;
	struct receiver v;
	struct pl_pump *p;
	uint32_t len;
	int fd[2];

	fill_random(image, size);
	memset(image + size / 3, 0, size / 4);
	OK(pipe2(fd, 0) == 0 && fcntl(fd[1], F_SETFL, O_NONBLOCK) == 0);
	EQ(pl_known_init(&known, size, shift), 0);
	EQ(pl_proof_init(&proof, size), 0);
	cfg = (struct pl_pump_cfg){
		.src_fd = temp_file(image, size), .size = size, .align = 1,
		.out_fd = fd[1], .sink = PL_SINK_FRAMES, .cluster = 256 * KiB,
		.slots = 4, .readers = 2, .known = &known, .proof = &proof,
	};
	EQ(pl_pump_new(&p, &cfg), 0);
	receiver_start(&v, fd[0], size, 64 * KiB);
	put_frame(p, PL_D1_MARK, 0, "sync", 4);
	EQ(pl_pump_pass(p, &all, 1, PL_PASS_LAST | PL_PASS_SKIP_ZERO | flags, &fault), 0);
	for (int i = 0; i < 30; i++) {
		struct pl_extent ext = { rnd(size - 1), 0 };
		uint64_t n = rnd(rnd(3) ? 20000 : 300000) + 1;

		ext.end = n < size - ext.start ? ext.start + n : size;
		if (rnd(3))
			fill_random(image + ext.start, ext.end - ext.start);
		else
			memset(image + ext.start, 0, ext.end - ext.start);
		OK(pwrite(cfg.src_fd, image, size, 0) == (ssize_t)size);
		EQ(pl_pump_pass(p, rnd(4) ? &ext : &all, 1,
				PL_PASS_SKIP_ZERO | (rnd(2) ? PL_PASS_CHANGED : 0),
				&fault), 0);
		if (rnd(2))
			same_root(&proof, -1, image);
	}
	same_root(&proof, -1, image);
	/* A PROOF holds for what was sent before it: this one is outdated. */
	put_frame(p, PL_PROOF_MARK, 0, claim, 48);
	put_frame(p, PL_D1_MARK, 0, image, 3);
	put_frame(p, PL_D1_MARK, 0, NULL, 0);
	pthread_join(v.thread, NULL);
	EQ(v.event, PL_RECV_END);
	OK(!pl_recv_proof_data(v.r, &len));
	EQ(len, 0);
	same_root(&v.proof, v.out, image);

	/* The stream goes on: with a question, and a better PROOF. */
	pl_recv_reopen(v.r);
	put_frame(p, PL_PROOF_MARK, 3, "\1\0\0\0\0\0\0", 8);
	EQ(pl_recv_run(v.r, &v.msg, &v.fault), PL_RECV_QUESTION);
	EQ(v.msg.pos, 3);
	got = pl_recv_proof_data(v.r, &len);
	OK(got && len == 8 && got[0] == 1);
	EQ(pl_proof_root(&proof, -1, root), 0);
	memcpy(claim + 16, root, 16);
	put_frame(p, PL_PROOF_MARK, 0, claim, 48);
	put_frame(p, PL_D1_MARK, 0, NULL, 0);
	EQ(pl_recv_run(v.r, &v.msg, &v.fault), PL_RECV_END);
	got = pl_recv_proof_data(v.r, &len);
	OK(got && len == 48 && !memcmp(got, claim, 48));

	receiver_free(&v);
	pl_pump_free(p);
	pl_known_fini(&known);
	pl_proof_fini(&proof);
	close(fd[1]);
	close(cfg.src_fd);
	free(image);
}

/* What a receiver refuses: the sizes of a PROOF that cannot be, and data past the size
   that it was told. */
static void refused(void)
{
	struct { uint32_t mark, size; uint64_t pos; int err; } bad[] = {
		{ PL_PROOF_MARK, 47, 0, -EPROTO }, { PL_PROOF_MARK, 0, 0, -EPROTO },
		{ PL_PROOF_MARK, 0, 1, -EPROTO }, { PL_PROOF_MARK, 12, 1, -EPROTO },
		{ PL_PROOF_MARK, 2056, 1, -EPROTO }, { PL_D1_MARK, 3, 99998, -EFBIG },
		{ PL_D1_MARK, 3, INT64_MAX - 2, -ERANGE },
		{ PL_D1_MARK, 100, 99901, -EFBIG }, { 0x4cc0ac52, 8, 0, -EBADMSG },
	};

	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		struct header h = { bad[i].mark, bad[i].size, bad[i].pos };
		struct receiver v;
		int fd[2];

		OK(pipe(fd) == 0);
		receiver_start(&v, fd[0], 100000, 4096);
		put(fd[1], (const uint8_t *)"\x3d\xac\xc0\x4c\4\0\0\0\0\0\0\0\0\0\0\0sync",
		    20);
		put(fd[1], (const uint8_t *)&h, sizeof(h));
		pthread_join(v.thread, NULL);
		EQ(v.event, bad[i].err);
		EQ(v.fault.stage, PL_STAGE_PROTOCOL);
		receiver_free(&v);
		close(fd[1]);
	}
}

/* An image of nothing has a proof, too, and takes no data. */
static void empty_image(void)
{
	struct header h = { PL_D1_MARK, 1, 0 };
	struct receiver v;
	int fd[2];

	OK(pipe(fd) == 0);
	receiver_start(&v, fd[0], 0, 4096);
	put(fd[1], (const uint8_t *)"\x3d\xac\xc0\x4c\4\0\0\0\0\0\0\0\0\0\0\0sync", 20);
	put(fd[1], (const uint8_t *)&h, sizeof(h));
	pthread_join(v.thread, NULL);
	EQ(v.event, -EFBIG);
	receiver_free(&v);
	close(fd[1]);
}

/* A pass that writes nothing reads an image into a proof, whatever its extents. */
static void only_read(void)
{
	uint64_t size = 3 * MiB + 77;
	uint8_t *image = must_alloc(size);
	struct pl_extent ext[] = { { 100, 5000 }, { 9000, MiB }, { MiB + 512, size } };
	struct pl_pump_cfg cfg;
	struct pl_proof proof, other;
	struct pl_fault fault;
	struct pl_pump *p;

	fill_random(image, size);
	EQ(pl_proof_init(&proof, size), 0);
	EQ(pl_proof_init(&other, size + 1), 0);
	cfg = (struct pl_pump_cfg){
		.src_fd = temp_file(image, size), .size = size, .align = 1, .out_fd = -1,
		.sink = PL_SINK_NONE, .cluster = 64 * KiB, .slots = 4, .readers = 2,
		.proof = &other,
	};
	EQ(pl_pump_new(&p, &cfg), -EINVAL);
	cfg.proof = &proof;
	cfg.sink = PL_SINK_FILE;
	EQ(pl_pump_new(&p, &cfg), -EINVAL);
	cfg.sink = PL_SINK_NONE;
	EQ(pl_pump_new(&p, &cfg), 0);
	EQ(pl_pump_pass(p, ext, 3, 0, &fault), 0);
	same_root(&proof, -1, image);
	pl_pump_free(p);
	pl_proof_fini(&proof);
	pl_proof_fini(&other);
	close(cfg.src_fd);
	free(image);
}

int main(void)
{
	uint64_t sizes[] = { 0, 1, 4095, 4096, 4097, MiB - 1, MiB, MiB + 4096 };
	uint8_t got[16], want[16], data[300];

	fill_random(data, sizeof(data));
	for (size_t len = 0; len <= sizeof(data); len++) {
		pl_hash128(data, len, got);
		pl_hash128_ref(data, len, want);
		OK(!memcmp(got, want, 16));
	}
	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++)
		random_writes(sizes[i], 5);
	random_writes(300 * KiB + 5, 60);
	random_writes(9 * MiB, 10);
	each_bit_counts();
	unknown_blocks();
	sizes_count();
	threads();
	both_ends(12, 0, 2 * MiB + 77);
	both_ends(12, PL_PASS_LIVE, 2 * MiB);
	both_ends(14, 0, 2 * MiB + 5000);
	both_ends(16, PL_PASS_LIVE, 3 * MiB + 1);
	refused();
	empty_image();
	only_read();
	return 0;
}
