"""What every room needs of the machine: command lines, Ctrl-C, atomic files, memory, progress, error texts.

Others use `command_line.CommandLine`, `files.write_atomic`, `progress.Progress` and `error_text.one_line`.
Imports no other room.
"""
