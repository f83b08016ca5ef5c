"""Gives every room what it needs of the machine: command lines, Ctrl-C, atomic files, progress, powers of two.

Others use `command_line.CommandLine`, `files.write_atomic`, `files.one_line` and `progress.Progress`. Imports no other
room.
"""
