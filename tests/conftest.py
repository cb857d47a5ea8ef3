# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several folders share; helpers are in tests/support.py."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lab.hosts import Lab

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "fakeploop"), str(HERE / "fuzz")]


def pytest_configure(config: pytest.Config) -> None:
    """Ended from outside (by `timeout`, say), a run still takes down its loop
    devices, mounts and namespaces."""
    leads = config.pluginmanager.hasplugin("dsession")  # pytest-xdist's, whose workers test
    names = [signal.SIGTERM, signal.SIGHUP]
    if leads or hasattr(config, "workerinput"):
        # A ^C goes to all of them, and the leader would kill who takes long.
        names.append(signal.SIGINT)

    def stop(signum: int, frame: FrameType | None) -> None:
        for name in names:
            signal.signal(name, signal.SIG_IGN)
        if not leads:
            raise KeyboardInterrupt
        for pid in Path("/proc/self/task", str(os.getpid()), "children").read_text().split():
            os.kill(int(pid), signal.SIGTERM)  # when they end, this ends

    # A shell ignores ^C in what it starts with `&`, and so would every copy here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in names:
        signal.signal(signum, stop)


def pytest_report_header() -> str:
    """Which pyploop is tested: the one of this interpreter, an installed wheel or a
    checkout that is installed with -e."""
    import pyploop

    return f"pyploop {pyploop.__version__}: {os.path.dirname(pyploop.__file__)}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The tables of the disturbed migrations, when all of them were asked for."""
    if "table" in sys.modules:  # of tests/migrate
        sys.modules["table"].tell(terminalreporter)


@pytest.fixture(scope="session")
def build_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what tests compile stays for the next run (pytest's cache)."""
    cache: pytest.Cache | None = getattr(request.config, "cache", None)
    if cache is not None:
        with contextlib.suppress(OSError):  # another user's checkout
            folder = cache.mkdir("compiled")
            if os.access(folder, os.W_OK):
                return folder
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True, scope="session")
def journals_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is killed here leaves nothing in /run/pyploop, and `pyploop thaw`
    there finds no copy of a user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYPLOOP_RUN", str(tmp_path_factory.mktemp("run")))
        yield


def _open_descriptors() -> set[str]:
    """Without that of the look itself."""
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    """A test that leaves a descriptor open fails."""
    before = _open_descriptors()
    yield
    import gc

    left = _open_descriptors() - before
    deadline = time.monotonic() + 5
    if left:
        gc.collect()
    # A thread that has just ended its work may be about to close one.
    while (left := left & _open_descriptors()) and time.monotonic() < deadline:
        time.sleep(0.01)
    names = {
        fd: os.readlink(f"/proc/self/fd/{fd}")
        for fd in left
        if os.path.exists(f"/proc/self/fd/{fd}")
    }
    assert not names, f"descriptors left open: {names}"


@pytest.fixture
def two_hosts() -> Iterator[Lab]:
    """Two hosts for a migration; skips where there can be none, fails on CI."""
    from lab import hosts, requirements

    requirements.check()
    with hosts.lab() as made:
        yield made
