# SPDX-License-Identifier: Apache-2.0
"""The cgroups of a dump against config.json: where they lie, and which devices they
allow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pyploop.runtimes.config import within
from pyploop.runtimes.oci import config_json
from pyploop.runtimes.oci.image_files import Images
from pyploop.wire.protobuf import Message

_RULE = re.compile(r"([abc]) ([0-9]{1,10}|\*):([0-9]{1,10}|\*) ([rwm]{1,3})")


class Cgroups:
    """The cgroups of the images."""

    def __init__(self, images: Images, config: dict[str, Any]) -> None:
        self._images, self._linux = images, config["linux"]

    def check(self, entry: Message) -> None:
        """Each controller has one folder, with all cgroups of the container.  runc tells
        CRIU where that folder is on this host.  Others would stay where they were."""
        tops: dict[str, set[str]] = {}
        for group in entry.messages(1):
            for member in group.messages(2):
                name, path = member.text(1) or "", member.text(2) or ""
                if ".." in path.split("/"):
                    self._images.refuse(f"has the cgroup {path!r}, which leads upwards")
                for part in name.split(","):  # mounted together
                    tops.setdefault(part, set()).add(path)
        for controller in entry.messages(2):
            folders = controller.messages(2)
            if len(folders) > 1:
                self._images.refuse("has more than one cgroup for a controller")
            for folder in folders:
                name = "/" + (folder.text(1) or "").strip("/")
                members = set().union(*(tops.get(c, set()) for c in controller.texts(1)))
                if name == "/" or not members or not all(within(path, name) for path in members):
                    self._images.refuse(
                        f"has the cgroup {name!r}, which does not contain the container"
                    )
                self._folder(folder, 0)

    def _folder(self, folder: Message, depth: int) -> None:
        name = folder.text(1) or ""
        if ".." in name.split("/") or (depth and "/" in name) or depth > 32:
            self._images.refuse(f"has the cgroup {name[:80]!r}, which is not a plain name")
        for prop in folder.messages(3):
            key, value = prop.text(1) or "", prop.text(2) or ""
            if (
                "/" in key
                or key == "release_agent"
                or (key == "notify_on_release" and value.strip() not in ("", "0"))
            ):
                self._images.refuse(f"sets {key[:80]} of a cgroup, which is never restored")
            if key.startswith("devices."):
                self._device_rules(value.splitlines())
        for child in folder.messages(2):
            self._folder(child, depth + 1)

    def _device_rules(self, lines: Iterable[str]) -> None:
        ours = {
            (r["type"], r["major"], r["minor"])
            for r in self._linux["resources"]["devices"]
            if r.get("allow") and "major" in r and "minor" in r
        }
        ours |= {("c", *numbers) for numbers in config_json.RULES}
        for line in filter(None, map(str.strip, lines)):
            found = _RULE.fullmatch(line)
            if found is None:
                self._images.refuse(f"has the device rule {line[:80]!r}, which is not a plain one")
            major, minor = (-1 if n == "*" else int(n) for n in (found[2], found[3]))
            only_made = found[4] == "m" and found[1] != "a"
            if not only_made and (found[1], major, minor) not in ours:
                self._images.refuse(f"allows the device {line[:80]!r}, but config.json does not")
