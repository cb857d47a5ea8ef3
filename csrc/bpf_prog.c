/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * bpf_prog.c - the program that runs in the kernel at a block tracepoint.
 *
 * Two licences, unlike the rest: what is assembled here is loaded into the
 * kernel and calls a helper that is open to GPL programs only, so it
 * declares itself "GPL" there.  This file is what that program is made
 * from, and may be used under the GPL, version 2, as well.
 *
 * The program, for one request or bio:
 *
 *	op not a write kind, no bytes, another disk	-> nothing
 *	sector beyond any disk				-> everything += 1
 *	clip to the tracked range, mark its granules	-> bitmap
 *	add the sectors, unclipped			-> sums
 *
 * Marks come before sums: a reader that finds the sums equal to the kernel's
 * own accounting must find every mark too.
 *
 * A discard may span 4 GiB, 16384 words of the finest bitmap.  A loop over
 * them costs the verifier up to 0.7 s at load, since it walks every turn.
 * Instead, bpf_probe_read_kernel() copies from an area of the map that
 * user space has filled with ones: no loop, nothing to walk.  It zeroes
 * its destination when it fails, hence the check of its result.
 */
#include "bpf_internal.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

const char pl_bpf_licence[] = "GPL";

#define OP_MASK 0xff	/* REQ_OP_MASK */
#define OP_DISCARD 3	/* REQ_OP_DISCARD */
#define OP_WRITE_ZEROES 9	/* REQ_OP_WRITE_ZEROES */
#define MAX_SECTOR_SHIFT 54
#define SECTOR_SHIFT 9

/*
 * The fetching atomics are full barriers everywhere; without fetch they
 * order nothing on arm64 and others.  On x86 every locked instruction is a
 * barrier, and "or" with fetch would become a compare-and-exchange loop.
 */
#ifdef __x86_64__
#define ATOMIC_ORDER 0
#else
#define ATOMIC_ORDER BPF_FETCH
#endif

enum { R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 };

_Static_assert(sizeof(struct bpf_insn) == 8, "the kernel's");

enum label { L_LOW, L_HIGH, L_MANY, L_SUM, L_DISCARD,
	     L_EVERYTHING, L_OUT, L_COUNT };

struct as {
	struct pl_bpf_code *code;
	int at[L_COUNT];			/* where a label stands */
	signed char want[PL_BPF_MAX_INSN];	/* label + 1 of a jump */
	int err;
};

static void emit(struct as *a, uint8_t code, int dst, int src, int off, int32_t imm)
{
	if (a->code->n >= PL_BPF_MAX_INSN) {
		a->err = -E2BIG;
		return;
	}
	a->code->insn[a->code->n++] = (struct bpf_insn){
		.code = code, .dst_reg = (unsigned)dst & 15u,
		.src_reg = (unsigned)src & 15u, .off = (int16_t)off, .imm = imm,
	};
}

/* dst = dst `op` imm / src, on 64 bits */
static void alu_i(struct as *a, int op, int dst, int32_t imm)
{
	emit(a, (uint8_t)(BPF_ALU64 | BPF_K | op), dst, 0, 0, imm);
}

static void alu(struct as *a, int op, int dst, int src)
{
	emit(a, (uint8_t)(BPF_ALU64 | BPF_X | op), dst, src, 0, 0);
}

/* dst = *(size *)(src + off) */
static void load(struct as *a, int size, int dst, int src, uint32_t off)
{
	if (off > INT16_MAX)
		a->err = -ERANGE;
	emit(a, (uint8_t)(BPF_LDX | BPF_MEM | size), dst, src, (int)off, 0);
}

/* atomically *(u64 *)(dst + off) `op`= src; src is lost */
static void atomic(struct as *a, int op, int dst, int off, int src)
{
	emit(a, BPF_STX | BPF_ATOMIC | BPF_DW, dst, src, off, op | ATOMIC_ORDER);
}

static void imm64(struct as *a, int dst, uint64_t v)
{
	emit(a, BPF_LD | BPF_IMM | BPF_DW, dst, 0, 0, (int32_t)(uint32_t)v);
	emit(a, 0, 0, 0, 0, (int32_t)(uint32_t)(v >> 32));
}

/* dst = address of the map's value + off */
static void map_value(struct as *a, int dst, int map_fd, uint32_t off)
{
	emit(a, BPF_LD | BPF_IMM | BPF_DW, dst, BPF_PSEUDO_MAP_VALUE, 0, map_fd);
	emit(a, 0, 0, 0, 0, (int32_t)off);
}

static void want(struct as *a, enum label l)
{
	if (a->code->n < PL_BPF_MAX_INSN)
		a->want[a->code->n] = (signed char)(l + 1);
}

static void jump(struct as *a, enum label l)
{
	want(a, l);
	emit(a, BPF_JMP | BPF_JA, 0, 0, 0, 0);
}

