# SPDX-License-Identifier: Apache-2.0
"""What a disk is, and how it would be copied: `inspect`."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyploop.disks import disk_descriptor, image
from pyploop.disks.disk_descriptor import Descriptor
from pyploop.disks.image import Image
from pyploop.disks.opening import open_source
from pyploop.disks.source import Source
from pyploop.errors import DeviceError, OpenError, PyploopError, SysfsError
from pyploop.system import mount_table, sysblock
from pyploop.system.sysblock import BlockDevice
from pyploop.trackers.registry import choose
from pyploop.usage.users import Found, refusal


@dataclass(frozen=True, kw_only=True)
class DeltaInfo:
    """One image of the chain of a DiskDescriptor.xml.  Sizes are bytes."""

    guid: str
    parent: str
    path: str
    format: str
    version: int | None
    size: int
    file_size: int
    allocated: int
    data: int
    in_use: bool | None


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """What is opened for a copy.  Sizes are bytes."""

    path: str
    kind: str
    """`block`, `file`, or `ploop`."""
    size: int
    disk: str | None
    """The whole device in sysfs, such as `loop0`."""
    partition_offset: int | None
    backing_file: str | None
    io_mode: str
    """How it is read, in words."""


@dataclass(frozen=True, kw_only=True)
class MountInfo:
    """A file system of the disk that is mounted."""

    point: str
    fstype: str
    source: str


@dataclass(frozen=True, kw_only=True)
class UserInfo:
    """Something that uses the disk."""

    device: str
    what: str
    state: str
    """`frozen` with the disk, `unfrozen`, `compared`, or `unknown` (a copy is refused)."""
    advice: str | None


@dataclass(frozen=True, kw_only=True)
class TrackerInfo:
    """The tracker that a copy would have; name None: it cannot be copied."""

    name: str | None
    why: str


@dataclass(frozen=True, kw_only=True)
class DiskInfo:
    """What a disk is.  Sizes are bytes; None: not known, or it has none."""

    path: str
    kind: str
    """`image`, `device`, or `descriptor`."""
    format: str
    """`raw` or `ploop1`."""
    version: int | None
    size: int | None
    """Of the disk that it shows."""
    file_size: int | None
    cluster: int | None
    allocated: int | None
    """Of the file system below."""
    data: int | None
    """In clusters, or outside of holes."""
    in_use: bool | None
    """As the image's header says."""
    chain: tuple[DeltaInfo, ...]
    """Of a descriptor, the lowest first."""
    device: DeviceInfo | None
    mounts: tuple[MountInfo, ...]
    users: tuple[UserInfo, ...]
    tracker: TrackerInfo | None
    notes: tuple[str, ...]
    """What a person should know about it."""


Report = dict[str, Any]
"""The fields of a DiskInfo, while they are gathered."""


def inspect(path: str | os.PathLike[str]) -> DiskInfo:
    """What an image file, a block device or a DiskDescriptor.xml is, and how it would be
    copied.

    Reads only.  A tracker is tried out, and not started; nothing is frozen.  DeviceError:
    there is no such file, or it is neither.  FormatError, DescriptorError: it is damaged.
    OpenError: a part of it cannot be opened.
    """
    report = _gather(os.fspath(path))
    device, tracker = report["device"], report["tracker"]
    return DiskInfo(
        **report
        | {
            "chain": tuple(DeltaInfo(**d) for d in report["chain"]),
            "device": None if device is None else DeviceInfo(**device),
            "mounts": tuple(MountInfo(**m) for m in report["mounts"]),
            "users": tuple(UserInfo(**u) for u in report["users"]),
            "tracker": None if tracker is None else TrackerInfo(**tracker),
            "notes": tuple(report["notes"]),
        }
    )


