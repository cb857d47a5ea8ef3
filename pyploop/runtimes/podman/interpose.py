# SPDX-License-Identifier: Apache-2.0
"""What Podman runs in the place of conmon, and conmon in the place of runc, while a container
is restored (restored.py).  Each becomes the real program, with other words:

    interpose.py FOLDER conmon WORD…    conmon's: its runtime is FOLDER/runc
    interpose.py FOLDER runc WORD…      runc's: images, CRIU and options are pyploop's

FOLDER has `order.json`:

    conmon, runc   the real programs
    close          descriptors that conmon must not keep: locks of the migration
    images, work   folders, instead of those that Podman names; `images` may be missing: then
                   the restore fails, and Podman has only made the container
    options        further options of `runc restore`
    shm            what is bound to /dev/shm, when a pod shares it
    environment    for runc and CRIU

`spec.json`, the source's config.json, and `criu`, the path of what runc runs as CRIU.  Started
by its path (python -I -S); it imports only the standard library.
"""

import contextlib
import json
import os
import sys
from typing import Any


def conmon(folder: str, order: dict[str, Any], words: list[str]) -> None:
    for fd in order["close"]:
        with contextlib.suppress(OSError):
            os.close(fd)
    if "-r" in words:
        words[words.index("-r") + 1] = f"{folder}/runc"
    os.execv(order["conmon"], [order["conmon"], *words])


def complete(folder: str, bundle: str, shm: str) -> None:
    """Podman makes config.json from what it knew when the container was created, and adds what
    is this host's own.  At a start it would add the volumes and more.  Here all else is as it
    was on the source.  shm: of the pod, for which Podman does not look at a restore."""
    with open(f"{folder}/spec.json") as f:
        spec = json.load(f)
    with open(f"{bundle}/config.json") as f:
        made = json.load(f)
    spec["root"] = made["root"]
    if "cgroupsPath" in made["linux"]:  # a pod has another ID here
        spec["linux"]["cgroupsPath"] = made["linux"]["cgroupsPath"]
    own = {m["destination"]: m for m in made["mounts"]}
    spec["mounts"] = [own.get(m["destination"], m) for m in spec["mounts"]]
    for mount in spec["mounts"]:
        if shm and mount["destination"] == "/dev/shm":
            mount["source"] = shm
        # CRIU does not follow a link to what is bound, as runc does at a start.
        elif {"bind", "rbind"} & {*mount.get("options", ())} and os.path.islink(mount["source"]):
            mount["source"] = os.path.realpath(mount["source"])
    paths = {n["type"]: n for n in made["linux"]["namespaces"]}
    spec["linux"]["namespaces"] = [paths.get(n["type"], n) for n in spec["linux"]["namespaces"]]
    with open(f"{bundle}/config.json.new", "w") as f:
        json.dump(spec, f)
    os.replace(f"{bundle}/config.json.new", f"{bundle}/config.json")


def runc(folder: str, order: dict[str, Any], words: list[str]) -> None:
    if "restore" not in words:
        os.execv(order["runc"], [order["runc"], *words])
    if not order.get("images"):
        raise SystemExit("pyploop: the container was made, and is not restored")
    complete(folder, words[words.index("--bundle") + 1], order["shm"])
    words[words.index("--image-path") + 1] = order["images"]
    words[words.index("--work-path") + 1] = order["work"]
    at = words.index("restore") + 1
    words[at:at] = order["options"]
    with open(f"{folder}/criu") as f:
        criu = f.read()
    argv = [order["runc"], "--criu", criu, *words]
    os.execve(argv[0], argv, {**os.environ, **order["environment"]})


def main() -> None:
    folder, what, *words = sys.argv[1:]
    with open(f"{folder}/order.json") as f:
        order = json.load(f)
    {"conmon": conmon, "runc": runc}[what](folder, order, words)


if __name__ == "__main__":
    main()
