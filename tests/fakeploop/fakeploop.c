/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fakeploop - LD_PRELOAD library that lets a process believe that a loop
 * device (or a plain file) is an OpenVZ ploop device.  See README.md for the
 * environment variables that configure it.
 *
 * How: names are rewritten (/dev/ploopN, /sys/block/ploopN, the mount
 * tables) on their way into libc, and the ploop driver's ioctls are answered
 * here.  The sysfs files are real files in a small directory, made when a
 * faked name is used for the first time, so every libc call works on them.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
#ifdef FAKEPLOOP_BPF
#include "pl.h"
#endif

/* The libc functions below are defined here: no fortified inline twins. */
#ifdef _FORTIFY_SOURCE
#error "compile with -U_FORTIFY_SOURCE"
#endif

#define API __attribute__((visibility("default")))
#define PLOOP_MAJOR 182u
#define MAX_FD 4096

struct extent {
	uint64_t start, end;
};
#define P_TRACK_INIT	_IOR('P', 6, struct extent)
#define P_TRACK_STOP	_IO('P', 7)
#define P_TRACK_ABORT	_IO('P', 8)
#define P_TRACK_SETPOS	_IOW('P', 9, uint64_t)
#define P_TRACK_READ	_IOR('P', 10, struct extent)
#define P_SYNC		_IO('P', 11)
#define P_MAINT		_IOC(_IOC_WRITE, 'P', 19, 16)	/* asked before a copy */
#define P_FREEZE	_IO('P', 32)
#define P_THAW		_IO('P', 33)

/* REAL(open)(...) calls the next definition of a libc function. */
#define REAL(name) ({							\
	static __typeof__(&name) fn_;					\
	if (!fn_)							\
		fn_ = (__typeof__(&name))dlsym(RTLD_NEXT, #name);	\
	fn_; })

/* ------------------------------------------------------------ settings */

static struct {
	const char *dev;	/* /dev/ploop0; NULL: everything passes through */
	const char *name;	/* ploop0 */
	unsigned minor;
	const char *backing;
	bool is_blk;
	dev_t rdev;		/* of the backing, when is_blk */
	char disk[64];		/* loop3, when is_blk */
	uint64_t dev_size;
	char image[PATH_MAX];
	uint64_t shift;		/* image position of the device's byte 0 */
	const char *format, *mount, *script;
	bool bpf, log_io, own_dir;
	uint64_t block, grain;
	int log_fd;
	char dir[PATH_MAX - 64];
	bool dir_made;
} cfg;

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned char is_dev_fd[MAX_FD], is_image_fd[MAX_FD];

static void slurp(char *buf, size_t len, const char *fmt, ...)
{
	char path[PATH_MAX];
	va_list ap;
	int fd;
	ssize_t n = 0;

	va_start(ap, fmt);
	vsnprintf(path, sizeof(path), fmt, ap);
	va_end(ap);
	fd = REAL(open)(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		n = read(fd, buf, len - 1);
		REAL(close)(fd);
	}
	if (n < 0)
		n = 0;
	while (n > 0 && buf[n - 1] == '\n')
		n--;
	buf[n] = 0;
}

static void init(void)
{
	const char *e;
	struct stat st;

	cfg.log_fd = -1;
	cfg.backing = getenv("FAKEPLOOP_BACKING");
	if (!cfg.backing)
		return;
	e = getenv("FAKEPLOOP_DEV");
	if (!e)
		e = "/dev/ploop0";
	cfg.name = strrchr(e, '/') ? strrchr(e, '/') + 1 : e;
	cfg.minor = (unsigned)atoi(cfg.name + strcspn(cfg.name, "0123456789")) * 16;
	cfg.mount = getenv("FAKEPLOOP_MOUNT");
	cfg.format = getenv("FAKEPLOOP_FORMAT");
	if (!cfg.format)
		cfg.format = "raw";
	cfg.log_io = getenv("FAKEPLOOP_LOG_IO") != NULL;
	cfg.block = (e = getenv("FAKEPLOOP_BLOCK")) ? strtoull(e, NULL, 0) : 2048;
	cfg.grain = (e = getenv("FAKEPLOOP_TRACK_GRAIN")) ?
		strtoull(e, NULL, 0) : cfg.block * 512;
	e = getenv("FAKEPLOOP_TRACK");
	if (e && !strncmp(e, "script:", 7))
		cfg.script = e + 7;
	else if (e && !strcmp(e, "bpf"))
		cfg.bpf = true;

	if (!REAL(stat)(cfg.backing, &st) && S_ISBLK(st.st_mode)) {
		char link[64], to[PATH_MAX] = "", num[32];
		ssize_t n;

		cfg.is_blk = true;
		cfg.rdev = st.st_rdev;
		snprintf(link, sizeof(link), "/sys/dev/block/%u:%u",
			 major(st.st_rdev), minor(st.st_rdev));
		n = REAL(readlink)(link, to, sizeof(to) - 1);
		if (n > 0 && strrchr(to, '/'))
			snprintf(cfg.disk, sizeof(cfg.disk), "%s",
				 strrchr(to, '/') + 1);
		slurp(num, sizeof(num), "/sys/block/%s/size", cfg.disk);
		cfg.dev_size = strtoull(num, NULL, 10) * 512;
		slurp(num, sizeof(num), "/sys/block/%s/loop/offset", cfg.disk);
		cfg.shift = strtoull(num, NULL, 10);
		slurp(cfg.image, sizeof(cfg.image),
		      "/sys/block/%s/loop/backing_file", cfg.disk);
	} else {
		cfg.dev_size = (uint64_t)st.st_size;
		if (!REAL(realpath)(cfg.backing, cfg.image))
			snprintf(cfg.image, sizeof(cfg.image), "%s", cfg.backing);
	}
	if ((e = getenv("FAKEPLOOP_IMAGE")))
		snprintf(cfg.image, sizeof(cfg.image), "%s", e);

	if ((e = getenv("FAKEPLOOP_LOG"))) {
		int fd = REAL(open)(e, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);

		/* Out of the way: low descriptor numbers stay as they were. */
		cfg.log_fd = fcntl(fd, F_DUPFD_CLOEXEC, 900);
		REAL(close)(fd);
	}
	e = getenv("FAKEPLOOP_DEV");
	cfg.dev = e ? e : "/dev/ploop0";
}

