# SPDX-License-Identifier: Apache-2.0
"""A copy between two hosts whose connection is lost goes on over another one.  The ssh is a
program of ours that runs the command on this host, and can be cut (tests/cut_ssh.py)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import pyploop_cmd, pyploop_env, wait_until

import pyploop
from pyploop.api.bridge import Bridge
from pyploop.errors import ConnectError, ParameterError, PyploopError
from pyploop.report import event_types
from pyploop.units import BLOCK, MIB

CUT_SSH = Path(__file__).parent.parent / "cut_ssh.py"
KILL_ALL = "for p in {0}/pids/*; do kill -9 ${{p##*/}}; rm -f $p; done"
ONCE = "[ -e {0}/done ] || {{ touch {0}/done; {1}; }}"


class Line:
    """The connections between this host and the other one, `b`, whose home is `home`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder / "line", folder / "home"
        for path in (self.home, *(self.folder / name for name in ("pids", "lanes", "cuts"))):
            path.mkdir(parents=True)
        for name in ("log", "there"):
            (self.folder / name).mkdir()

    def cut(self, lane: int, direction: str, after: int, which: str = "one") -> None:
        (self.folder / "cuts" / str(lane)).write_text(f"{direction} {after} {which}")

    def carried(self, lane: int) -> tuple[int, int]:
        """Bytes up and down."""
        log = self.folder / "log" / str(lane)
        wait_until(lambda: log.exists() and log.read_text(), "the lane's end")
        up, down = log.read_text().split()
        return int(up), int(down)

    def fresh(self) -> None:
        for name in ("lanes", "log", "cuts"):
            for path in (self.folder / name).iterdir():
                path.unlink()

    def up(self, what: str) -> list[int]:
        """The connections that are up: `agent` or `lane`."""
        found = []
        for path in (self.folder / "pids").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.read_text() == what:
                    found.append(int(path.name))
        return found

    def there(self) -> list[int]:
        """The processes on the other host."""
        pids = [int(path.name) for path in (self.folder / "there").iterdir()]
        return [pid for pid in pids if Path(f"/proc/{pid}/cwd").exists()]

    def end(self) -> None:
        for pid in self.there():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    made, programs = Line(tmp_path), tmp_path / "bin"
    programs.mkdir()
    ssh = f'#!/bin/sh\nexec {sys.executable} -S -E {CUT_SSH} {made.folder} "$@"\n'
    for name, text in (
        ("ssh", ssh),
        ("pyploop", f'#!/bin/sh\nexec {" ".join(pyploop_cmd())} "$@"\n'),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for name, value in pyploop_env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(made.home))
    yield made
    made.end()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    made = tmp_path / "image"
    made.write_bytes(os.urandom(12 * MIB) + bytes(MIB) + os.urandom(MIB + 512))
    return made


class Copied:
    """A copy in one of the directions, and what was said of it."""

    def __init__(
        self, line: Line, image: Path, way: str, seen: list[Any] | None = None, **options: Any
    ) -> None:
        self.events: list[Any] = [] if seen is None else seen
        there = line.home / "there"
        if way == "push":
            self.target, places = there, (str(image), "b:there")
        else:
            there.write_bytes(image.read_bytes())
            self.target = image.parent / "back"
            places = ("b:there", str(self.target))
            self.target.unlink(missing_ok=True)
        self.result = pyploop.copy(
            *places, options=pyploop.CopyOptions(**options), on_event=self.events.append
        )
        source = image if way == "push" else there
        assert self.target.read_bytes() == source.read_bytes()
        assert self.result.acknowledged == "acknowledged"
        assert self.result.proven == (options.get("proof") != "never")
        assert not [e for e in self.events if isinstance(e, event_types.Error)]

    @property
    def states(self) -> list[str]:
        """Of the connection for the data, but not how often one was tried."""
        found = [e.state for e in self.events if isinstance(e, event_types.Cut)]
        return [state for state in found if state != "retried"]


