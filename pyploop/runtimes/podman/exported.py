# SPDX-License-Identifier: Apache-2.0
"""Podman's own description of a container, which another host's Podman can make it from.

It is part of what `podman container checkpoint --export` writes (config.dump, network.status).
`podman inspect` does not tell all of it.  So Podman is asked for a checkpoint in which
criu_stub.py stands in CRIU's place: the container runs on meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.oci import json_shapes
from pyploop.runtimes.podman import criu_stub
from pyploop.runtimes.podman.command import Podman, program_path
from pyploop.runtimes.podman.found import Found
from pyploop.system import private_folder

LARGEST = 1 << 18
"""Bytes of one description at most: it is sent in one message."""
LEFT = ("dump.log", "stats-dump", "config.dump", "spec.dump", "network.status")
"""What Podman may leave in the container's folder."""
IMAGES, ASIDE = "checkpoint", "checkpoint.pyploop"
"""Where Podman wants the images of a checkpoint, and where those are meanwhile that a user has
kept there."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,255}")
"""Of a volume, a network or a secret."""
MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


@dataclass(frozen=True)
class Link:
    """A link of the container, as Podman has made it."""

    name: str
    mac: str
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Exported:
    """What Podman says of a container, for another Podman."""

    config: dict[str, Any]
    """Its ContainerConfig (config.dump)."""
    network: dict[str, Any]
    """Name of a network -> its links and addresses (network.status)."""

    @property
    def links(self) -> list[Link]:
        """Sorted by their names."""
        found = []
        for status in self.network.values():
            for name, link in ((status or {}).get("interfaces") or {}).items():
                nets = [
                    str((s or {}).get("ipnet") or "") for s in (link or {}).get("subnets") or ()
                ]
                addresses = tuple(net.partition("/")[0] for net in nets)
                found.append(Link(name, str((link or {}).get("mac_address") or ""), addresses))
        return sorted(found, key=lambda link: link.name)


def export(podman: Podman, found: Found, criu: str) -> Exported:
    """Of a running container.  MigrateError(15)."""
    bundle = Path(found.bundle)
    before = {name for name in LEFT if (bundle / name).exists()}
    # With both, an earlier export was killed.
    if (bundle / IMAGES).exists() and not (bundle / ASIDE).exists():
        (bundle / IMAGES).rename(bundle / ASIDE)
    with private_folder.scratch() as folder:
        script = folder / "criu"
        words = [sys.executable, "-I", "-S", str(Path(criu_stub.__file__))]
        real = shutil.which(criu) or criu
        script.write_text(f'#!/bin/sh\nexec {shlex.join([*words, real])} "$@"\n')
        script.chmod(0o700)
        archive = folder / "export.tar"
        try:
            podman.run(
                *("container", "checkpoint", f"--export={archive}", "--compress=none"),
                *("--leave-running", "--ignore-rootfs", "--ignore-volumes"),
                *("--tcp-established", "--file-locks", found.id),
                env={**os.environ, "PATH": f"{folder}:{program_path()}"},
            )
            with tarfile.open(archive) as tar:
                return Exported(_read(tar, "config.dump"), _read(tar, "network.status", {}))
        except (OSError, tarfile.TarError) as e:
            raise MigrateError(
                VzExitCode.BAD_CONFIG, f"cannot read what podman exported of {found.name}: {e}"
            ) from e
        finally:
            _tidy(bundle, before)


def _tidy(bundle: Path, before: set[str]) -> None:
    shutil.rmtree(bundle / IMAGES, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        (bundle / ASIDE).rename(bundle / IMAGES)
    for name in LEFT:
        if name not in before:
            with contextlib.suppress(OSError):
                (bundle / name).unlink()


def _read(
    tar: tarfile.TarFile, name: str, otherwise: dict[str, Any] | None = None
) -> dict[str, Any]:
    try:
        f = tar.extractfile(name)
    except KeyError:
        f = None
    if f is None:
        if otherwise is not None:
            return otherwise
        raise MigrateError(VzExitCode.BAD_CONFIG, f"podman's export has no {name}")
    data = f.read(LARGEST + 1)
    try:
        found = json_shapes.loads(data) if len(data) <= LARGEST else None
    except ValueError as e:
        raise MigrateError(VzExitCode.BAD_CONFIG, f"{name} of podman's export: {e}") from e
    if found is None and otherwise is not None:
        return otherwise
    if not isinstance(found, dict):
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{name} of podman's export must be one JSON object of at most {LARGEST >> 10} KiB",
        )
    return found
