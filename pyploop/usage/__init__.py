# SPDX-License-Identifier: Apache-2.0
"""Who uses the bytes of a source, and who writes to them unseen by a tracker.

`related_devices` finds the devices that share bytes, `users` who uses them,
`untracked_writes` what passes a tracker by, and `monitor` watches all three during a
copy.  It may import `undo` and what is below.
"""
