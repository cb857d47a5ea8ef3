# SPDX-License-Identifier: Apache-2.0
"""Wire dialects: bytes to frames and back, no I/O."""
