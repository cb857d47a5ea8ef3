# SPDX-License-Identifier: Apache-2.0
"""A container's image, for a host whose Podman does not have it: only the layers that the host
lacks go there.

The source reads them from `podman image save`.  The target gives `podman image load` an archive
in which the layers that it has are holes of the same size.  Podman does not read these, because
it looks in its storage for the digest of each layer first.  It checks the digests of the others,
and the image's ID is the digest of its configuration.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import select
import shutil
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Item
from pyploop.runtimes.oci import json_shapes
from pyploop.runtimes.podman.command import LONGEST, Podman
from pyploop.system.commands import Command, last_words

CONFIG = "image.json"
"""Label of the file with the image's configuration and the sizes of its layers."""
LAYER = re.compile(r"layer-([0-9a-f]{64})")
"""Labels of its layers."""
ARCHIVE = "image.tar"
"""The file that `load` makes meanwhile."""
LARGEST_CONFIG = 8 << 20
MOST_LAYERS = 1024
MOST_NAMES = 64
IN_USE = 2
"""Exit status of `podman image rm` when a container uses it."""
_BLOCK = 512
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./:-]{0,254}")


@dataclass(frozen=True)
class Image:
    """An image, as the source's Podman knows it."""

    id: str
    layers: tuple[str, ...] = ()
    """SHA-256 of each uncompressed layer (its diff ID), the lowest first."""
    names: tuple[str, ...] = ()
    """NAME:TAG, all of them."""

    def sent(self) -> dict[str, Any]:
        """For the source facts."""
        return {"layers": list(self.layers), "names": list(self.names)}


def find(podman: Podman, image: str) -> Image:
    """MigrateError(15)."""
    found = podman.inspected("image", image)
    if found is None:
        raise MigrateError(VzExitCode.BAD_CONFIG, f"Podman has no image {image[:12]} on this host")
    layers = (found.get("RootFS") or {}).get("Layers") or ()
    return Image(image, tuple(map(_digest, layers)), tuple(found.get("RepoTags") or ()))


def parse(image: str, sent: Any) -> Image:
    """What the source says of its image.  ValueError, KeyError, TypeError."""
    layers, names = list(sent["layers"]), list(sent["names"])
    if len(layers) > MOST_LAYERS or len(names) > MOST_NAMES:
        raise ValueError("too many layers or names of an image")
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{str(name)[:80]!r} is not the name of an image")
    return Image(image, tuple(map(_digest, layers)), tuple(names))


def _digest(text: Any) -> str:
    found = _DIGEST.fullmatch(str(text))
    if found is None:
        raise ValueError(f"{str(text)[:80]!r} is not a SHA-256")
    return found[1]


# ---- on the source


@dataclass
class _Archive:
    """What was read of `podman image save`."""

    layers: dict[str, IO[bytes]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    config: str = ""


def save(
    podman: Podman, image: str, labels: Collection[str], make_file: Callable[[], IO[bytes]]
) -> list[Item]:
    """The files with these labels.  make_file: a new one, which is open as long as it is
    needed.  MigrateError(6)."""
    wanted = {m[1] for label in labels if (m := LAYER.fullmatch(label))}
    words = ["image", "save", "--format", "docker-archive", image]
    archive = _Archive()
    with _output(podman, words) as out, tarfile.open(fileobj=out, mode="r|") as tar:
        for entry in tar:
            digest, dot, kind = entry.name.partition(".")
            if not entry.isreg() or not dot or not _DIGEST.fullmatch(digest):
                continue
            data = tar.extractfile(entry)
            assert data is not None
            if kind == "tar":
                archive.sizes[digest] = entry.size
                if digest in wanted:
                    archive.layers[digest] = file = make_file()
                    shutil.copyfileobj(data, file)
                    file.flush()
            elif digest == image:
                archive.config = data.read(LARGEST_CONFIG).decode()
    if not archive.config or wanted - set(archive.layers):
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"{podman.program} {' '.join(words)} wrote an archive without all layers of the image",
        )
    about = make_file()
    about.write(json.dumps({"config": archive.config, "sizes": archive.sizes}).encode())
    about.flush()
    files = {CONFIG: about, **{f"layer-{d}": f for d, f in archive.layers.items()}}
    return [Item(label, f"/proc/self/fd/{file.fileno()}") for label, file in files.items()]


@contextlib.contextmanager
def _output(podman: Podman, words: Sequence[str]) -> Iterator[IO[bytes]]:
    """What a command of Podman writes.  MigrateError(6), also when that is not an archive."""
    what = f"{podman.program} {' '.join(words)}"
    read, write = os.pipe()
    with os.fdopen(read, "rb", 0) as pipe:
        try:
            # Its output is an archive here, and not a text.
            shell = ["sh", "-c", f'exec "$@" >/proc/self/fd/{write}', "sh", podman.program, *words]
            command = Command(shell, [write])
        except OSError as e:
            raise MigrateError(VzExitCode.COPY_FAILED, f"{what}: {e.strerror}") from e
        finally:
            os.close(write)
        out, why = _Patient(pipe, podman.timeout), ""
        try:
            yield out  # type: ignore[misc]  # tarfile only reads
            while out.read(1 << 20):  # what follows the archive
                pass
        except (OSError, tarfile.TarError, ValueError) as e:
            why = str(e)
        finally:
            pipe.close()
            status, text = _end(command, 0.0 if why else podman.timeout)
    if status or why:
        said = last_words(text) if text.strip() or not why else why
        raise MigrateError(VzExitCode.COPY_FAILED, f"{what} ended with {status}: {said}")


