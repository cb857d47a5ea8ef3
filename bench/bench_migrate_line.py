# SPDX-License-Identifier: Apache-2.0
"""How much of a long line a migration uses.

    sudo python3 bench/bench_migrate_line.py --round-trip 0.1 --rate 125e6 --size 1024

Two hosts in one folder (tests/migrate/anypair.py), with a container of two disks of which one
has so many MiB of random data, and an sshd of this host between them behind a line in user
space (bench/line.py).  `--memory` MiB of random memory images are sent, too.  The rates are
those of the first pass over the disks, and of the dump.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import MIB, TESTS, cleaned_up

sys.path.insert(0, str(TESTS / "migrate"))

import anypair
from anypair import Pair, any_pair
from support import pyploop_cmd, pyploop_env

HERE = Path(__file__).parent
SECONDS = 10.0


def _port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


def _wait(port: int) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def _ssh(folder: Path, round_trip: float, rate: float) -> Iterator[list[str]]:
    """The command of ssh that goes to this host over the line."""
    far, near = _port(), _port()
    for name in ("key", "host_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True
        )
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        f"Port {far}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\nUsePAM no\n"
        f"AuthorizedKeysFile {folder}/key.pub\nPidFile none\nStrictModes no\nUseDNS no\n"
        "PermitRootLogin yes\nPasswordAuthentication no\n"
    )
    kind, key, *_ = (folder / "host_key.pub").read_text().split()
    (folder / "known").write_text(f"[127.0.0.1]:{near} {kind} {key}\n")
    (folder / "ssh_config").write_text(
        f"Host other\n  HostName 127.0.0.1\n  Port {near}\n  User {getpass.getuser()}\n"
        f"  IdentityFile {folder}/key\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known\n"
    )
    line = [sys.executable, str(HERE / "line.py"), "--listen", f"127.0.0.1:{near}"]
    line += ["--to", f"127.0.0.1:{far}", "--round-trip", str(round_trip), "--rate", str(rate)]
    sshd = [shutil.which("sshd") or "/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")]
    processes = []
    try:
        with (folder / "log").open("wb") as log:
            for command in (sshd, line):
                processes.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                )
        _wait(far)
        _wait(near)
        yield ["ssh", "-F", str(folder / "ssh_config")]
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def _through(pair: Pair, ssh: list[str]) -> None:
    for host in (pair.a, pair.b):
        config = host / "migrate.toml"
        lines = config.read_text().splitlines()
        lines = [f"ssh = {json.dumps(ssh)}" if x.startswith("ssh =") else x for x in lines]
        config.write_text("\n".join(lines) + "\n")


def _events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _fill(path: Path, mib: int) -> None:
    with path.open("wb") as f:
        for _ in range(mib):
            f.write(os.urandom(MIB))
        os.fsync(f.fileno())


def _say(what: str, size: int, seconds: float, line: float) -> None:
    rate = size / seconds
    print(
        f"{what}, {size >> 20} MiB in {seconds:.2f} s: {rate / 1e6:.1f} MB/s, "
        f"{rate / line:.1%} of the line"
    )


def measure(o: argparse.Namespace, folder: Path) -> None:
    anypair.SIZES["ext4"] = (o.size + o.size // 8 + 64) * MIB
    with any_pair(folder) as pair, _ssh(folder, o.round_trip, o.rate) as ssh:
        if o.size:
            _fill(pair.a / "one" / "data", o.size)
        if o.memory:
            _fill(pair.a / "pages", o.memory)
        _through(pair, ssh)
        log = folder / "events"
        start = time.monotonic()
        words = ["migrate", "--config", str(pair.a / "migrate.toml"), "--live", "-vvv"]
        done = subprocess.run(
            [*pyploop_cmd(), *words, "--json", str(log), *o.options.split(), "other", "box"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            env=pyploop_env(),
        )  # fmt: skip
        total = time.monotonic() - start
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        if o.verbose:
            print(done.stdout, done.stderr)
        events = _events(log)
        first = max((e for e in events if e["event"] == "round" and e["number"] == 0),
                    key=lambda e: int(e["sent"]), default=None)  # fmt: skip
        print(f"round trip {o.round_trip * 1000:g} ms, {o.rate / 1e6:g} MB/s; in all {total:.2f} s")
        if first is not None and o.size:
            _say("disk", int(first["sent"]), float(first["seconds"]), o.rate)
        (moved,) = (e for e in events if e["event"] == "moved")
        if o.memory:
            _say("memory", int(moved["dump_bytes"]), float(moved["steps"]["dump sent"]), o.rate)
        (pair.a / "pages").unlink(missing_ok=True)
        pair.runs_only_on(pair.b)


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    p.add_argument("--round-trip", type=float, default=0.1, metavar="SECONDS")
    p.add_argument("--rate", type=float, default=125e6, metavar="BYTES/S")
    p.add_argument("--size", type=int, default=1024, metavar="MIB")
    p.add_argument("--memory", type=int, default=0, metavar="MIB")
    p.add_argument("--repeat", type=int, default=1)
    p.add_argument("--options", default="", help="of pyploop migrate")
    p.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where the disks lie")
    p.add_argument("-v", dest="verbose", action="store_true", help="what the migration says")
    o = p.parse_args()
    with cleaned_up():
        for _ in range(o.repeat):
            with tempfile.TemporaryDirectory(prefix="pyploop-bench-", dir=o.dir) as folder:
                measure(o, Path(folder))


if __name__ == "__main__":
    main()
