# SPDX-License-Identifier: Apache-2.0
"""The receiving end of a copy: `receive`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pyploop.api.copying import HasFileno
from pyploop.api.reporting import make_reporter
from pyploop.diskcopy import receiver, replies
from pyploop.diskcopy.write_mode import WRITES, Write
from pyploop.errors import ParameterError
from pyploop.report.events import Reporter
from pyploop.system import descriptors

if TYPE_CHECKING:
    from pyploop.report.event_types import Event
    from pyploop.report.results import ReceiveResult


def receive(
    target: str | os.PathLike[str],
    stream: int | HasFileno,
    *,
    feedback: int | None = None,
    timeout: float = 600.0,
    protocol: Literal["auto", "packets"] = "auto",
    to_device: bool = False,
    write: Write = "auto",
    on_event: Callable[[Event], None] | None = None,
    reporter: Reporter | None = None,
) -> ReceiveResult:
    """Receive one image from a sender into the new file `target`.

    stream: pipe or socket, or its descriptor; it is read until the image ends and not
    further, and stays the caller's.  feedback: descriptor on which a sender behind a pipe
    is answered.  timeout: seconds without a byte after which it fails, 0: never.
    protocol: `packets` tells the sender of a failure before its first byte, too; else its
    protocol is seen by that.  to_device: onto the block device `target`, which is overwritten.
    write, on_event, reporter: as for Copy.

    When it returns, the file is complete and durable under its name.  When it raises there
    is none, unless the message says so: CreateError (it exists), ParameterError (what is
    given is no stream), ReadError (the stream ended early, or is silent), ProtocolError,
    TooLargeError, WriteError, SyncError.
    """
    if write not in WRITES:
        raise ParameterError(f"write={write!r}: it must be one of {', '.join(WRITES)}")
    fd = stream if isinstance(stream, int) else stream.fileno()
    descriptors.check_stream(fd, "descriptor")
    if feedback is not None:
        descriptors.check_stream(feedback, "feedback descriptor")
    got = receiver.receive(
        os.fspath(target),
        fd,
        feedback,
        reporter or make_reporter(on_event),
        timeout,
        expected=replies.Replies(fd) if protocol == "packets" else None,
        to_device=to_device,
        write=write,
    )
    from pyploop.report.results import ReceiveResult  # its sender has its answer by now

    return ReceiveResult(**got.fields())
