# SPDX-License-Identifier: Apache-2.0
"""A lane of a remote copy, at the end that asks: an ssh process that carries nothing but the
copy's own bytes, in both directions."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from pyploop.errors import ConnectError
from pyploop.transport import deadlines
from pyploop.transport.ssh import NoHelloError, Ssh
from pyploop.transport.ssh_cipher import chosen
from pyploop.wire import mux as wire


class NobodyWaitsError(ConnectError):
    """The other host has answered that no agent there waits for this lane."""


class Lane:
    """rfd, wfd: what comes from the other host, and what goes there.  A context manager that
    ends the connection."""

    def __init__(
        self, host: str, ssh: Sequence[str], options: Sequence[str], lane: Sequence[str]
    ) -> None:
        """lane: the command on the host, as words.  Else as Ssh.  It connects by itself from
        now on; `join` makes it a lane."""
        self.host = host
        try:
            self._ssh = Ssh(host, ssh, options, lane)
        except OSError as e:
            raise ConnectError.of(f"cannot run {ssh[0]} on this host", e, path=ssh[0]) from e
        self.rfd, self.wfd = self._ssh.rfd, self._ssh.wfd
        self.cipher = ""
        """Of ssh, once it has joined; empty: it did not say."""

    def join(self, token: str, gone: Callable[[], bool] = bool) -> Lane:
        """Wait until the agent has it; returns itself.  token: the agent's.  ConnectError: it
        does not come about, or `gone` says that it is not needed any more.  It is closed
        then."""
        try:
            # The token is in no command line, where others would see it.
            os.write(self.wfd, wire.lane_hello(token))
            self._ssh.wait_for(wire.lane_is_ready, "copy-lane", piece=1, gone=gone)
        except (NoHelloError, OSError) as e:
            if gone():
                self.cut()
            kind = (
                NobodyWaitsError if self._ssh.status() == ConnectError.exit_code else ConnectError
            )
            printed = self._ssh.printed()
            self.close()
            why = e.strerror if isinstance(e, OSError) else e
            raise kind(
                f"the connection to {self.host} for the data does not come about: {why}"
                + (f" ({printed})" if printed else "")
            ) from e
        except BaseException:
            self.close()
            raise
        self.cipher = chosen(self._ssh.raw_output)
        return self

    def printed(self) -> str:
        """What ssh and the other host printed on stderr."""
        return self._ssh.printed(deadlines.LAST_WORDS)

    def ended(self) -> bool:
        """ssh has ended, and the connection with it."""
        return self._ssh.status(0.0) is not None

    def cut(self) -> None:
        """From any thread: end ssh, so that each wait for the lane fails."""
        self._ssh.terminate()

    def detach(self) -> Ssh:
        """Its connection, which is the caller's from now on."""
        return self._ssh

    def close(self) -> None:
        self._ssh.close(deadlines.ENDING)

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is not None:
            self.cut()  # else all that is under way would be waited for
        self.close()
