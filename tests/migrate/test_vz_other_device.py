# SPDX-License-Identifier: Apache-2.0
"""What is mounted on VE_ROOT is the private area's, and only what was copied is
destroyed; with the stand-in of vzhost.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import support
from anypair import make_disk
from vzlab import CTID, runs_only_on, vz_lab


@pytest.mark.parametrize("simfs", [False, True])
def test_another_mount_on_ve_root_is_refused_by_both_names(tmp_path: Path, simfs: bool) -> None:
    support.needs("root", "loop", "mkfs.ext4", "rsync")
    with vz_lab(tmp_path, simfs=simfs) as lab:
        root = lab.a.folder / "root" / CTID
        ours = lab.a.folder / "private" / CTID / ("" if simfs else "root.hdd/root.hds")
        other = tmp_path / "other"
        make_disk(other)
        for words, name in (
            (["-o", "loop", other], "/dev/loop" if simfs else str(other)),
            (["-t", "tmpfs", "mine"], "mine"),
        ):
            support.run("mount", *words, root)
            try:
                done = lab.migrate(lab.a, "--live", "b", CTID)
            finally:
                support.run("umount", root)
            assert done.returncode == 15, done.stderr
            assert name in done.stderr and str(ours) in done.stderr, done.stderr
            assert not lab.b.exists() and ours.exists()
        # One that is mounted within it is said to stay.
        (root / "shared").mkdir()
        support.run("mount", "-t", "tmpfs", "mine", root / "shared")
        try:
            done = lab.migrate(lab.a, "--live", "--check-only", "b", CTID)
        finally:
            support.run("umount", root / "shared")
            (root / "shared").rmdir()
        assert done.returncode == 0, done.stderr
        assert f"is mounted on {root}/shared" in done.stdout
        assert lab.migrate(lab.a, "--live", "b", CTID).returncode == 0
        runs_only_on(lab, lab.b, clean=not simfs)


def test_a_private_area_that_took_the_copied_one_s_place_is_not_destroyed(tmp_path: Path) -> None:
    support.needs("root", "loop", "mkfs.ext4")
    with vz_lab(tmp_path) as lab:
        top = lab.a.folder / "private" / CTID / "root.hdd/root.hds"
        lab.a.fail("chkpnt --kill", "gate", number=1)
        command = lab.command(lab.a, "--live", "b", CTID)
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=support.pyploop_env(),
        ) as moving:
            support.wait_until(lab.a.reached, "it runs on b", 40)
            top.rename(tmp_path / "aside")
            top.write_text("precious")
            lab.a.open_gate()
            said = moving.communicate(timeout=60)[0]
        assert moving.returncode == 8, said
        assert f"{top} is not what was copied" in said
        assert top.read_text() == "precious"
        top.unlink()
        (tmp_path / "aside").rename(top)
        done = lab.migrate(lab.a, "--recover")
        assert done.returncode == 0, done.stderr
        runs_only_on(lab, lab.b)
