/* SPDX-License-Identifier: Apache-2.0 */
/* Bitmaps against a model with one byte per granule. */
#define _GNU_SOURCE
#include "testing.h"

static bool bit(const struct pl_bitmap *b, uint64_t i)
{
	return b->word[i / 64] >> (i % 64) & 1;
}

static void same(const struct pl_bitmap *b, const uint8_t *model)
{
	struct pl_extent run = { 0, 0 };
	uint64_t count = 0, bytes = 0, at = 0;

	for (uint64_t i = 0; i < b->nbits; i++) {
		uint64_t end = (i + 1) << b->shift;

		if (bit(b, i) != model[i])
			DIE("bit %llu", (unsigned long long)i);
		if (!model[i])
			continue;
		count++;
		bytes += (end > b->size ? b->size : end) - (i << b->shift);
	}
	/* Nothing is ever set behind the last granule. */
	for (uint64_t i = b->nbits; i < b->nwords * 64; i++)
		OK(!bit(b, i));
	EQ(pl_bitmap_count(b), count);
	EQ(pl_bitmap_bytes(b), bytes);
	while (pl_bitmap_next(b, run.end, &run)) {
		uint64_t first = run.start >> b->shift;
		uint64_t last = (run.end - 1) >> b->shift;

		OK(run.start < run.end && run.end <= b->size && run.start >= at);
		OK(first == 0 || !model[first - 1]);
		OK(last + 1 == b->nbits || !model[last + 1]);
		for (uint64_t i = first; i <= last; i++) {
			OK(model[i]);
			count--;
		}
		at = run.end;
	}
	EQ(count, 0);
}

static void model_range(const struct pl_bitmap *b, uint8_t *model,
			uint64_t start, uint64_t end, bool set)
{
	for (uint64_t i = 0; i < b->nbits; i++) {
		uint64_t g0 = i << b->shift, g1 = (i + 1) << b->shift;

		if (g1 > b->size)
			g1 = b->size;
		if (set ? start < end && start < g1 && end > g0 :
			  start < end && start <= g0 && end >= g1)
			model[i] = set;
	}
}

static void random_against_model(uint64_t size, uint32_t shift)
{
	struct pl_bitmap b;
	uint8_t *model;

	EQ(pl_bitmap_init(&b, size, shift), 0);
	model = must_alloc(b.nbits);
	same(&b, model);
	for (int i = 0; i < 150; i++) {
		uint64_t start = rnd(size + 3), end = rnd(size + size / 2 + 2);
		bool set = rnd(3) > 0;

		if (rnd(4) == 0)
			end = start + rnd(3 << shift);
		if (rnd(20) == 0) {
			pl_bitmap_zero(&b);
			memset(model, 0, b.nbits);
		}
		if (set)
			pl_bitmap_set(&b, start, end);
		else
			pl_bitmap_clear(&b, start, end);
		model_range(&b, model, start, end, set);
		same(&b, model);
	}
	free(model);
	pl_bitmap_fini(&b);
}

