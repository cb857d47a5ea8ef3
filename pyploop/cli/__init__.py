# SPDX-License-Identifier: Apache-2.0
"""Arguments and exit codes; what they ask for is done elsewhere."""
