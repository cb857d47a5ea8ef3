# SPDX-License-Identifier: Apache-2.0
"""Root that may not use bpf(2): a container, a seccomp filter, no capabilities."""

from __future__ import annotations

import errno
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from forbid_bpf import SYS_BPF
from support import MIB, is_frozen, loop_device, needs, pyploop_cmd, pyploop_env
from support_live import (
    comparison,
    copy,
    file_system,
    fio,
    random_file,
    sparse_file,
    succeeded,
    work_dir,
)

pytestmark = pytest.mark.root

MAP_CREATE, PROG_LOAD, RAW_TRACEPOINT_OPEN = "0", "5", "17"
WITHOUT = "--bounding-set=-sys_admin,-bpf,-perfmon"
REFUSED = {
    "in a container": (errno.EPERM, "all", "create its map"),
    "without the system call": (errno.ENOSYS, "all", "built without bpf(2)"),
    "without memory for the map": (errno.ENOMEM, MAP_CREATE, "kernel memory for the map"),
    "in lockdown": (errno.EPERM, PROG_LOAD, "load its program"),
    "with a verifier that refuses": (errno.EINVAL, PROG_LOAD, "refused its program"),
    "without raw tracepoints": (errno.EPERM, RAW_TRACEPOINT_OPEN, "attach to its tracepoint"),
}


@pytest.fixture
def folder() -> Iterator[Path]:
    needs("loop")
    with work_dir() as path:
        yield path


def forbidden(code: int, command: str) -> list[str]:
    if platform.machine() not in SYS_BPF:
        pytest.skip(f"the number of bpf(2) on {platform.machine()} is not known here")
    return [sys.executable, str(Path(__file__).with_name("forbid_bpf.py")), str(code), command]


def info(device: str, prefix: Sequence[str]) -> dict[str, str]:
    words = [*prefix, *pyploop_cmd(), "info", "--json", device]
    done = subprocess.run(words, env=pyploop_env(), capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)["tracker"]
    return found


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.invariant(number=8)
def test_auto_scans_and_says_why_where_bpf_is_refused(case: str, folder: Path) -> None:
    code, command, why = REFUSED[case]
    prefix = forbidden(code, command)
    image, target = random_file(folder / "image", 4 * MIB), folder / "target"
    with loop_device(image) as device:
        got = copy(device, target, sender=[*prefix, *pyploop_cmd(), "copy"], via="local")
        succeeded(got)
        assert got.summary["tracker"] == "scan"
        assert target.read_bytes() == image.read_bytes()
        assert "Tracker: scan (BPF cannot be used: " in got.errors and why in got.errors
        tracker = info(device, prefix)
        assert tracker["name"] == "scan" and why in tracker["why"]


@pytest.mark.parametrize("case", ["in a container", "without raw tracepoints"])
@pytest.mark.invariant(number=8)
def test_bpf_that_is_asked_for_by_name_fails_where_it_is_refused(case: str, folder: Path) -> None:
    code, command, why = REFUSED[case]
    image, target = random_file(folder / "image", 4 * MIB), folder / "target"
    sender = [*forbidden(code, command), *pyploop_cmd(), "copy"]
    with loop_device(image) as device:
        got = copy(device, target, "--tracker", "bpf", sender=sender, via="local")
    assert got.code == 3 and why in got.errors
    assert not target.exists()


def test_root_without_the_capabilities_scans(folder: Path) -> None:
    needs("setpriv")
    prefix = ["setpriv", WITHOUT]
    image, target = random_file(folder / "image", 4 * MIB), folder / "target"
    with loop_device(image) as device:
        got = copy(device, target, sender=[*prefix, *pyploop_cmd(), "copy"], via="local")
        succeeded(got)
        assert got.summary["tracker"] == "scan" and "CAP_BPF" in got.errors
        assert target.read_bytes() == image.read_bytes()
        assert info(device, prefix)["name"] == "scan"


def test_accounting_that_is_off_and_cannot_be_switched_on_leaves_a_scan(folder: Path) -> None:
    """A container's /sys is often read-only."""
    needs("unshare")
    script = 'mount -o bind,remount,ro /sys && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", script, "sh"]
    sender = [*prefix, *pyploop_cmd(), "copy"]
    image, target = random_file(folder / "image", 4 * MIB), folder / "target"
    with loop_device(image) as device:
        switch = Path("/sys/block", Path(device).name, "queue/iostats")
        before = switch.read_text()
        try:
            switch.write_text("0")
            got = copy(device, target, "--tracker", "bpf", sender=sender, via="local")
            assert got.code == 3 and "iostats cannot be written" in got.errors
            assert not target.exists()
            got = copy(device, target, sender=sender, via="local")
            succeeded(got)
            assert got.summary["tracker"] == "scan" and "iostats cannot be written" in got.errors
            assert info(device, prefix)["name"] == "scan"
            # On already, it need not be written.
            switch.write_text("1")
            assert info(device, prefix)["name"] == "bpf"
        finally:
            switch.write_text(before)


def test_a_scan_of_a_mounted_device_arrives_as_it_was_frozen(folder: Path) -> None:
    needs("fio", "mkfs.ext4")
    size = 48 * MIB
    image, target = sparse_file(folder / "image", size), folder / "target"
    sender = [*forbidden(errno.EPERM, "all"), *pyploop_cmd(), "copy"]
    load = ["--rw=randwrite", "--bs=4k", "--size=8m", "--fsync=64", "--rate_iops=500"]
    with (
        loop_device(image) as device,
        file_system(device, folder / "mnt") as point,
        fio(point, "w", *load),
    ):
        check = comparison(image, target, size)
        got = copy(device, target, "--before-thaw", check, sender=sender)
        succeeded(got)
        assert got.summary["tracker"] == "scan"
        assert got.summary["completeness"] == "unknown"
        assert "tracking complete" not in got.errors
        assert not is_frozen(point)