/* The C tool prints stale errnos: nothing here may add its own. */
static bool on(void)
{
	int err = errno;

	pthread_once(&once, init);
	errno = err;
	return cfg.dev != NULL;
}

static void say(const char *fmt, ...)
{
	char line[512];
	struct timespec ts;
	va_list ap;
	int n, err = errno;

	if (cfg.log_fd < 0)
		return;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	n = snprintf(line, sizeof(line), "%lld.%06ld ", (long long)ts.tv_sec,
		     ts.tv_nsec / 1000);
	va_start(ap, fmt);
	n += vsnprintf(line + n, sizeof(line) - (size_t)n - 1, fmt, ap);
	va_end(ap);
	if (n > (int)sizeof(line) - 2)
		n = sizeof(line) - 2;
	line[n++] = '\n';
	(void)!REAL(write)(cfg.log_fd, line, (size_t)n);
	errno = err;
}

/* -------------------------------------------------------- forced failures
 * FAKEPLOOP_FAIL=OP:ERRNO[:NTH][,...]; ERRNO is a name, a number, or 0
 * (a read that returns 0 bytes).  Returns -1: carry on.
 */
static int fail(const char *op)
{
	static const struct { const char *name; int no; } names[] = {
		{"EIO", EIO}, {"EBUSY", EBUSY}, {"EAGAIN", EAGAIN}, {"EINVAL", EINVAL},
		{"ENOSPC", ENOSPC}, {"EPERM", EPERM}, {"EACCES", EACCES},
		{"ENOENT", ENOENT}, {"ENOTTY", ENOTTY}, {"EINTR", EINTR},
		{"EPIPE", EPIPE}, {"ENOMEM", ENOMEM}, {"EFBIG", EFBIG},
		{"EOPNOTSUPP", EOPNOTSUPP}, {"ENXIO", ENXIO}, {"EROFS", EROFS},
	};
	static unsigned seen[16];
	const char *spec = getenv("FAKEPLOOP_FAIL");
	char want[32], err[32];
	int result = -1;

	for (unsigned i = 0; spec && *spec && i < 16; i++) {
		unsigned nth = 0, k;
		int no = -1;

		if (sscanf(spec, "%31[^:,]:%31[^:,]:%u", want, err, &nth) >= 2 &&
		    !strcmp(want, op) &&
		    (++seen[i] == nth || nth == 0)) {
			for (k = 0; k < sizeof(names) / sizeof(names[0]); k++)
				if (!strcmp(err, names[k].name))
					no = names[k].no;
			result = no >= 0 ? no : atoi(err);
			say("FAIL %s %s", op, err);
		}
		spec = strchr(spec, ',');
		if (spec)
			spec++;
	}
	return result;
}

#define FAIL_OR_GO(op) do {				\
	int f_ = fail(op);				\
	if (f_ >= 0) {					\
		errno = f_;				\
		return -1;				\
	} } while (0)

/* --------------------------------------------------- names and their files */

static void put(const char *rel, const char *fmt, ...)
{
	char path[PATH_MAX], text[PATH_MAX + 64];
	va_list ap;
	int fd, n;

	va_start(ap, fmt);
	n = vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	snprintf(path, sizeof(path), "%s/%s", cfg.dir, rel);
	for (char *p = path + strlen(cfg.dir) + 1; (p = strchr(p, '/')); p++) {
		*p = 0;
		mkdir(path, 0755);
		*p = '/';
	}
	fd = REAL(open)(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0 || REAL(write)(fd, text, (size_t)n) != n) {
		fprintf(stderr, "fakeploop: %s: %m\n", path);
		abort();
	}
	REAL(close)(fd);
}