/* to l if dst `op` imm / src; comparisons are unsigned, on 64 bits */
static void jump_i(struct as *a, int op, int dst, int32_t imm, enum label l)
{
	want(a, l);
	emit(a, (uint8_t)(BPF_JMP | BPF_K | op), dst, 0, 0, imm);
}

static void jump_r(struct as *a, int op, int dst, int src, enum label l)
{
	want(a, l);
	emit(a, (uint8_t)(BPF_JMP | BPF_X | op), dst, src, 0, 0);
}

static void label(struct as *a, enum label l)
{
	a->at[l] = (int)a->code->n;
}

static void patch(struct as *a)
{
	for (unsigned i = 0; i < a->code->n; i++) {
		int off;

		if (!a->want[i])
			continue;
		off = a->at[a->want[i] - 1] - (int)i - 1;
		assert(off >= 0);	/* forward: the verifier has no loop to walk */
		a->code->insn[i].off = (int16_t)off;
	}
}

/* R6 = first sector, R7 = bytes, R8 = op; leaves unless it is of interest. */
static void fetch_event(struct as *a, const struct pl_bpf_target *t,
			const struct pl_bpf_object *o)
{
	load(a, BPF_DW, R6, R1, o->arg * 8);
	load(a, BPF_W, R8, R6, o->off_op);
	alu_i(a, BPF_AND, R8, OP_MASK);
	/* Every op that changes data is odd, as op_is_write() has it. */
	alu(a, BPF_MOV, R2, R8);
	alu_i(a, BPF_AND, R2, 1);
	jump_i(a, BPF_JEQ, R2, 0, L_OUT);

	if (o->bytes_arg >= 0) {
		load(a, BPF_DW, R7, R1, (uint32_t)o->bytes_arg * 8);
		alu_i(a, BPF_LSH, R7, 32);	/* an unsigned int */
		alu_i(a, BPF_RSH, R7, 32);
	} else {
		load(a, BPF_W, R7, R6, o->off_bytes);
	}
	/* Before the sector is looked at: a flush has a senseless one. */
	jump_i(a, BPF_JEQ, R7, 0, L_OUT);

	/* A NULL on the way reads as zeroes, and no disk has major 0. */
	alu(a, BPF_MOV, R1, R6);
	for (unsigned i = 0; i < o->npath; i++)
		load(a, BPF_DW, R1, R1, o->path[i]);
	load(a, BPF_W, R2, R1, o->off_major);
	jump_i(a, BPF_JNE, R2, (int32_t)t->major, L_OUT);
	load(a, BPF_W, R2, R1, o->off_minor);
	jump_i(a, BPF_JNE, R2, (int32_t)t->minor, L_OUT);

	/*
	 * Commands passed through (SG_IO) have sector -1: what they write is
	 * anybody's guess.  The kernel does not account them either.
	 */
	load(a, BPF_DW, R6, R6, o->off_sector);
	alu(a, BPF_MOV, R1, R6);
	alu_i(a, BPF_RSH, R1, MAX_SECTOR_SHIFT);
	jump_i(a, BPF_JNE, R1, 0, L_EVERYTHING);
}

/* R6 = first and R9 = last granule, or on to the sums if there is none. */
static void clip(struct as *a, const struct pl_bpf_target *t, uint32_t shift)
{
	alu(a, BPF_MOV, R9, R7);
	alu_i(a, BPF_ADD, R9, (1 << SECTOR_SHIFT) - 1);
	alu_i(a, BPF_RSH, R9, SECTOR_SHIFT);
	alu(a, BPF_ADD, R9, R6);

	imm64(a, R1, t->first);
	jump_r(a, BPF_JGE, R6, R1, L_LOW);
	alu(a, BPF_MOV, R6, R1);
	label(a, L_LOW);
	imm64(a, R2, t->end);
	jump_r(a, BPF_JLE, R9, R2, L_HIGH);
	alu(a, BPF_MOV, R9, R2);
	label(a, L_HIGH);
	jump_r(a, BPF_JGE, R6, R9, L_SUM);

	alu(a, BPF_SUB, R6, R1);
	alu(a, BPF_SUB, R9, R1);
	alu_i(a, BPF_SUB, R9, 1);
	alu_i(a, BPF_RSH, R6, (int32_t)shift - SECTOR_SHIFT);
	alu_i(a, BPF_RSH, R9, (int32_t)shift - SECTOR_SHIFT);
}

