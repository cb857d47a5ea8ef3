# SPDX-License-Identifier: Apache-2.0
"""Open the source of a copy: find out what it is, how it can be read, and what is mounted
from it."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pyploop.disks.identity import Identity
from pyploop.disks.source import Source
from pyploop.disks.tail import find_tail, left_out
from pyploop.errors import (
    DeviceError,
    FormatError,
    OpenError,
    ParameterError,
)
from pyploop.system import kernel, mount_table, sysblock
from pyploop.system.mount_table import Mount
from pyploop.system.sysblock import Loop
from pyploop.units import BLOCK, SECTOR
from pyploop.usage.monitor import Monitor, Subject
from pyploop.usage.related_devices import RelatedDevices, below_overlay, find_related

ReadPath = Literal["auto", "device", "backing"]


def open_source(
    path: str,
    read: ReadPath = "auto",
    mounts: Sequence[str] = (),
    *,
    to_freeze: bool = True,
    unsafe: bool = False,
    check: Callable[[Source], None] | None = None,
) -> Source:
    """Open a block device, /dev/ploopN, an image file, or the image file of an
    attached loop device (then the device is the source).

    read: how a loop device is read.  `backing`: from its backing file.  `device`: with
    O_DIRECT from the device.  `auto`: the first, if it is certain to have the same data.
    mounts: mount points to freeze instead of the ones that are found.
    to_freeze: find what must be frozen, and watch the users of the source.  OpenError when
    that cannot be frozen, or the source has other users, unless `unsafe`.
    check: called when the source is open, before its users are searched.
    """
    try:
        st = os.stat(path)
    except OSError as e:
        raise DeviceError.of(f"cannot open the source {path}", e) from e
    if stat.S_ISREG(st.st_mode):
        loops = sysblock.loop_device_of(path)
        if len(loops) > 1:
            raise DeviceError(
                f"{path} is attached to {', '.join(loops)}: name the device to copy", path=path
            )
        if not loops:
            return _watched(_open_file(path), mounts, to_freeze, unsafe, check)
        _check_whole(path, st.st_size, loops[0])
        path = loops[0]
        st = os.stat(path)
    if not stat.S_ISBLK(st.st_mode):
        raise DeviceError(f"the source {path} is neither a block device nor a file", path=path)
    if Path(path).name.startswith("ploop") and _ploop_sysfs(path).is_dir():
        source = _open_ploop(path)
    else:
        source = _open_block(path, sysblock.dev_numbers(st.st_rdev), read)
    return _watched(source, mounts, to_freeze, unsafe, check)


def _watched(
    source: Source,
    mounts: Sequence[str],
    to_freeze: bool,
    unsafe: bool,
    check: Callable[[Source], None] | None,
) -> Source:
    """Find the users of the source; it is closed after a failure."""
    try:
        if check is not None:
            check(source)
        if source.is_image:  # its driver tracks all writes, by whomever
            if to_freeze:
                _find_mounts(source, mounts)
            return source
        if mounts:
            source.mounts = [Mount(mount, "?", source.path) for mount in mounts]
            for mount in mounts:
                _check_mount(source, mount)
        source.monitor = Monitor(_subject(source), source.mounts, unsafe)
        if to_freeze:
            source._owned.callback(source.monitor.close)
            source.monitor.begin()
            source.mounts = source.mounts or source.monitor.found.mounts
    except BaseException:
        source.close()
        raise
    return source


def _subject(source: Source) -> Subject:
    if source.related is None:
        file = sysblock.file_id(os.fstat(source.fd))
        return Subject(source.path, None, [file], source.path, [source.fd])
    loop = source.related.loop
    if loop is None:
        return Subject(source.path, source.related)
    files = [loop.file]
    fds = [] if source.sparse_fd is None else [source.sparse_fd]
    if lower := below_overlay(loop):
        fds.append(_open(lower, os.O_RDONLY, source._owned, "the backing file"))
        files.append(sysblock.file_id(os.fstat(fds[-1])))
    return Subject(source.path, source.related, files, loop.name, fds)


def _check_whole(path: str, size: int, loop: str) -> None:
    """DeviceError when the loop device shows only a part of the file."""
    with contextlib.ExitStack() as owned:
        shown = kernel.device_size(_open(loop, os.O_RDONLY, owned, "the loop device"), loop)
    if shown != size:
        raise DeviceError(
            f"{path} ({size} bytes) is attached to {loop} only in part ({shown} bytes): "
            "name the device to copy that part",
            path=path,
        )


def _open(
    path: str, flags: int, owned: contextlib.ExitStack, what: str, name: str | None = None
) -> int:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC)
    except OSError as e:
        raise DeviceError.of(f"cannot open {what} {name or path}", e) from e
    owned.callback(os.close, fd)
    return fd


def _open_file(path: str) -> Source:
    owned = contextlib.ExitStack()
    # Its type is checked before it is opened for reading: the owner of its folder may have
    # replaced it with a FIFO, for which an open waits, or with a device.
    pin = _open(path, os.O_PATH, owned, "the source")
    if not stat.S_ISREG(os.fstat(pin).st_mode):
        owned.close()
        raise DeviceError(f"the source {path} is not a regular file any more", path=path)
    fd = _open(f"/proc/self/fd/{pin}", os.O_RDONLY, owned, "the source", path)
    size = os.fstat(fd).st_size
    return Source(
        path,
        "file",
        size,
        fd,
        io_mode="file, buffered",
        sparse_fd=fd,
        image=path,
        _owned=owned,
    )


def _open_block(path: str, dev: tuple[int, int], read: ReadPath) -> Source:
    owned = contextlib.ExitStack()
    try:
        fd = _open(path, os.O_RDONLY | os.O_DIRECT, owned, "the source")
        size = kernel.device_size(fd, path)
        block = sysblock.find(dev)
        related = find_related(block)
        source = Source(
            path,
            "block",
            size,
            fd,
            align=kernel.logical_block_size(fd, path),
            io_mode="device, O_DIRECT",
            block=block,
            related=related,
            image=path,
            control_fd=fd,
            _owned=owned,
        )
        if size == 0:
            raise DeviceError(
                f"the source {path} has no size",
                path=path,
                hint="attach something to the device first (losetup), or insert a medium",
            )
        if related.loop is not None:
            _use_backing(source, related, related.loop, read)
        elif read == "backing":
            raise ParameterError(
                f"--read backing: {path} is not on a loop device, so it has no backing file",
                path=path,
            )
        if source.fd == fd and related.queue.dev != block.dev:
            _use_lower(source, related)
        _identify(source, related)
        if source.fd == fd and size % source.align:
            at = size - size % source.align
            source.tail = find_tail(path, at, size, source.sparse_fd, source.sparse_base)
            owned.callback(os.close, source.tail.fd)
            source.io_mode += f", the last {source.tail.size} bytes from {source.tail.name}"
    except BaseException:
        owned.close()
        raise
    return source


def _identify(source: Source, related: RelatedDevices) -> None:
    """Remember what each device shows, before the first read.  OSError when a loop device
    was detached."""
    for disk in related.below:
        fd = -1
        if disk.name.startswith("loop"):
            path = f"/dev/{disk.name}"
            try:
                fd = sysblock.open_device(path, disk.dev)
            except OSError as e:
                raise DeviceError.of(f"cannot open {path}, on which {source.path} lies", e) from e
            source._owned.callback(os.close, fd)
        identity = Identity(disk.name, fd)
        source._owned.callback(identity.close)
        source.identities.append(identity)


def _use_lower(source: Source, related: RelatedDevices) -> None:
    """Read the block device that the source lies on.  A loop device between them would read
    through that device's page cache, which misses writes that bypass the cache."""
    path = f"/dev/{related.queue.name}"
    fd = _open(path, os.O_RDONLY | os.O_DIRECT, source._owned, f"the device below {source.path},")
    align = kernel.logical_block_size(fd, path)
    if related.base % align or source.size % align:
        source.io_mode += f" ({path}, on which it lies, not used: {align}-byte sectors)"
        return
    source.fd, source.base, source.align = fd, related.base, align
    source.io_mode = f"{path}, on which it lies, O_DIRECT"


