# SPDX-License-Identifier: Apache-2.0
"""systemd units of Podman's containers: which lines a target accepts, and what systemctl is
asked for.  A script stands in for systemctl, because no systemd runs where the tests run."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyploop.errors import MigrateError
from pyploop.runtimes.podman import systemd
from pyploop.runtimes.podman.command import Podman
from pyploop.runtimes.podman.systemd import Unit, why_not

ID = "a" * 64
TEXT = f"""# container-web.service
[Unit]
Description=Podman container-web.service
Documentation=man:podman-generate-systemd(1)
Wants=network-online.target
After=network-online.target
RequiresMountsFor=/run/containers/storage

[Service]
Environment=PODMAN_SYSTEMD_UNIT=%n
Restart=on-failure
TimeoutStopSec=70
ExecStart=/usr/bin/podman start web
ExecStop=/usr/bin/podman stop  \\
\t-t 10 web
ExecStopPost=/usr/bin/podman stop  \\
\t-t 10 web
PIDFile=/run/containers/storage/overlay-containers/{ID}/userdata/conmon.pid
Type=forking

[Install]
WantedBy=default.target
"""


def test_what_podman_generates_moves() -> None:
    assert not why_not(TEXT, ID, "web")
    assert not why_not(TEXT.replace("podman start web", f"podman start {ID}"), ID, "web")


@pytest.mark.parametrize(
    "line",
    [
        "ExecStart=/bin/sh -c reboot",
        "ExecStart=/usr/bin/podman start other",
        "ExecStart=/usr/bin/podman run --privileged web",
        "ExecStartPre=/bin/true",
        "ExecStop=/usr/bin/podman stop \\\n  --all web",
        "Wants=poweroff.target",
        "Environment=LD_PRELOAD=/tmp/x.so",
        "PIDFile=/etc/shadow",
        "[Socket]",
        "User=web",
    ],
)
def test_any_other_line_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="does not write"):
        systemd.coming(
            [{"name": "web.service", "text": TEXT + line, "enabled": 1, "active": 1}], ID, "web"
        )


@pytest.mark.parametrize("name", ["../web.service", "web", "-x.service", "web.service/x"])
def test_a_unit_s_name_is_no_path(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a unit"):
        systemd.coming([{"name": name, "text": TEXT, "enabled": 1, "active": 1}], ID, "web")


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What systemctl and systemd-run were asked for; systemd is said to run."""
    file, programs = tmp_path / "asked", tmp_path / "bin"
    programs.mkdir()
    for name in ("systemctl", "systemd-run"):
        script = f'#!/bin/sh\necho "{name} $*" >>{file}\n'
        script += "case $1 in is-enabled) echo enabled;; is-active) echo active;; esac\n"
        (programs / name).write_text(script + "[ ! -e " + str(tmp_path / "fail") + " ]\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(systemd, "FOLDER", tmp_path / "units")
    monkeypatch.setattr(systemd, "RUNNING", programs)
    (tmp_path / "units").mkdir()
    return file


def said(asked: Path) -> list[str]:
    """Since the last time."""
    lines = asked.read_text().splitlines() if asked.exists() else []
    asked.unlink(missing_ok=True)
    return lines


def test_a_unit_is_found_by_its_commands_and_follows_the_container(asked: Path) -> None:
    units = asked.with_name("units")
    (units / "web.service").write_text(TEXT)
    (units / "webmail.service").write_text(TEXT.replace(" web\n", " webmail\n"))
    found = systemd.find(9.0, ID, "web")
    assert found == [Unit("web.service", TEXT, True, True)]
    said(asked)
    systemd.stop(found, 9.0)
    systemd.start(found, 9.0)
    assert said(asked) == ["systemctl stop web.service", "systemctl start web.service"]
    systemd.release(found, 9.0)
    assert said(asked) == [
        "systemctl disable web.service",
        "systemctl stop --no-block web.service",
    ]
    for _ in range(2):  # it may be repeated
        systemd.remove(found, 9.0)
        systemd.release(found, 9.0)
    assert not (units / "web.service").exists()
    said(asked)
    systemd.install(systemd.coming([u.sent() for u in found], ID, "web"), 9.0)
    assert (units / "web.service").read_text() == TEXT
    assert said(asked) == [
        "systemctl daemon-reload",
        "systemctl enable web.service",
        "systemctl start web.service",
    ]


def test_a_unit_with_a_drop_in_stays(asked: Path) -> None:
    (asked.with_name("units") / "web.service").write_text(TEXT)
    (asked.with_name("units") / "web.service.d").mkdir()
    (found,) = systemd.find(9.0, ID, "web")
    assert (found.text, found.why) == ("", "web.service.d adds to it")


def test_the_timer_of_a_health_check_is_made_once(asked: Path) -> None:
    config = {"healthcheck": {"Test": ["CMD-SHELL", "true"], "Interval": 30_000_000_000}}
    systemd.watch_health(Podman("/usr/bin/podman", 9.0), ID, systemd.interval_of(config))
    timers, run, start = said(asked)
    assert timers.startswith("systemctl list-timers")
    assert f"--unit {ID} --on-unit-inactive=30s" in run
    assert run.endswith(f"/usr/bin/podman healthcheck run {ID}")
    assert start == f"systemctl start --no-block {ID}.service"
    assert not systemd.interval_of({"healthcheck": {"Test": ["NONE"], "Interval": 5}})


def test_a_systemctl_that_fails_is_an_error(asked: Path) -> None:
    asked.with_name("fail").touch()
    with pytest.raises(MigrateError, match=r"systemctl disable web\.service ended with 1"):
        asked.with_name("units").joinpath("web.service").write_text(TEXT)
        systemd.release([Unit("web.service", TEXT, True, True)], 9.0)
    assert said(asked)
