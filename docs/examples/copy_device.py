# SPDX-License-Identifier: Apache-2.0
"""Copy a device that is in use: copy_device.py DEVICE IMAGE"""

import sys

import pyploop
from pyploop import events


def show(event: events.Event) -> None:
    if isinstance(event, events.Phase):
        print(f"{event.time:6.2f} s  {event.phase}")
    elif isinstance(event, events.Round):
        print(f"{event.time:6.2f} s  round {event.number}: {event.sent} bytes")


try:
    result = pyploop.copy(sys.argv[1], sys.argv[2], on_event=show)
except pyploop.CreateError as error:
    sys.exit(f"{error}; {error.hint}" if error.hint else str(error))
print(f"{result.size} bytes, frozen for {result.frozen_total * 1000:.0f} ms")
