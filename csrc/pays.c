/* SPDX-License-Identifier: Apache-2.0 */
/* See pays.h. */
#include "clock.h"
#include "pays.h"

/* A window: as short as a rate can be measured in, through what buffers there are. */
#define WINDOW_NS (100u * PL_NS_PER_MS)
#define WINDOW_BYTES (1u << 20)
#define LONGEST_NS (1u * PL_NS_PER_S)	/* on a line of less than 1 MiB/s */
#define GAIN 1.05		/* less is noise */
#define FIRST_PAUSE 4u
#define LONGEST_PAUSE 64u
/* While our CPU is the bottleneck nothing shows that the line became faster: so the
   rate without compression is measured anew after so many windows. */
#define LONGEST_TRUST 32u

static void turn(struct pl_pays *p, bool on)
{
	p->on = on;
	p->proven = false;
	p->age = 0;
}

/* Off: the line is full of plain data, or something else is slower. */
static void judge_plain(struct pl_pays *p, double rate)
{
	if (p->pause)
		p->pause--;
	if (!p->waits) {
		p->age = 0;
		return;
	}
	p->plain_rate = rate;
	/* In the first such window the buffers on the way may have been filled. */
	if (p->age >= 2 && !p->pause)
		turn(p, true);
}

static void judge_packed(struct pl_pays *p, double rate)
{
	/* Data that cannot be compressed prove nothing, and trying costs little. */
	if (p->now.packed_bytes < p->now.bytes / 8)
		return;
	/* The first window begins with blocks that were read before. */
	if (p->age < 2)
		return;
	if (rate >= p->plain_rate * GAIN) {
		p->proven = true;
		p->backoff = 0;
		if (p->age >= LONGEST_TRUST && !p->waits)
			turn(p, false);
		return;
	}
	p->backoff = p->backoff ? p->backoff * 2 : FIRST_PAUSE;
	if (p->backoff > LONGEST_PAUSE)
		p->backoff = LONGEST_PAUSE;
	p->pause = p->backoff;
	turn(p, false);
}

void pl_pays_add(struct pl_pays *p, const struct pl_while *w)
{
	double rate;

	p->now.ns += w->ns;
	p->now.waited_ns += w->waited_ns;
	p->now.bytes += w->bytes;
	p->now.packed_bytes += w->packed_bytes;
	if (p->now.ns < WINDOW_NS ||
	    (p->now.bytes < WINDOW_BYTES && p->now.ns < LONGEST_NS))
		return;
	rate = (double)p->now.bytes * PL_NS_PER_S / (double)p->now.ns;
	p->waits = p->now.waited_ns >= p->now.ns / 2;
	p->age++;
	if (p->on)
		judge_packed(p, rate);
	else
		judge_plain(p, rate);
	p->now = (struct pl_while){ 0 };
}