/* The first touch of a faked name: children need no preload any more. */
static void make_tree(void)
{
	const char *e = getenv("FAKEPLOOP_DIR");

	if (cfg.dir_made)
		return;
	cfg.dir_made = true;
	unsetenv("LD_PRELOAD");
	if (e) {
		snprintf(cfg.dir, sizeof(cfg.dir), "%s", e);
		mkdir(cfg.dir, 0755);
	} else {
		strcpy(cfg.dir, "/tmp/fakeploop.XXXXXX");
		if (!mkdtemp(cfg.dir)) {
			fprintf(stderr, "fakeploop: mkdtemp: %m\n");
			abort();
		}
		cfg.own_dir = true;
	}
	put("sys/dev", "%u:%u\n", PLOOP_MAJOR, cfg.minor);
	put("sys/size", "%llu\n", (unsigned long long)cfg.dev_size / 512);
	put("sys/ro", "0\n");
	put("sys/pstate/top", "0\n");
	put("sys/pstate/block_size", "%llu\n", (unsigned long long)cfg.block);
	put("sys/pstate/running", "1\n");
	put("sys/pstate/cookie", "%s\n", "");
	put("sys/pstate/fmt_version", "%d\n", 2);
	put("sys/pdelta/0/image", "%s\n", cfg.image);
	put("sys/pdelta/0/format", "%s\n", cfg.format);
	put("sys/pdelta/0/io", "direct\n");
	put("sys/pdelta/0/ro", "0\n");
}

static void rm_tree(const char *path, int depth)
{
	DIR *d = depth < 5 ? REAL(opendir)(path) : NULL;
	struct dirent *de;
	char sub[PATH_MAX];

	while (d && (de = readdir(d))) {
		if (!strcmp(de->d_name, ".") || !strcmp(de->d_name, ".."))
			continue;
		snprintf(sub, sizeof(sub), "%s/%s", path, de->d_name);
		if (unlink(sub))
			rm_tree(sub, depth + 1);
	}
	if (d)
		closedir(d);
	rmdir(path);
}

__attribute__((destructor)) static void bye(void)
{
	if (cfg.own_dir)
		rm_tree(cfg.dir, 0);
}

/*
 * A mount table with the backing device (or the mount point asked for)
 * shown as the ploop device.
 */
static const char *mount_table(const char *real, const char *rel, bool info,
			       char *out)
{
	char line[8192], num[32];
	bool seen = false;
	FILE *in = REAL(fopen)(real, "re"), *to;
	size_t want = cfg.mount ? strlen(cfg.mount) : 0;

	snprintf(out, PATH_MAX, "%s/%s", cfg.dir, rel);
	to = REAL(fopen)(out, "we");
	if (!in || !to) {
		fprintf(stderr, "fakeploop: %s: %m\n", out);
		abort();
	}
	snprintf(num, sizeof(num), "%u:%u", major(cfg.rdev), minor(cfg.rdev));
	while (fgets(line, sizeof(line), in)) {
		char *f[64], *save = NULL;
		int n = 0, dev = -1, at = info ? 4 : 1;

		line[strcspn(line, "\n")] = 0;
		for (char *t = strtok_r(line, " ", &save); t && n < 64;
		     t = strtok_r(NULL, " ", &save))
			f[n++] = t;
		for (int i = 6; info && i + 2 < n; i++)
			if (!strcmp(f[i], "-")) {
				dev = i + 2;
				break;
			}
		if (!info)
			dev = 0;
		if (n > at && dev >= 0) {
			bool here = want && !strcmp(f[at], cfg.mount);
			bool same = cfg.is_blk &&
				(info ? !strcmp(f[2], num) :
				 !strcmp(f[0], cfg.backing));

			if (here || (same && !want)) {
				seen = true;
				f[dev] = (char *)cfg.dev;
				if (info) {
					static char fake[32];

					snprintf(fake, sizeof(fake), "%u:%u",
						 PLOOP_MAJOR, cfg.minor);
					f[2] = fake;
				}
			}
		}
		for (int i = 0; i < n; i++)
			fprintf(to, "%s%s", i ? " " : "", f[i]);
		fputc('\n', to);
	}
	if (want && !seen) {
		if (info)
			fprintf(to, "9999 1 %u:%u / %s rw,relatime - ext4 %s rw\n",
				PLOOP_MAJOR, cfg.minor, cfg.mount, cfg.dev);
		else
			fprintf(to, "%s %s ext4 rw,relatime 0 0\n", cfg.dev,
				cfg.mount);
	}
	REAL(fclose)(in);
	REAL(fclose)(to);
	return out;
}

