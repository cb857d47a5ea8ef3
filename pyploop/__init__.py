# SPDX-License-Identifier: Apache-2.0
"""pyploop: copy a container's disk to another host while it runs.

    pyploop.copy("/dev/loop0", "/backup/disk.img")

`__all__` is the public interface.  It follows semantic versioning from 0.2.0 on; what is
not in it may change at any time.  A name is loaded when it is first used (PEP 562), so
importing pyploop costs next to nothing, and a copy loads nothing of a migration.
"""

TYPE_CHECKING = False  # as typing has it, which nothing here needs at run time
if TYPE_CHECKING:
    from pyploop.api.copying import Copy, CopyOptions, copy
    from pyploop.api.devices import device_of
    from pyploop.api.freezing import Frozen, frozen
    from pyploop.api.inspecting import DiskInfo, inspect
    from pyploop.api.migrating import MigrationOptions, MigrationResult, migrate, recover
    from pyploop.api.receiving import receive
    from pyploop.api.syncing import sync
    from pyploop.api.tracking import Changes, Extent, Tracker, track
    from pyploop.errors import (
        BusyError,
        CancelledError,
        CommandError,
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
