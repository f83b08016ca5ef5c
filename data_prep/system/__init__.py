"""What every room needs of the machine: atomic files, memory, progress, Ctrl-C, error texts.

Others use `files.write_atomic`, `progress.Progress` and `error_text.one_line`. Imports no other room.
"""
