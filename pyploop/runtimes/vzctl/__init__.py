# SPDX-License-Identifier: Apache-2.0
"""OpenVZ containers, by vzctl's documented contract."""
