# SPDX-License-Identifier: Apache-2.0
"""vz.conf and CTID.conf against what a shell makes of them, and the lock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import support

from pyploop.errors import BusyError, OpenError, ParameterError
from pyploop.migration import locks
from pyploop.report import timings
from pyploop.runtimes.vzctl import config_files
from pyploop.runtimes.vzctl.config_files import VzConf

CONF = """\
## Global parameters
VIRTUOZZO=yes
LOCKDIR=/vz/lock   # where locks are
DUMPDIR='/vz/du mp'
export VE_ROOT="/vz/root/$VEID"
VE_PRIVATE=/vz/private/${VEID}
  TEMPLATE=/vz/template
CPU_INFO="a \\"quoted\\" \\$NAME \\\\ word"
MIXED=a"b $VEID"'c $VEID'\\ d
CONTINUED=one\\
two
LINES="first
second $VEID"
EMPTY=
SEMI=1; OTHER=ignored
NOTHING=$UNSET_VARIABLE_OF_NOBODY
HASH=a#b
"""


def _by_shell(text: str, names: list[str]) -> dict[str, str]:
    script = "VEID=101\n" + text + "".join(f"\nprintf '%s\\0' \"${n}\"" for n in names)
    out = subprocess.run(["/bin/sh", "-c", script], capture_output=True, check=True, env={})
    return dict(zip(names, out.stdout.decode().split("\0"), strict=False))


def test_assignments_read_as_a_shell_reads_them() -> None:
    conf = VzConf({"VEID": "101"})
    conf.update(CONF, "vz.conf")
    names = ["VIRTUOZZO", "LOCKDIR", "DUMPDIR", "VE_ROOT", "VE_PRIVATE", "TEMPLATE", "CPU_INFO"]
    names += ["MIXED", "CONTINUED", "LINES", "EMPTY", "SEMI", "NOTHING", "HASH"]
    assert {n: conf.get(n) for n in names} == _by_shell(CONF, names)


@pytest.mark.parametrize(
    "value",
    ["$(touch {f})", "`touch {f}`", '"$(touch {f})"', "${{X:-$(touch {f})}}", "$1", "x touch {f}"],
)
def test_what_only_a_shell_can_tell_is_an_error_when_asked_for_and_never_run(
    value: str, tmp_path: Path
) -> None:
    witness = tmp_path / "executed"
    conf = VzConf()
    conf.update(f"GOOD=1\nBAD={value.format(f=witness)}\n", "/etc/vz/vz.conf")
    assert conf.get("GOOD") == "1"
    with pytest.raises(ParameterError, match=r"BAD in /etc/vz/vz\.conf, line 2"):
        conf.get("BAD")
    assert not witness.exists()


def test_a_container_s_own_file_wins_and_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "vz.conf").write_text("VE_PRIVATE=/vz/private/$VEID\n")
    assert config_files.load("7", tmp_path).path("VE_PRIVATE") == "/vz/private/7"
    (tmp_path / "conf" / "7.conf").write_text('VE_PRIVATE="/data/$VEID/private"\n')
    assert config_files.load("7", tmp_path).path("VE_PRIVATE") == "/data/7/private"
    assert config_files.load("7", tmp_path).path("LOCKDIR") == "/vz/lock"
    with pytest.raises(OpenError, match=r"vz\.conf"):
        config_files.load("7", tmp_path / "elsewhere")


def test_a_path_must_be_absolute() -> None:
    conf = VzConf({"VE_ROOT": "vz/root"})
    with pytest.raises(ParameterError, match="absolute"):
        conf.path("VE_ROOT")


# ---- the lock


def test_a_container_is_locked_with_our_pid_and_unlocked_after(tmp_path: Path) -> None:
    lock = tmp_path / "101.lck"
    with locks.container_lock(tmp_path, "101"):
        assert int(lock.read_text()) == os.getpid()
        with pytest.raises(BusyError, match=str(os.getpid())):
            locks.container_lock(tmp_path, "101").__enter__()
        with locks.container_lock(tmp_path, "102"):
            pass
        assert lock.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_owner_is_gone_is_taken_over(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "101.lck").write_text(f"{gone.pid}\n")
    with locks.container_lock(tmp_path, "101"):
        assert int((tmp_path / "101.lck").read_text()) == os.getpid()


def test_a_fresh_lock_without_a_pid_is_somebody_s_who_is_just_writing_it(tmp_path: Path) -> None:
    (tmp_path / "101.lck").touch()
    with pytest.raises(BusyError):
        locks.container_lock(tmp_path, "101").__enter__()
    os.utime(tmp_path / "101.lck", (0, 0))
    with locks.container_lock(tmp_path, "101"):
        pass


def test_a_host_takes_so_many_migrations_and_a_killed_one_frees_its_place(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from pyploop.migration import locks\n"
            "with locks.host_slot(Path(sys.argv[1]), 2, 0):\n"
            "    print('held', flush=True); time.sleep(60)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        env=support.pyploop_env(),
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with locks.host_slot(tmp_path, 2, 0):
            with pytest.raises(BusyError, match="2 migrations"):
                locks.host_slot(tmp_path, 2, 0).__enter__()
            holder.kill()
            holder.wait()
            with locks.host_slot(tmp_path, 2, 5):
                pass
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()


# ---- the table


def test_the_table_has_vzmigrate_s_layout() -> None:
    moments = timings.Moments(
        suspend=10.0, copied=10.437, dumped=11.087, sent=11.554, resumed=13.371
    )
    assert timings.table(moments.rows(), moments.total) == (
        "        Suspend + Dump:   0.65\n"
        "   Pcopy after suspend:   0.44\n"
        "        Copy dump file:   0.47\n"
        "       Undump + Resume:   1.82\n"
        "                        ------\n"
        "  Total suspended time:   3.37"
    )
