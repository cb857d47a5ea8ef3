# SPDX-License-Identifier: Apache-2.0
"""Memory images are sent while CRIU writes them."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, PyploopError, WriteError
from pyploop.migration import deadlines
from pyploop.migration.image_channels import ImageWriter
from pyploop.migration.source import tmpfs_images
from pyploop.migration.source.agent_client import Remote
from pyploop.system import kernel
from pyploop.system.jobs import Job
from pyploop.transport import deadlines as connection

LOOK = 0.1
"""Seconds between two looks at the folder, whatever the kernel reports of it."""
LOOK_UNTOLD = 0.01
"""The same when the kernel reports nothing: no more inotify instances are allowed."""


Folders = Mapping[str, Path]
"""What comes before the names of its images on the way -> a folder."""


def send_first(folders: Folders, out: ImageWriter) -> list[str]:
    """Send the images that are there before the dump begins; returns their names.  No process
    changes them any more, and the target can use them."""
    first = [(before + p.name, p) for before, p in _files(folders)]
    for name, path in first:
        out.file(name, str(path))
    return [name for name, _ in first]


def _files(folders: Folders) -> list[tuple[str, Path]]:
    """Without the link to a pre-dump's folder."""
    return [(b, p) for b, f in folders.items() for p in sorted(f.iterdir()) if p.is_file()]


def stream_dump(
    folders: Folders, out: ImageWriter, dump: Job[Any], sent: Collection[str] = ()
) -> None:
    """Send folders of CRIU images, which are being written until `dump` has ended.
    When the dump fails, its failure is raised here too, and the stream gets no end.
    sent: names of images that were sent before.

    The pages and the files of a tmpfs are nearly all of the data, and are written
    strictly in order, so they are sent as they grow.  CRIU may still change the other
    files, so they are sent at the end.
    """
    at: dict[str, int] = {}
    with _Growth(folders, dump) as growth:
        done = False
        while not done:
            done = growth.wait()
            for before, folder in folders.items():
                for path in (*folder.glob("pages-*.img"), *folder.glob(tmpfs_images.PATTERN)):
                    name = before + path.name
                    at[name] = out.grown(name, path, at.get(name, 0))
    dump.join()
    for before, path in _files(folders):
        name = before + path.name
        if name in at:
            out.complete(name, 0o600, at[name])
        elif name not in sent:
            out.file(name, str(path))
    out.end()


class _Growth:
    """Waits until a file of the folders was written to, or the job is over."""

    def __init__(self, folders: Folders, job: Job[Any]) -> None:
        self._job = job
        self._over = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._over, select.POLLIN)
        self._changes: list[int] = []
        self._look = LOOK
        try:
            for folder in folders.values():
                self._changes.append(kernel.watch_writes(str(folder)))
                self._poll.register(self._changes[-1], select.POLLIN)
        except OSError:
            self._look = LOOK_UNTOLD
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        self._job.over.wait()
        os.eventfd_write(self._over, 1)

    def __enter__(self) -> _Growth:
        self._watcher.start()
        return self

    def __exit__(self, *exc: object) -> None:
        # Nobody waits for it.  The dump may go on, and its end comes; and to close what
        # reports the writes takes the kernel up to 20 ms, while the container is suspended.
        threading.Thread(target=self._close, daemon=True).start()

    def _close(self) -> None:
        self._watcher.join()
        os.close(self._over)
        for fd in self._changes:
            os.close(fd)

    def wait(self) -> bool:
        """Whether the job is over.  Its last writes came before that."""
        ready = dict(self._poll.poll(self._look * 1000))
        for fd in ready.keys() & {*self._changes}:
            os.read(fd, 65536)
        return self._over in ready


def explained(remote: Remote, name: str, join: Callable[[], object]) -> None:
    """Wait for a stream that sends what the target calls `name`.  When the target ended it,
    the failure is the target's own, which no broken channel tells: a full images_dir, say."""
    try:
        join()
    except WriteError as e:
        if remote.alive():
            try:
                remote.call("join", deadlines.REQUEST, name=name, timeout=connection.GLANCE)
            except MigrateError as why:
                raise why from e
            except PyploopError:
                pass  # the stream's failure is what is known
        raise