WAYS = pytest.mark.parametrize("way", ["push", "pull"])
TO = {"push": "up", "pull": "down"}
BACK = {"push": "down", "pull": "up"}


@pytest.mark.parametrize(("way", "which"), [("push", "one"), ("pull", "one"), ("push", "all")])
def test_a_cut_in_the_first_pass_is_bridged_and_only_what_was_under_way_goes_again(
    line: Line, image: Path, way: str, which: str
) -> None:
    """After `all`, the second lane carries the agent's requests."""
    line.cut(0, TO[way], 5 * MIB, which)
    line.cut(1 if which == "one" else 2, TO[way], 3 * MIB, which)
    got = Copied(line, image, way)
    assert got.states == ["lost", "bridged", "lost", "bridged"]
    assert got.result.cuts == 2
    # What the pipes of this line hold, with what the pump has ready: at most so much.
    assert got.result.wire_bytes < image.stat().st_size + 2 * 4 * MIB
    wait_until(lambda: not line.there(), "the other host has ended all")


@WAYS
def test_a_cut_of_the_agent_s_connection_alone_does_not_disturb_the_data(
    line: Line, image: Path, way: str
) -> None:
    """In the stop command, so that it is a moment at which the copy runs."""
    kill = f"grep -l agent {line.folder}/pids/* | while read p; do kill -9 ${{p##*/}}; rm $p; done"
    stop = pyploop.Stop("cmd", f"{kill}; sleep 0.3", undo="true")
    got = Copied(line, image, way, stops=[stop])
    assert (got.states, got.result.cuts) == ([], 0)
    assert got.result.freezes_given_up == 0
    assert [e for e in got.events if isinstance(e, event_types.Summary)]


@WAYS
def test_a_cut_in_the_freeze_ends_that_freeze_and_another_one_follows(
    line: Line, image: Path, way: str, tmp_path: Path
) -> None:
    """The stop command writes to the source, so there are last blocks."""
    log, there = tmp_path / "stops", line.home / "there"
    write = f"dd if=/dev/urandom of={image if way == 'push' else there} bs=4k count=1 conv=notrunc"
    cut = ONCE.format(line.folder, KILL_ALL.format(line.folder))
    stop = pyploop.Stop(
        "cmd", f"echo stop >> {log}; {write} 2> {log}.dd; {cut}", undo=f"echo on >> {log}"
    )
    got = Copied(line, image, way, stops=[stop])
    assert log.read_text().split() == ["stop", "on", "stop"]
    assert got.result.freezes_given_up == 1
    assert (got.states, got.result.cuts) == (["lost", "bridged"], 1)


@WAYS
def test_a_copy_whose_answer_to_the_end_was_lost_has_succeeded(
    line: Line, image: Path, way: str, tmp_path: Path
) -> None:
    log = tmp_path / "stops"
    stop = pyploop.Stop("cmd", f"echo stop >> {log}", undo=f"echo on >> {log}")
    Copied(line, image, way, stops=[stop])
    up, down = line.carried(0)
    line.fresh()
    log.unlink()
    (line.home / "there").unlink()
    line.cut(0, BACK[way], (down if way == "push" else up) - 1, "all")
    got = Copied(line, image, way, stops=[stop])
    assert got.states == ["lost", "bridged"] if way == "push" else not got.states
    assert got.result.cuts == 1
    assert log.read_text().split() == ["stop", "on"]
    assert got.result.freezes_given_up == 0
    assert len([e for e in got.events if isinstance(e, event_types.Summary)]) == 1


