# SPDX-License-Identifier: Apache-2.0
"""pyploop's access to Linux: system calls, sysfs and mounts, processes, threads, safe paths.

Nothing here knows what a copy or a container is.  This package may import `report` and
the packages below it.

- A new ioctl or structure goes into `pyploop/_kernel_build.py`, where the compiler fills
  in numbers and layouts.  `kernel` gives it a name and documents its errors.
- What sysfs shows of a block device is in `sysblock`; what is mounted, in `mount_table`,
  the only reader of mountinfo.
- Paths below a folder that another user can change: `beneath`, `tree_walk`, `removal`.
  Folders that only this user can change: `private_folder`.
"""