def _use_backing(source: Source, related: RelatedDevices, loop: Loop, read: ReadPath) -> None:
    """Find the loop device's backing file.  Take the holes from it, and read it unless
    `read` is `device`."""
    disk = loop.path
    why = ""
    fd = -1
    try:
        status_fd = source.fd
        if loop.device.dev != (source.block and source.block.dev):
            status_fd = sysblock.open_device(disk, loop.device.dev)
            source._owned.callback(os.close, status_fd)
        status = kernel.loop_status(status_fd, disk)
        name = sysblock.backing_file(loop.device.name)
        # Read the file as the loop device does.  With direct I/O the page cache of the file
        # is cold; with buffered I/O it has the newest data.
        pin = os.open(name, os.O_PATH | os.O_CLOEXEC)  # see _open_file
        try:
            st = os.fstat(pin)
            if sysblock.file_id(st) != (status.device, status.inode):
                why = f"{name} is another file now, or a file of another mount namespace"
            elif not stat.S_ISREG(st.st_mode):
                why = f"{name} is not a regular file"
            else:
                how = os.O_DIRECT if status.direct_io else 0
                fd = os.open(f"/proc/self/fd/{pin}", os.O_RDONLY | os.O_CLOEXEC | how)
        finally:
            os.close(pin)
        if not why and source.block is not None and loop.device.dev == source.block.dev:
            source.notes += left_out(source.path, source.size, name, st.st_size, status)
    except (OSError, DeviceError) as e:
        why = str(e)
    if why:
        if fd >= 0:
            os.close(fd)
        if read == "backing":
            raise OpenError(f"cannot read the backing file of {disk}: {why}")
        source.io_mode += f" (backing file not used: {why})"
        return
    source._owned.callback(os.close, fd)
    base = status.offset + related.queue.start
    source.sparse_fd, source.sparse_base = fd, base
    if read == "device":
        return
    source.fd, source.base = fd, base
    if status.direct_io:
        # A loop device's sector is no smaller than the alignment that its file needs.
        source.align = max(BLOCK, source.align)
        source.io_mode = f"backing file {name}, O_DIRECT"
    else:
        source.align = 1
        source.io_mode = f"backing file {name}, buffered"