/* The name to use in place of `path`; `buf` holds PATH_MAX bytes. */
static const char *lookup(const char *path, char *buf)
{
	static const char *const heads[] = {"/sys/block/", "/sys/class/block/",
					    "/sys/devices/virtual/block/"};
	const char *sub = NULL;
	char byno[64];
	size_t len;
	struct stat st;

	if (!path || path[0] != '/' || !on())
		return path;
	if (!strcmp(path, cfg.dev)) {
		pthread_mutex_lock(&lock);
		make_tree();
		pthread_mutex_unlock(&lock);
		return cfg.backing;
	}
	for (unsigned i = 0; i < 3 && !sub; i++) {
		len = strlen(heads[i]);
		if (!strncmp(path, heads[i], len) &&
		    !strncmp(path + len, cfg.name, strlen(cfg.name)))
			sub = path + len + strlen(cfg.name);
	}
	len = (size_t)snprintf(byno, sizeof(byno), "/sys/dev/block/%u:%u",
			       PLOOP_MAJOR, cfg.minor);
	if (!strncmp(path, byno, len))
		sub = path + len;
	if (sub && (*sub == 0 || *sub == '/')) {
		pthread_mutex_lock(&lock);
		make_tree();
		pthread_mutex_unlock(&lock);
		snprintf(buf, PATH_MAX, "%s/sys%s", cfg.dir, sub);
		/* queue/..., stat, inflight: those of the backing device */
		if (cfg.is_blk && REAL(lstat)(buf, &st))
			snprintf(buf, PATH_MAX, "/sys/block/%s%s", cfg.disk, sub);
		return buf;
	}
	if (!strncmp(path, "/proc/", 6)) {
		const char *last = strrchr(path, '/') + 1;
		char self[32];

		snprintf(self, sizeof(self), "/proc/%d/", getpid());
		if (last == path + 6 || !strncmp(path, "/proc/self/", 11) ||
		    !strncmp(path, self, strlen(self))) {
			bool info = !strcmp(last, "mountinfo");

			if (info || !strcmp(last, "mounts")) {
				pthread_mutex_lock(&lock);
				make_tree();
				mount_table(path, last, info, buf);
				pthread_mutex_unlock(&lock);
				return buf;
			}
		}
	}
	return path;
}

static const char *redirect(const char *path, char *buf)
{
	int err = errno;
	const char *to = lookup(path, buf);

	errno = err;
	return to;
}

/* ------------------------------------------------------------- tracking */

static struct {
	bool active;
	uint64_t setpos;
	uint64_t cursor;	/* TRACK_READ goes on from here, and wraps */
	FILE *script;
	int image_fd;
#ifdef FAKEPLOOP_BPF
	struct pl_bpf *bpf;
	struct pl_bitmap dirty, queued, scratch;
	struct pl_bpf_snapshot base;
	int stat_fd;
	bool frozen;
#endif
} tr = {.image_fd = -1};

static uint64_t image_size(void)
{
	struct stat st;

	if (REAL(stat)(cfg.image, &st))
		return cfg.dev_size;
	return S_ISBLK(st.st_mode) ? cfg.dev_size : (uint64_t)st.st_size;
}

static void script_write(uint64_t start, uint64_t len, int byte)
{
	static char buf[65536];
	int fd = REAL(open)(cfg.image, O_WRONLY | O_CLOEXEC);

	memset(buf, byte, sizeof(buf));
	while (fd >= 0 && len) {
		size_t n = len < sizeof(buf) ? (size_t)len : sizeof(buf);
		ssize_t w = pwrite(fd, buf, n, (off_t)start);

		if (w <= 0)
			break;
		start += (uint64_t)w;
		len -= (uint64_t)w;
	}
	if (fd < 0 || len || REAL(fdatasync)(fd)) {
		fprintf(stderr, "fakeploop: script write: %m\n");
		abort();
	}
	REAL(close)(fd);
}

/* 0 and an extent, or EAGAIN at the end of a pass */
static int script_next(struct extent *e, bool peek)
{
	char line[256];
	long at;

	while (tr.script && (at = ftell(tr.script), fgets(line, sizeof(line), tr.script))) {
		unsigned long long a, b;
		int byte;

		if (line[0] == '#')
			continue;
		if (line[0] == '\n' || line[0] == '-') {
			if (peek)
				continue;
			return EAGAIN;
		}
		if (sscanf(line, "write %lli %lli %i", (long long *)&a,
			   (long long *)&b, &byte) == 3) {
			if (!peek) {
				script_write(a, b, byte);
				say("SCRIPT_WRITE %llu %llu %d", a, b, byte);
			}
			continue;
		}
		if (sscanf(line, "%lli %lli", (long long *)&a, (long long *)&b) != 2) {
			fprintf(stderr, "fakeploop: script: %s", line);
			abort();
		}
		if (peek)
			fseek(tr.script, at, SEEK_SET);
		e->start = a;
		e->end = b;
		return 0;
	}
	return EAGAIN;
}

#ifdef FAKEPLOOP_BPF
static void bpf_close(void)
{
	if (!tr.bpf)
		return;
	pl_bpf_close(tr.bpf);
	tr.bpf = NULL;
	pl_bitmap_fini(&tr.dirty);
	pl_bitmap_fini(&tr.queued);
	pl_bitmap_fini(&tr.scratch);
	REAL(close)(tr.stat_fd);
}

static int bpf_open(void)
{
	struct pl_bpf_cfg c = {
		.major = major(cfg.rdev), .minor = minor(cfg.rdev),
		.end = cfg.dev_size, .source = PL_BPF_RQ,
	};
	char why[256] = "the backing must be a block device", path[128];
	int rc = -EINVAL;

	c.done_shift = c.queued_shift =
		(uint32_t)(63 - __builtin_clzll(cfg.grain));
	if (cfg.is_blk)
		rc = pl_bpf_open(&tr.bpf, &c, why, sizeof(why));
	if (rc) {
		fprintf(stderr, "fakeploop: tracker: %s\n", why);
		return -rc;
	}
	rc = pl_bitmap_init(&tr.dirty, cfg.dev_size, c.done_shift) |
		pl_bitmap_init(&tr.queued, cfg.dev_size, c.done_shift) |
		pl_bitmap_init(&tr.scratch, cfg.dev_size, c.done_shift);
	snprintf(path, sizeof(path), "/sys/block/%s/stat", cfg.disk);
	tr.stat_fd = REAL(open)(path, O_RDONLY | O_CLOEXEC);
	tr.frozen = false;
	if (rc || tr.stat_fd < 0 ||
	    pl_bpf_snapshot(tr.bpf, tr.stat_fd, 100, &tr.base) < 0) {
		bpf_close();
		return EIO;
	}
	return 0;
}

