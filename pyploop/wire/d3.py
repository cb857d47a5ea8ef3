# SPDX-License-Identifier: Apache-2.0
"""D3's handshake: which features of the packets hold; no I/O (docs/internals/protocol.md).

sender                              receiver
SYNC with position = offer()  ->    (reply, agreed) = answer(position)
agreed(offer, reply)          <-    reply
"""

from __future__ import annotations

MD5 = 1 << 0
"""Every later packet carries the MD5 of its data."""
COPY_DEVICE = 1 << 1
"""The device is copied, by packets that pyploop neither sends nor takes."""
PYPLOOP = 1 << 30
"""The receiver's file is new, so zeroes need not be sent.  Ignored by C tools."""
SUPPORTED = MD5 | PYPLOOP


def offer() -> int:
    """The features that our sender offers."""
    return SUPPORTED


def answer(offered: int) -> tuple[int, int]:
    """(the receiver's reply, the features that hold from now on)."""
    features = offered & SUPPORTED
    return -features, features


def agreed(offered: int, reply: int) -> int:
    """The features that hold, from the receiver's reply; 0: an old peer.
    ValueError when it is a failure.

    OpenVZ 9.0.30 answers -1 (MD5) whatever it supports; it applies what was
    offered, so with MD5 offered that is true."""
    if reply > 0:
        raise ValueError(f"the handshake was answered with {reply}")
    return -reply & offered
