# SPDX-License-Identifier: Apache-2.0
"""How much of a long line the pumps use, by the number of lanes.

    python3 bench/bench_lanes.py --round-trip 0.1 --rate 125e6 --lanes 1 2 4 8

Random data from memory to memory, over a line in user space (bench/line.py) on which each
lane has 2 MiB under way at most, as an OpenSSH channel has.  No ssh, no disk: what is
measured is how the data are spread over the lanes.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import threading
import time

from common import MIB, cleaned_up
from line import SSH_WINDOW, Line

from pyploop import _core
from pyploop._core import Extents, Known, Pump, Receiver
from pyploop.wire import d1


def _pair() -> tuple[int, int]:
    a, b = socket.socketpair()
    return a.detach(), b.detach()


def _run(size: int, lanes: int, line: Line) -> float:
    """Seconds from the first byte until the receiver has written all."""
    src, dst = os.memfd_create("source"), os.memfd_create("target")
    data = os.urandom(MIB)
    for at in range(0, size, MIB):
        os.pwrite(src, data[at // MIB % 4096 :] + data[: at // MIB % 4096], at)
    ends = [(_pair(), _pair()) for _ in range(lanes)]
    for (_, line_in), (line_out, _) in ends:
        line.carry(line_in, line_out)
    os.set_blocking(ends[0][0][0], False)
    pump = Pump(
        src_fd=src, src_base=0, size=size, align=1, out_fd=ends[0][0][0],
        sink=_core.SINK_FRAMES, cluster=256 * 1024, slots=24, readers=1,
        known=Known(size, 12), features=d1.Feature.LANES, lane_stall_ms=20_000,
    )  # fmt: skip
    receiver = Receiver(
        in_fd=ends[0][1][1], out_fd=dst, slots=16, slot_size=256 * 1024,
        max_frame=64 * MIB, window=32 * MIB, lane_stall_ms=20_000,
    )  # fmt: skip
    pump.write(d1.sync())
    receiver.run()
    receiver.expect(d1.Feature.LANES)
    for number, ((out, _), (_, into)) in enumerate(ends[1:], 1):
        os.set_blocking(out, False)
        receiver.add_lane(into, number)
        pump.add_lane(out, number)
    events: list[int] = []
    thread = threading.Thread(target=lambda: events.append(receiver.run()[0]))
    start = time.monotonic()
    thread.start()
    pump.run(Extents.of([(0, size)]), _core.PASS_LAST)
    pump.write(d1.end())
    thread.join()
    seconds = time.monotonic() - start
    assert events == [_core.RECV_END]
    assert os.pread(dst, MIB, size - MIB) == os.pread(src, MIB, size - MIB)
    for (out, _), (_, into) in ends:
        os.close(out)
        os.close(into)
    os.close(src)
    os.close(dst)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Lanes over a long line.")
    parser.add_argument("--round-trip", type=float, default=0.1, metavar="SECONDS")
    parser.add_argument("--rate", type=float, default=125e6, metavar="BYTES/S")
    parser.add_argument("--size", type=int, default=512, metavar="MIB")
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeat", type=int, default=3)
    o = parser.parse_args()
    size = o.size * MIB
    seconds: dict[int, list[float]] = {n: [] for n in o.lanes}
    with cleaned_up() as stack:
        line = stack.enter_context(Line(o.round_trip, o.rate, SSH_WINDOW))
        for _ in range(o.repeat):
            for n in o.lanes:
                seconds[n].append(_run(size, n, line))
    print(f"{o.size} MiB, round trip {o.round_trip * 1000:g} ms, {o.rate / 1e6:g} MB/s")
    for n, values in seconds.items():
        rate = size / statistics.median(values)
        spread = ", ".join(f"{v:.2f}" for v in sorted(values))
        print(f"{n} lanes: {rate / 1e6:7.1f} MB/s, {rate / o.rate:6.1%} of the line ({spread} s)")


if __name__ == "__main__":
    main()
