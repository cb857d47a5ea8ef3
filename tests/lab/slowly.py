# SPDX-License-Identifier: Apache-2.0
"""`pyploop` with deadlines that are PYPLOOP_SLOWNESS times as long, for a machine
that is emulated; or with some that PYPLOOP_DEADLINES names, for a test that would sit
through them (`migration.deadlines.REQUEST=2 transport.deadlines.SILENCE=3`).

    slowly.py pyploop.cli.main ARGUMENTS…       (as `python3 -m` would run it)
"""

from __future__ import annotations

import importlib
import os
import sys

LONGER = {
    "api.more_lanes": "STOPPING",
    "api.far_end": "LAST UNDOING",
    "api.remote_host": "ASKING",
    "bench.far_host": "BESIDE",
    "bench.line": "START",
    "copyagent.agent": "UNASKED UNDONE",
    "copyagent.again": "SLACK",
    "diskcopy.d1_target": "HELLO_WAIT",
    "diskcopy.lanes": "LANE_STALL",
    "diskcopy.target_update": "TAKING_OVER",
    "freeze.cgroup": "FREEZE_DEADLINE",
    "freeze.command": "KILL_GRACE",
    "freeze.filesystems": "LOCK_DEADLINE",
    "freeze.mounted": "UNMOUNT_DEADLINE",
    "freeze.vzctl": "STATUS_DEADLINE SUSPEND_DEADLINE",
    "migration.deadlines": "ATTEMPTS CHECKING DUMP_WAIT INTERRUPTED LANE LOADING PROBING REQUEST "
    "RESTORING RSYNC_ENDING RSYNC_READY RSYNC_VERSION SETTLE_WAIT SETTLING UNASKED UNBEGUN UNDOING "
    "UNMOVED",
    "migration.source.bulk_lanes": "STOPPING",
    "migration.source.lane_supply": "STOPPING",
    "migration.target.page_link": "START_SECONDS",
    "runtimes.page_record": "STOPPING",
    "runtimes.lazy_record": "ENDING",
    "runtimes.runc.cgroup": "DEADLINE",
    "runtimes.podman.command": "LONGEST",
    "runtimes.podman.extras": "DRAINED TIMEOUT",
    "runtimes.podman.networks": "TIMEOUT",
    "runtimes.podman.placed": "MOUNTING",
    "runtimes.podman.pod": "_TIMEOUT",
    "runtimes.runc.criu": "PROBE_TIMEOUT",
    "runtimes.runc.criu_options": "TIMEOUT",
    "runtimes.runc.early": "STOPPING",
    "runtimes.runc.host_fit": "TIMEOUT",
    "runtimes.runc.lazy_restore": "PROBE_SECONDS READY_SECONDS SERVING_SECONDS STOPPING_SECONDS",
    "runtimes.runc.memory_tracking": "TIMEOUT",
    "runtimes.runc.page_server": "PROBE_SECONDS READY_SECONDS STOPPING_SECONDS",
    "runtimes.runc.target": "PREPARING",
    "runtimes.volumes": "BUSY_DEADLINE",
    "system.commands": "BEGUN",
    "system.file_systems": "TIMEOUT",
    "system.network": "ANSWER",
    "system.stderr_tail": "DRAINED LAST",
    "trackers.bpf": "BASE_DEADLINE",
    "trackers.dm": "TIMEOUT",
    "transport.deadlines": "CONNECT ENDING HELLO LANE_STALL LAST_WORDS SILENCE",
    "transport.lane_handover": "COMING HANDING_OVER",
    "transport.ssh": "ENDED",
    "transport.ssh_cipher": "SECONDS",
    "undo.ledger": "ANSWER_DEADLINE START_DEADLINE UNDO_TIMEOUT",
    "usage.io_accounting": "QUIET_DEADLINE",
}
"""How long one waits for something that a slower machine does later."""

