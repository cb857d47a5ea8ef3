# SPDX-License-Identifier: Apache-2.0
"""The connection of a remote copy to the agent on the other host, and its failures."""

from __future__ import annotations

from typing import Any

from pyploop import __version__, errors
from pyploop.errors import CancelledError, ConnectError, ParameterError, PyploopError
from pyploop.transport import hints
from pyploop.transport.client import Client
from pyploop.wire import copy_messages

_FAILURES = {
    int(kind.exit_code): kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, PyploopError)
    and kind not in (PyploopError, errors.MigrateError, errors.NotSupportedError)
}


class LostThereError(ConnectError):
    """The copy there has failed, since it had no connection for too long; or its pyploop has
    ended."""


_FAILURES[int(ConnectError.exit_code)] = LostThereError


class CopyClient(Client):
    """The connection to the agent.  ConnectError (69): there is none, or it was lost."""

    what = "the copy"
    nothing = "nothing was copied"
    """What state things are in, after a failure before the first byte."""
    not_in_log = ("progress",)
    install_ssh = "install it (the Debian package openssh-client)"

    def not_a_host(self, text: str) -> ParameterError:
        return ParameterError(text)

    def unreachable(self, text: str, hint: str | None = None) -> ConnectError:
        return ConnectError(f"{text}; {self.nothing}", hint=hint)

    def no_agent(self, why: str, printed: str, status: int | None) -> ConnectError:
        host, shown = self.host, f" ({printed})" if printed else ""
        install = (
            f"install pyploop {__version__} on {host}, so that `ssh {host} pyploop --version` "
            "prints it, or name the program there (--remote-pyploop)"
        )
        if status == 127:
            return self.unreachable(f"there is no pyploop on {host}{shown}", install)
        if "unknown command" in printed:
            return self.unreachable(
                f"the pyploop on {host} is too old for remote copies: it has no copy-agent", install
            )
        if status == 255:  # ssh's own
            return self.unreachable(
                f"cannot connect to {host}: {printed or why}",
                f"`ssh -o BatchMode=yes {host} true` must work: pyploop lets ssh ask nothing",
            )
        return self.unreachable(f"no pyploop copy-agent on {host}: {why}{shown}", install)

    def lost(self, error: PyploopError, op: str, why: str) -> PyploopError:
        if isinstance(error, CancelledError):
            return error
        return ConnectError(f"the connection to {self.host} was lost: {why}")

    def failed_there(self, error: Any) -> PyploopError:
        code, text, peer_failed = copy_messages.failure(error)
        text, hint = hints.parted(text)
        kind = _FAILURES.get(code, errors.ProtocolError)
        # Marked as the other host's words, both of them.
        failure = kind(f"{self.host}: {text}", hint=hint and f"{self.host}: {hint}")
        failure.peer_failed = peer_failed
        return failure

    def checked(self, op: str, value: Any) -> dict[str, Any]:
        return copy_messages.answer(op, value)
