# SPDX-License-Identifier: Apache-2.0
"""Build of pyploop._kernel: ioctl numbers and struct layouts, by the compiler.

Control plane only.  Run by setup.py (cffi_modules); nothing is packed by hand.
"""

from cffi import FFI

ffi = FFI()
ffi.cdef(
    """
    static const unsigned long FIFREEZE, FITHAW;
    static const unsigned long BLKGETSIZE64, BLKSSZGET;
    static const unsigned long LOOP_GET_STATUS64;
    static const int RENAME_NOREPLACE;

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

    int pk_ioctl0(int fd, unsigned long request);
    int pk_ioctl_u64(int fd, unsigned long request, uint64_t *value);
    int pk_ioctl_int(int fd, unsigned long request, int *value);
    int pk_loop_status(int fd, struct loop_info64 *info);
    int pk_syncfs(int fd);
    int pk_write_back(int fd);
    int pk_set_pipe_size(int fd, int bytes);
    int pk_rename_noreplace(int dirfd, const char *from, const char *to);
    """
)
ffi.set_source(
    "pyploop._kernel",
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/fs.h>
    #include <linux/loop.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <sys/ioctl.h>
    #include <unistd.h>

    #ifndef RENAME_NOREPLACE
    #define RENAME_NOREPLACE 1
    #endif

    /* 0 or a count, or -errno; cffi releases the GIL around each call. */
    static int result(int ret) { return ret < 0 ? -errno : ret; }

    static int pk_ioctl0(int fd, unsigned long request)
    { return result(ioctl(fd, request, 0)); }
    static int pk_ioctl_u64(int fd, unsigned long request, uint64_t *value)
    { return result(ioctl(fd, request, value)); }
    static int pk_ioctl_int(int fd, unsigned long request, int *value)
    { return result(ioctl(fd, request, value)); }
    static int pk_loop_status(int fd, struct loop_info64 *info)
    { return result(ioctl(fd, LOOP_GET_STATUS64, info)); }
    static int pk_syncfs(int fd)
    { return result(syncfs(fd)); }
    static int pk_write_back(int fd)
    { return result(sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WAIT_BEFORE |
        SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER)); }
    static int pk_set_pipe_size(int fd, int bytes)
    { return result(fcntl(fd, F_SETPIPE_SZ, bytes)); }
    static int pk_rename_noreplace(int dirfd, const char *from, const char *to)
    { return result(renameat2(dirfd, from, dirfd, to, RENAME_NOREPLACE)); }
    """,
    define_macros=[("_GNU_SOURCE", "1")],
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
