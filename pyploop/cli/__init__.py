# SPDX-License-Identifier: Apache-2.0
"""The command line: arguments, rendering, and exit codes; nothing else.

A command parses its options, has the API do the work, and shows what became of it.  Only
here may the process be changed: signal handlers, `sys`, standard streams, `os._exit`.  It
may import every room.  A new command is a module with `parser()` and `run(args, level)`,
which returns the exit code, and a name in `main.COMMANDS` and `main.USAGE`.
"""
