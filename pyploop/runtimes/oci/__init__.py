# SPDX-License-Identifier: Apache-2.0
"""OCI bundles and CRIU images of another host, taken over only as far as this host's
policy allows.

It may import the runtimes' protocol, `config` and `policy`.
"""
