/* SPDX-License-Identifier: Apache-2.0 */
/*
 * guest - the processes of the container that the migration tests move.
 *
 *   server    TCP 5000: answers each "W SEQ" with "A SEQ" once the row is in a
 *             sqlite database (WAL, synchronous=FULL)
 *   appender  appends one 64-byte record after another to /data/append.log and
 *             fsyncs each; a record carries when its predecessor was durable
 *   load      writes 4 KiB blocks at random places of /data/load.bin, buffered,
 *             at the rate that "L MB_PER_SECOND" set; it remembers how often each
 *             block was written, so "V" finds blocks that the disk lost; and it holds
 *             memory, of which it rewrites some pages all the time, and "V" finds
 *             those that are not as they were written
 *
 * "I" asks how many rows the database has, and whether it is intact.
 *
 * Replies: "A SEQ", "L ok", "V CHECKED WRONG", "I ROWS INTACT", "E TEXT".  Times are CLOCK_REALTIME in
 * nanoseconds: CRIU restores into a time namespace whose CLOCK_MONOTONIC goes on from
 * where it was at the dump, so that clock does not see the freeze.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sqlite3.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
	PORT = 5000,
	RECORD = 64,
	BLOCK = 4096,
	BLOCKS = 32768,			/* 128 MiB */
	CONNECTIONS = 8,
	LINE = 128,
	TICK_MS = 10,
	REWRITES = 8,			/* pages of memory, each tick */
};

/* What the server asks of the load, and the answer. */
struct shared {
	_Atomic uint64_t rate;		/* bytes a second */
	_Atomic uint32_t verify_asked, verify_done;
	_Atomic uint64_t checked, wrong;
};

static struct shared *shared;

