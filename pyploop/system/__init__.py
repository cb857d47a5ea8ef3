# SPDX-License-Identifier: Apache-2.0
"""What pyploop asks of Linux: system calls, sysfs, processes, threads, safe paths.

Nothing here knows what a copy or a container is.  It may import `report` and what is
below.  A new ioctl or structure goes into `pyploop/_kernel_build.py`, where the
compiler fills it in, and gets its name in `kernel`.
"""
