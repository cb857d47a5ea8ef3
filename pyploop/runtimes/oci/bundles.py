# SPDX-License-Identifier: Apache-2.0
"""The OCI bundle of a container: reading its config.json, and fitting it to this
host."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.config import ContainerConfig
from pyploop.runtimes.oci import config_json, json_shapes

CONFIG = "config.json"
RECEIVED = "config.json.received"
"""The source's config.json, until it is checked and written anew.  No runtime reads a file
of this name."""
CRIU = "criu.conf"
"""Options for CRIU, beside config.json.  The annotation org.criu.config names it."""
LARGEST = 1 << 17
"""Bytes of a config.json at most: it is sent in one message."""


def read(bundle: str, name: str = CONFIG) -> dict[str, Any]:
    """The parsed config.json.  MigrateError(15) when it cannot be read."""
    path = Path(bundle) / name
    try:
        with path.open("rb") as f:
            data = f.read(LARGEST + 1)  # not more of a larger one, which may be sparse
        config = json_shapes.loads(data) if len(data) <= LARGEST else None
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else str(e)
        raise MigrateError(
            VzExitCode.BAD_CONFIG, f"cannot read {path}: {why}", path=str(path)
        ) from e
    if not isinstance(config, dict):
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"{path} is not a container's configuration: it must be one JSON object, of at most "
            f"{LARGEST >> 10} KiB",
            path=str(path),
        )
    return config


def write(bundle: str, config: dict[str, Any], criu_options: Sequence[str] = ()) -> None:
    """Replace config.json: durable, and in one step."""
    _replace(Path(bundle) / CONFIG, json.dumps(config, indent=1))
    write_criu(bundle, criu_options)


def paths_of(config: dict[str, Any]) -> list[str]:
    """Paths of this host that a fitted configuration names: the root and the sources of
    binds."""
    binds = [m["source"] for m in config.get("mounts", []) if m["type"] == "bind"]
    return [p for p in (config.get("root", {}).get("path"), *binds) if p]


def memory_limit(config: dict[str, Any]) -> int:
    """Bytes that the container's processes may use; 0: any number."""
    resources = config.get("linux", {}).get("resources") or {}
    limit = (resources.get("memory") or {}).get("limit")
    return limit if isinstance(limit, int) and limit > 0 else 0


def write_criu(bundle: str, options: Sequence[str] = ()) -> None:
    """Write CRIU's options for this container.  options: more lines.

    CRIU must not lock the network itself: the lock would stay in the network namespace,
    which this host made and the container only uses."""
    lines = ("network-lock skip", *options)
    (Path(bundle) / CRIU).write_text("".join(f"{line}\n" for line in lines))


def forget_hook(bundle: str) -> None:
    """Drop the hook of an agent of an older version that was killed.  A dump calls the hook too.
    Nobody would answer it, so it would end the container."""
    try:
        text = (Path(bundle) / CRIU).read_text()
    except OSError:
        return
    if re.search(r'^action-script "?/.*/pyploop-[0-9a-f]+/hook"?$', text, re.MULTILINE):
        write_criu(bundle)


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
    """The source's configuration, written anew with the paths, cgroup and network namespace
    of this host, as the policy here allows it.

    paths: path in config.json -> as the source's migrate.toml writes it.  mounts: how
    those paths begin at the source -> here.  MigrateError(15) when it asks for more
    than the policy allows.
    """
    return config_json.fit(config, paths, mounts, ours, f"{ours.bundle}/{CRIU}")
