# SPDX-License-Identifier: Apache-2.0
"""Podman's containers, moved without a line of configuration.

Podman runs its containers by runc, so suspend, dump and restore are those of runtimes.runc.
This package adds what Podman knows and what Podman has to do: what the container consists of
(`found`, `exported`), and the restore by Podman itself (`restored`, `interpose`), so that its
database, its monitor and its logs are right afterwards.
docs/internals/podman.md says how, and why so.
"""
