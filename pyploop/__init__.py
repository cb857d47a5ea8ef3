# SPDX-License-Identifier: Apache-2.0
"""pyploop: copy a container's disk to another host while it runs.

    pyploop.copy("/dev/loop0", "/backup/disk.img")

`__all__` is the public interface.  It follows semantic versioning from 0.2.0 on; what is
not in it may change at any time.  A name is loaded when it is first used (PEP 562), so
importing pyploop costs next to nothing, and a copy loads nothing of a migration.
"""

TYPE_CHECKING = False  # as typing has it, which nothing here needs at run time
if TYPE_CHECKING:
    from pyploop.api.copying import Copy, CopyOptions
    from pyploop.api.devices import device_of
    from pyploop.api.freezing import Frozen, frozen
    from pyploop.api.inspecting import DiskInfo, inspect
    from pyploop.api.memory import MemoryStatus, forget_memory, memory_status
    from pyploop.api.migrating import MigrationOptions, MigrationResult, migrate, recover
    from pyploop.api.receiving import receive
    from pyploop.api.remote import copy
    from pyploop.api.syncing import sync
    from pyploop.api.tracking import Changes, Extent, Tracker, track
    from pyploop.api.verifying import VerifyResult, verify
    from pyploop.errors import (
        BusyError,
        CancelledError,
        CommandError,
        ConnectError,
        CreateError,
        DescriptorError,
        DeviceControlError,
        DeviceError,
        ExitCode,
        FormatError,
        LoopError,
        MigrateError,
        NotSupportedError,
        OpenError,
        ParameterError,
        ProtocolError,
        PyploopError,
        ReadError,
        SyncError,
        SysfsError,
        TooLargeError,
        VzExitCode,
        WriteError,
    )
    from pyploop.freeze.stoppers import Spec as Stop
    from pyploop.report import event_types as events
    from pyploop.report.results import CopyResult, ReceiveResult

__version__ = "0.2.0.dev0"

__all__ = [
    "BusyError",
    "CancelledError",
    "Changes",
    "CommandError",
    "ConnectError",
    "Copy",
    "CopyOptions",
    "CopyResult",
    "CreateError",
    "DescriptorError",
    "DeviceControlError",
    "DeviceError",
    "DiskInfo",
    "ExitCode",
    "Extent",
    "FormatError",
    "Frozen",
    "LoopError",
    "MemoryStatus",
    "MigrateError",
    "MigrationOptions",
    "MigrationResult",
    "NotSupportedError",
    "OpenError",
    "ParameterError",
    "ProtocolError",
    "PyploopError",
    "ReadError",
    "ReceiveResult",
    "Stop",
    "SyncError",
    "SysfsError",
    "TooLargeError",
    "Tracker",
    "VerifyResult",
    "VzExitCode",
    "WriteError",
    "__version__",
    "copy",
    "device_of",
    "events",
    "forget_memory",
    "frozen",
    "inspect",
    "memory_status",
    "migrate",
    "receive",
    "recover",
    "sync",
    "track",
    "verify",
]

_HOMES = {
    "api.copying": ("Copy", "CopyOptions"),
    "api.devices": ("device_of",),
    "api.freezing": ("Frozen", "frozen"),
    "api.inspecting": ("DiskInfo", "inspect"),
    "api.memory": ("MemoryStatus", "forget_memory", "memory_status"),
    "api.migrating": ("MigrationOptions", "MigrationResult", "migrate", "recover"),
    "api.receiving": ("receive",),
    "api.remote": ("copy",),
    "api.syncing": ("sync",),
    "api.tracking": ("Changes", "Extent", "Tracker", "track"),
    "api.verifying": ("VerifyResult", "verify"),
    "report.results": ("CopyResult", "ReceiveResult"),
}
"""Where what is not an error is; `Stop` and `events` have other names there."""


if not TYPE_CHECKING:  # a type checker would take any name to be there

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name == "events":
            found: object = import_module("pyploop.report.event_types")
        elif name == "Stop":
            found = import_module("pyploop.freeze.stoppers").Spec
        elif name in __all__:
            home = next((home for home, names in _HOMES.items() if name in names), "errors")
            found = getattr(import_module(f"pyploop.{home}"), name)
        else:
            raise AttributeError(f"module 'pyploop' has no attribute {name!r}")
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
