# SPDX-License-Identifier: Apache-2.0
"""The OCI bundle of a runc container, fitted to the host that it comes to."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.config import ContainerConfig
from pyploop.runtimes.oci import config_json, json_shapes

CONFIG = "config.json"
RECEIVED = "config.json.received"
"""The source's, until it is checked and written anew: no runtime reads this one."""
CRIU = "criu.conf"
"""Beside it; what the annotation org.criu.config names."""
LARGEST = 1 << 17
"""Bytes of a config.json: it travels in a message."""


def read(bundle: str, name: str = CONFIG) -> dict[str, Any]:
    """MigrateError(15) when it is no config.json."""
    path = Path(bundle) / name
    try:
        with path.open("rb") as f:
            data = f.read(LARGEST + 1)  # of a larger one, sparse perhaps, no more
        config = json_shapes.loads(data) if len(data) <= LARGEST else None
    except (OSError, ValueError) as e:
        raise MigrateError(VzExitCode.BAD_CONFIG, f"cannot read {path}: {e}") from e
    if not isinstance(config, dict):
        raise MigrateError(VzExitCode.BAD_CONFIG, f"{path} is not a container's configuration")
    return config


def write(bundle: str, config: dict[str, Any]) -> None:
    """Durable, and in one step."""
    _replace(Path(bundle) / CONFIG, json.dumps(config, indent=1))
    write_criu(bundle, None)


def paths_of(config: dict[str, Any]) -> list[str]:
    """Paths on this host that a fitted configuration names: the root, and what it
    binds."""
    binds = [m["source"] for m in config.get("mounts", []) if m["type"] == "bind"]
    return [p for p in (config.get("root", {}).get("path"), *binds) if p]


def write_criu(bundle: str, script: Path | None) -> None:
    """CRIU's options for this container.  It must not lock the network itself,
    since that lock stays in a namespace which is not the container's own."""
    lines = ["network-lock skip"]
    if script is not None:
        lines.append(f"action-script {script}")
    (Path(bundle) / CRIU).write_text("\n".join(lines) + "\n")


def forget_hook(bundle: str) -> None:
    """Drop the hook of an agent that was killed.  A dump comes by it too, finds
    nobody to ask, and would end the container."""
    try:
        text = (Path(bundle) / CRIU).read_text()
    except OSError:
        return
    if re.search(r"^action-script .*/pyploop-[0-9a-f]+/hook$", text, re.MULTILINE):
        write_criu(bundle, None)


def _replace(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    with open(new, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    new.replace(path)


def adapt(
    config: Any, paths: dict[str, str], mounts: dict[str, str], ours: ContainerConfig
) -> dict[str, Any]:
    """The source's configuration, written anew: with our paths, cgroup and network
    namespace, and as our policy lets it be.

    paths: as they are written in it -> as the source's configuration of pyploop
    writes them.  mounts: of these the beginnings -> ours.  MigrateError(15) when it
    asks for more.
    """
    return config_json.fit(config, paths, mounts, ours, f"{ours.bundle}/{CRIU}")
