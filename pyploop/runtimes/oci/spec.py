# SPDX-License-Identifier: Apache-2.0
"""The keys of an OCI config.json that are accepted from another host, after the runtime
specification (https://github.com/opencontainers/runtime-spec, config.md and
config-linux.md).  The policy decides which values they may have (config_json.py).

Refused on purpose: hooks, intelRdt, rdma, timeOffsets, netDevices, scheduler and the
devices of blkio.  They run commands, or concern what is the host's own.
"""

from __future__ import annotations

from typing import Any

from pyploop.runtimes.oci.json_shapes import (
    INT64,
    UINT32,
    UINT64,
    flag,
    listing,
    mapping,
    matching,
    never,
    number,
    one_of,
    path,
    table,
    text,
)

_CAPABILITIES = listing(matching(r"CAP_[A-Z_]{2,30}", "a capability's name"), 64)
_ACTIONS = ("KILL", "KILL_PROCESS", "KILL_THREAD", "TRAP", "ERRNO", "TRACE", "ALLOW", "LOG")
_ACTION = one_of(*(f"SCMP_ACT_{a}" for a in _ACTIONS))
_IDS = listing(table(containerID=UINT32, hostID=UINT32, size=UINT32), 340)
_DEVICE_NUMBER = number(-1, (1 << 32) - 1)
_HOST_NAME = matching(r"[A-Za-z0-9._-]{0,64}", "a host name")

_PROCESS = table(
    terminal=flag,
    consoleSize=table(height=UINT32, width=UINT32),
    user=table(uid=UINT32, gid=UINT32, umask=number(0, 0o777), additionalGids=listing(UINT32)),
    args=listing(text),
    env=listing(text),
    cwd=path,
    capabilities=table(
        bounding=_CAPABILITIES,
        effective=_CAPABILITIES,
        inheritable=_CAPABILITIES,
        permitted=_CAPABILITIES,
        ambient=_CAPABILITIES,
    ),
    rlimits=listing(table(type=text, hard=UINT64, soft=UINT64), 32),
    noNewPrivileges=flag,
    apparmorProfile=text,
    oomScoreAdj=number(-1000, 1000),
    selinuxLabel=text,
)
_MOUNT = table(destination=path, type=text, source=text, options=listing(text, 64))
_SYSCALL = table(
    names=listing(matching(r"[a-z0-9_]{1,64}", "a system call's name")),
    action=_ACTION,
    errnoRet=number(0, 4095),
    args=listing(
        table(
            index=number(0, 5),
            value=UINT64,
            valueTwo=UINT64,
            op=matching(r"SCMP_CMP_[A-Z_]{2,12}", "a comparison"),
        ),
        64,
    ),
)
_SECCOMP = table(
    defaultAction=_ACTION,
    defaultErrnoRet=number(0, 4095),
    architectures=listing(matching(r"SCMP_ARCH_[A-Z0-9_]{1,16}", "an architecture"), 64),
    flags=listing(one_of(*(f"SECCOMP_FILTER_FLAG_{f}" for f in ("TSYNC", "LOG", "SPEC_ALLOW"))), 8),
    listenerPath=never("is a socket of another host"),
    listenerMetadata=never("is for a socket of another host"),
    syscalls=listing(_SYSCALL),
)
_RESOURCES = table(
    devices=listing(
        table(
            allow=flag,
            type=one_of("", "a", "b", "c"),
            major=_DEVICE_NUMBER,
            minor=_DEVICE_NUMBER,
            access=matching(r"[rwm]{0,3}", "made of the letters r, w and m"),
        )
    ),
    memory=table(
        limit=INT64,
        reservation=INT64,
        swap=INT64,
        kernel=INT64,
        kernelTCP=INT64,
        swappiness=number(0, 200),
        useHierarchy=flag,
        disableOOMKiller=never("would let the host run out of memory"),
        checkBeforeUpdate=flag,
    ),
    cpu=table(
        shares=UINT64,
        quota=INT64,
        burst=UINT64,
        period=UINT64,
        idle=number(0, 1),
        cpus=matching(r"[0-9,-]{0,512}", "a list of CPUs"),
        mems=matching(r"[0-9,-]{0,512}", "a list of memory nodes"),
    ),
    pids=table(limit=INT64),
    blockIO=table(weight=number(0, 1000), leafWeight=number(0, 1000)),
    hugepageLimits=listing(
        table(pageSize=matching(r"[0-9]{1,6}[KMG]B", "a page size"), limit=UINT64), 16
    ),
    unified=mapping,
)
_LINUX = table(
    devices=listing(
        table(
            type=one_of("b", "c", "u", "p"),
            path=path,
            major=INT64,
            minor=INT64,
            fileMode=number(0, 0o177777),
            uid=UINT32,
            gid=UINT32,
        ),
        256,
    ),
    uidMappings=_IDS,
    gidMappings=_IDS,
    sysctl=mapping,
    resources=_RESOURCES,
    cgroupsPath=text,
    namespaces=listing(table(type=text, path=text), 16),
    seccomp=_SECCOMP,
    rootfsPropagation=one_of("", "private", "rprivate", "slave", "rslave"),
    maskedPaths=listing(path),
    readonlyPaths=listing(path),
    mountLabel=text,
    personality=table(
        domain=one_of("LINUX", "LINUX32"), flags=never("are not accepted: no runtime uses them")
    ),
)
_CONFIG = table(
    ociVersion=matching(r"[0-9]{1,3}\.[0-9]{1,3}\.[0-9A-Za-z.+-]{1,32}", "a version"),
    process=_PROCESS,
    root=table(path=text, readonly=flag),
    hostname=_HOST_NAME,
    domainname=_HOST_NAME,
    mounts=listing(_MOUNT, 1024),
    linux=_LINUX,
    annotations=mapping,
    hooks=never("are commands of another host, which are not run here"),
)


def anew(config: Any) -> dict[str, Any]:
    """A copy of the configuration that has only known keys, each of its type.
    MigrateError(15)."""
    made: dict[str, Any] = _CONFIG(config, "")
    return made
