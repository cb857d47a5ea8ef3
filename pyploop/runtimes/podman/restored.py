# SPDX-License-Identifier: Apache-2.0
"""The restore by Podman: `podman container restore --import` of an archive that has only the
description of the container.  Podman makes the container under its own ID and name, with its
root, its network and its monitor, and then runs what stands in runc's place (interpose.py).
That waits, as early.py describes, until the container's files and memory images are there.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyploop.runtimes.podman import interpose
from pyploop.runtimes.podman.exported import Exported
from pyploop.runtimes.runc import loopback

FOLDER = "podman"
"""Beside the images."""
OPTIONS = ("--ignore-rootfs", "--ignore-volumes", "--tcp-established", "--file-locks")


class Order:
    """The folder with all that the restore by Podman needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(
        self,
        exported: Exported,
        spec: dict[str, Any],
        *,
        programs: dict[str, str],
        close: Sequence[int] = (),
        images: Path | None = None,
        work: Path | None = None,
        options: Sequence[str] = (),
        pod: tuple[str, str] = ("", ""),
        close_tcp: bool = False,
    ) -> None:
        """Replace what is there.  programs: podman, conmon, runc.  The rest is as interpose.py
        says.  spec: the source's config.json.  pod: the ID of the pod that it becomes a part of,
        and the folder that is its /dev/shm.  close_tcp: restore TCP connections closed, as their
        addresses are not here.  OSError."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700)
        self._archive(exported)
        (self.folder / "spec.json").write_text(json.dumps(spec))
        order = {
            "conmon": programs["conmon"],
            "runc": programs["runc"],
            "close": list(close),
            "images": str(images or ""),
            "work": str(work or ""),
            "options": list(options),
            "shm": pod[1],
            "environment": {},
        }
        if work is not None:
            assert images is not None
            hold = images.parent / loopback.HOLD
            lines = loopback.options(self.folder, spec, hold)
            lines += ["tcp-close"] if close_tcp else []
            order["environment"] = environment(self.folder, lines)
        (self.folder / "order.json").write_text(json.dumps(order))
        here = shlex.quote(str(self.folder))
        python = shlex.join([sys.executable, "-I", "-S", str(Path(interpose.__file__))])
        for name in ("conmon", "runc"):
            self._script(name, f'exec {python} {here} {name} "$@"')
        command = shlex.join(
            [
                *(programs["podman"], "--conmon", str(self.folder / "conmon")),
                *("container", "restore", f"--import={self.folder / 'made.tar'}", *OPTIONS),
                *([f"--pod={pod[0]}"] if pod[0] else ()),
            ]
        )
        # What it gets as --criu (early.py) is for runc, and Podman has no such option.
        self._script("restore", f'printf %s "$2" >{here}/criu\nexec {command}')

    def _script(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o700)

    def _archive(self, exported: Exported) -> None:
        """What `podman container restore --import` asks for at least."""
        with tarfile.open(self.folder / "made.tar", "w") as tar:
            for name, value in (
                ("config.dump", exported.config),
                ("spec.dump", exported.config["spec"]),
                ("network.status", exported.network),
            ):
                _add(tar, name, json.dumps(value).encode())
            entry = tarfile.TarInfo("checkpoint")
            entry.type, entry.mode = tarfile.DIRTYPE, 0o700
            tar.addfile(entry)
            _add(tar, "checkpoint/inventory.img", b"")  # Podman looks whether it is there


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o600
    tar.addfile(entry, io.BytesIO(data))


def environment(folder: Path, lines: Sequence[str] = ()) -> dict[str, str]:
    """For a CRIU that conmon starts with an empty environment.  lines: further options."""
    from pyploop.runtimes.runc import tmpfs

    made = tmpfs.environment(tmpfs.PLAIN)
    return {
        "PATH": made["PATH"],
        "PYPLOOP_TMPFS": made["PYPLOOP_TMPFS"],
        "CRIU_CONFIG_FILE": str(criu_options(folder, *lines)),
    }


def criu_options(folder: Path, *lines: str) -> Path:
    """CRIU must not lock the network: Podman makes the namespace, and a lock would stay in it.
    The links are cut instead.  lines: further options.  Returns the file, which also has the
    options of the user's own CRIU_CONFIG_FILE."""
    file = folder / "criu.conf"
    own = os.environ.get("CRIU_CONFIG_FILE")
    text = Path(own).read_text() if own and own != str(file) else ""
    file.write_text("\n".join([text, "network-lock skip", *lines, ""]))
    return file