def _end(command: Command, timeout: float) -> tuple[int, str]:
    try:
        return command.wait(timeout)
    except TimeoutError as e:
        return -1, str(e) if timeout else ""


class _Patient(io.RawIOBase):
    """Reads a pipe, and waits for each piece only so long."""

    def __init__(self, pipe: IO[bytes], timeout: float) -> None:
        self._pipe, self._timeout = pipe, timeout
        self._poll = select.poll()
        self._poll.register(pipe, select.POLLIN)

    def read(self, size: int = -1) -> bytes:
        """TimeoutError."""
        if not self._poll.poll(min(self._timeout * 1000, 1 << 30)):
            raise TimeoutError(f"it wrote nothing for {self._timeout:g} s")
        return self._pipe.read(size)


# ---- on the target


def lacking(podman: Podman, image: Image) -> frozenset[str]:
    """Labels of what this host needs to make the image."""
    known: set[str] = set()
    ids = podman.run("image", "ls", "--all", "--quiet", "--no-trunc").split()
    if ids:
        # One that has gone meanwhile makes it fail, after it has printed the others.
        words = ("image", "inspect", "--format", "{{json .RootFS.Layers}}", *sorted(set(ids)))
        for line in podman.tried(*words)[1].splitlines():
            with contextlib.suppress(ValueError, TypeError):
                known.update(map(_digest, json.loads(line)))
    return frozenset({CONFIG, *(f"layer-{d}" for d in image.layers if d not in known)})


def id_of(podman: Podman, name: str) -> str:
    """Empty: there is no image of that name."""
    status, text = podman.tried("image", "inspect", "--format", "{{.Id}}", name)
    return "" if status else text.strip()


def free_names(podman: Podman, image: Image) -> list[str]:
    """Those of its names that no image has here.  Another image keeps its own."""
    return [name for name in image.names if not podman.says_yes("image", "exists", name)]


def load(podman: Podman, image: Image, folder: Path) -> None:
    """Make the image of the files in this folder, which are removed.  MigrateError(6)."""
    archive = folder / ARCHIVE
    try:
        _assemble(image, folder, archive)
        words = ("image", "load", "--quiet", "--input", str(archive))
        podman.run(*words, code=VzExitCode.COPY_FAILED, timeout=LONGEST)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise MigrateError(
            VzExitCode.COPY_FAILED, f"cannot make the image {image.id[:12]} of what came: {e}"
        ) from e
    finally:
        archive.unlink(missing_ok=True)


def _assemble(image: Image, folder: Path, archive: Path) -> None:
    """The archive of `podman image load`.  OSError, ValueError, KeyError, TypeError."""
    about = folder / CONFIG
    told = json_shapes.loads(about.read_bytes())
    config = str(told["config"]).encode()
    if hashlib.sha256(config).hexdigest() != image.id:
        raise ValueError("its configuration is that of another image")
    manifest = {
        "Config": f"{image.id}.json",
        "RepoTags": None,  # a name would be taken away from another image
        "Layers": [f"{digest}.tar" for digest in image.layers],
    }
    with archive.open("xb") as out, tarfile.open(fileobj=out, mode="w") as tar:
        _add(tar, "manifest.json", json.dumps([manifest]).encode())
        _add(tar, f"{image.id}.json", config)
        for digest in dict.fromkeys(image.layers):
            _add_layer(tar, out, digest, folder / f"layer-{digest}", told["sizes"])
    about.unlink()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _add_layer(
    tar: tarfile.TarFile, out: IO[bytes], digest: str, file: Path, sizes: Mapping[str, Any]
) -> None:
    entry = tarfile.TarInfo(f"{digest}.tar")
    if file.exists():
        with file.open("rb") as f:
            entry.size = os.fstat(f.fileno()).st_size
            tar.addfile(entry, f)
        file.unlink()
        return
    entry.size = int(sizes[digest])
    if entry.size < 0:
        raise ValueError("a layer has a negative size")
    tar.addfile(entry)
    tar.offset += -(-entry.size // _BLOCK) * _BLOCK
    out.seek(tar.offset)


def name(podman: Podman, image: str, names: Sequence[str]) -> None:
    """Give it these names, if they are still free.  MigrateError(6)."""
    for one in names:
        if not podman.says_yes("image", "exists", one):
            podman.run("image", "tag", image, one, code=VzExitCode.COPY_FAILED)


def remove(podman: Podman, image: str, names: Sequence[str], came: bool) -> None:
    """Undo `load` and `name`.  came: there was no such image before.  One that a container uses
    stays.  MigrateError(7)."""
    ours = [one for one in names if id_of(podman, one) == image]
    if not came:
        if ours:
            podman.run("image", "untag", image, *ours, code=VzExitCode.RESTORE_FAILED)
        return
    for one in ours or [image]:
        if podman.says_yes("image", "exists", one):
            status, output = podman.tried("image", "rm", one)
            if status not in (0, IN_USE):
                raise MigrateError(
                    VzExitCode.RESTORE_FAILED,
                    f"cannot remove the image {image[:12]}: {last_words(output)}",
                )
