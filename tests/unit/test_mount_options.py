# SPDX-License-Identifier: Apache-2.0
"""Mount options of a configuration, as mount(2) gets them."""

from __future__ import annotations

import pytest

from pyploop.errors import MigrateError, ParameterError
from pyploop.runtimes import config
from pyploop.system import mount_options
from pyploop.system.kernel import MOUNT_FLAGS


def flags(*names: str) -> int:
    return sum(MOUNT_FLAGS[name] for name in names)


@pytest.mark.parametrize(
    ("options", "wanted", "data"),
    [
        ("", (), ""),
        ("defaults,rw", (), ""),
        ("defaults,nofail,_netdev,auto,x-systemd.device-timeout=30,x-gvfs-show", (), ""),
        ("noauto,nouser,nousers,noowner,nogroup,comment=backup,loop", (), ""),
        ("user", ("noexec", "nosuid", "nodev"), ""),
        ("user=joe,users", ("noexec", "nosuid", "nodev"), ""),
        ("user,exec,dev", ("nosuid",), ""),
        ("exec,user", ("noexec", "nosuid", "nodev"), ""),
        ("owner", ("nosuid", "nodev"), ""),
        ("group,suid", ("nodev",), ""),
        ("ro,rw", (), ""),
        ("rw,ro", ("ro",), ""),
        ("noatime,atime", (), ""),
        ("lazytime,sync,dirsync,nosymfollow", ("lazytime", "sync", "dirsync", "nosymfollow"), ""),
        ("errors=remount-ro,noatime", ("noatime",), "errors=remount-ro"),
        ("subvol=@/a,compress=zstd:3,nouuid", (), "subvol=@/a,compress=zstd:3,nouuid"),
        ('context="system_u:object_r:t:s0:c1,c2",nodev', ("nodev",), None),
    ],
)
def test_options_for_others_go_no_further(
    options: str, wanted: tuple[str, ...], data: str | None
) -> None:
    made = mount_options.parse(options)
    assert made.flags == flags(*wanted)
    assert made.data == (data if data is not None else options.removesuffix(",nodev"))


@pytest.mark.parametrize(
    "option",
    [
        "remount",
        "bind",
        "rbind",
        "move",
        "offset=4096",
        "sizelimit=1M",
        "uhelper=udisks2",
        "helper=x",
        "encryption=aes",
        "loop=/dev/loop7",
        "logdev=/dev/sdb",
        "rtdev=/dev/sdc",
        "journal_path=/dev/sdd",
        "device=/dev/sde",
        "shared",
        "rprivate",
        "verity.roothash=00",
        "X-mount.subdir=a",
    ],
)
def test_an_option_that_would_be_dropped_in_silence_is_refused(option: str) -> None:
    with pytest.raises(ParameterError, match=option.split("=", maxsplit=1)[0]):
        mount_options.parse(f"rw,{option}")
    disk = {"image": "/i", "mount": "/m", "options": f"noatime,{option}"}
    with pytest.raises(MigrateError, match=r"disk\.options") as e:
        config.parse({"container": {"web": {"bundle": "/b", "disk": [disk]}}}, "x")
    assert e.value.exit_code == 1


def test_the_last_value_of_an_option_counts_and_its_quotes_do_not() -> None:
    assert mount_options.value_of('subvol=a,rw,subvol="b,c"', "subvol") == "b,c"
    assert mount_options.value_of("subvolid=5,rw", "subvol") is None