def _gather(path: str) -> Report:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISBLK(mode):
            return _of_device(path)
        if stat.S_ISDIR(mode) and os.path.exists(os.path.join(path, disk_descriptor.NAME)):
            raise DeviceError(
                f"{path} is a directory: name {os.path.join(path, disk_descriptor.NAME)}",
                path=path,
            )
        if path.lower().endswith(".xml"):
            return _of_descriptor(path)
        return _of_image(path)
    except OSError as e:
        raise DeviceError.of(f"cannot inspect {path}", e) from e
    except ValueError as e:  # a NUL in the name
        raise DeviceError(f"cannot inspect {path!r}: {e}") from e


def _empty(path: str, kind: str) -> Report:
    return {
        "path": path,
        "kind": kind,
        "format": "raw",
        "version": None,
        "size": None,
        "file_size": None,
        "cluster": None,
        "allocated": None,
        "data": None,
        "in_use": None,
        "chain": [],
        "device": None,
        "mounts": [],
        "users": [],
        "tracker": None,
        "notes": [],
    }


def _of_image(path: str) -> Report:
    report = _empty(path, "image")
    found = image.inspect(path)
    _put_image(report, found)
    _put_serving(report, path)
    return report


def _put_image(report: Report, found: Image) -> None:
    header = found.header
    report["notes"] += found.notes
    report.update(
        format=found.format,
        size=found.size,
        file_size=found.file_size,
        allocated=found.allocated,
        data=found.data,
        in_use=found.in_use,
    )
    if header is None:
        if found.signed:
            report["notes"].append("a raw image whose first bytes are a ploop1 signature")
        return
    report.update(version=header.version, cluster=header.cluster)
    if header.cluster & (header.cluster - 1):
        report["notes"].append(
            "the ploop driver takes clusters of a power of two only: it cannot use this image"
        )
    if not header.in_use and header.in_use_value not in image.CLOSED:
        report["notes"].append(f"unknown value {header.in_use_value:#x} of the in-use field")


def _of_descriptor(path: str) -> Report:
    report = _empty(path, "descriptor")
    found = disk_descriptor.read(path)
    images = [image.inspect(d.path, d.format, OpenError) for d in found.chain]
    _put_image(report, images[-1])
    report.update(
        size=found.size,
        cluster=found.cluster,
        file_size=sum(i.file_size for i in images),
        allocated=sum(i.allocated for i in images),
        data=sum(i.data for i in images),
        chain=[
            {
                "guid": delta.guid,
                "parent": delta.parent,
                "path": delta.path,
                "format": i.format,
                "version": i.header.version if i.header else None,
                "size": i.size,
                "file_size": i.file_size,
                "allocated": i.allocated,
                "data": i.data,
                "in_use": i.in_use,
            }
            for delta, i in zip(found.chain, images, strict=True)
        ],
    )
    _compare(report, found, images)
    _put_serving(report, found.top.path)
    return report


def _compare(report: Report, found: Descriptor, images: list[Image]) -> None:
    """Note where the descriptor and its deltas disagree.  A lower delta may be
    smaller: the disk has grown since."""
    notes = report["notes"]
    if images[-1].size != found.size:
        notes.append(f"the descriptor says {found.size} bytes, its top delta {images[-1].size}")
    for delta, i in zip(found.chain, images, strict=True):
        if i.header and i.header.cluster != found.cluster:
            notes.append(
                f"the descriptor says clusters of {found.cluster} bytes, "
                f"{delta.path} has {i.header.cluster}"
            )
        if i.in_use and delta is not found.top:
            notes.append(f"{delta.path} is marked as in use, but is not the top delta")
    if found.others:
        notes.append(f"{found.others} other images belong to snapshots that are not in the chain")


def _put_serving(report: Report, path: str) -> None:
    """The device that serves an image file, if one does, and the tracker."""
    device = disk_descriptor.serving_ploop(path)
    if device is None:
        loops = sysblock.loop_device_of(path)
        if len(loops) > 1:
            report["notes"].append(f"attached to {', '.join(loops)}: name the device to copy")
            report["tracker"] = _no_tracker("several devices serve the image")
            return
        device = loops[0] if loops else None
    if device is not None and report["format"] == "ploop1" and not _is_ploop(device):
        report["notes"].append(f"{device} shows the bytes of the file, not of the disk in it")
    _put_device(report, device or path)


