# SPDX-License-Identifier: Apache-2.0
"""D3's handshake: the features that both ends use; no I/O (docs/internals/protocol.md).

sender                              receiver
SYNC with position = offer()  ->    (reply, agreed) = answer(position)
agreed(offer, reply)          <-    reply
"""

from __future__ import annotations

MD5 = 1 << 0
"""Every later packet carries the MD5 of its data."""
COPY_DEVICE = 1 << 1
"""Copies a device, with packets that pyploop neither sends nor accepts."""
PYPLOOP = 1 << 30
"""The receiver's file is new, so zeroes need not be sent.  Ignored by C tools."""
SUPPORTED = MD5 | PYPLOOP


def offer() -> int:
    """The features that our sender offers."""
    return SUPPORTED


def answer(offered: int) -> tuple[int, int]:
    """(the receiver's reply, the features that both ends use from now on)."""
    features = offered & SUPPORTED
    return -features, features


def agreed(offered: int, reply: int) -> int:
    """The features that both ends use, from the receiver's reply; 0: an old peer.
    ValueError when the reply is a failure.

    OpenVZ 9.0.30 always answers -1 (MD5), but uses what was offered.  So the answer is right
    when MD5 was offered."""
    if reply > 0:
        raise ValueError(f"the handshake was answered with {reply}")
    return -reply & offered
