# SPDX-License-Identifier: Apache-2.0
"""How `pyploop thaw` undoes the entries of a copy's journal, without the copy's own
descriptors.  To import this registers them (docs/internals/freeze.md)."""

from __future__ import annotations

import errno
import os

from pyploop.diskcopy import target_name  # noqa: F401 - registers `part`
from pyploop.errors import DeviceControlError
from pyploop.freeze.mounted import open_at
from pyploop.system import kernel, mount_table
from pyploop.system.claims import is_claimed
from pyploop.undo import journal, watchdog
from pyploop.undo.journal import Entry


def thaw(entry: Entry) -> None:
    """Kind `thaw`: thaw the file system with the device number `dev`, at `mount` or
    wherever it is mounted.  Does nothing when it is not frozen."""
    places = [entry["mount"], *mount_table.mount_points(entry["dev"])]
    for place in places:
        try:
            fd = open_at(place)
        except OSError:
            continue
        try:
            dev = os.fstat(fd).st_dev
            # Another file system may have this device number by now.
            same = entry.get("fsid") in (None, os.fstatvfs(fd).f_fsid)
            if same and f"{os.major(dev)}:{os.minor(dev)}" == entry["dev"]:
                kernel.fithaw(fd, place)
                return
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            return  # not frozen
        finally:
            os.close(fd)
    major, _, minor = entry["dev"].partition(":")
    if major != "0" and not is_claimed((int(major), int(minor)), unknown=True):
        return  # a frozen file system claims its device, mounted or not
    raise DeviceControlError(
        f"{entry['mount']} is not mounted any more, there or elsewhere, and may still be frozen: "
        f"mount device {entry['dev']} again, and try again",
        path=entry["mount"],
    )


journal.register("thaw", thaw)
journal.register("write", watchdog.write_value)
journal.register("run", watchdog.run)