static int bpf_pull(void)
{
	int err = pl_bpf_take_done(tr.bpf, &tr.dirty);

	return err ? err : pl_bpf_take_queued(tr.bpf, &tr.queued);
}

static bool bpf_next(uint64_t limit, struct pl_extent *run)
{
	if (pl_bitmap_next(&tr.dirty, tr.cursor, run) && run->start < limit)
		return true;
	return pl_bitmap_next(&tr.dirty, 0, run) && run->start < limit;
}

/*
 * Completion events can be lost on some machines.  Once the file system is
 * frozen the kernel's own count tells; then whatever was ever submitted is
 * reported once more, from the start: a second trip around would be one too
 * many for the C tool.
 */
static bool bpf_lost(void)
{
	struct pl_bpf_snapshot s;
	int64_t write, discard;

	if (fail("TRACK_LOST") >= 0 ||
	    pl_bpf_snapshot(tr.bpf, tr.stat_fd, 100, &s) < 0)
		return true;
	write = (int64_t)(s.stat_write - tr.base.stat_write -
			  (s.after.done_write - tr.base.before.done_write));
	discard = (int64_t)(s.stat_discard - tr.base.stat_discard -
			    (s.after.done_discard - tr.base.before.done_discard));
	if (write <= 0 && discard <= 0)
		return false;
	say("TRACK_LOST %lld sectors written, %lld discarded",
	    (long long)write, (long long)discard);
	return true;
}
#endif

static int track_init(struct extent *e)
{
	if (tr.active)
		return EBUSY;
#ifdef FAKEPLOOP_BPF
	if (cfg.bpf) {
		int rc = bpf_open();

		if (rc)
			return rc;
	}
#else
	if (cfg.bpf) {
		fprintf(stderr, "fakeploop: built without csrc/bpf_tracker.c\n");
		return ENOTTY;
	}
#endif
	if (cfg.script && !tr.script) {
		tr.script = REAL(fopen)(cfg.script, "re");
		if (!tr.script) {
			fprintf(stderr, "fakeploop: %s: %m\n", cfg.script);
			return EIO;
		}
	}
	tr.active = true;
	tr.setpos = tr.cursor = 0;
	e->start = 0;
	e->end = image_size();
	return 0;
}

static void track_end(void)
{
	tr.active = false;
#ifdef FAKEPLOOP_BPF
	bpf_close();
#endif
}

static int track_stop(void)
{
	struct extent e;

	if (!tr.active)
		return EINVAL;
	if (cfg.script && !script_next(&e, true))
		return EBUSY;
#ifdef FAKEPLOOP_BPF
	if (tr.bpf) {
		if (bpf_pull())
			return EIO;
		if (pl_bitmap_count(&tr.dirty))
			return EBUSY;
	}
#endif
	track_end();
	return 0;
}

static int track_setpos(uint64_t pos)
{
	if (!tr.active)
		return EINVAL;
#ifdef FAKEPLOOP_BPF
	/* What was dirtied at or past the old position is yet to be read. */
	if (tr.bpf) {
		uint64_t old = tr.setpos > cfg.shift ? tr.setpos - cfg.shift : 0;

		if (bpf_pull())
			return EIO;
		pl_bitmap_clear(&tr.dirty, old, cfg.dev_size);
	}
#endif
	tr.setpos = pos;
	return 0;
}

static int track_read(struct extent *e)
{
	if (!tr.active)
		return EINVAL;
	if (cfg.script)
		return script_next(e, false);
#ifdef FAKEPLOOP_BPF
	if (tr.bpf) {
		struct pl_extent run;
		uint64_t limit = tr.setpos > cfg.shift ? tr.setpos - cfg.shift : 0;

		if (bpf_pull())
			return EIO;
		if (tr.frozen) {
			tr.frozen = false;	/* look once */
			if (bpf_lost()) {
				if (pl_bitmap_or(&tr.dirty, &tr.queued))
					return EIO;
				tr.cursor = 0;
			}
		}
		if (!bpf_next(limit, &run))
			return EAGAIN;
		tr.cursor = run.end;
		pl_bitmap_clear(&tr.dirty, run.start, run.end);
		if (run.end > limit)
			run.end = limit;
		e->start = run.start + cfg.shift;
		e->end = run.end + cfg.shift;
		return 0;
	}
#endif
	return EAGAIN;
}

/* ------------------------------------------------------------------ ioctl */

static int answer(int err, int old)
{
	errno = err ? err : old;
	return err ? -1 : 0;
}

