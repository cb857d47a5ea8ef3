# SPDX-License-Identifier: Apache-2.0
"""DiskDescriptor.xml: the delta files of a disk, from base to top.

ploop and Parallels write it; docs/internals/images.md has its elements.  Unknown elements are
ignored.  A DOCTYPE is refused, so there are no entities but XML's own five.  Sizes are
bytes here and sectors in the file.
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from pyploop.disks import image
from pyploop.disks.image import Format
from pyploop.errors import DescriptorError, DeviceError, OpenError, PyploopError, SysfsError
from pyploop.system import sysblock
from pyploop.units import SECTOR

NAME = "DiskDescriptor.xml"
MAX_SIZE = 1 << 20
MAX_DEPTH = 32
NO_PARENT = "{00000000-0000-0000-0000-000000000000}"
DEFAULT_TOP = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
"""The top delta when there is no TopGUID: Parallels always uses this GUID."""
FORMATS: dict[str, Format] = {"Compressed": "ploop1", "Plain": "raw"}

_GUID = re.compile(r"\{[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\}")


@dataclass(frozen=True)
class Delta:
    """One file of the chain.  `parent` is None in the base."""

    guid: str
    parent: str | None
    path: str
    format: Format


@dataclass(frozen=True)
class Descriptor:
    """`size` and `cluster` (Blocksize) are bytes.  `chain` goes from the base to the top.
    `others` is the number of images of other snapshots, which are not in the chain."""

    path: str
    size: int
    cluster: int
    chain: tuple[Delta, ...]
    others: int = 0
    files: tuple[str, ...] = ()
    """All image files, those of other snapshots included."""

    @property
    def top(self) -> Delta:
        return self.chain[-1]


class _Builder(ET.TreeBuilder):
    """Refuses a DOCTYPE before any entity of it can be used."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise DescriptorError("it has a DOCTYPE, which is not allowed")

    def start(self, tag: str, attrs: dict[str, str], /) -> ET.Element:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise DescriptorError(f"its elements are nested deeper than {MAX_DEPTH}")
        return super().start(tag, attrs)

    def end(self, tag: str, /) -> ET.Element:
        self._depth -= 1
        return super().end(tag)


def read(path: str) -> Descriptor:
    """Read and check a descriptor.  OpenError: it cannot be read.
    DescriptorError, naming the file: it does not describe one chain."""
    fd = image.open_regular(path, OpenError, "the descriptor")
    try:
        with open(fd, "rb") as f:
            data = f.read(MAX_SIZE + 1)
    except OSError as e:
        raise OpenError.of(f"cannot read the descriptor {path}", e) from e
    return parse(data, path)


def parse(data: bytes, path: str) -> Descriptor:
    """The descriptor in `data`; names of files are relative to `path`."""
    try:
        if len(data) > MAX_SIZE:
            raise DescriptorError(f"it is larger than {MAX_SIZE} bytes")
        return _parse(data, path)
    except PyploopError as e:
        raise DescriptorError(f"{path}: {e}", path=path) from e


def _parse(data: bytes, path: str) -> Descriptor:
    parser = ET.XMLParser(target=_Builder())
    try:
        parser.feed(data)
        root = parser.close()
    except (ET.ParseError, ValueError, LookupError) as e:
        raise DescriptorError(f"not XML: {e}") from e
    if root.tag != "Parallels_disk_image":
        raise DescriptorError(f"the root element is {root.tag!r}, not 'Parallels_disk_image'")
    size = _sectors(_only(root, "Disk_Parameters"), "Disk_size")
    storage = _only(_only(root, "StorageData"), "Storage")
    start, end = _sectors(storage, "Start"), _sectors(storage, "End")
    if start or end != size:
        raise DescriptorError(
            f"Storage goes from byte {start} to {end}, and the disk from 0 to {size}"
        )
    cluster = _sectors(storage, "Blocksize")
    if cluster == 0:
        raise DescriptorError("Blocksize is 0")
    images = _images(storage, os.path.dirname(path))
    top, parents = _snapshots(root, images)
    chain = _chain(top, parents, images)
    files = tuple(file for file, _ in images.values())
    return Descriptor(path, size, cluster, chain, len(images) - len(chain), files)


def _children(parent: ET.Element, tag: str) -> list[ET.Element]:
    return [child for child in parent if child.tag == tag]


def _only(parent: ET.Element, tag: str) -> ET.Element:
    found = _children(parent, tag)
    if len(found) != 1:
        raise DescriptorError(f"{parent.tag} has {len(found)} elements {tag} (one expected)")
    return found[0]


def _text(parent: ET.Element, tag: str) -> str:
    text = (_only(parent, tag).text or "").strip()
    if not text:
        raise DescriptorError(f"{tag} in {parent.tag} is empty")
    return text


def _sectors(parent: ET.Element, tag: str) -> int:
    text = _text(parent, tag)
    if not re.fullmatch(r"[0-9]{1,16}", text):
        raise DescriptorError(f"{tag} is {text[:40]!r}, not a number of sectors")
    return int(text) * SECTOR


