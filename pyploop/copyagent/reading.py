# SPDX-License-Identifier: Apache-2.0
"""What `pyploop verify` asks an agent for: the hashes of a file or device there."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from pyploop._core import Proof
from pyploop.diskcopy import proof as proofs
from pyploop.diskcopy import receipt
from pyploop.disks import opening
from pyploop.disks.source import Source
from pyploop.errors import FormatError, ParameterError, ProtocolError
from pyploop.wire import copy_messages


class Reading:
    """One file or device.  Call `close` on every path."""

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        self._source: Source | None = None
        self._proof: Proof | None = None

    def look(self, path: str) -> dict[str, Any]:
        """Open it.  Of a receipt: its text."""
        if self._source is not None:
            raise ProtocolError("agent protocol: `look` must come once")
        text = receipt.text_of(path)
        if text is not None:
            if len(text) > copy_messages.LONGEST_RECEIPT:
                raise FormatError(f"{path} is larger than any receipt", path=path)
            found = base64.b64encode(text).decode()
            return {"size": 0, "device": False, "receipt": found}
        source = opening.open_source(path, to_freeze=False)
        self._undo.callback(source.close)
        self._source = source
        return {"size": source.size, "device": source.is_device, "receipt": None}

    def digest(
        self, size: int, begun: Callable[[Callable[[], None]], None]
    ) -> Callable[[], dict[str, Any]]:
        """What reads its first `size` bytes, and returns their root.  begun: as `opened` of
        receipt.digest."""
        source = self._source
        if source is None:
            raise ProtocolError("agent protocol: `digest` must come after `look`")
        if size > source.size:
            raise ParameterError(f"{source.path} has {source.size} bytes, and not {size}")

        def read() -> dict[str, Any]:
            self._proof = receipt.digest(source, size, begun)
            begun(lambda: None)  # what has read it is not needed any more
            return {"root": self._proof.root().hex()}

        return read

    def hashes(self, level: int, nodes: Sequence[int]) -> dict[str, Any]:
        """The children of these nodes."""
        if self._proof is None:
            raise ProtocolError("agent protocol: `hashes` must come after `digest` is done")
        found = b"".join(proofs.children(self._proof, level, node) for node in nodes)
        return {"hashes": base64.b64encode(found).decode()}

    def close(self) -> None:
        self._undo.close()