/* Set the bits R6 ... R9. */
static void mark(struct as *a, const struct pl_bpf_target *t,
		 const struct pl_bpf_marks *m)
{
	/* R3, R4 = first and last word.  Always in bounds; for the verifier. */
	alu(a, BPF_MOV, R3, R6);
	alu_i(a, BPF_RSH, R3, 6);
	jump_i(a, BPF_JGE, R3, (int32_t)m->nwords, L_EVERYTHING);
	alu(a, BPF_MOV, R4, R9);
	alu_i(a, BPF_RSH, R4, 6);
	jump_i(a, BPF_JGE, R4, (int32_t)m->nwords, L_EVERYTHING);

	/* R1, R2 = masks of the first and of the last word */
	alu_i(a, BPF_AND, R6, 63);
	alu_i(a, BPF_MOV, R1, -1);
	alu(a, BPF_LSH, R1, R6);
	alu_i(a, BPF_AND, R9, 63);
	alu_i(a, BPF_XOR, R9, 63);
	alu_i(a, BPF_MOV, R2, -1);
	alu(a, BPF_RSH, R2, R9);

	/* R5 = address of the first word */
	map_value(a, R5, t->map_fd, m->off);
	alu(a, BPF_MOV, R0, R3);
	alu_i(a, BPF_LSH, R0, 3);
	alu(a, BPF_ADD, R5, R0);
	jump_r(a, BPF_JNE, R3, R4, L_MANY);
	alu(a, BPF_AND, R1, R2);
	if (m->look_first) {
		load(a, BPF_DW, R2, R5, 0);
		alu(a, BPF_AND, R2, R1);
		jump_r(a, BPF_JEQ, R2, R1, L_SUM);
	}
	atomic(a, BPF_OR, R5, 0, R1);
	jump(a, L_SUM);

	label(a, L_MANY);
	atomic(a, BPF_OR, R5, 0, R1);
	map_value(a, R1, t->map_fd, m->off);
	alu(a, BPF_MOV, R0, R4);
	alu_i(a, BPF_LSH, R0, 3);
	alu(a, BPF_ADD, R1, R0);
	atomic(a, BPF_OR, R1, 0, R2);

	/* The words between, if any */
	alu(a, BPF_SUB, R4, R3);
	alu_i(a, BPF_SUB, R4, 1);
	jump_i(a, BPF_JEQ, R4, 0, L_SUM);
	jump_i(a, BPF_JGT, R4, (int32_t)t->ones_words, L_EVERYTHING);
	alu(a, BPF_MOV, R1, R5);
	alu_i(a, BPF_ADD, R1, 8);
	alu(a, BPF_MOV, R2, R4);
	alu_i(a, BPF_LSH, R2, 3);
	map_value(a, R3, t->map_fd, t->ones_off);
	emit(a, BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_probe_read_kernel);
	jump_i(a, BPF_JNE, R0, 0, L_EVERYTHING);
}

static void sum(struct as *a, const struct pl_bpf_target *t,
		const struct pl_bpf_marks *m)
{
	alu_i(a, BPF_RSH, R7, SECTOR_SHIFT);
	emit(a, BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_get_smp_processor_id);
	alu_i(a, BPF_AND, R0, PL_BPF_LANES - 1);
	alu_i(a, BPF_LSH, R0, PL_BPF_LANE_SHIFT);
	map_value(a, R1, t->map_fd, m->lanes);
	alu(a, BPF_ADD, R1, R0);
	jump_i(a, BPF_JEQ, R8, OP_DISCARD, L_DISCARD);
	if (t->zeroes_with_discards)
		jump_i(a, BPF_JEQ, R8, OP_WRITE_ZEROES, L_DISCARD);
	atomic(a, BPF_ADD, R1, offsetof(struct pl_bpf_lane, write), R7);
	jump(a, L_OUT);
	label(a, L_DISCARD);
	atomic(a, BPF_ADD, R1, offsetof(struct pl_bpf_lane, discard), R7);
}

uint32_t pl_bpf_ones_words(uint32_t shift)
{
	/* Bytes of an event are a u32, plus one word for bad alignment. */
	return (uint32_t)((1ull << 32 >> shift) / 64) + 1;
}

int pl_bpf_assemble(struct pl_bpf_code *code, const struct pl_bpf_target *t,
		    const struct pl_bpf_object *o,
		    const struct pl_bpf_marks *m)
{
	struct as a = { .code = code };

	code->n = 0;
	fetch_event(&a, t, o);
	clip(&a, t, m->shift);
	mark(&a, t, m);
	label(&a, L_SUM);
	sum(&a, t, m);
	jump(&a, L_OUT);

	label(&a, L_EVERYTHING);
	map_value(&a, R1, t->map_fd, offsetof(struct pl_bpf_page, everything));
	alu_i(&a, BPF_MOV, R2, 1);
	atomic(&a, BPF_ADD, R1, 0, R2);

	label(&a, L_OUT);
	alu_i(&a, BPF_MOV, R0, 0);
	emit(&a, BPF_JMP | BPF_EXIT, 0, 0, 0, 0);
	patch(&a);
	return a.err;
}
