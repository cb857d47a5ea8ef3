# SPDX-License-Identifier: Apache-2.0
"""The other host's end of a remote copy: what runs there as `pyploop copy-agent` and
`pyploop copy-lane`.

Belongs here: how requests become calls of the API, how lanes find their agent, and what an
agent may be asked for.  The end that asks is in api/remote.py.
"""