static void edges(void)
{
	struct pl_bitmap b;
	struct pl_extent run;

	EQ(pl_bitmap_init(&b, 1, 8), -EINVAL);
	EQ(pl_bitmap_init(&b, 1, 41), -EINVAL);
	EQ(pl_bitmap_init(&b, 1ull << 63, 12), -EINVAL);

	EQ(pl_bitmap_init(&b, 0, 12), 0);	/* an empty source */
	pl_bitmap_set(&b, 0, UINT64_MAX);
	pl_bitmap_clear(&b, 0, UINT64_MAX);
	pl_bitmap_zero(&b);
	EQ(pl_bitmap_count(&b), 0);
	EQ(pl_bitmap_bytes(&b), 0);
	EQ(pl_bitmap_next(&b, 0, &run), 0);
	pl_bitmap_fini(&b);
	pl_bitmap_fini(&b);
	pl_bitmap_fini(NULL);

	/* Exactly 64 granules: the last word is full. */
	EQ(pl_bitmap_init(&b, 64 * 4096, 12), 0);
	pl_bitmap_set(&b, 0, 64 * 4096);
	EQ(pl_bitmap_count(&b), 64);
	EQ(pl_bitmap_next(&b, 0, &run), 1);
	EQ(run.start, 0);
	EQ(run.end, 64 * 4096);
	EQ(pl_bitmap_next(&b, 64 * 4096, &run), 0);
	pl_bitmap_clear(&b, 63 * 4096, UINT64_MAX);
	EQ(pl_bitmap_count(&b), 63);
	pl_bitmap_clear(&b, 1, 4096);		/* not a whole granule */
	EQ(pl_bitmap_count(&b), 63);
	pl_bitmap_fini(&b);

	/* `from` in the middle of a granule. */
	EQ(pl_bitmap_init(&b, 3 * 4096 + 5, 12), 0);
	pl_bitmap_set(&b, 3 * 4096 + 4, 3 * 4096 + 5);
	EQ(pl_bitmap_bytes(&b), 5);
	EQ(pl_bitmap_next(&b, 3 * 4096 + 2, &run), 1);
	EQ(run.start, 3 * 4096 + 2);
	EQ(run.end, 3 * 4096 + 5);
	pl_bitmap_clear(&b, 3 * 4096, 3 * 4096 + 5);	/* partial, but whole */
	EQ(pl_bitmap_count(&b), 0);
	pl_bitmap_fini(&b);

	/* An extent of exactly 4 GiB keeps its length (an int would not). */
	EQ(pl_bitmap_init(&b, 9 * GiB, 12), 0);
	pl_bitmap_set(&b, 2 * GiB, 6 * GiB);
	EQ(pl_bitmap_bytes(&b), 4 * GiB);
	EQ(pl_bitmap_next(&b, 0, &run), 1);
	EQ(run.start, 2 * GiB);
	EQ(run.end - run.start, 4 * GiB);
	pl_bitmap_fini(&b);

	/* The largest source. */
	EQ(pl_bitmap_init(&b, INT64_MAX, 40), 0);
	pl_bitmap_set(&b, 0, UINT64_MAX);
	EQ(pl_bitmap_bytes(&b), INT64_MAX);
	EQ(pl_bitmap_next(&b, INT64_MAX - 1, &run), 1);
	EQ(run.end, INT64_MAX);
	pl_bitmap_fini(&b);
}

static void or_of_two(void)
{
	struct pl_bitmap fine, coarse, other;
	struct pl_extent run;

	EQ(pl_bitmap_init(&fine, MiB + 100, 12), 0);
	EQ(pl_bitmap_init(&coarse, MiB + 100, 16), 0);
	EQ(pl_bitmap_init(&other, MiB, 12), 0);
	EQ(pl_bitmap_or(&fine, &coarse), -EINVAL);
	EQ(pl_bitmap_or(&fine, &other), -EINVAL);
	EQ(pl_bitmap_or_scaled(&fine, &other), -EINVAL);
	pl_bitmap_set(&fine, 70000, 70001);
	pl_bitmap_set(&fine, MiB + 99, MiB + 100);
	EQ(pl_bitmap_or_scaled(&coarse, &fine), 0);
	EQ(pl_bitmap_count(&coarse), 2);
	EQ(pl_bitmap_bytes(&coarse), 65536 + 100);
	EQ(pl_bitmap_or_scaled(&fine, &coarse), 0);
	EQ(pl_bitmap_bytes(&fine), 65536 + 100);
	EQ(pl_bitmap_next(&fine, 0, &run), 1);
	EQ(run.start, 65536);
	EQ(run.end, 131072);
	pl_bitmap_fini(&fine);
	pl_bitmap_fini(&coarse);
	pl_bitmap_fini(&other);
}

int main(void)
{
	static const uint64_t sizes[] = {
		1, 4, 512, 4095, 4096, 4097, 63 * 4096, 64 * 4096,
		64 * 4096 + 1, 65 * 4096 - 1, 300 * 4096 + 77, 1000 * 4096,
	};

	edges();
	or_of_two();
	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++)
		for (uint32_t shift = 9; shift <= 16; shift += shift == 9 ? 3 : 4)
			random_against_model(sizes[i], shift);
	return 0;
}
