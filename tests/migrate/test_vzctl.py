# SPDX-License-Identifier: Apache-2.0
"""`pyploop migrate` of OpenVZ containers, against a stand-in for vzctl."""

from __future__ import annotations

import contextlib
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from vzlab import CTID, VzLab, runs_only_on, vz_lab

from pyploop.errors import MigrateError
from pyploop.migration.source.agent_client import Remote
from pyploop.runtimes import config


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[VzLab]:
    support.needs("root", "loop", "mkfs.ext4")
    with vz_lab(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VzLab]:
    """One lab for all that is refused, and so changes nothing."""
    support.needs("root", "loop", "mkfs.ext4")
    with vz_lab(tmp_path_factory.mktemp("still")) as made:
        yield made


def test_a_container_moves_live_there_and_back(lab: VzLab) -> None:
    files = lab.a.files()
    done = lab.migrate(lab.a, "--live", "-t", "--keep-dst", "hostb", CTID)
    assert done.returncode == 0, done.stderr
    runs_only_on(lab, lab.b)
    assert lab.b.files() == files
    assert (lab.b.folder / f"private/{CTID}/.ve.layout").readlink() == Path("5")
    assert not (lab.a.folder / "executed").exists()
    rows = re.findall(r"^  ( *\S[^:\n]*): +(\d+\.\d\d)$", done.stdout, re.MULTILINE)
    assert [r[0].strip() for r in rows] == [
        "Suspend + Dump",
        "Pcopy after suspend",
        "Copy dump file",
        "Undump + Resume",
        "Total suspended time",
    ]
    assert [c.split(" ", 1)[1] for c in lab.a.calls()[-5:]] == [
        f"--skiplock chkpnt {CTID} --suspend",
        lab.a.calls()[-4].split(" ", 1)[1],
        f"--skiplock chkpnt {CTID} --kill",
        f"--skiplock umount {CTID}",
        f"--skiplock destroy {CTID}",
    ]
    assert f"--skiplock chkpnt {CTID} --dump --dumpfile " in lab.a.calls()[-4]
    assert [c.split()[3] for c in lab.b.calls()] == ["--undump", "--resume"]
    back = lab.migrate(lab.b, "--live", "hosta", "web")  # by its name
    assert back.returncode == 0, back.stderr
    runs_only_on(lab, lab.a)


def test_without_live_it_is_stopped_and_started(lab: VzLab) -> None:
    done = lab.migrate(lab.a, "-t", "hostb", CTID)
    assert done.returncode == 0, done.stderr
    runs_only_on(lab, lab.b)
    assert lab.b.calls() == [f"vzctl --skiplock start {CTID}"]


def test_a_stopped_container_moves_and_stays_stopped(lab: VzLab) -> None:
    lab.a.vzctl("stop", CTID)
    done = lab.migrate(lab.a, "hostb", CTID)
    assert done.returncode == 0, done.stderr
    assert (lab.a.exists(), lab.b.exists(), lab.b.status()) == (False, True, "down")
    lab.b.vzctl("start", CTID)
    runs_only_on(lab, lab.b)


def test_the_source_is_kept_when_asked(lab: VzLab) -> None:
    done = lab.migrate(lab.a, "--live", "-r", "no", "hostb", CTID)
    assert done.returncode == 0, done.stderr
    assert (lab.a.folder / f"etc/vz/conf/{CTID}.conf.migrated").exists()
    assert (lab.a.folder / f"private/{CTID}/root.hdd/root.hds").exists()
    assert (lab.a.exists(), lab.b.status()) == (False, "running")


def test_a_check_changes_nothing(still: VzLab) -> None:
    files, calls = still.a.files(), (still.a.calls(), still.b.calls())
    done = still.migrate(still.a, "--live", "--check-only", "hostb", CTID)
    assert done.returncode == 0, done.stderr
    assert still.a.files() == files
    assert (still.a.calls(), still.b.calls()) == calls
    runs_only_on(still, still.a)


# ---- vzmigrate's exit codes


@contextlib.contextmanager
def changed(path: Path, text: str | None) -> Iterator[None]:
    """A file with another text, or none, for a while."""
    before = path.read_text() if path.exists() else None
    mode = path.stat().st_mode if path.exists() else 0o644
    try:
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
            path.chmod(mode)
        yield
    finally:
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_text(before)
            path.chmod(mode)


