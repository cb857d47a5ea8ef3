# SPDX-License-Identifier: Apache-2.0
"""Build of pyploop._kernel: ioctl numbers and struct layouts, by the compiler.

Control plane only.  Run by setup.py (cffi_modules); nothing is packed by hand.
"""

from cffi import FFI

ffi = FFI()
ffi.cdef(
    """
    static const unsigned long FIFREEZE, FITHAW;
    static const unsigned long BLKGETSIZE64, BLKROGET, BLKSSZGET;
    static const unsigned long LOOP_GET_STATUS64;
    static const unsigned long FS_IOC_GETVERSION, FICLONE;
    static const int RENAME_NOREPLACE;
    static const unsigned long MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS;
    static const unsigned long MS_NOATIME, MS_NODIRATIME, MS_RELATIME, MS_STRICTATIME;
    static const unsigned long MS_LAZYTIME, MS_DIRSYNC, MS_MANDLOCK, MS_I_VERSION;
    static const unsigned long MS_SILENT, MS_NOSYMFOLLOW;
    static const int MNT_DETACH;
    static const unsigned long MS_REMOUNT, MS_BIND;
    static const uint64_t RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_MAGICLINKS;

    struct loop_info64 {
        uint64_t lo_device;
        uint64_t lo_inode;
        uint64_t lo_rdevice;
        uint64_t lo_offset;
        uint64_t lo_sizelimit;
        uint32_t lo_number;
        uint32_t lo_flags;
        ...;
    };
    static const uint32_t LO_FLAGS_DIRECT_IO;

    struct pk_access { uint64_t mask; uint64_t dev; uint64_t inode; int pid; };
    static const uint64_t FAN_OPEN, FAN_MODIFY, FAN_CLOSE_WRITE, FAN_Q_OVERFLOW;

    int pk_ioctl0(int fd, unsigned long request);
    int pk_ioctl_value(int fd, unsigned long request, unsigned long value);
    int pk_ioctl_u64(int fd, unsigned long request, uint64_t *value);
    int pk_ioctl_int(int fd, unsigned long request, int *value);
    int pk_loop_status(int fd, struct loop_info64 *info);
    int pk_syncfs(int fd);
    int pk_is_tmpfs(int fd);
    int pk_direct_alignment(int fd, uint32_t *block, uint32_t *memory);
    int pk_write_back(int fd);
    int pk_watch_writes(const char *path);
    int pk_set_pipe_size(int fd, int bytes);
    int pk_rename_noreplace(int dirfd, const char *from, const char *to);
    int pk_mount(const char *source, const char *point, const char *type,
                 unsigned long flags, const char *data);
    int pk_umount(const char *point, int flags);
    int pk_clone_mount(const char *path);
    int pk_loop_free(int control_fd);
    int pk_loop_attach(int loop_fd, int file_fd, const char *name);
    int pk_loop_detach(int loop_fd);
    int pk_pidfd_getfd(int pidfd, int fd);
    int pk_tcp_repair(int fd, int on);
    int pk_enter_network(int ns_fd);
    static const unsigned int FAN_MARK_FILESYSTEM;
    int pk_watch(int file_fd, unsigned int whole, uint64_t mask);
    int pk_read_access(int fd, struct pk_access *found);
    int pk_io_priority(int tid);
    long long pk_attributes(int dirfd, const char *name);
    int pk_kcmp_files(int one, int other);
    int pk_openat2(int dirfd, const char *path, uint64_t flags, uint64_t mode,
                   uint64_t resolve);
    """
)
ffi.set_source(
    "pyploop._kernel",
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/fs.h>
    #include <linux/loop.h>
    #include <linux/magic.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <sched.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <string.h>
    #include <sys/fanotify.h>
    #include <sys/inotify.h>
    #include <sys/ioctl.h>
    #include <sys/mount.h>
    #include <sys/socket.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/vfs.h>
    #include <unistd.h>

    #ifndef MS_NOSYMFOLLOW
    #define MS_NOSYMFOLLOW 256  /* linux/mount.h, since 5.10 */
    #endif
    /* linux/openat2.h, since 5.6.  Older kernel headers do not have it; the values are a
       stable kernel interface. */
    #ifndef SYS_openat2
    #define SYS_openat2 437
    #endif
    #ifndef SYS_open_tree  /* since 5.2; its flag OPEN_TREE_CLONE is 1 */
    #define SYS_open_tree 428
    #endif
    #define RESOLVE_NO_MAGICLINKS 0x02
    #define RESOLVE_NO_SYMLINKS 0x04
    #define RESOLVE_BENEATH 0x08

    #ifndef RENAME_NOREPLACE
    #define RENAME_NOREPLACE 1
    #endif

    /* 0 or a count, or -errno; cffi releases the GIL around each call. */
    static int result(int ret) { return ret < 0 ? -errno : ret; }

    static int pk_ioctl0(int fd, unsigned long request)
    { return result(ioctl(fd, request, 0)); }
    static int pk_ioctl_value(int fd, unsigned long request, unsigned long value)
    { return result(ioctl(fd, request, value)); }
    static int pk_ioctl_u64(int fd, unsigned long request, uint64_t *value)
    { return result(ioctl(fd, request, value)); }
    static int pk_ioctl_int(int fd, unsigned long request, int *value)
    { return result(ioctl(fd, request, value)); }
    static int pk_loop_status(int fd, struct loop_info64 *info)
    { return result(ioctl(fd, LOOP_GET_STATUS64, info)); }
    static int pk_syncfs(int fd)
    { return result(syncfs(fd)); }
    static int pk_is_tmpfs(int fd)
    {
        struct statfs fs;
        return fstatfs(fd, &fs) < 0 ? -errno : fs.f_type == TMPFS_MAGIC;
    }
    static int pk_direct_alignment(int fd, uint32_t *block, uint32_t *memory)
    {
        /* statx(2), by offsets: struct statx of libc may be older than Linux 6.1. */
        union { uint32_t word[64]; uint64_t aligned; } x = { { 0 } };
        if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, 0x2000 /* STATX_DIOALIGN */, &x) < 0)
            return -errno;
        *memory = x.word[0x98 / 4];
        *block = x.word[0x9c / 4];
        return !!(x.word[0] & 0x2000);
    }
    static int pk_write_back(int fd)
    { return result(sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WAIT_BEFORE |
        SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER)); }
    static int pk_watch_writes(const char *path)
    {
        int fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC), err;
        if (fd < 0 || inotify_add_watch(fd, path, IN_MODIFY) >= 0)
            return result(fd);
        err = -errno;
        close(fd);
        return err;
    }
    static int pk_set_pipe_size(int fd, int bytes)
    { return result(fcntl(fd, F_SETPIPE_SZ, bytes)); }
    static int pk_rename_noreplace(int dirfd, const char *from, const char *to)
    { return result(renameat2(dirfd, from, dirfd, to, RENAME_NOREPLACE)); }
    static int pk_mount(const char *source, const char *point, const char *type,
                        unsigned long flags, const char *data)
    { return result(mount(source, point, type, flags, data)); }
    static int pk_umount(const char *point, int flags)
    { return result(umount2(point, flags)); }
    static int pk_clone_mount(const char *path)
    { return result((int)syscall(SYS_open_tree, AT_FDCWD, path, 1 | O_CLOEXEC)); }
    static int pk_loop_free(int control_fd)
    { return result(ioctl(control_fd, LOOP_CTL_GET_FREE)); }
    /* AUTOCLEAR: it detaches after its last user, so a killed process leaves none. */
    static int pk_loop_attach(int loop_fd, int file_fd, const char *name)
    {
        struct loop_config config = { .fd = (uint32_t)file_fd };
        config.info.lo_flags = LO_FLAGS_AUTOCLEAR;
        strncpy((char *)config.info.lo_file_name, name, LO_NAME_SIZE - 1);
        return result(ioctl(loop_fd, LOOP_CONFIGURE, &config));
    }
    static int pk_loop_detach(int loop_fd)
    { return result(ioctl(loop_fd, LOOP_CLR_FD)); }
    static int pk_pidfd_getfd(int pidfd, int fd)
    { return result((int)syscall(SYS_pidfd_getfd, pidfd, fd, 0)); }
    static int pk_tcp_repair(int fd, int on)
    { return result(setsockopt(fd, IPPROTO_TCP, TCP_REPAIR, &on, sizeof on)); }
    static int pk_enter_network(int ns_fd)
    { return result(setns(ns_fd, CLONE_NEWNET)); }
    struct pk_access { uint64_t mask; uint64_t dev; uint64_t inode; int pid; };
    static int pk_watch(int file_fd, unsigned int whole, uint64_t mask)
    {
        int fd = fanotify_init(FAN_CLASS_NOTIF | FAN_CLOEXEC | FAN_NONBLOCK, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return -errno;
        if (fanotify_mark(fd, FAN_MARK_ADD | whole, mask, file_fd, NULL) < 0) {
            int ret = -errno;
            close(fd);
            return ret;
        }
        return fd;
    }
    /* One event at a time: when its file cannot be opened, read(2) fails.  After other events
       it would drop that one without a word.  Each event has an open file; inode 0: this one
       has none.  1, or -errno. */
    static int pk_read_access(int fd, struct pk_access *found)
    {
        struct fanotify_event_metadata e;
        struct stat st = { .st_ino = 0 };
        if (read(fd, &e, sizeof e) < 0)
            return -errno;
        if (e.fd >= 0) {
            if (fstat(e.fd, &st) < 0)
                st.st_ino = 0;
            close(e.fd);
        }
        *found = (struct pk_access){
            .mask = e.mask, .dev = st.st_dev, .inode = st.st_ino, .pid = e.pid };
        return 1;
    }
    static long long pk_attributes(int dirfd, const char *name)
    {
        union { uint32_t word[64]; uint64_t aligned[32]; } x = { { 0 } };
        if (syscall(SYS_statx, dirfd, name, AT_SYMLINK_NOFOLLOW, 0, &x) < 0)
            return -errno;
        return x.aligned[1] & x.aligned[7];  /* stx_attributes, stx_attributes_mask */
    }

    static int pk_io_priority(int tid)
    { return result((int)syscall(SYS_ioprio_get, 1 /* a thread */, tid)); }
    static int pk_kcmp_files(int one, int other)
    { return result((int)syscall(SYS_kcmp, one, other, 2 /* KCMP_FILES */, 0, 0)); }
    static int pk_openat2(int dirfd, const char *path, uint64_t flags, uint64_t mode,
                          uint64_t resolve)
    {
        struct { uint64_t flags, mode, resolve; } how = { flags, mode, resolve };
        _Static_assert(sizeof how == 24, "open_how of the kernel, in its first version");
        return result((int)syscall(SYS_openat2, dirfd, path, &how, sizeof how));
    }
    """,
    define_macros=[("_GNU_SOURCE", "1")],
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