@WAYS
def test_a_lane_that_is_lost_before_it_was_used_here_costs_no_byte(
    line: Line, image: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other host goes on over it, but its answer is lost, and the lane, too.  Without a
    proof, which would find what is missing."""
    resume = Bridge._resume

    def lost(bridge: Bridge, number: int) -> None:
        resume(bridge, number)
        if number == 1:
            time.sleep(0.3)  # it fills the pipes
            bridge._lanes[-1].cut()
            raise ConnectError("the answer was lost")

    monkeypatch.setattr(Bridge, "_resume", lost)
    line.cut(0, TO[way], 600_000)
    got = Copied(line, image, way, proof="never", compress="never")
    assert got.states == ["lost", "bridged"]


@WAYS
def test_after_the_time_the_copy_fails_and_leaves_nothing(
    line: Line, image: Path, way: str, tmp_path: Path
) -> None:
    line.cut(0, TO[way], 2 * MIB, "off")
    began = time.monotonic()
    with pytest.raises(ConnectError, match=r"no other one came about within 1 s \(--retry\)") as e:
        Copied(line, image, way, retry=1.0)
    assert e.value.exit_code == 69 and time.monotonic() - began > 1
    assert not (tmp_path / "back").exists()
    if way == "push":
        assert not (line.home / "there").exists()


@pytest.mark.parametrize("inplace", [False, True])
def test_an_agent_that_waits_gives_way_to_another_copy(
    line: Line, image: Path, inplace: bool
) -> None:
    """The first copy was killed without a connection, and nobody could say so there."""
    if inplace:
        (line.home / "there").write_bytes(bytes(image.stat().st_size))
    words = ["copy", str(image), "b:there", *(["--update", "--inplace"] if inplace else [])]
    line.cut(0, "up", 2 * MIB, "off")
    with subprocess.Popen([*pyploop_cmd(), *words, "--compress", "never"]) as first:
        wait_until((line.folder / "refuse").exists, "the cut", 60)
        first.kill()
    (line.folder / "refuse").unlink()
    options = pyploop.CopyOptions(update=inplace, inplace=inplace)
    pyploop.copy(str(image), "b:there", options=options)
    assert (line.home / "there").read_bytes() == image.read_bytes()


@pytest.mark.parametrize("retry", [-1.0, float("inf"), float("nan"), 1e12])
def test_a_time_that_cannot_be_is_refused_before_anything_is_connected(
    line: Line, image: Path, retry: float
) -> None:
    with pytest.raises(ParameterError, match="retry="):
        pyploop.copy(str(image), "b:there", options=pyploop.CopyOptions(retry=retry))
    assert not list((line.folder / "lanes").iterdir())


def test_without_retry_a_cut_ends_the_copy(line: Line, image: Path) -> None:
    line.cut(0, "up", 2 * MIB)
    with pytest.raises(ConnectError, match="the connection to b for the data was lost"):
        Copied(line, image, "push", retry=0.0)
    wait_until(lambda: not line.there(), "the other host has ended all")


def test_an_agent_that_was_killed_is_not_waited_for(line: Line, image: Path) -> None:
    seen: list[Any] = []

    def kill() -> None:
        wait_until(lambda: any(map(begun, seen)), "the first pass", 60)
        line.end()

    killer = threading.Thread(target=kill)
    killer.start()
    began = time.monotonic()
    with pytest.raises(ConnectError, match="its pyploop has ended"):
        Copied(line, image, "push", seen, bandwidth=MIB)
    killer.join()
    assert time.monotonic() - began < 60
    assert not (line.home / "there").exists()


def test_a_failure_of_the_other_end_is_not_tried_again(
    line: Line, image: Path, tmp_path: Path
) -> None:
    program = tmp_path / "limited"
    program.write_text(f'#!/bin/bash\nulimit -f 4096\nexec {" ".join(pyploop_cmd())} "$@"\n')
    program.chmod(0o755)
    with pytest.raises(PyploopError, match="File too large") as e:
        Copied(line, image, "push", remote_pyploop=str(program))
    assert e.value.exit_code == 7
    assert not (line.home / "there").exists()


# ---- at random moments


def cut_at_random(line: Line, chance: random.Random, way: str, size: int) -> list[str]:
    """Plan one to three cuts.  Returns them in words."""
    plans = []
    for lane in sorted(chance.sample(range(4), chance.randint(1, 3))):
        # Before both ends have greeted each other there is nothing to go on with.
        direction = TO[way] if not lane or chance.randrange(4) else BACK[way]
        after = chance.randrange(1000 if not lane else 0, size if direction == TO[way] else 500)
        which = chance.choice(["one", "all"])
        line.cut(lane, direction, after, which)
        plans.append(f"lane {lane} {direction} after {after}: {which}")
    return plans


def begun(event: Any) -> bool:
    return isinstance(event, event_types.Phase) and event.phase != "comparing"


@pytest.mark.parametrize("seed", range(int(os.environ.get("PYPLOOP_CUTS", "2"))))
def test_cuts_at_random_moments_cost_little_and_no_byte(line: Line, image: Path, seed: int) -> None:
    """PYPLOOP_CUTS: how many.  Besides, a connection is killed after a random time."""
    chance = random.Random(seed)
    way = chance.choice(["push", "pull"])
    large = seed >= 2
    if large:
        image.write_bytes(os.urandom(40 * MIB) + bytes(4 * MIB) + os.urandom(8 * MIB + 1000))
    size = image.stat().st_size
    plans = cut_at_random(line, chance, way, size)
    over, seen = threading.Event(), list[Any]()

    def kill() -> None:
        for _ in range(chance.randint(0, 2)):
            wait_until(lambda: over.is_set() or any(map(begun, seen)), "the first pass", 60)
            if over.wait(chance.uniform(0, 3)):
                return
            victims = line.up(chance.choice(["agent", "lane"]))
            for pid in victims[: chance.choice([1, 9])]:
                plans.append(f"killed {pid}")
                (line.folder / "pids" / str(pid)).unlink(missing_ok=True)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        got = Copied(line, image, way, seen, bandwidth=chance.choice([0, 20 * MIB]))
    except BaseException as e:
        raise AssertionError(f"{way}: {plans}") from e
    finally:
        over.set()
        killer.join()
    wire = got.result.wire_bytes / size
    print(f"{seed} {way}: {got.result.cuts} cuts, {wire:.3f} of the data; {plans}")
    if large:
        assert wire <= 1.2, plans


# ---- an older copy that is brought up to date


def outdated(image: Path, target: Path) -> None:
    """600 blocks differ."""
    state = bytearray(image.read_bytes())
    for block in random.Random(3).sample(range(12 * MIB // BLOCK), 600):
        state[block * BLOCK] ^= 1
    target.write_bytes(state)


def update_of(line: Line, image: Path, way: str) -> tuple[Path, tuple[str, str]]:
    """(the target, SOURCE and TARGET)."""
    there, back = line.home / "there", image.parent / "back"
    outdated(image, there if way == "push" else back)
    if way == "push":
        return there, (str(image), "b:there")
    there.write_bytes(image.read_bytes())
    return back, ("b:there", str(back))


@WAYS
def test_a_cut_in_the_data_of_an_update_is_bridged(line: Line, image: Path, way: str) -> None:
    target, places = update_of(line, image, way)
    line.cut(0, TO[way], MIB)
    options = pyploop.CopyOptions(update=True, compress="never")
    done = pyploop.copy(*places, options=options)
    assert (done.cuts, done.proven) == (1, True)
    assert target.read_bytes() == image.read_bytes()


@WAYS
def test_a_cut_in_the_digests_of_an_update_leaves_the_older_copy_and_the_next_one_goes_on(
    line: Line, image: Path, way: str
) -> None:
    """What the other end has of them is not known."""
    target, places = update_of(line, image, way)
    before = target.read_bytes()
    line.cut(0, BACK[way], 20_000)
    with pytest.raises(ConnectError, match="the connection to b for the data was lost"):
        pyploop.copy(*places, options=pyploop.CopyOptions(update=True))
    assert target.read_bytes() == before
    wait_until(lambda: not line.there(), "the other host has ended all")
    pyploop.copy(*places, options=pyploop.CopyOptions(update=True))
    assert target.read_bytes() == image.read_bytes()
    assert not target.with_name(f"{target.name}.pyploop-partial").exists()
