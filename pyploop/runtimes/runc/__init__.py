# SPDX-License-Identifier: Apache-2.0
"""runc containers, moved live by CRIU.

`runtime` has the steps of a migration; the other modules say what such a container
is made of, and what of it cannot move.
"""