static int dev_ioctl(int fd, unsigned long req, void *arg)
{
	struct extent *e = arg;
	const char *op = NULL;
	int err = 0, old = errno;

	switch (req) {
	case P_TRACK_INIT: op = "TRACK_INIT"; break;
	case P_TRACK_STOP: op = "TRACK_STOP"; break;
	case P_TRACK_ABORT: op = "TRACK_ABORT"; break;
	case P_TRACK_SETPOS: op = "SETPOS"; break;
	case P_TRACK_READ: op = "TRACK_READ"; break;
	case P_SYNC: op = "SYNC"; break;
	case P_MAINT: op = "MAINT"; break;	/* left as it is: nothing running */
	case P_FREEZE: op = "FREEZE"; break;
	case P_THAW: op = "THAW"; break;
	case BLKGETSIZE64:
	case BLKGETSIZE:
	case BLKSSZGET:
		if (cfg.is_blk)
			return REAL(ioctl)(fd, req, arg);
		if (req == BLKGETSIZE64)
			*(uint64_t *)arg = cfg.dev_size;
		else if (req == BLKGETSIZE)
			*(unsigned long *)arg = cfg.dev_size / 512;
		else
			*(int *)arg = 512;
		return 0;
	default:
		say("IOCTL %#lx", req);
		return REAL(ioctl)(fd, req, arg);
	}
	FAIL_OR_GO(op);
	pthread_mutex_lock(&lock);
	switch (req) {
	case P_TRACK_INIT:
		err = track_init(e);
		if (!err)
			say("%s %llu %llu", op, (unsigned long long)e->start,
			    (unsigned long long)e->end);
		break;
	case P_TRACK_STOP:
		err = track_stop();
		break;
	case P_TRACK_ABORT:
		track_end();
		break;
	case P_TRACK_SETPOS:
		err = track_setpos(*(uint64_t *)arg);
		say("%s %llu", op, (unsigned long long)*(uint64_t *)arg);
		break;
	case P_TRACK_READ:
		err = track_read(e);
		if (!err)
			say("%s %llu %llu", op, (unsigned long long)e->start,
			    (unsigned long long)e->end);
		break;
	case P_SYNC:
		say("SYNC start");
		if (REAL(fdatasync)(fd))
			err = errno;
		break;
	}
	pthread_mutex_unlock(&lock);
	if (err)
		say("%s error %d (%s)", op, err, strerrorname_np(err));
	else if (req != P_TRACK_INIT && req != P_TRACK_SETPOS &&
		 req != P_TRACK_READ)
		say("%s%s", op, req == P_SYNC ? " end" : "");
	return answer(err, old);
}

static bool fake_frozen;

/* Never freeze a file system that is not the one on the backing. */
static int freeze_ioctl(int fd, unsigned long req, void *arg)
{
	const char *op = req == FIFREEZE ? "FIFREEZE" : "FITHAW";
	struct stat st;
	int rc = 0;

	FAIL_OR_GO(op);
	if (cfg.is_blk && !REAL(fstat)(fd, &st) && st.st_dev == cfg.rdev) {
		say("%s start", op);
		rc = REAL(ioctl)(fd, req, arg);
		say("%s end %d", op, rc ? errno : 0);
	} else if (req == FIFREEZE && fake_frozen) {
		errno = EBUSY;		/* as of any frozen file system */
		rc = -1;
	} else {
		fake_frozen = req == FIFREEZE;
		say("%s faked", op);
	}
#ifdef FAKEPLOOP_BPF
	if (!rc)
		tr.frozen = req == FIFREEZE;
#endif
	return rc;
}

API int ioctl(int fd, unsigned long req, ...)
{
	va_list ap;
	void *arg;

	va_start(ap, req);
	arg = va_arg(ap, void *);
	va_end(ap);
	if (on()) {
		if (fd >= 0 && fd < MAX_FD && is_dev_fd[fd])
			return dev_ioctl(fd, req, arg);
		if (req == FIFREEZE || req == FITHAW)
			return freeze_ioctl(fd, req, arg);
	}
	return REAL(ioctl)(fd, req, arg);
}

/* ------------------------------------------------------- open and friends */

static int do_open(int dirfd, const char *path, int flags, mode_t mode)
{
	char buf[PATH_MAX];
	const char *to = redirect(path, buf);
	bool dev = to == cfg.backing && to != path;
	bool image = path && cfg.dev && !dev && !strcmp(path, cfg.image);
	int fd;

	if (dev)
		FAIL_OR_GO("OPEN");
	if (image)
		FAIL_OR_GO("OPEN_IMAGE");
	if (to == buf)
		say("OPEN_FAKE %s", path);
	fd = REAL(openat)(dirfd, to, flags, mode);
	if (fd < 0 && errno == EINVAL && (dev || image) && (flags & O_DIRECT)) {
		say("no O_DIRECT on %s", to);
		fd = REAL(openat)(dirfd, to, flags & ~O_DIRECT, mode);
	}
	if (dev || image)
		say("%s %s flags=%#o fd=%d", dev ? "OPEN" : "OPEN_IMAGE", path,
		    (unsigned)flags, fd);
	if (fd >= 0 && fd < MAX_FD) {
		is_dev_fd[fd] = dev;
		is_image_fd[fd] = image;
	}
	return fd;
}

#define GET_MODE(last, flags) ({				\
	mode_t m_ = 0;						\
	if ((flags) & (O_CREAT | __O_TMPFILE)) {		\
		va_list ap_;					\
		va_start(ap_, last);				\
		m_ = va_arg(ap_, mode_t);			\
		va_end(ap_);					\
	}							\
	m_; })

