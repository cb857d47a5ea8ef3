# SPDX-License-Identifier: Apache-2.0
"""OCI bundles and CRIU images from another host, accepted only as far as this host's policy
allows.

- `bundles` reads and writes config.json.  `json_shapes` and `spec` say which keys are
  accepted, `config_json` fits their values to the policy, `destinations` checks where the
  mounts really lie.
- `criu_images` checks a dump: its files (`image_files`), processes (`image_processes`),
  mounts (`image_mounts`) and cgroups (`image_cgroups`).

A new key of config.json gets a shape in `spec`, and a check in `config_json` when it
reaches for something of the host.  May import the runtimes' protocol and what is below.
"""