def expect(lab: VzLab, code: int, *words: str, says: str = "") -> None:
    """The code, one line, and the container as it was."""
    done = lab.migrate(lab.a, *(words or ("--live", "hostb", CTID)))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert says in done.stderr
    for host in (lab.a, lab.b):
        host.mend()
    runs_only_on(lab, lab.a)


def test_usage_ends_with_1(still: VzLab) -> None:
    expect(still, 1, "--live", "hostb")


def test_a_stopped_container_cannot_move_live_2(lab: VzLab) -> None:
    lab.a.vzctl("stop", CTID)
    done = lab.migrate(lab.a, "--live", "hostb", CTID)
    assert (done.returncode, lab.b.files()) == (2, set())


def test_no_connection_ends_with_4(still: VzLab) -> None:
    expect(still, 4, "--live", "nowhere", CTID, says="No route to host")


def test_a_target_without_room_for_the_disk_ends_with_6(still: VzLab) -> None:
    with support.tmpfs(still.b.folder / "private", 1 << 20):
        expect(still, 6, says="room")


def test_a_target_whose_disk_fills_up_ends_with_6(lab: VzLab) -> None:
    # Room for the sparse image at the check, not for what is written then.
    with support.tmpfs(lab.b.folder / "private", 8 << 20):
        big = lab.a.folder / f"root/{CTID}/big"
        process = subprocess.Popen(
            lab.command(lab.a, "--live", "--bwlimit", "4M", "hostb", CTID),
            env=support.pyploop_env(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            support.wait_until((lab.b.folder / f"private/{CTID}").exists, "begun")
            big.write_bytes(bytes(range(256)) * (12 << 12))
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
        big.unlink()
        assert process.returncode == 6, err
        assert lab.b.files() == set()
    runs_only_on(lab, lab.a)


def test_a_failing_restore_ends_with_7(lab: VzLab) -> None:
    lab.b.fail("restore --undump", 17)
    expect(lab, 7, says="restore")


def test_a_failing_resume_after_the_commit_is_withdrawn_7(lab: VzLab) -> None:
    lab.b.fail("restore --resume", 17)
    expect(lab, 7, says="--resume")


@pytest.mark.parametrize("step", ["--suspend", "--dump"])
def test_a_failing_checkpoint_ends_with_8(lab: VzLab, step: str) -> None:
    lab.a.fail(f"chkpnt {step}", 16)
    expect(lab, 8, says=step)


def test_a_container_that_exists_on_the_target_ends_with_9(lab: VzLab) -> None:
    (lab.b.folder / f"private/{CTID}").mkdir()
    conf = lab.b.folder / f"etc/vz/conf/{CTID}.conf"
    conf.write_text("")
    done = lab.migrate(lab.a, "--live", "hostb", CTID)
    assert (done.returncode, conf.read_text()) == (9, ""), done.stderr
    assert lab.a.status() == "running"


def test_no_such_container_ends_with_10(still: VzLab) -> None:
    expect(still, 10, "--live", "hostb", "102")


def test_an_address_in_use_ends_with_12(still: VzLab) -> None:
    with changed(still.b.folder / "state/addresses", "10.0.0.1\n10.1.2.3\n"):
        expect(still, 12, says="10.1.2.3")


def test_a_quota_error_of_vzctl_ends_with_13(lab: VzLab) -> None:
    lab.b.fail("restore --undump", 61)
    expect(lab, 13)


def test_a_kernel_that_is_not_openvz_ends_with_14(still: VzLab) -> None:
    still.b.fail("status", 5)
    expect(still, 14)


def test_a_configuration_for_other_places_ends_with_15(lab: VzLab) -> None:
    conf = lab.a.folder / f"etc/vz/conf/{CTID}.conf"
    text = conf.read_text()
    conf.write_text(text + f"VE_ROOT={lab.a.folder}/root/$VEID\n")
    expect(lab, 15, says="names")


def test_a_target_without_ploop_ends_with_16(still: VzLab) -> None:
    with changed(still.b.folder / "bin/ploop", None):
        expect(still, 16)


def test_an_older_checkpoint_version_ends_with_17(still: VzLab) -> None:
    with changed(still.b.folder / "state/checkpoint", "6"):
        expect(still, 17)


def test_a_cpu_that_lacks_something_ends_with_18(
    lab: VzLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The target's agent sees a smaller CPU: its own kernel tells it otherwise.
    site = lab.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys\nif 'agent' in sys.orig_argv:\n"
        "    import pyploop.system.cpu as c\n    c.flags = lambda: ['fpu']\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    expect(lab, 18, says="--nodeps=cpu")
    done = lab.migrate(lab.a, "--live", "--check-only", "--nodeps=cpu", "hostb", CTID)
    assert done.returncode == 0, done.stderr


def test_no_vz_conf_on_the_target_ends_with_19(still: VzLab) -> None:
    with changed(still.b.folder / "etc/vz/vz.conf", None):
        expect(still, 19)


def test_a_locked_container_ends_with_20(lab: VzLab) -> None:
    lock = lab.a.folder / f"lock/{CTID}.lck"
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        lock.write_text(f"{sleeper.pid}\n")
        done = lab.migrate(lab.a, "--live", "hostb", CTID)
        assert (done.returncode, lock.read_text()) == (20, f"{sleeper.pid}\n"), done.stderr
    finally:
        sleeper.kill()
        sleeper.wait()
    # Its owner is dead: the lock is stale, and the migration goes on.
    assert lab.migrate(lab.a, "--live", "hostb", CTID).returncode == 0
    runs_only_on(lab, lab.b)


# ---- afterwards (test_vzctl_failures.py has what goes wrong at each step)


def test_the_next_migration_recovers_first(lab: VzLab) -> None:
    lab.a.fail("chkpnt --dump", "kill-caller")
    assert lab.migrate(lab.a, "--live", "hostb", CTID).returncode == -9
    lab.a.mend()
    done = lab.migrate(lab.a, "--live", "hostb", CTID)
    assert done.returncode == 0, done.stderr
    assert "Rolled back" in done.stdout
    runs_only_on(lab, lab.b)


def test_a_target_that_cannot_be_asked_leaves_it_suspended_and_says_so(lab: VzLab) -> None:
    lab.b.fail("restore --resume", "kill-peer")
    assert lab.migrate(lab.a, "--live", "hostb", CTID).returncode == -9
    lab.b.mend()
    ssh = lab.a.folder / "bin/ssh"
    works = ssh.read_text()
    ssh.write_text("#!/bin/sh\nexit 255\n")
    done = lab.migrate(lab.a, "--recover")
    assert done.returncode == 4, done.stderr
    assert "stays suspended here" in done.stderr
    assert (lab.a.status(), lab.b.status()) == ("running suspended", "running")
    ssh.write_text(works)
    assert lab.migrate(lab.a, "--recover").returncode == 0
    runs_only_on(lab, lab.b)


def test_an_interrupted_migration_runs_on_where_it_was(lab: VzLab) -> None:
    process = subprocess.Popen(
        lab.command(lab.a, "--live", "--bwlimit", "100K", "hostb", CTID),
        env=support.pyploop_env(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        support.wait_until((lab.b.folder / f"private/{CTID}").exists, "begun")
        process.terminate()
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == -15, err
    runs_only_on(lab, lab.a)


def test_another_version_of_pyploop_is_named_before_anything_starts(still: VzLab) -> None:
    newer = "#!/bin/sh\nprintf 'PYPLOOP-AGENT 1 7.0.0\\n'; cat >/dev/null\n"
    with changed(still.a.folder / "bin/ssh", newer):
        expect(still, 4, says="pyploop 7.0.0")


def test_of_two_sources_with_the_same_number_only_one_begins(lab: VzLab) -> None:
    """vzctl locks a container in its own steps only, so both pass the checks."""
    host = config.load(str(lab.a.folder / "migrate.toml"))
    facts = {
        "machine": platform.machine(),
        "source": {"id": "1", "name": "one"},
        "top": "root.hdd/root.hds",
        "trees": [],
    }
    checks = {"container": CTID, "runtime": "vzctl", "live": False, "facts": facts}
    begins = {"stall": 60.0, "keep": True}
    with (
        Remote("hostb", host.ssh, (), host.agent) as one,
        Remote("hostb", host.ssh, (), host.agent) as two,
    ):
        for remote in (one, two):
            remote.call("check", 30.0, **checks, sizes=[0], nodeps=[])
        one.call("begin", 30.0, migration="1" * 16, **begins)
        with pytest.raises(MigrateError, match="is under way") as refused:
            two.call("begin", 30.0, migration="2" * 16, **begins)
        assert refused.value.exit_code == 20
    assert not {f for f in lab.b.files() if not f.endswith(".target")}
    runs_only_on(lab, lab.a, clean=False)