AS_IT_IS = {
    # Pauses: how often one looks, or does it again.
    "api.more_lanes": "BRIEF LOOK SOON",
    "api.far_end": "JOINING SOONER",
    "api.remote_verifying": "WAIT",
    "cli.main": "RAISED_AGAIN",
    "diskcopy.freeze_policy": "BURST PAUSE SMOOTH",
    "diskcopy.lane_policy": "AGAIN FALLEN FILLED FULL GROWS IDLE LINE SAMPLE SHORT SOONEST",
    "diskcopy.precopy": "RETRY",
    "diskcopy.prior": "TICK",
    "freeze.cgroup_freezer": "LONGEST_POLL",
    "migration.commit_record": "POLL",
    "migration.locks": "POLL",
    "migration.source.bulk_lanes": "BRIEF FIRST LOOK",
    "migration.source.disk_lanes": "BRIEF LOOK",
    "migration.source.dump_stream": "LOOK LOOK_UNTOLD",
    "migration.source.lane_supply": "LONG LOOK",
    "migration.source.suspend_plan": "LATELY PAUSE",
    "migration.source.wire_probe": "SECONDS",
    "report.slow_steps": "LONG LOOK",
    "runtimes.runc.cgroup_moves": "EVERY",
    "migration.source.post_copy": "LONGEST_WAIT",
    "runtimes.memory_record": "POLL",
    "runtimes.runc.announce": "CARRIER LOOK RUNNING",
    "runtimes.runc.connections": "ACKNOWLEDGED LOOK",
    "runtimes.runc.link_cut": "LAST_REQUEST",
    "runtimes.runc.preflight_sockets": "AGAIN",
    "system.claims": "PAUSE",
    "system.jobs": "TICK",
    "transport.deadlines": "GLANCE PING_EVERY",
    "transport.lane_handover": "LOOK",
    "transport.mux": "BREAKS",
    "undo.watchdog": "LATE RETRY",
    "usage.users": "CLAIM_PAUSE",
    # What a measurement lasts, or is cut into.
    "bench.freezes": "COOLED",
    "bench.line": "GAIN SLICE",
    # What a decision compares with what was measured.
    "bench.forecast": "FEWEST WINDOW",
    "diskcopy.freeze_stage": "REPAIR_SLACK",
    "diskcopy.measurements": "COLD_FREEZE",
    "freeze.session": "STOP_ASSUMED",
    "migration.source.suspend_limit": "FOR_UNDOING",
    "migration.source.suspend_forecast": "CLAMP LEAST OVERLAP SLOW",
    "migration.source.trees": "QUICK SHRINK",
    "system.contention": "CPU LONGEST",
    # What the user sets.
    "bench.far_host": "LARGEST",
    "api.copying": "ANSWER_TIMEOUT FREEZE_LIMIT",
    "libploop": "IDLE STALL",
    # Hours and days, and 60 s for a few bytes.
    "diskcopy.target_name": "OLD",
    "migration.deadlines": "IDLE LONGEST_STALL RETRY RSYNC_LOOK RSYNC_SOONEST",
    "system.descriptors": "ANSWER_TIMEOUT POLL_SLICE",
    "units": "LONGEST",
    "wire.copy_messages": "FOREVER",
    "wire.messages": "LONGEST_TIME",
    # Those of programs of their own, which are started by their paths.
    "runtimes.runc.page_dump": "CRIU_SECONDS",
    "runtimes.runc.page_greeting": "GREETING_SECONDS",
    "runtimes.runc.page_keeper": "NOTE_EVERY RETRY",
    "runtimes.runc.page_relay": "LINGER LOOK OUTCOME_SECONDS",
    "runtimes.runc.page_stream": "PING_EVERY SILENCE",
    "runtimes.runc.read_ahead": "STANDING",
    "runtimes.runc.guarded_container": "ENDING_SECONDS",
    "runtimes.runc.lazy_guard": "LONG_SECONDS READY_SECONDS",
    # Parts of something.
    "cli.demo_disk": "FILL",
    "diskcopy.target_room": "PART",
    "migration.source.memory": "PREVIEW",
    "runtimes.lazy_policy": "FORKED",
    "runtimes.runc.container": "PREVIEW",
}
"""All other constants that are no whole number.  tests/unit/test_slowly.py finds one that is
in neither table."""


def _set(module: str, name: str, value: float) -> None:
    """Wherever modules have imported it."""
    before: float = getattr(importlib.import_module(f"pyploop.{module}"), name)
    for other in [m for n, m in sys.modules.items() if n.startswith("pyploop.")]:
        if vars(other).get(name) is before:
            setattr(other, name, value)


def slow_down(factor: float) -> None:
    """Make the deadlines longer."""
    for module, names in LONGER.items():
        found = importlib.import_module(f"pyploop.{module}")
        for name in names.split():
            _set(module, name, getattr(found, name) * factor)


def set_deadlines(text: str) -> None:
    """Those that are named, and no others."""
    for word in text.split():
        path, _, value = word.partition("=")
        module, _, name = path.rpartition(".")
        assert name in LONGER[module].split(), word
        _set(module, name, float(value))


if __name__ == "__main__":
    set_deadlines(os.environ.pop("PYPLOOP_DEADLINES", ""))
    if (factor := float(os.environ.get("PYPLOOP_SLOWNESS", "1"))) != 1:
        slow_down(factor)
    from pyploop.cli.main import program

    del sys.argv[1]
    program()