API int open(const char *path, int flags, ...)
{
	return do_open(AT_FDCWD, path, flags, GET_MODE(flags, flags));
}
API int open64(const char *path, int flags, ...)
{
	return do_open(AT_FDCWD, path, flags, GET_MODE(flags, flags));
}
API int openat(int dirfd, const char *path, int flags, ...)
{
	return do_open(dirfd, path, flags, GET_MODE(flags, flags));
}
API int openat64(int dirfd, const char *path, int flags, ...)
{
	return do_open(dirfd, path, flags, GET_MODE(flags, flags));
}
API int __open_2(const char *path, int flags)
{
	return do_open(AT_FDCWD, path, flags, 0);
}
API int __open64_2(const char *path, int flags)
{
	return do_open(AT_FDCWD, path, flags, 0);
}
API int __openat_2(int dirfd, const char *path, int flags)
{
	return do_open(dirfd, path, flags, 0);
}
API int __openat64_2(int dirfd, const char *path, int flags)
{
	return do_open(dirfd, path, flags, 0);
}

static FILE *do_fopen(const char *path, const char *mode)
{
	char buf[PATH_MAX];
	const char *to = redirect(path, buf);

	if (to == buf) {
		int f = fail(strncmp(path, "/proc", 5) ? "OPEN_SYSFS" : "OPEN_MOUNTS");

		if (f >= 0) {
			errno = f;
			return NULL;
		}
		say("OPEN_FAKE %s", path);
	}
	return REAL(fopen)(to, mode);
}
API FILE *fopen(const char *path, const char *mode)
{
	return do_fopen(path, mode);
}
API FILE *fopen64(const char *path, const char *mode)
{
	return do_fopen(path, mode);
}
API FILE *setmntent(const char *path, const char *mode)
{
	return do_fopen(path, mode);
}

static void forget_fd(int fd)
{
	if (fd >= 0 && fd < MAX_FD)
		is_dev_fd[fd] = is_image_fd[fd] = 0;
}
API int close(int fd)
{
	forget_fd(fd);
	return REAL(close)(fd);
}
API int fclose(FILE *f)
{
	forget_fd(fileno(f));
	return REAL(fclose)(f);
}

API DIR *opendir(const char *path)
{
	char buf[PATH_MAX];

	return REAL(opendir)(redirect(path, buf));
}
API int access(const char *path, int mode)
{
	char buf[PATH_MAX];

	return REAL(access)(redirect(path, buf), mode);
}
API int faccessat(int dirfd, const char *path, int mode, int flags)
{
	char buf[PATH_MAX];

	return REAL(faccessat)(dirfd, redirect(path, buf), mode, flags);
}
API ssize_t readlink(const char *path, char *out, size_t len)
{
	char buf[PATH_MAX];

	return REAL(readlink)(redirect(path, buf), out, len);
}
API ssize_t readlinkat(int dirfd, const char *path, char *out, size_t len)
{
	char buf[PATH_MAX];

	return REAL(readlinkat)(dirfd, redirect(path, buf), out, len);
}

API char *realpath(const char *path, char *out)
{
	char buf[PATH_MAX];

	if (redirect(path, buf) != path)	/* a faked name is its own */
		return out ? strcpy(out, path) : strdup(path);
	return REAL(realpath)(path, out);
}
API char *__realpath_chk(const char *path, char *out, size_t len)
{
	(void)len;
	return realpath(path, out);
}

/* -------------------------------------------------------------------- stat */

static int fix_stat(int rc, bool dev, struct stat *st)
{
	dev_t fake = makedev(PLOOP_MAJOR, cfg.minor);

	if (rc || !cfg.dev)
		return rc;
	if (dev) {
		st->st_mode = S_IFBLK | 0600;
		st->st_rdev = fake;
		st->st_size = 0;
	}
	if (cfg.is_blk && st->st_dev == cfg.rdev)
		st->st_dev = fake;
	return 0;
}

static int do_stat(int dirfd, const char *path, struct stat *st, int flags)
{
	char buf[PATH_MAX];
	const char *to = redirect(path, buf);
	bool dev = on() && path && !strcmp(path, cfg.dev);

	if (dev)
		FAIL_OR_GO("STAT");
	return fix_stat(REAL(fstatat)(dirfd, to, st, flags), dev, st);
}

static int do_fstat(int fd, struct stat *st)
{
	bool dev = on() && fd >= 0 && fd < MAX_FD && is_dev_fd[fd];

	if (dev)
		FAIL_OR_GO("FSTAT");
	if (on() && fd >= 0 && fd < MAX_FD && is_image_fd[fd])
		FAIL_OR_GO("FSTAT_IMAGE");
	return fix_stat(REAL(fstat)(fd, st), dev, st);
}

/* On LP64 struct stat64 is struct stat. */
_Static_assert(sizeof(struct stat) == sizeof(struct stat64), "LP64 only");