def _guid(parent: ET.Element, tag: str) -> str:
    text = _text(parent, tag).lower()
    if not _GUID.fullmatch(text):
        raise DescriptorError(f"{tag} in {parent.tag} is {text[:40]!r}, not a GUID in braces")
    return text


def _images(storage: ET.Element, folder: str) -> dict[str, tuple[str, Format]]:
    """GUID -> (path, format)."""
    images: dict[str, tuple[str, Format]] = {}
    files: set[str] = set()
    for element in _children(storage, "Image"):
        guid = _guid(element, "GUID")
        if guid in images:
            raise DescriptorError(f"two Images have the GUID {guid}")
        kind = _text(element, "Type")
        if kind not in FORMATS:
            raise DescriptorError(
                f"Image {guid} has the unknown Type {kind[:40]!r} (known: {', '.join(FORMATS)})"
            )
        path = os.path.join(folder, _text(element, "File"))
        if (plain := os.path.normpath(path)) in files:
            raise DescriptorError(f"two Images have the File {plain[-80:]!r}")
        files.add(plain)
        images[guid] = path, FORMATS[kind]
    if not images:
        raise DescriptorError("it has no Image")
    return images


def _snapshots(
    root: ET.Element, images: dict[str, tuple[str, Format]]
) -> tuple[str, dict[str, str | None]]:
    """(the top's GUID, GUID -> parent)."""
    sections = _children(root, "Snapshots")
    if len(sections) > 1:
        raise DescriptorError(f"it has {len(sections)} elements Snapshots (one expected)")
    parents: dict[str, str | None] = {}
    top = ""
    for section in sections:
        if _children(section, "TopGUID"):
            top = _guid(section, "TopGUID")
        for shot in _children(section, "Shot"):
            guid, parent = _guid(shot, "GUID"), _guid(shot, "ParentGUID")
            if guid in parents:
                raise DescriptorError(f"two Shots have the GUID {guid}")
            parents[guid] = None if parent == NO_PARENT else parent
    if not parents and len(images) == 1:
        # Without snapshots the one image is the disk.
        only = next(iter(images))
        if top in ("", only):
            return only, {only: None}
    if not top and DEFAULT_TOP in parents:
        top = DEFAULT_TOP
    if not top:
        raise DescriptorError("it has no TopGUID, so the top delta is not known")
    if top not in parents:
        raise DescriptorError(f"no Shot has the TopGUID {top}")
    return top, parents


def _chain(
    top: str, parents: dict[str, str | None], images: dict[str, tuple[str, Format]]
) -> tuple[Delta, ...]:
    roots = [guid for guid, parent in parents.items() if parent is None]
    if len(roots) > 1:
        raise DescriptorError(f"several Shots have no parent: {', '.join(roots[:4])}")
    chain: list[Delta] = []
    seen: set[str] = set()
    guid: str | None = top
    while guid is not None:
        if guid in seen:
            raise DescriptorError(f"Shot {guid} is its own ancestor")
        seen.add(guid)
        if guid not in parents:
            raise DescriptorError(f"Shot {chain[-1].guid} has the parent {guid}, which is missing")
        if guid not in images:
            raise DescriptorError(f"Shot {guid} has no Image")
        path, kind = images[guid]
        parent = parents[guid]
        chain.append(Delta(guid, parent, path, kind))
        guid = parent
    for delta in chain[:-1]:
        if delta.format == "raw":
            raise DescriptorError(f"Image {delta.guid} is Plain, but not the base of the chain")
    return tuple(reversed(chain))


def serving_loop(path: str) -> str | None:
    """The loop device on the top delta of this descriptor, as on a kernel without the ploop
    driver; None when there is none.

    It shows the bytes of that file, and a copy carries these.  They are the disk only when
    the chain is one raw delta.  DeviceError when there are several such devices."""
    top = read(path).top.path
    try:
        loops = sysblock.loop_device_of(top)
    except (OSError, ValueError) as e:
        raise OpenError(f"cannot open the top delta {top!r}: {e}") from e
    if len(loops) > 1:
        raise DeviceError(
            f"{top} is attached to {', '.join(loops)}: name the device to use", path=top
        )
    return loops[0] if loops else None


def serving_ploop(delta: str, sys_block: Path = Path("/sys/block")) -> str | None:
    """The ploop device whose top delta is this file (OpenVZ kernels only)."""
    try:
        wanted = os.stat(delta)
    except (OSError, ValueError) as e:
        raise OpenError(f"cannot open the delta {delta!r}: {e}") from e
    for state in sorted(sys_block.glob("ploop*/pstate/top")):
        node = state.parent.parent
        try:
            name = sysblock.text_of(node / "pdelta" / sysblock.attribute(state) / "image")
            st = os.stat(name.rstrip("\n"))
        except (OSError, SysfsError):
            continue
        if (st.st_dev, st.st_ino) == (wanted.st_dev, wanted.st_ino):
            return f"/dev/{node.name}"
    return None
