# SPDX-License-Identifier: Apache-2.0
"""`--suspend-limit`: whatever the target does, a suspended container runs again at the
source, unless the target may have restored it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from anypair import Pair
from support import pyploop_cmd
from test_command import pair  # noqa: F401 - a fixture

HERE = Path(__file__).parent


def with_target(pair: Pair, how: str) -> None:  # noqa: F811
    """The target of migrations from a is such a one (hostile.py)."""
    config = pair.a / "migrate.toml"
    lines = config.read_text().splitlines()
    (at,) = (n for n, text in enumerate(lines) if text.startswith("agent ="))
    agent = json.loads(lines[at].partition("=")[2])[len(pyploop_cmd()) :]
    # Its agent gives up the connection, and with it all that may have been restored.
    agent = [*pyploop_cmd("transport.deadlines.SILENCE=8"), *agent]
    lines[at] = f"agent = {json.dumps([sys.executable, str(HERE / 'hostile.py'), how, *agent])}"
    config.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("how", ["deaf", "flood", "drip"])
@pytest.mark.invariant(number=6)
def test_it_goes_on_here_when_the_target_stalls_the_suspended_time(
    pair: Pair,  # noqa: F811
    how: str,
) -> None:
    with_target(pair, how)
    done = pair.migrate(pair.a, "--live", "--suspend-limit", "2")
    assert done.returncode == 6, done.stderr
    # Whichever comes first.  The disks go by lanes, which are honest.
    flood = how == "flood" and "a flood of messages" in done.stderr
    late = "for more than 2 s (--suspend-limit)", "the request 'restore' to other failed: no answer"
    assert flood or any(text in done.stderr for text in late)
    assert "Traceback" not in done.stderr
    (pair.b / f"migrate.toml.{how}").unlink()
    pair.runs_only_on(pair.a)


def test_it_goes_on_here_when_the_target_forgets_the_restore(pair: Pair) -> None:  # noqa: F811
    with_target(pair, "forgetful")
    done = pair.migrate(pair.a, "--live", "--suspend-limit", "2")
    assert done.returncode == 6, done.stderr
    assert "no answer" in done.stderr
    (pair.b / "migrate.toml.forgetful").unlink()
    pair.runs_only_on(pair.a)


@pytest.mark.invariant(number=4)
def test_it_is_not_run_twice_when_the_answer_to_the_restore_is_lost(
    pair: Pair,  # noqa: F811
) -> None:
    """The limit passes while the container runs there already.  On a busy machine it
    may pass before that; then the container goes on here, and a longer limit is tried."""
    with_target(pair, "late")
    for limit in (2, 6, 18):
        done = pair.migrate(pair.a, "--live", "--suspend-limit", str(limit))
        if done.returncode != 6:
            break
        (pair.b / "migrate.toml.late").unlink()  # else the next target is honest
    assert done.returncode == 0, done.stderr
    assert "The container runs on the target, but afterwards this failed" in done.stdout
    (pair.b / "migrate.toml.late").unlink()
    pair.runs_only_on(pair.b)


def test_a_target_that_is_slow_to_restore_withdraws_it(pair: Pair) -> None:  # noqa: F811
    """It commits nothing when the source does not wait for it any more."""
    text = (HERE / "anyhost.py").read_text()
    slow = pair.b / "slow.py"
    slow.write_text(
        text.replace('elif step == "undump":', 'elif step == "undump":\n        time.sleep(3)')
    )
    config = pair.b / "migrate.toml"
    config.write_text(config.read_text().replace(str(HERE / "anyhost.py"), str(slow)))
    (pair.b / "guest.py").symlink_to(HERE / "guest.py")
    done = pair.migrate(pair.a, "--live", "--suspend-limit", "2")
    assert done.returncode == 6, done.stderr
    assert "no answer" in done.stderr
    for name in ("slow.py", "guest.py"):
        (pair.b / name).unlink()
    shutil.rmtree(pair.b / "__pycache__", ignore_errors=True)
    config.write_text(config.read_text().replace(str(slow), str(HERE / "anyhost.py")))
    pair.runs_only_on(pair.a)


def test_what_a_target_tells_is_told_as_its_word(pair: Pair) -> None:  # noqa: F811
    with_target(pair, "claims")
    done = pair.migrate(pair.a, "--live")
    assert done.returncode == 8, done.stderr
    assert "not finished: other: box: it does not run any more here" in done.stderr
    (pair.b / "migrate.toml.claims").unlink()
    pair.runs_only_on(pair.b)


def test_the_limit_goes_with_live(pair: Pair) -> None:  # noqa: F811
    done = pair.migrate(pair.a, "--suspend-limit", "5")
    assert (done.returncode, "needs --live" in done.stderr) == (1, True), done.stderr
