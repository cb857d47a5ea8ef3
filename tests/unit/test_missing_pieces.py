# SPDX-License-Identifier: Apache-2.0
"""What a migration says when something is not installed: what is missing, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyploop.errors import MigrateError, VzExitCode
from pyploop.migration.source.agent_client import Remote
from pyploop.runtimes import registry
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.runc import criu
from pyploop.system import commands


def refused(error: MigrateError) -> tuple[int, str, str]:
    return error.exit_code, str(error), error.hint or ""


def test_a_program_that_is_missing_is_named_and_where_its_path_is_written() -> None:
    with pytest.raises(MigrateError) as e:
        commands.run(["no-such-criu", "--version"], VzExitCode.NO_KERNEL, 1)
    code, text, hint = refused(e.value)
    assert code == VzExitCode.NO_KERNEL
    assert text.endswith("there is no program no-such-criu on this host")
    assert "install it" in hint and "migrate.toml" in hint


def test_a_criu_that_is_too_old_leads_to_a_newer_one(tmp_path: Path) -> None:
    program = tmp_path / "criu"
    program.write_text("#!/bin/sh\necho 'Version: 3.17.1'\n")
    program.chmod(0o755)
    with pytest.raises(MigrateError) as e:
        criu.version(str(program))
    code, text, hint = refused(e.value)
    assert code == VzExitCode.NO_KERNEL
    assert "has the version 3.17; 4.2 or newer is needed" in text
    assert "debian/install-host runc" in hint and "runc.criu" in hint


def test_a_name_that_runc_does_not_know_may_be_one_of_podman() -> None:
    with pytest.raises(MigrateError) as e:
        registry.make_runtime(HostConfig(), None, "web")
    code, text, hint = refused(e.value)
    assert code == VzExitCode.NO_CONTAINER
    assert "no container web: runc does not know it" in text
    assert "podman:web" in hint


@pytest.mark.parametrize(
    ("status", "words"), [(127, "install pyploop on b"), (255, "`ssh -o BatchMode=yes b pyploop")]
)
def test_a_host_without_pyploop_is_told_from_one_that_ssh_does_not_reach(
    status: int, words: str
) -> None:
    ssh = ["sh", "-c", f"echo what ssh says >&2; exit {status}"]
    with (
        pytest.raises(MigrateError) as e,
        Remote("b", ssh, [], ["pyploop", "agent"]),
    ):
        pass
    code, text, hint = refused(e.value)
    assert code == VzExitCode.CANNOT_CONNECT
    assert "no pyploop agent on b: " in text and "(what ssh says)" in text
    assert hint.startswith(words)
