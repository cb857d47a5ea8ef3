# SPDX-License-Identifier: Apache-2.0
"""Builds csrc/ as a static library, and the two extensions on top of it.

The library is compiled on its own so that it can be held to -Wall -Wextra
(-Werror with PYPLOOP_WERROR=1, as CI does) without holding generated code to it.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

here = Path(__file__).parent
sources = sorted(str(p.relative_to(here)) for p in here.glob("csrc/*.c"))
headers = sorted(str(p.relative_to(here)) for p in here.glob("csrc/*.h"))
cflags = ["-std=gnu11", "-O2", "-g", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra"]
if os.environ.get("PYPLOOP_WERROR"):
    cflags.append("-Werror")

core = Extension(
    "pyploop._core",
    ["pyploop/_core.pyx"],
    include_dirs=["csrc"],
    depends=headers + sources,
    extra_compile_args=["-std=gnu11", "-O2", "-g", "-pthread"],
    extra_link_args=["-pthread"],
)

setup(
    libraries=[
        (
            "plcore",
            {"sources": sources, "depends": headers, "include_dirs": ["csrc"], "cflags": cflags},
        )
    ],
    ext_modules=cythonize([core], language_level=3),
    cffi_modules=["pyploop/_kernel_build.py:ffi"],
)
