# SPDX-License-Identifier: Apache-2.0
"""What pyploop consists of, as CycloneDX 1.6 (JSON) on stdout: the installed
package, what it needs at run time, what is compiled into it, and what it calls.

    python3 .ci/sbom.py > sbom.cdx.json     by the interpreter that has pyploop
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

COMPILED = {
    "libxxhash-dev": "headers of xxHash, compiled into _core",
    "libzstd1": "_core: compressed frames",
}
CALLED = {
    "openssh-client": "migrate: the connection",
    "rsync": "migrate: directories",
    "runc": "migrate: runc containers",
    "criu": "migrate --live: runc containers",
    "podman": "migrate: Podman's containers",
    "nftables": "migrate --live: Podman's containers",
}
"""Debian packages: what they are for."""
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def purl(found: Distribution) -> str:
    name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
    return f"pkg:pypi/{name}@{found.version}"


def needed(found: Distribution) -> list[str]:
    """Names of what it requires, without extras."""
    lines = found.requires or []
    return [m[0] for x in lines if "extra ==" not in x and (m := _NAME.match(x))]


def component(found: Distribution, kind: str = "library") -> dict[str, Any]:
    made: dict[str, Any] = {
        "type": kind,
        "bom-ref": purl(found),
        "name": found.metadata["Name"],
        "version": found.version,
        "purl": purl(found),
    }
    words = found.metadata.get("License-Expression")
    if words:
        made["licenses"] = [{"expression": words}]
    elif words := found.metadata.get("License"):
        made["licenses"] = [{"license": {"name": words.split("\n")[0][:80]}}]
    return made


def debian(name: str, what: str, scope: str) -> dict[str, Any]:
    """A Debian package; without a version where it is not installed."""
    query = ["dpkg-query", "-W", "-f", "${Version}", name]
    try:
        version = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:  # no Debian
        version = ""
    ref = f"pkg:deb/debian/{name}" + (f"@{version}" if version else "")
    made = {"type": "library" if scope == "required" else "application", "bom-ref": ref}
    made |= {"name": name, "description": what, "scope": scope, "purl": ref}
    return made | ({"version": version} if version else {})


def bill() -> dict[str, Any]:
    top = distribution("pyploop")
    found = {top.metadata["Name"]: top}
    edges: dict[str, list[str]] = {}
    todo = [top]
    while todo:
        one = todo.pop()
        below = []
        for name in needed(one):
            try:
                there = distribution(name)
            except PackageNotFoundError:  # of another Python or system
                continue
            below.append(purl(there))
            if there.metadata["Name"] not in found:
                found[there.metadata["Name"]] = there
                todo.append(there)
        edges[purl(one)] = sorted(below)
    others = [debian(n, w, "required") for n, w in COMPILED.items()]
    others += [debian(n, w, "optional") for n, w in CALLED.items()]
    edges[purl(top)] += [o["bom-ref"] for o in others]
    parts = [component(d) for n, d in sorted(found.items()) if d is not top] + others
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([purl(top), parts]))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {"component": component(top, "application")},
        "components": parts,
        "dependencies": [{"ref": ref, "dependsOn": on} for ref, on in sorted(edges.items())],
    }


if __name__ == "__main__":
    json.dump(bill(), sys.stdout, indent=1)
    sys.stdout.write("\n")
