# SPDX-License-Identifier: Apache-2.0
"""Which device shows a container's disk: `device_of`."""

from __future__ import annotations

import os

from pyploop.disks import disk_descriptor
from pyploop.errors import DeviceError, FormatError


def device_of(descriptor: str | os.PathLike[str]) -> str:
    """The device whose top delta a DiskDescriptor.xml names: the ploop device, or on a
    stock kernel the loop device to which the delta (raw) is attached.

    DeviceError: none serves it.  FormatError: a loop device shows a delta that is not raw.
    DescriptorError: the file does not describe one chain of deltas.
    """
    name = os.fspath(descriptor)
    top = disk_descriptor.read(name).top
    found = disk_descriptor.serving_ploop(top.path)
    if found is not None:
        return found
    found = disk_descriptor.serving_loop(name)
    if found is None:
        raise DeviceError(
            f"no device shows {top.path}, the top delta of {name}",
            path=top.path,
            hint="mount the disk (ploop mount), or attach a raw delta to a loop device (losetup)",
        )
    if top.format != "raw":
        raise FormatError(
            f"{top.path} has the format {top.format}, which the loop device {found} does not "
            "understand: it shows the file as it is",
            path=top.path,
            hint="attach it to a ploop device (ploop mount)",
        )
    return found
