/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The archive's way to stdout: as it is, or in stored blocks of gzip's format
 * (RFC 1951, 3.2.4; RFC 1952).
 */
#include <string.h>
#include <unistd.h>

#include "tar.h"

enum { ROOM = 256 << 10, STORED = 65535 };

static char buffer[ROOM]; /* of the file that is read */
static unsigned char block[5 + STORED];
static size_t filled; /* of the stored block */
static bool wrapped;
static uint32_t table[8][256], crc;
static uint32_t total;

static void put(const void *data, size_t bytes)
{
	const char *at = data;
	while (bytes) {
		ssize_t n = write(STDOUT_FILENO, at, bytes);
		if (n < 0)
			fail("cannot write", "the archive");
		at += n;
		bytes -= (size_t)n;
	}
}

static void make_table(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t c = i;
		for (int bit = 0; bit < 8; bit++)
			c = c & 1 ? c >> 1 ^ 0xEDB88320u : c >> 1;
		table[0][i] = c;
	}
	for (uint32_t i = 0; i < 256; i++)
		for (int k = 1; k < 8; k++)
			table[k][i] = table[k - 1][i] >> 8 ^
				      table[0][table[k - 1][i] & 255];
}

static void sum(const unsigned char *p, size_t n)
{
	uint32_t c = ~crc;
	for (; n >= 8; n -= 8, p += 8) {
		uint32_t low =
			c ^ ((uint32_t)p[0] | (uint32_t)p[1] << 8 |
			     (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
		c = table[7][low & 255] ^ table[6][low >> 8 & 255] ^
		    table[5][low >> 16 & 255] ^ table[4][low >> 24] ^
		    table[3][p[4]] ^ table[2][p[5]] ^ table[1][p[6]] ^
		    table[0][p[7]];
	}
	for (; n; n--, p++)
		c = c >> 8 ^ table[0][(c ^ *p) & 255];
	crc = ~c;
}

static void put_block(bool last)
{
	block[0] = last;
	block[1] = filled & 255;
	block[2] = (unsigned char)(filled >> 8);
	block[3] = (unsigned char)~block[1];
	block[4] = (unsigned char)~block[2];
	put(block, 5 + filled);
	filled = 0;
}

void out_begin(bool gzip)
{
	static const unsigned char head[10] = { 0x1f, 0x8b, 8, 0, 0,
						0,    0,    0, 4, 3 };
	wrapped = gzip;
	if (wrapped) {
		make_table();
		put(head, sizeof head);
	}
}

void out_write(const void *data, size_t bytes)
{
	if (!wrapped) {
		put(data, bytes);
		return;
	}
	sum(data, bytes);
	total += (uint32_t)bytes;
	for (const char *at = data; bytes;) {
		size_t n = STORED - filled < bytes ? STORED - filled : bytes;
		memcpy(block + 5 + filled, at, n);
		filled += n;
		at += n;
		bytes -= n;
		if (filled == STORED)
			put_block(false);
	}
}

void out_file(int fd, int64_t at, int64_t bytes, const char *name)
{
	while (bytes) {
		size_t most = bytes < ROOM ? (size_t)bytes : ROOM;
		ssize_t n = pread(fd, buffer, most, at);
		if (n < 0)
			fail("cannot read", name);
		if (!n)
			refuse("it became shorter while it was read", name);
		out_write(buffer, (size_t)n);
		at += n;
		bytes -= n;
	}
}

void out_pad(int64_t bytes)
{
	static const char zeroes[BLOCK];
	if (bytes % BLOCK)
		out_write(zeroes, (size_t)(BLOCK - bytes % BLOCK));
}

void out_end(void)
{
	static const char zeroes[2 * BLOCK]; /* they end an archive */
	out_write(zeroes, sizeof zeroes);
	if (!wrapped)
		return;
	put_block(true);
	unsigned char tail[8];
	for (int i = 0; i < 4; i++) {
		tail[i] = (unsigned char)(crc >> 8 * i);
		tail[4 + i] = (unsigned char)(total >> 8 * i);
	}
	put(tail, sizeof tail);
}
