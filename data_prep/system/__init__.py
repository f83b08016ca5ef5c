"""What every room needs of the machine: atomic files, progress, Ctrl-C, powers of two.

Others use `files.write_atomic`, `files.one_line` and `progress.Progress`. Imports no other room.
"""
