# SPDX-License-Identifier: Apache-2.0
"""The cffi module that _kernel_build.py makes; only pyploop.system.kernel uses it."""

from typing import Any

ffi: Any
lib: Any
