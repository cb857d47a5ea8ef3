# SPDX-License-Identifier: Apache-2.0
"""Containers of engines that cannot be migrated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import ROOT

from pyploop import MigrationOptions, migrate
from pyploop.errors import MigrateError, VzExitCode


@pytest.mark.parametrize(("word", "engine"), [("docker:web", "Docker"), ("lxc:web", "LXC")])
def test_a_container_of_docker_or_lxc_is_refused_with_the_page_that_says_why(
    tmp_path: Path, word: str, engine: str
) -> None:
    config = tmp_path / "migrate.toml"
    config.touch()
    with pytest.raises(MigrateError, match=f"containers of {engine} cannot") as e:
        migrate("b", word, options=MigrationOptions(config=str(config)))
    assert e.value.exit_code == VzExitCode.USAGE
    (page,) = re.findall(r"\((docs/[^)]*)\)", str(e.value))
    assert (ROOT / page).read_text().startswith("# Docker and LXC\n")
