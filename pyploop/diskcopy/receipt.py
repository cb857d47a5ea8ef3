# SPDX-License-Identifier: Apache-2.0
"""The receipt of a copy: what its target must hold, and how that is known
(docs/reference/receipt.md).  And the digests of a file or device, to compare with it."""

from __future__ import annotations

import base64
import errno
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pyploop import __version__, _core
from pyploop._core import Extents, Fault, Proof, Pump
from pyploop.disks.source import Source
from pyploop.errors import FormatError, OpenError, ParameterError, ReadError, WriteError
from pyploop.system import shared_folder
from pyploop.system.worker import run_cancellable
from pyploop.units import BLOCK, MIB

if TYPE_CHECKING:
    from pyploop.diskcopy.context import Context

SCHEMA = "pyploop.receipt/1"
HASH = "XXH3-64 of 4 KiB, XXH3-128 of 256"
PARTS = 4096
"""Most hashes of parts in a receipt: 87 KiB of text."""
LONGEST = MIB
"""Bytes of a receipt at most."""
_AS_THERE = ("tracker", "completeness", "acknowledged", "proven", "dialect")
"""Fields that the summary has, too."""
CLUSTER, SLOTS = MIB, 8
"""Bytes of one read, and reads under way."""
NODE = 16
_UNITS = [BLOCK * _core.PROOF_FANOUT**n for n in range(1, 7)]
"""Bytes of the image that a node stands for, by its level."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a target must hold.  Sizes in bytes, times as in ISO 8601."""

    size: int
    root: str
    part: int
    """Bytes of the image that one of `parts` stands for."""
    parts: str
    """Their hashes, 16 bytes each, in base64."""
    source: str
    source_host: str
    target: str | None
    target_host: str | None
    """None: the sender does not know it."""
    began: str
    frozen: str | None
    """When the source was stopped or frozen: the moment that the image shows.  None: it was
    not."""
    ended: str
    tracker: str
    completeness: str
    acknowledged: str
    proven: bool
    """The receiver has compared the root with that of what it wrote."""
    unsafe: tuple[str, ...]
    dialect: str
    schema: str = SCHEMA
    hash: str = HASH
    block: int = BLOCK
    pyploop: str = __version__

    def write(self, path: str) -> None:
        """WriteError."""
        try:
            with shared_folder.open_log(path) as f:
                f.write(json.dumps(asdict(self), indent=1) + "\n")
        except (OSError, OpenError) as e:
            raise WriteError(
                f"the target is complete, but the receipt {path} cannot be written: "
                f"{getattr(e, 'strerror', None) or e}",
                path=path,
            ) from e

    @classmethod
    def read(cls, path: str) -> Receipt | None:
        """As `parse` of `text_of`."""
        text = text_of(path)
        return None if text is None else cls.parse(text, path)

    @classmethod
    def parse(cls, text: str | bytes, path: str) -> Receipt:
        """path: where it is, for messages.  FormatError: it is damaged, or of another
        version."""
        try:
            made = json.loads(text)
            made["unsafe"] = tuple(made["unsafe"])
            receipt = cls(**made)
            receipt._check()
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise FormatError(
                f"{path} is a receipt that is damaged, or of another version of pyploop: {e}",
                path=path,
            ) from e
        return receipt

    def _check(self) -> None:
        if (self.schema, self.hash, self.block) != (SCHEMA, HASH, BLOCK):
            raise ValueError(f"{self.schema!r} with {self.hash!r}")
        sizes = (self.size, self.part)
        if not all(isinstance(n, int) and 0 <= n < 1 << 63 for n in sizes) or not self.part:
            raise ValueError(f"sizes {sizes}")
        if self.part not in _UNITS:
            raise ValueError(f"parts of {self.part} bytes")
        if len(bytes.fromhex(self.root)) != NODE:
            raise ValueError("the root is not 16 bytes")
        if len(self.nodes) != max(-(-self.size // self.part), 1) * NODE:
            raise ValueError("there is not a hash for each part")

    @property
    def nodes(self) -> bytes:
        """The hashes of the parts."""
        return base64.b64decode(self.parts, validate=True)


def text_of(path: str) -> bytes | None:
    """Of a file that is a receipt, perhaps a damaged one; None: it is none.  ReadError."""
    try:
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as f:
            text = f.read(LONGEST + 1)
    except OSError as e:
        raise ReadError.of(f"cannot read {path}", e, path=path) from e
    ours = text.startswith(b"{") and b'"pyploop.receipt/' in text and len(text) <= LONGEST
    return text if ours else None


def check_place(path: str, target: str | None) -> None:
    """Before the first byte: WriteError when a receipt cannot be written there; ParameterError
    when it would replace the target, or a device.  target: its path; None: it has none here."""
    try:
        shared_folder.check_links(path)
        folder = os.path.dirname(path) or "."
        there = os.path.exists(path)
        if there and stat.S_ISBLK(os.stat(path).st_mode):
            raise ParameterError(
                f"--receipt {path} is a block device, which it would overwrite; nothing was copied",
                path=path,
            )
        if target is not None and os.path.realpath(target) == os.path.realpath(path):
            raise ParameterError(
                f"--receipt {path} is the target itself; nothing was copied", path=path
            )
        if os.path.isdir(path):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.path.isdir(folder):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if not os.access(path if there else folder, os.W_OK, effective_ids=True):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, OpenError) as e:
        why = getattr(e, "strerror", None) or e
        raise WriteError(
            f"the receipt {path} cannot be written: {why}; nothing was copied", path=path
        ) from e


def of_copy(c: Context) -> Receipt:
    """Of a copy whose target is durable, by its sender."""
    assert c.source_pump.proof is not None
    spans, options = c.recorder.spans, c.options
    frozen = [s.start for s in spans if s.stage == "frozen"] if c.stops else []
    return make(
        c.source_pump.proof,
        vars(c.summary),
        source=(os.path.abspath(c.source.path), host()),
        target=(options.target, options.target_host),
        times=(spans[0].start, frozen[0] if frozen else None, time.monotonic()),
    )


def make(
    proof: Proof,
    summary: dict[str, Any],
    *,
    source: tuple[str, str],
    target: tuple[str | None, str | None],
    times: tuple[float, float | None, float],
) -> Receipt:
    """summary: the fields of CopyResult.  source, target: path and host.  times: when it began,
    when the source was frozen, and when it ended, by time.monotonic()."""
    part, parts = _parts(proof)
    began, frozen, ended = times
    return Receipt(
        size=proof.size,
        root=proof.root().hex(),
        part=part,
        parts=parts,
        source=source[0],
        source_host=source[1],
        target=target[0],
        target_host=target[1],
        began=_date(began),
        frozen=None if frozen is None else _date(frozen),
        ended=_date(ended),
        unsafe=tuple(summary["unsafe"]),
        **{name: summary[name] for name in _AS_THERE},
    )


def _date(at: float) -> str:
    """ISO 8601 of a time.monotonic()."""
    return datetime.fromtimestamp(time.time() - time.monotonic() + at, UTC).isoformat()


def _parts(proof: Proof) -> tuple[int, str]:
    """`part` and `parts` of a receipt."""
    level = next(n for n in range(proof.levels) if len(proof.nodes(n)) <= PARTS * NODE)
    unit = BLOCK * _core.PROOF_FANOUT ** (level + 1)
    return unit, base64.b64encode(proof.nodes(level)).decode()


def digest(
    source: Source, size: int, opened: Callable[[Callable[[], None]], None] = lambda _: None
) -> Proof:
    """Read the first `size` bytes of a source into a proof.  opened: called with what cancels
    that from another thread.  ReadError."""
    proof = Proof(size)
    if not source.is_device:
        # So that it is what the disk has: a page cache may hide that it has not.
        os.posix_fadvise(source.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    tail = source.tail if size == source.size else None
    pump = Pump(
        src_fd=source.fd,
        src_base=source.base,
        size=size,
        align=source.align,
        out_fd=-1,
        sink=_core.SINK_NONE,
        cluster=CLUSTER,
        slots=SLOTS,
        readers=1 if source.align == 1 else 4,
        proof=proof,
        tail=0 if tail is None else tail.size,
        tail_fd=-1 if tail is None else tail.fd,
        tail_pos=0 if tail is None else tail.pos,
    )
    opened(pump.cancel)
    extents = Extents.of(_whole_blocks(source.holes()[0], size))
    try:
        run_cancellable(lambda: pump.run(extents), pump.cancel)
    except Fault as e:
        raise ReadError.of(f"cannot read {source.path} at byte {e.pos}", e, path=source.path) from e
    proof.root()
    return proof


def _whole_blocks(data: list[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """The extents below `size`, widened to blocks without overlap."""
    floor = 0
    for start, end in data:
        first = max(start // BLOCK * BLOCK, floor)
        floor = min(-(-end // BLOCK) * BLOCK, size)
        if first < floor:
            yield first, floor


def wrong_parts(receipt: Receipt, nodes: Callable[[int], bytes]) -> list[tuple[int, int]]:
    """The parts of an image with another root, as (start, end), whose hashes are not the
    receipt's.  nodes: the image's of a level."""
    level, theirs = 0, receipt.nodes
    if len(theirs) == NODE:
        return [(0, receipt.size)]
    while BLOCK * _core.PROOF_FANOUT ** (level + 1) < receipt.part:
        level += 1
    ours = nodes(level)
    found: list[tuple[int, int]] = []
    for i in range(0, len(theirs), NODE):
        if ours[i : i + NODE] != theirs[i : i + NODE]:
            start = i // NODE * receipt.part
            end = min(start + receipt.part, receipt.size)
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
    return found


def host() -> str:
    return os.uname().nodename
