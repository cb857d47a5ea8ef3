# SPDX-License-Identifier: Apache-2.0
"""The static files: they are copied before the disks, while the container runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container, Sequence

from pyploop.diskcopy.options import Options
from pyploop.migration import deadlines, file_stream
from pyploop.migration.source.agent_client import Remote
from pyploop.migration.source.file_delta import send_file
from pyploop.migration.source.remote_digests import RemoteDigests
from pyploop.report.events import Reporter
from pyploop.runtimes import Item


def send_items(
    items: Sequence[Item],
    remote: Remote,
    options: Options,
    report: Reporter,
    kept: Container[str] = (),
) -> None:
    """Send the configuration and lower deltas.  They are durable on the target when this
    returns.  kept: names of what the target can reuse."""
    known = {item.label: os.stat(item.path).st_size for item in items if item.label in kept}
    with contextlib.ExitStack() as stack:
        digests = None
        if known:
            digests = stack.enter_context(RemoteDigests(remote, [*known.items()], options.stall))
        number, fd = remote.open_channel()
        out = stack.enter_context(file_stream.Writer(fd, options.stall))
        remote.call("items", deadlines.REQUEST, channel=number)
        for item in items:
            label, path = item.label, item.path
            if digests is not None and label in known:
                found = send_file(out, label, path, known[label], digests.reader)
                digests.log(report, label, found)
                continue
            out.file(label, path)
        out.end()
        remote.call("join", options.stall, name="items", timeout=options.stall)
