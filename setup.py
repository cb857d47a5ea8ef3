# SPDX-License-Identifier: Apache-2.0
"""Builds csrc/ as a static library, the two extensions on top of it, the helper programs,
and the manual.

The library is compiled on its own, so that its warnings need not hold for generated
code.  PYPLOOP_WERROR=1, as CI sets it, makes them errors.  CFLAGS=-O0 makes a build for
the debugger: nothing is optimised, and the library's assertions are on.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from Cython.Build import cythonize
from setuptools import Command, Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

here = Path(__file__).resolve().parent
sources = sorted(str(p.relative_to(here)) for p in here.glob("csrc/*.c"))
headers = sorted(str(p.relative_to(here)) for p in here.glob("csrc/*.h"))
machine = platform.machine()
for_debugger = "-O0" in os.environ.get("CFLAGS", "").split()
# What a distribution gives its packages.  -U: some compilers define it by themselves.
hardening = ["-U_FORTIFY_SOURCE", "-fstack-protector-strong", "-fstack-clash-protection"]
if not for_debugger:  # sizes are known to an optimising compiler only
    hardening.append("-D_FORTIFY_SOURCE=3")
if machine in ("x86_64", "i686"):
    hardening.append("-fcf-protection")
elif machine == "aarch64":
    hardening.append("-mbranch-protection=standard")
# Symbols are bound when the module is loaded, and what they are bound by is read-only then.
links = ["-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack"]
# The folder of the build is not written into the modules: the same source, the same bytes.
paths = [f"-ffile-prefix-map={here}=."]
common = ["-std=gnu11", "-O0" if for_debugger else "-O2", "-g", "-pthread"]
warnings = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow"]
warnings += ["-Wmissing-prototypes", "-Wstrict-prototypes"]
cflags = [*common, "-fPIC", "-fvisibility=hidden", *warnings, *hardening, *paths]
cflags.append("-UNDEBUG" if for_debugger else "-DNDEBUG")
if os.environ.get("PYPLOOP_WERROR"):
    cflags.append("-Werror")

core = Extension(
    "pyploop._core",
    ["pyploop/_core.pyx"],
    include_dirs=["csrc"],
    depends=headers + sources,
    extra_compile_args=common,
    extra_link_args=["-pthread", "-lzstd"],  # at the end: csrc/ needs it
)


class BuildExtensions(build_ext):
    """All of them hardened and reproducible, cffi's, too.  And the helper program."""

    def run(self) -> None:
        super().run()
        sources = sorted(str(p.relative_to(here)) for p in here.glob("csrc/tmpfs_tar/*.c"))
        objects = self.compiler.compile(
            sources,
            output_dir=self.build_temp,
            extra_preargs=["-D_GNU_SOURCE"],
            extra_postargs=cflags,
            depends=sorted(str(p.relative_to(here)) for p in here.glob("csrc/tmpfs_tar/*.h")),
        )
        self.compiler.link_executable(
            objects,
            "tar",
            output_dir=str(self._helpers()),
            extra_postargs=["-pie", *links],
        )

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(self._helpers() / "tar")]

    def _helpers(self) -> Path:
        """A folder of their own: it is put into PATH."""
        return Path(here if self.inplace else self.build_lib, "pyploop", "helpers")

    def build_extensions(self) -> None:
        for extension in self.extensions:
            extension.extra_compile_args += hardening + paths
            extension.extra_link_args += links
        super().build_extensions()


class BuildManual(Command):
    """Manual pages and completions, by the parsers of what was just built."""

    description = "generate manual pages and completions"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        self.editable_mode = False  # setuptools sets it: there is nothing to install then
        self.build_lib = self.build_base = None

    def finalize_options(self) -> None:
        self.set_undefined_options(
            "build", ("build_lib", "build_lib"), ("build_base", "build_base")
        )

    def run(self) -> None:
        if self.editable_mode:
            return
        out = Path(self.build_base or "build", "manual")
        shutil.rmtree(out, ignore_errors=True)  # of a command that has gone, say
        path = os.pathsep.join(filter(None, [self.build_lib, os.environ.get("PYTHONPATH")]))
        subprocess.run(
            [sys.executable, "-P", str(here / "man/generate.py"), str(out)],
            env={**os.environ, "PYTHONPATH": path},
            check=True,
        )
        made = sorted(p for p in out.rglob("*") if p.is_file())
        self.distribution.data_files = [
            *(self.distribution.data_files or []),
            *((str(p.parent.relative_to(out)), [str(p)]) for p in made),
        ]


class Build(build):
    sub_commands = [*build.sub_commands, ("build_manual", None)]  # noqa: RUF012 - as in setuptools


setup(
    cmdclass={"build": Build, "build_ext": BuildExtensions, "build_manual": BuildManual},
    libraries=[
        (
            "plcore",
            {"sources": sources, "depends": headers, "include_dirs": ["csrc"], "cflags": cflags},
        )
    ],
    ext_modules=cythonize([core], language_level=3),
    cffi_modules=["pyploop/_kernel_build.py:ffi"],
)