def _of_device(path: str) -> Report:
    report = _empty(path, "device")
    source = _put_device(report, path)
    report.update(format=source.image_format, size=source.size)
    if source.is_image:
        report["cluster"] = source.cluster
        found = image.inspect(source.image, source_format(source), OpenError)
        _put_image(report, found)
    return report


def source_format(source: Source) -> image.Format:
    return "ploop1" if source.image_format == "ploop1" else "raw"


def _is_ploop(device: str) -> bool:
    return os.path.basename(device).startswith("ploop")


def _put_device(report: Report, path: str) -> Source:
    """How `path` would be read and tracked.  Returns the source, closed."""
    try:
        source = _open(report, path)
    except PyploopError as e:
        if not _is_denied(e):
            raise
        source = _unopened(path)
        why = f"not known to this user: {e}"
        source.io_mode = why
        report["tracker"] = _no_tracker(why)
    try:
        if source.is_device:
            report["device"] = _device(source)
            report["mounts"] = [
                {"point": m.point, "fstype": m.fstype, "source": m.source} for m in source.mounts
            ]
        report["users"] = _users(source)
        if report["tracker"] is None:
            report["tracker"] = _tracker(source)
        if report["kind"] == "device" and source.sparse_fd is not None:
            report["data"] = sum(end - start for start, end in source.holes()[0])
        report["notes"] += source.notes
    finally:
        source.close()
    return source


def _users(source: Source) -> list[Report]:
    found = [] if source.monitor is None else source.monitor.found.users
    return [
        {"device": u.device, "what": u.what, "state": u.state, "advice": u.advice or None}
        for u in found
    ]


def _open(report: Report, path: str) -> Source:
    try:
        return open_source(path)
    except OpenError as e:
        # Used in a way that a copy cannot be right with: the rest is still true.
        source = open_source(path, to_freeze=False)
        found = Found() if source.monitor is None else source.monitor.look()
        source.mounts = found.mounts
        report["notes"] += [refusal([u]) for u in found.unknown] or [str(e)]
        return source


def _is_denied(e: BaseException) -> bool:
    """Some call failed for want of a privilege."""
    cause: BaseException | None = e
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM):
            return True
        cause = cause.__cause__
    return False


def _unopened(path: str) -> Source:
    """What sysfs and mountinfo tell about a device that cannot be opened."""
    st = os.stat(path)
    if not stat.S_ISBLK(st.st_mode):
        raise DeviceError(f"cannot open the source {path}: {os.strerror(errno.EACCES)}", path=path)
    block = sysblock.find((os.major(st.st_rdev), os.minor(st.st_rdev)))
    mounts = mount_table.mounts_of(sysblock.stacked_on(block), Path("/proc/self/mountinfo"))
    return Source(path, "block", block.size, -1, block=block, mounts=mounts)


def _device(source: Source) -> Report:
    block = source.block
    return {
        "path": source.path,
        "kind": source.kind,
        "size": source.size,
        "disk": block.disk if block else None,
        "partition_offset": block.start if block and block.is_partition else None,
        "backing_file": _backing_file(source, block),
        "io_mode": source.io_mode,
    }


def _backing_file(source: Source, block: BlockDevice | None) -> str | None:
    if source.is_image:
        return source.image
    if block is None or not block.disk.startswith("loop"):
        return None
    try:
        return sysblock.backing_file(block.disk)
    except SysfsError:  # detached meanwhile
        return None


def _tracker(source: Source) -> Report:
    try:
        tracker = choose("auto", source)
    except PyploopError as e:
        return _no_tracker(str(e))
    tracker.stop(False)
    return {"name": tracker.name, "why": tracker.why}


def _no_tracker(why: str) -> Report:
    return {"name": None, "why": why}
