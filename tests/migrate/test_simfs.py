# SPDX-License-Identifier: Apache-2.0
"""`pyploop migrate` of OpenVZ containers whose root is a directory (simfs),
against a stand-in for vzctl."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from treeloop import account
from vzlab import CTID, VzHost, VzLab, vz_lab

from pyploop.runtimes import config
from pyploop.runtimes.vzctl.runtime import Vzctl

CHANGES = ("numbers", ".", ".deleted_but_open")
"""What the container itself, or its end, changes."""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[VzLab]:
    support.needs("root", "rsync")
    with vz_lab(tmp_path, simfs=True) as made:
        yield made


def runs_only_on(lab: VzLab, host: VzHost) -> None:
    """On this host, having lost and repeated no number; nothing on the other."""
    other = lab.b if host is lab.a else lab.a
    assert (host.status(), other.status()) == ("running", "down")
    before = len(host.numbers())
    support.wait_until(lambda: len(host.numbers()) > before, "it counts on")
    numbers = host.numbers()
    assert numbers == list(range(len(numbers)))
    assert other.files() == set()
    assert not [p for p in host.files() if p.startswith(("lock", "images", "varlib"))]
    rsyncs = f"^[^ ]*rsync .*{lab.folder}"
    support.wait_until(
        lambda: not support.run("pgrep", "-f", rsyncs, check=False), "no rsync is left"
    )


def still(host: VzHost) -> dict[str, object]:
    tree = account(host.folder / "private" / CTID)
    return {k: v for k, v in tree.items() if k not in CHANGES}


def test_a_container_in_a_directory_moves_live_there_and_back(lab: VzLab) -> None:
    for host in (lab.a, lab.b):
        (host.folder / "bin/ploop").unlink()  # not needed
    before = still(lab.a)
    done = lab.migrate(lab.a, "--live", "-t", "--rsync=-z", "hostb", CTID)
    assert done.returncode == 0, done.stderr
    assert "Total suspended time" in done.stdout
    runs_only_on(lab, lab.b)
    assert still(lab.b) == before
    back = lab.migrate(lab.b, "--live", "hosta", CTID)
    assert back.returncode == 0, back.stderr
    runs_only_on(lab, lab.a)
    assert still(lab.a) == before


def test_without_live_it_is_stopped_and_started(lab: VzLab) -> None:
    before = still(lab.a)
    done = lab.migrate(lab.a, "hostb", CTID)
    assert done.returncode == 0, done.stderr
    runs_only_on(lab, lab.b)
    assert still(lab.b) == before


def test_the_source_is_kept_when_asked(lab: VzLab) -> None:
    done = lab.migrate(lab.a, "--live", "-r", "no", "hostb", CTID)
    assert done.returncode == 0, done.stderr
    assert (lab.a.folder / f"private/{CTID}/etc/hostname").exists()
    assert (lab.a.exists(), lab.b.status()) == (False, "running")


FAILS = {
    # who fails, and the exit code
    "suspend": ("a", "chkpnt --suspend", 16, 8),
    "dump": ("a", "chkpnt --dump", 16, 8),
    "undump": ("b", "restore --undump", 17, 7),
    "resume": ("b", "restore --resume", 17, 7),
}


@pytest.mark.parametrize("what", FAILS if os.environ.get("PYPLOOP_MATRIX") else ["dump", "undump"])
def test_after_a_failing_step_it_runs_on_and_the_target_is_clean(lab: VzLab, what: str) -> None:
    host, step, status, code = FAILS[what]
    {"a": lab.a, "b": lab.b}[host].fail(step, status)
    done = lab.migrate(lab.a, "--live", "hostb", CTID)
    assert done.returncode == code, done.stderr
    for h in (lab.a, lab.b):
        h.mend()
    runs_only_on(lab, lab.a)


def test_a_failing_rsync_ends_with_6_and_names_the_reason(lab: VzLab) -> None:
    """In the last pass, whose server does not know the tree."""
    rsync = lab.b.folder / "bin/rsync"
    real = shutil.which("rsync")
    bad = f"{real} --server --daemon --config=/dev/null ."
    rsync.write_text(
        f'#!/bin/sh\ncase "$*" in *tree-0.[2-9].conf*) exec {bad} ;; esac\nexec {real} "$@"\n'
    )
    rsync.chmod(0o755)
    config = lab.b.folder / "migrate.toml"
    config.write_text(config.read_text() + f'[rsync]\ncommand = "{rsync}"\n')
    done = lab.migrate(lab.a, "--live", "hostb", CTID)
    assert done.returncode == 6, done.stderr
    assert "rsync" in done.stderr
    assert "Traceback" not in done.stderr
    runs_only_on(lab, lab.a)


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_missing_rsync_is_named_before_anything_starts(lab: VzLab, side: str) -> None:
    config = {"a": lab.a, "b": lab.b}[side].folder / "migrate.toml"
    config.write_text(config.read_text() + '[rsync]\ncommand = "rsync-that-is-not-there"\n')
    files = lab.a.files()
    done = lab.migrate(lab.a, "--live", "hostb", CTID)
    assert done.returncode == 6, done.stderr
    assert "rsync-that-is-not-there is not installed on this host" in done.stderr
    assert (lab.a.files(), lab.b.files()) == (files, set())
    runs_only_on(lab, lab.a)


def test_what_is_mounted_in_it_is_not_left_behind_silently(lab: VzLab) -> None:
    point = lab.a.folder / f"private/{CTID}/more"
    with support.mounted("none", point, fstype="tmpfs"):
        done = lab.migrate(lab.a, "--live", "hostb", CTID)
    assert done.returncode == 6, done.stderr
    assert f"{point} belongs to another file system" in done.stderr
    runs_only_on(lab, lab.a)


def test_an_option_that_runs_a_command_is_a_wrong_usage(lab: VzLab) -> None:
    done = lab.migrate(lab.a, "--live", "--rsync=-e sh", "hostb", CTID)
    assert done.returncode == 1, done.stderr
    assert "-e is not allowed" in done.stderr
    runs_only_on(lab, lab.a)


def test_a_tree_that_was_kept_is_gone_on_with_and_not_believed(lab: VzLab) -> None:
    (lab.a.folder / f"private/{CTID}/big").write_bytes(os.urandom(4 << 20))
    lab.b.fail("restore --undump", 17)
    assert lab.migrate(lab.a, "--live", "--keep-dst", "hostb", CTID).returncode == 7
    lab.b.mend()
    (kept,) = (lab.b.folder / "private").iterdir()
    assert not lab.b.exists()
    assert (kept / "big").stat().st_ino  # and what it holds is changed, behind our back
    times = (kept / "big").stat()
    with (kept / "big").open("r+b") as f:
        f.write(b"not what the container wrote")
    os.utime(kept / "big", ns=(times.st_atime_ns, times.st_mtime_ns))
    (kept / "etc/hostname").unlink()
    (kept / "more").mkdir()
    before, inode = still(lab.a), (kept / "etc").stat().st_ino
    done = lab.migrate(lab.a, "--live", "hostb", CTID)
    assert done.returncode == 0, done.stderr
    runs_only_on(lab, lab.b)
    assert still(lab.b) == before
    assert (lab.b.folder / f"private/{CTID}/etc").stat().st_ino == inode
    assert [p.name for p in (lab.b.folder / "private").iterdir()] == [CTID]


def test_a_kept_tree_goes_with_a_failure_that_keeps_nothing(lab: VzLab) -> None:
    lab.b.fail("restore --undump", 17)
    assert lab.migrate(lab.a, "--live", "--keep-dst", "hostb", CTID).returncode == 7
    assert len(lab.b.files()) > 1
    assert lab.migrate(lab.a, "--live", "hostb", CTID).returncode == 7
    lab.b.mend()
    runs_only_on(lab, lab.a)


def test_a_tree_that_came_from_another_host_is_removed(lab: VzLab) -> None:
    lab.b.fail("restore --undump", 17)
    assert lab.migrate(lab.a, "--live", "--keep-dst", "hostb", CTID).returncode == 7
    lab.b.mend()
    record = lab.b.folder / f"varlib/pyploop/vzctl-{CTID}.kept-trees"
    told = json.loads(record.read_text())
    told["source"]["id"] = "another"
    record.write_text(json.dumps(told))
    done = lab.migrate(lab.a, "--live", "hostb", CTID)
    assert done.returncode == 0, done.stderr
    assert "cannot be used" in done.stdout
    runs_only_on(lab, lab.b)
    assert [p.name for p in (lab.b.folder / "private").iterdir()] == [CTID]


KILLS = [
    ("a", "chkpnt --suspend", "kill-caller", "a"),
    ("a", "chkpnt --dump", "kill-caller", "a"),
    ("b", "restore --undump", "kill-peer", "a"),
    ("b", "restore --resume", "kill-peer", "b"),
    ("a", "chkpnt --kill", "kill-caller", "b"),
    ("a", "destroy", "kill-caller", "b"),
]


@pytest.mark.parametrize(
    ("host", "step", "who", "runs_on"), KILLS if os.environ.get("PYPLOOP_MATRIX") else KILLS[:1]
)
def test_a_killed_orchestrator_is_recovered_from(
    lab: VzLab, host: str, step: str, who: str, runs_on: str
) -> None:
    where = {"a": lab.a, "b": lab.b}
    where[host].fail(step, who)
    done = lab.migrate(lab.a, "--live", "hostb", CTID)
    assert done.returncode == -9, done.stderr
    where[host].mend()
    done = lab.migrate(lab.a, "--recover")
    assert done.returncode == 0, done.stderr
    runs_only_on(lab, where[runs_on])


DESCRIPTOR = """\
<Parallels_disk_image><Disk_Parameters><Disk_size>2048</Disk_size></Disk_Parameters>
<StorageData><Storage><Start>0</Start><End>2048</End><Blocksize>2048</Blocksize>
<Image><GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID><Type>Plain</Type><File>%s</File></Image>
</Storage></StorageData></Parallels_disk_image>
"""


@pytest.mark.parametrize("how", ["link", "dots"])
def test_a_container_that_makes_up_a_disk_gets_no_file_of_the_host(lab: VzLab, how: str) -> None:
    """Its root is its private area, so it can have a root.hdd there before it stops."""
    private, secret = lab.a.folder / "private" / CTID, lab.a.folder / "private/secret"
    secret.write_bytes(b"only root of the host may read this" + bytes(1 << 20))
    lab.a.vzctl("stop", CTID)
    shutil.rmtree(private / "etc")
    (private / "link").unlink()
    (private / "root.hdd").mkdir()
    file = "root.hds" if how == "link" else "../../secret"
    (private / "root.hdd/DiskDescriptor.xml").write_text(DESCRIPTOR % file)
    if how == "link":
        (private / "root.hdd/root.hds").symlink_to(secret)
    done = lab.migrate(lab.a, "hostb", CTID)
    assert done.returncode == 6, done.stderr
    assert "the disk " in done.stderr
    assert lab.b.files() == set()
    assert private.exists() and secret.exists()
    secret.unlink()


def test_what_kind_of_container_it_is_is_decided_once(
    lab: VzLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs, and may make a root.hdd after the checks."""
    host = config.HostConfig(vz_etc=str(lab.a.folder / "etc/vz"))
    runtime = Vzctl(host, CTID)
    monkeypatch.setattr(Vzctl, "_check_root", lambda self: None)
    assert runtime.check_source(live=False)["simfs"]
    made = Path(runtime.trees()[0].path) / "root.hdd"
    made.mkdir()
    try:
        assert runtime.trees() and not runtime.disks(source=True)
    finally:
        made.rmdir()