def _ploop_sysfs(path: str) -> Path:
    return Path("/sys/block") / Path(path).name


def _open_ploop(path: str) -> Source:
    owned = contextlib.ExitStack()
    try:
        fd = _open(path, os.O_RDONLY | os.O_DIRECT, owned, "the source")
        sysfs = _ploop_sysfs(path)
        top = sysblock.attribute(sysfs / "pstate/top")
        cluster = sysblock.number(sysfs / "pstate/block_size") * SECTOR
        delta = sysfs / "pdelta" / top
        image = sysblock.attribute(delta / "image")
        fmt = sysblock.attribute(delta / "format")
        if fmt not in ("raw", "ploop1"):
            raise FormatError(
                f"{image}: delta format {fmt!r} cannot be copied (raw and ploop1 can)", path=image
            )
        # The image file is copied, and the driver tracks its bytes.
        image_fd = _open_image(image, owned)
        st = os.stat(path)
        block = sysblock.find(sysblock.dev_numbers(st.st_rdev))
        return Source(
            path,
            "ploop",
            os.fstat(image_fd).st_size,
            image_fd,
            align=BLOCK,
            io_mode=f"delta {image}, O_DIRECT",
            block=block,
            cluster=cluster,
            image=image,
            image_format=fmt,
            _owned=owned,
            control_fd=fd,
        )
    except BaseException:
        owned.close()
        raise


def _open_image(image: str, owned: contextlib.ExitStack) -> int:
    try:
        fd = os.open(image, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as e:
        raise OpenError.of(f"cannot open the top delta {image}", e) from e
    owned.callback(os.close, fd)
    return fd


def _find_mounts(source: Source, mounts: Sequence[str]) -> None:
    """Find the mounts of a ploop device."""
    if mounts:
        source.mounts = [Mount(mount, "?", source.path) for mount in mounts]
    elif source.block is not None:
        devices = sysblock.stacked_on(source.block)
        found = mount_table.mounts_of(devices)
        # The driver may number its partitions differently from sysfs.
        source.mounts = [replace(m, dev=None) for m in found]


def _check_mount(source: Source, mount: str) -> None:
    """OpenError unless the folder lies on a file system of the source."""
    try:
        st = os.stat(mount)
    except OSError as e:
        raise OpenError.of(f"cannot open the mount point {mount}", e, path=mount) from e
    if source.related is None:
        return
    devices = source.related.tracked
    if sysblock.dev_numbers(st.st_dev) in {d.dev for d in devices}:
        return
    # A btrfs, and an XFS whose log device is the source, have another device number, so
    # compare the mount point.
    process, point = "self", os.path.realpath(mount)
    if m := re.match(r"/proc/(\d+)/root(/.*)?$", mount):
        process, point = m[1], m[2] or "/"
    for known in mount_table.mounts_of(devices, Path(f"/proc/{process}/mountinfo")):
        if known.point == point:
            return
    raise OpenError(f"--mount {mount}: it is not on a file system of {source.path}", path=mount)
