# SPDX-License-Identifier: Apache-2.0
"""List what is written to a mounted device: track_device.py DEVICE"""

import sys

import pyploop

device = sys.argv[1]
with pyploop.track(device) as tracker:
    print("tracking; press return to see what has changed", flush=True)
    for _ in sys.stdin:
        with pyploop.frozen(device, limit=10):
            changes = tracker.changed(quiesced=True)
            # A backup reads these extents here, while the device is frozen.
        for start, end in changes.extents:
            print(f"{start:12} {end - start:10} bytes")
        print(f"{changes.bytes} bytes, {changes.completeness}", flush=True)