static void die(const char *what)
{
	fprintf(stderr, "guest: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_REALTIME, &t);
	return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static void nap_ms(long ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000 };

	nanosleep(&t, NULL);
}

/* ---- appender */

static void appender(long interval_ms)
{
	int fd = open("/data/append.log", O_WRONLY | O_CREAT | O_APPEND, 0644);
	uint64_t durable = 0;

	if (fd < 0)
		die("append.log");
	for (uint64_t seq = 0;; seq++) {
		char record[RECORD + 1];

		snprintf(record, sizeof(record), "%020llu %020llu%*s\n", (unsigned long long)seq,
			 (unsigned long long)durable, RECORD - 42, "");
		if (write(fd, record, RECORD) != RECORD || fsync(fd))
			die("append.log");
		durable = now_ns();
		if (interval_ms)
			nap_ms(interval_ms);
	}
}

/* ---- load */

static uint32_t written[BLOCKS];	/* how often; 0: never */

static void fill(uint64_t *block, uint32_t index, uint32_t generation)
{
	uint64_t x = ((uint64_t)index << 32 | generation) * 0x9e3779b97f4a7c15u | 1;

	for (size_t i = 0; i < BLOCK / sizeof(*block); i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		block[i] = x;
	}
	block[0] = index;
	block[1] = generation;
}

/* Pages of memory, and how often each was rewritten. */
static struct {
	size_t count;
	uint64_t (*pages)[BLOCK / 8];
	uint32_t *rewritten;
} memory;

static void hold(size_t bytes)
{
	memory.count = bytes / BLOCK;
	memory.pages = aligned_alloc(BLOCK, bytes);
	memory.rewritten = calloc(memory.count, sizeof(*memory.rewritten));
	if (!memory.pages || !memory.rewritten)
		die("memory");
	for (size_t i = 0; i < memory.count; i++)
		fill(memory.pages[i], (uint32_t)i, 0);
}

/* The disk's blocks against what was written, read past the page cache; the memory. */
static void verify(void)
{
	static uint64_t seen[BLOCK / 8] __attribute__((aligned(BLOCK))), want[BLOCK / 8];
	uint64_t checked = 0, wrong = 0;
	int fd = open("/data/load.bin", O_RDWR | O_DIRECT);

	if (fd < 0 || fsync(fd))
		die("load.bin");
	for (uint32_t i = 0; i < BLOCKS; i++) {
		if (!written[i])
			continue;
		fill(want, i, written[i]);
		if (pread(fd, seen, BLOCK, (off_t)i * BLOCK) != BLOCK || memcmp(seen, want, BLOCK))
			wrong++;
		checked++;
	}
	close(fd);
	for (size_t i = 0; i < memory.count; i++, checked++) {
		fill(want, (uint32_t)i, memory.rewritten[i]);
		wrong += memcmp(memory.pages[i], want, BLOCK) != 0;
	}
	shared->checked = checked;
	shared->wrong = wrong;
}

static void load(size_t bytes)
{
	static uint64_t block[BLOCK / 8];
	int fd = open("/data/load.bin", O_RDWR | O_CREAT, 0644);
	uint64_t random = 88172645463325252u, debt = 0, next = 0;

	if (fd < 0 || ftruncate(fd, (off_t)BLOCKS * BLOCK))
		die("load.bin");
	if (bytes)
		hold(bytes);
	for (;;) {
		if (shared->verify_asked != shared->verify_done) {
			verify();
			shared->verify_done = shared->verify_asked;
		}
		for (int i = 0; i < REWRITES && memory.count; i++) {
			uint32_t page = next++ % (memory.count / 8);

			fill(memory.pages[page], page, ++memory.rewritten[page]);
		}
		/* A tick's share; what was missed while frozen is not made up for. */
		for (debt += shared->rate * TICK_MS / 1000; debt >= BLOCK; debt -= BLOCK) {
			uint32_t index;

			random ^= random << 13;
			random ^= random >> 7;
			random ^= random << 17;
			index = random % BLOCKS;
			fill(block, index, written[index] + 1);
			if (pwrite(fd, block, BLOCK, (off_t)index * BLOCK) != BLOCK)
				die("load.bin");
			written[index]++;
		}
		nap_ms(TICK_MS);
	}
}

/* ---- server */

static sqlite3 *db;
static sqlite3_stmt *insert;

static void open_database(void)
{
	if (sqlite3_open("/data/ledger.db", &db) ||
	    sqlite3_exec(db, "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
			 "CREATE TABLE IF NOT EXISTS ledger (seq INTEGER PRIMARY KEY, at INTEGER);",
			 NULL, NULL, NULL) ||
	    sqlite3_prepare_v2(db, "INSERT INTO ledger VALUES (?, ?)", -1, &insert, NULL)) {
		fprintf(stderr, "guest: %s\n", sqlite3_errmsg(db));
		exit(1);
	}
}

/* The first column of the first row, as a copy: "" when there is none. */
static void query(const char *sql, char text[LINE])
{
	sqlite3_stmt *statement;

	text[0] = 0;
	if (sqlite3_prepare_v2(db, sql, -1, &statement, NULL))
		return;
	if (sqlite3_step(statement) == SQLITE_ROW)
		snprintf(text, LINE, "%s", (const char *)sqlite3_column_text(statement, 0));
	sqlite3_finalize(statement);
}

static void answer(const char *request, char *reply)
{
	unsigned long long n;

	if (sscanf(request, "W %llu", &n) == 1) {
		sqlite3_bind_int64(insert, 1, (sqlite3_int64)n);
		sqlite3_bind_int64(insert, 2, (sqlite3_int64)now_ns());
		if (sqlite3_step(insert) == SQLITE_DONE)
			snprintf(reply, LINE, "A %llu\n", n);
		else
			snprintf(reply, LINE, "E %.100s\n", sqlite3_errmsg(db));
		sqlite3_reset(insert);
	} else if (sscanf(request, "L %llu", &n) == 1) {
		shared->rate = n * 1000000;
		snprintf(reply, LINE, "L ok\n");
	} else if (request[0] == 'V') {
		for (shared->verify_asked++; shared->verify_asked != shared->verify_done;)
			nap_ms(TICK_MS);
		snprintf(reply, LINE, "V %llu %llu\n", (unsigned long long)shared->checked,
			 (unsigned long long)shared->wrong);
	} else if (request[0] == 'I') {
		char rows[LINE], verdict[LINE];

		query("SELECT count(*) FROM ledger", rows);
		query("PRAGMA integrity_check", verdict);
		snprintf(reply, LINE, "I %llu %d\n", strtoull(rows, NULL, 10),
			 strcmp(verdict, "ok") == 0);
	} else {
		snprintf(reply, LINE, "E unknown request\n");
	}
}

/* One request at a time on each connection: < 0 when it has ended. */
static int serve(int fd)
{
	char request[LINE] = "", reply[LINE];
	size_t have = 0;

	do {
		ssize_t n = read(fd, request + have, LINE - 1 - have);

		if (n <= 0)
			return -1;
		have += (size_t)n;
		if (have == LINE - 1)
			return -1;
	} while (request[have - 1] != '\n');
	answer(request, reply);
	return write(fd, reply, strlen(reply)) == (ssize_t)strlen(reply) ? 0 : -1;
}

static void server(void)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	struct pollfd fds[1 + CONNECTIONS];
	int count = 1, one = 1;

	open_database();
	fds[0].fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	fds[0].events = POLLIN;
	setsockopt(fds[0].fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fds[0].fd, (struct sockaddr *)&at, sizeof(at)) || listen(fds[0].fd, CONNECTIONS))
		die("listen");
	for (;;) {
		if (poll(fds, (nfds_t)count, -1) < 0)
			continue;
		for (int i = count - 1; i > 0; i--) {
			if (fds[i].revents && serve(fds[i].fd) < 0) {
				close(fds[i].fd);
				fds[i] = fds[--count];
			}
		}
		if (fds[0].revents && count <= CONNECTIONS) {
			int fd = accept4(fds[0].fd, NULL, NULL, SOCK_CLOEXEC);

			if (fd < 0)
				continue;
			setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
			fds[count++] = (struct pollfd){ .fd = fd, .events = POLLIN };
		}
	}
}

/* guest APPEND_INTERVAL_MS [MEMORY_MIB]: runs until one of its processes ends. */
int main(int argc, char **argv)
{
	long interval_ms = argc > 1 ? atol(argv[1]) : 5;
	size_t bytes = argc > 2 ? (size_t)atol(argv[2]) << 20 : 0;

	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
		      -1, 0);
	if (shared == MAP_FAILED)
		die("mmap");
	for (int i = 0; i < 3; i++) {
		pid_t pid = fork();

		if (pid < 0)
			die("fork");
		if (pid == 0) {
			if (i == 0)
				server();
			else if (i == 1)
				appender(interval_ms);
			else
				load(bytes);
			exit(1);
		}
	}
	/* As process 1 of its namespace: that its end ends the others. */
	wait(NULL);
	return 1;
}