API int stat(const char *path, struct stat *st)
{
	return do_stat(AT_FDCWD, path, st, 0);
}
API int stat64(const char *path, struct stat64 *st)
{
	return do_stat(AT_FDCWD, path, (struct stat *)st, 0);
}
API int lstat(const char *path, struct stat *st)
{
	return do_stat(AT_FDCWD, path, st, AT_SYMLINK_NOFOLLOW);
}
API int lstat64(const char *path, struct stat64 *st)
{
	return do_stat(AT_FDCWD, path, (struct stat *)st, AT_SYMLINK_NOFOLLOW);
}
API int fstatat(int dirfd, const char *path, struct stat *st, int flags)
{
	return do_stat(dirfd, path, st, flags);
}
API int fstatat64(int dirfd, const char *path, struct stat64 *st, int flags)
{
	return do_stat(dirfd, path, (struct stat *)st, flags);
}
API int fstat(int fd, struct stat *st)
{
	return do_fstat(fd, st);
}
API int fstat64(int fd, struct stat64 *st)
{
	return do_fstat(fd, (struct stat *)st);
}
API int statx(int dirfd, const char *path, int flags, unsigned mask,
	      struct statx *sx)
{
	char buf[PATH_MAX];
	const char *to = redirect(path, buf);
	int rc = REAL(statx)(dirfd, to, flags, mask, sx);

	if (!rc && to == cfg.backing && to != path) {
		sx->stx_mode = S_IFBLK | 0600;
		sx->stx_rdev_major = PLOOP_MAJOR;
		sx->stx_rdev_minor = cfg.minor;
	}
	return rc;
}
/* Programs linked against glibc before 2.33. */
API int __xstat(int ver, const char *path, struct stat *st)
{
	(void)ver;
	return do_stat(AT_FDCWD, path, st, 0);
}
API int __lxstat(int ver, const char *path, struct stat *st)
{
	(void)ver;
	return do_stat(AT_FDCWD, path, st, AT_SYMLINK_NOFOLLOW);
}
API int __fxstat(int ver, int fd, struct stat *st)
{
	(void)ver;
	return do_fstat(fd, st);
}
API int __xstat64(int ver, const char *path, struct stat *st)
{
	return __xstat(ver, path, st);
}
API int __lxstat64(int ver, const char *path, struct stat *st)
{
	return __lxstat(ver, path, st);
}
API int __fxstat64(int ver, int fd, struct stat *st)
{
	return __fxstat(ver, fd, st);
}

/* --------------------------------------- calls that are logged or made fail */

API int syncfs(int fd)
{
	int rc;

	if (!on())
		return REAL(syncfs)(fd);
	FAIL_OR_GO("SYNCFS");
	say("SYNCFS start");
	rc = REAL(syncfs)(fd);
	say("SYNCFS end %d", rc ? errno : 0);
	return rc;
}

API long syscall(long nr, ...)
{
	long a[6];
	va_list ap;

	va_start(ap, nr);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(ap, long);
	va_end(ap);
	if (nr == SYS_syncfs)
		return syncfs((int)a[0]);
	return REAL(syscall)(nr, a[0], a[1], a[2], a[3], a[4], a[5]);
}

API int system(const char *cmd)
{
	int rc;

	if (!on())
		return REAL(system)(cmd);
	say("SYSTEM start %s", cmd ? cmd : "(null)");
	rc = REAL(system)(cmd);
	say("SYSTEM end %#x", (unsigned)rc);
	return rc;
}

API unsigned sleep(unsigned s)
{
	if (on())
		say("SLEEP %u", s);
	return REAL(sleep)(on() && getenv("FAKEPLOOP_NOSLEEP") ? 0 : s);
}

API int fdatasync(int fd)
{
	int rc;

	if (!on())
		return REAL(fdatasync)(fd);
	FAIL_OR_GO("FDATASYNC");
	rc = REAL(fdatasync)(fd);
	if (cfg.log_io)
		say("FDATASYNC fd=%d", fd);
	return rc;
}

API int fsync(int fd)
{
	if (on()) {
		FAIL_OR_GO("FSYNC");
		if (cfg.log_io)
			say("FSYNC fd=%d", fd);
	}
	return REAL(fsync)(fd);
}

static ssize_t do_pread(int fd, void *buf, size_t n, off_t pos)
{
	ssize_t rc;

	if (on() && fd >= 0 && fd < MAX_FD && is_image_fd[fd]) {
		int f = fail("READ");

		if (f >= 0) {
			errno = f;
			return f ? -1 : 0;
		}
		rc = REAL(pread)(fd, buf, n, pos);
		if (cfg.log_io)
			say("PREAD %llu %zu = %zd", (unsigned long long)pos, n, rc);
		return rc;
	}
	return REAL(pread)(fd, buf, n, pos);
}
API ssize_t pread(int fd, void *buf, size_t n, off_t pos)
{
	return do_pread(fd, buf, n, pos);
}
API ssize_t pread64(int fd, void *buf, size_t n, off64_t pos)
{
	return do_pread(fd, buf, n, pos);
}

API ssize_t write(int fd, const void *buf, size_t n)
{
	ssize_t rc;

	if (!on() || fd == cfg.log_fd || !cfg.log_io)
		return REAL(write)(fd, buf, n);
	FAIL_OR_GO("WRITE");
	rc = REAL(write)(fd, buf, n);
	say("WRITE fd=%d %zu = %zd", fd, n, rc);
	return rc;
}
